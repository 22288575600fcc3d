"""Experiment files, the settings of rounds, and the objects that both name."""
