"""One rank and two train alike, in each of the ways that the classes offer."""

import json
import shutil

import pytest
from safetensors import safe_open

from tests.api import cases
from tests.checkpoint.ranks import run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folders = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (1, 2)}
    found = {r: run(cases.on_ranks, r, str(folder), timeout=500) for r, folder in folders.items()}
    return found, folders


@pytest.mark.slow
@pytest.mark.parametrize("way", cases.WAYS)
def test_two_ranks_have_the_losses_of_one(runs, way):
    found, _ = runs
    one, (first, second) = found[1][0][way], (r[way] for r in found[2])
    assert first["losses"] and not second["losses"], "only the first rank writes"
    tolerance = 2e-2 if "bf16" in way else 1e-4 if way in ("ddp-8bit", "fsdp-bnb") else 1e-5
    assert first["losses"] == pytest.approx(one["losses"], rel=tolerance)
    whole = 16 * 16
    assert first["held"] == (whole // 2 if way.startswith("fsdp") else whole)


@pytest.mark.slow
def test_blocks_of_every_list_are_units(runs):
    found, _ = runs
    units = found[2][0]["fsdp"]["units"]
    assert units == ["", "first.0", "first.1", "first.2", "second.0", "second.1"]


@pytest.mark.slow
def test_what_two_ranks_exported_is_whole_and_what_they_saved_goes_on_with_one(runs, tmp_path):
    found, folders = runs
    run_of_two = folders[2] / "fsdp"
    with safe_open(run_of_two / "export" / "model.safetensors", "pt") as file:
        assert file.get_slice("first.0.linear.weight").get_shape() == [16, 16]
    lines = [json.loads(line) for line in (run_of_two / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    copies = [shutil.copytree(folders[n] / "fsdp", tmp_path / str(n)) for n in (1, 2)]
    (continued,) = run(cases.resumed, 1, *map(str, copies), timeout=300)
    assert len(continued[0]) == 6
    assert continued[1] == pytest.approx(continued[0], rel=1e-5)
    assert continued[0][-1] < found[1][0]["fsdp"]["losses"][-1]
