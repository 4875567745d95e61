import pytest

from ditty_di.data import Loader, megatron_blend
from ditty_di.data.shards.find import shard_file
from tests.data.shards.test_shards import write


def documents(first, number):
    return [[first + i, 0] for i in range(number)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("blends")
    write(made / "a", documents(100, 10))
    write(made / "b", documents(200, 20))
    return made


def firsts(mixture):
    """The first token of each document, by source."""
    found = {}
    for name, shards in mixture.sources.items():
        found[name] = [shards[i][0]["input"].tolist()[0] for i in range(len(shards))]
    return found


def test_one_path_is_cut_by_its_documents(folder):
    for split, expected in {"train": range(8), "validation": [8], "test": [9]}.items():
        blend = megatron_blend(f"{folder}/a", 2, split, ranges="8,1,1")
        assert firsts(blend) == {"a": [100 + i for i in expected]} and blend.sampler is None
    with pytest.raises(ValueError, match="ranges='1,0,1' leave no validation documents"):
        megatron_blend(f"{folder}/a", 2, "validation", ranges="1,0,1")
    with pytest.raises(ValueError, match="hardly any tokens"):
        megatron_blend(f"{folder}/a", 2, "test")  # 969,30,1 of 10 documents


def test_several_paths_and_weighted_ones(folder):
    paths = [f"{folder}/a", f"{folder}/b"]
    blend = megatron_blend(paths, 2, ranges="1")
    assert blend.sampler is None and len(blend) == 30
    blend = megatron_blend(["0.25", paths[0], "0.75", paths[1]], 2, ranges="1,1")
    assert firsts(blend) == {"a": [*range(100, 105)], "b": [*range(200, 210)]}
    inputs, _ = next(iter(Loader(blend, 8)))
    assert inputs["source"].tolist().count(1) == 6
    assert [*megatron_blend([1, paths[0], 1, paths[0]], 2).sources] == ["a", "a'"]


def test_a_blend_for_each_split(folder):
    blend = {"train": [0.5, f"{folder}/a", 0.5, f"{folder}/b"], "valid": f"{folder}/a"}
    assert len(megatron_blend(blend, 2)) == 30
    assert len(megatron_blend(blend, 2, "validation")) == 10
    with pytest.raises(ValueError, match="the blend has no split 'test'"):
        megatron_blend(blend, 2, "test")


def test_weighted_split_groups(folder):
    group = [
        {"path": f"{folder}/a", "split": "0:0.5", "weight": 3},
        {"path": f"{folder}/b", "split": "0.9:1", "weight": 1},
    ]
    blend = megatron_blend([{"Train": group}], 2)
    assert firsts(blend) == {"a": [*range(100, 105)], "b": [218, 219]}
    assert blend.stages == {0: {"a": 3, "b": 1}}
    with pytest.raises(ValueError, match="2 groups"):
        megatron_blend([{"one": group}, {"two": group}], 2)


def test_what_is_no_blend(folder):
    for blend in ([], 3):
        with pytest.raises(ValueError, match="not a blend"):
            megatron_blend(blend, 2)
    with pytest.raises(FileNotFoundError, match="c"):
        megatron_blend(f"{folder}/c", 2)
    with pytest.raises(ValueError, match="split='dev' must be one of"):
        megatron_blend(f"{folder}/a", 2, "dev")


def test_documents_of_a_part_are_those_of_megatron_core(folder):
    # Not a dependency: `pip install --no-deps megatron-core`. It passed with 0.16.1.
    config = pytest.importorskip("megatron.core.datasets.blended_megatron_dataset_config")
    vector = config.parse_and_normalize_split("969,30,1")
    matrix = config.convert_split_vector_to_split_matrix(vector)
    for number in (7, 33, 1000):
        write(folder / "many", documents(1, number))
        for part in matrix:
            first, last = (round(fraction * float(number)) for fraction in part)
            found = shard_file(folder / "many", between=part)
            assert (found.start, found.tokens) == (2 * first, 2 * (last - first))
