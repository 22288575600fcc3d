"""Data sets, a user's own data, and their division among clients."""

from potluck.data import datasets, own_data, partitions
from potluck.data.federated import Dataset, Examples, FederatedData, divide
from potluck.data.tables.schema import Schema

__all__ = [
    "Dataset",
    "Examples",
    "FederatedData",
    "Schema",
    "datasets",
    "divide",
    "own_data",
    "partitions",
]
