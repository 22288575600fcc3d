"""A served run: enrolment, leases, uploads, commits, and who leads."""
