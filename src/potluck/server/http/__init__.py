"""Everything between a socket and the server's work: limits, checks and handlers."""
