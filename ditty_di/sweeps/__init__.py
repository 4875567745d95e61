"""Run many trainings with other values: a grid, a search, a job array."""
