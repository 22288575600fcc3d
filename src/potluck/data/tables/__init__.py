"""Rows and columns: what a file holds, and how it becomes numbers."""
