"""Metrics that not all ranks have."""

from __future__ import annotations

import torch

from ditty_di.runtime import Runtime
from ditty_di.training.gradients import MetricAccumulator
from tests.checkpoint import ranks


def of_a_rank():
    runtime = Runtime()
    metrics = MetricAccumulator(runtime)
    half, rare = torch.tensor(0.5), torch.tensor(7.0)
    metrics.add({"a": half} if runtime.rank == 0 else {"rare": rare, "a": half})
    found = metrics.metrics()
    metrics.clear()
    empty = metrics.metrics()
    runtime.close()
    return found, empty


def test_numbers_keep_their_names_when_ranks_report_different_ones():
    for found, empty in ranks.run(of_a_rank, 2):
        assert found == {"a": 1.0, "rare": 7.0}
        assert empty == {}
