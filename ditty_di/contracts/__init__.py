"""Contracts: the rank and dtype of every tensor that a pipeline stage takes and returns."""
