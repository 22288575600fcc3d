"""Local training of many clients of a CPU as one program."""
