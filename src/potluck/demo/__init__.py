"""Demonstrations: gradients against averaging, and a server whose devices are killed."""
