"""Functions for the trainer's `parallelize_fn` slot: data parallelism, recomputation, compile."""
