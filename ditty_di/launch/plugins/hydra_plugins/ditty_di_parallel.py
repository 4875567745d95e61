"""Hydra finds plugins in packages named `hydra_plugins`, wherever they are on the path."""

from ditty_di.launch.sweep import ParallelJobs


class Parallel(ParallelJobs):
    """See `ditty_di.launch.sweep.ParallelJobs`."""
