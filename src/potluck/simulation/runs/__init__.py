"""Run directories: what was asked, what came of it, and reports."""
