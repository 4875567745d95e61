"""Measurements of two ranks: the slow one and its part, statistics by block, traces, spikes."""

from __future__ import annotations

import math

import pytest

from tests.distributed.launch import launch
from tests.distributed.measuring import SLOW, statistics


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("measured")


@pytest.fixture(scope="module")
def seen(folder):
    return launch("measured", 2, folder, timeout=240)


@pytest.mark.parametrize(("part", "rank"), [("data", 1), ("forward", 0)])
def test_the_slow_rank_and_the_slow_part_of_its_step_are_named(seen, part, rank):
    first, second = seen[part]
    assert not second["said"] and not second["rows"], "rank 0 speaks for all"
    measured = [row for row in first["rows"] if "stragglers/rank" in row]
    assert [row["step"] for row in measured] == [2, 4, 6]
    for row in measured:
        assert row["stragglers/rank"] == rank
        assert row[f"stragglers/{part}_seconds"] == pytest.approx(SLOW, rel=0.5)
        assert row["stragglers/waiting_seconds"] == pytest.approx(SLOW, rel=0.5)
        others = {"data", "forward", "optimizer"} - {part}
        assert all(abs(row[f"stragglers/{name}_seconds"]) < SLOW / 2 for name in others)
        assert row["stragglers/factor"] > 1.5
    (said,) = first["said"]
    assert said.startswith(f"step 4: rank {rank} is slow in {part}: the step takes ")


def test_a_spike_on_one_rank_skips_the_step_of_both_whoever_decides(seen):
    by_device, by_host = seen["spikes"]
    assert by_device[0] == by_device[1] and by_host[0] == by_host[1]
    assert by_device[0][:2] == by_host[0][:2] == [1, 0]
    assert by_device[0][2] == pytest.approx(by_host[0][2], rel=1e-6)
    assert all(map(math.isfinite, by_device[0][2]))


def test_statistics_by_block_do_not_depend_on_the_layout(seen, runtime):
    (alone,) = statistics(runtime=runtime)
    names = {name.rpartition("/")[0] for name in alone if name.startswith("blocks/")}
    assert names == {
        f"blocks/model.{name}" for name in ("embed_tokens", "layers.0", "layers.1", "norm")
    }
    kinds = {name.rpartition("/")[2] for name in alone if "layers.0/" in name}
    activations = {f"activation_{kind}" for kind in ("mean_abs", "std", "max", "zeros")}
    assert kinds == {"grad_norm", "update_ratio"} | activations
    norms = [value for name, value in alone.items() if name.endswith("grad_norm")]
    total = math.sqrt(math.fsum(v**2 for k, v in alone.items() if k.endswith("/grad_norm")))
    assert len(norms) == 4 and 0 < total <= 1.0001, "they add up to the clipped norm"
    for layout, rows in seen["blocks"].items():
        (row,) = rows
        assert row.keys() == alone.keys(), layout
        assert row == pytest.approx(alone, rel=2e-4, abs=1e-7), layout


def test_a_trace_of_two_ranks_has_a_page_with_their_communication(seen, folder):
    traces = folder / "profiling" / "traces" / "iteration_5"
    for rank in (0, 1):
        page = (traces / f"rank{rank}_trace.txt").read_text()
        ms = {line[:24].strip(): float(line[24:].split()[0]) for line in page.splitlines()[2:7]}
        assert 0 < ms["of it exposed"] <= ms["communication"] < ms["window"]
        assert 0 < ms["computing"] < ms["window"]
        assert ms["computing"] + ms["idle"] == pytest.approx(ms["window"], abs=0.01)
        assert "aten::mm" in page and "gloo:" in page
