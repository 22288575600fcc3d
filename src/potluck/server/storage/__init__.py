"""What a server keeps: tables, blobs, the audit log, copies of all of them."""
