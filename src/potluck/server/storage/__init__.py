"""The state of a server: tables, blobs, the audit log, copies of all of them."""
