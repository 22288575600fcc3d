"""Layers whose steps are compiled for the processor at hand."""
