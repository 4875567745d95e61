"""Functions for the trainer's `parallelize_fn` slot, and pipeline parallelism."""
