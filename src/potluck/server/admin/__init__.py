"""The operator's interface to a running server, and its client."""
