"""Text and examples that are read in sequence, where no row has a number."""
