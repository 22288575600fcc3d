"""A served run: enrolment, leases, uploads, commits, and the election of a leader."""
