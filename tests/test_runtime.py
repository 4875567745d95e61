from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ditty_di.runtime import Runtime, data_degrees, seed_everything


def test_one_process_needs_no_launcher():
    runtime = Runtime()
    assert (runtime.rank, runtime.world_size, runtime.dp_rank, runtime.dp_world_size) == (
        0,
        1,
        0,
        1,
    )
    assert dist.is_initialized()
    runtime.close()
    assert not dist.is_initialized()


def test_a_process_group_that_exists_is_used_and_left_alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    Runtime().close()
    assert dist.is_initialized()
    dist.destroy_process_group()


@pytest.mark.parametrize("seed", [0, 7, 2**40])
def test_every_seed_counts_also_0_and_large_ones(seed):
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    seed_everything(seed)
    first = draw()
    seed_everything(seed + 1)
    other = draw()
    seed_everything(seed)
    assert draw() == first
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    "replicate, shard, rest, world, expected",
    [(1, -1, 1, 4, (1, 4)), (-1, 1, 1, 4, (4, 1)), (-1, 2, 1, 4, (2, 2)), (1, -1, 2, 4, (1, 2))],
)
def test_what_is_left_of_the_world_goes_to_the_open_degree(replicate, shard, rest, world, expected):
    assert data_degrees(replicate, shard, rest, world) == expected


@pytest.mark.parametrize(
    "replicate, shard, rest, world, message",
    [
        (2, 2, 1, 2, "needs 4 ranks but there are 2; start that many .launcher.nproc=4"),
        (1, -1, 3, 4, "does not divide 4 ranks"),
        (-1, -1, 1, 4, "only one of dp_replicate and dp_shard can be -1"),
    ],
)
def test_a_layout_that_fits_no_world_is_refused(replicate, shard, rest, world, message):
    with pytest.raises(ValueError, match=message):
        data_degrees(replicate, shard, rest, world)


def test_a_layout_too_large_for_this_process_is_refused():
    with pytest.raises(ValueError, match="start that many"):
        Runtime(dp_shard=2)
    assert not dist.is_initialized()


def test_a_backend_that_this_torch_lacks_is_refused():
    with pytest.raises(ValueError, match=r"runtime.spmd_backend='none' does not work on torch"):
        Runtime(spmd_backend="none")
