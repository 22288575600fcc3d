"""Ways to train a cohort: all give the numbers of the plain loop."""
