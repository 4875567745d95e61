"""Hydra finds plugins in packages named `hydra_plugins`, wherever they are on the path."""

from ditty_di.sweeps.job_array import JobArray


class SlurmJobArray(JobArray):
    """See `ditty_di.sweeps.job_array.JobArray`."""
