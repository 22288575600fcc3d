"""Rows and columns: what a file holds, and how it becomes numbers.

Data that cannot be used raise a `DataError` that names file or client, column and row.
"""
