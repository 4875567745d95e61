"""Hydra finds plugins in packages named `hydra_plugins`, wherever they are on the path."""

from ditty_di.sweeps.parallel import ParallelJobs


class Parallel(ParallelJobs):
    """See `ditty_di.sweeps.parallel.ParallelJobs`."""
