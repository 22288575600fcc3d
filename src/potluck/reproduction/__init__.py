"""The paper, cell by cell: grids of runs, and pages with ours beside its numbers."""

from potluck.reproduction.grid import Grid, Job, jobs, run, select
from potluck.reproduction.paper import Cell, cells

__all__ = ["Cell", "Grid", "Job", "cells", "jobs", "run", "select"]
