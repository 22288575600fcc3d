"""Local training of many clients on one accelerator."""
