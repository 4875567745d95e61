"""Constructors of models, and functions that fill them with values (`protocols.WeightsFn`)."""
