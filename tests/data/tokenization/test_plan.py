"""Parts depend on the files alone; sources find files under names that survive a move."""

from __future__ import annotations

import shutil

import pyarrow
import pytest
from pyarrow import parquet

from ditty_di.data.tokenization.documents import Reading
from ditty_di.data.tokenization.plan import key_of, part_size, plan, settings_of
from ditty_di.data.tokenization.ranks import rank_and_world, wait_for_others
from ditty_di.data.tokenization.sources import File, TextFiles


@pytest.fixture
def folder(tmp_path):
    for name in ("b/one.txt", "a/one.txt", "two.jsonl", "notes.md", ".hidden/x.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(f'{{"text": "{name}"}}\n')
    return tmp_path / "in"


def names(*args, **options):
    return [file.name for file in TextFiles(*args, **options).files()]


def test_files_are_found_by_folder_pattern_and_list(folder):
    assert names(folder) == ["a/one.txt", "b/one.txt", "two.jsonl"]
    assert names(folder, patterns=["**/*.md"]) == ["notes.md"]
    assert names(f"{folder}/*/one.txt") == ["a/one.txt", "b/one.txt"]
    assert names([f"{folder}/two.jsonl", f"{folder}/a"]) == ["one.txt", "two.jsonl"]
    with pytest.raises(FileNotFoundError, match=r"no text at path=.*nowhere"):
        names(folder / "nowhere")


def test_a_sample_is_the_first_files_up_to_a_size(folder):
    assert names(folder, sample=45 / 2**20) == ["a/one.txt", "b/one.txt"]
    assert names(folder, sample="0.001KB") == ["a/one.txt"], "at least one"
    assert len(names(folder, sample="2GB")) == 3
    with pytest.raises(ValueError, match="sample='much'"):
        TextFiles(folder, sample="much")


def test_a_moved_folder_is_the_same_input_and_a_changed_file_is_not(folder, tmp_path):
    def key(where):
        return key_of(settings_of(TextFiles(where).files(), Reading(), 99, tokenizer="t"))

    before = key(folder)
    shutil.copytree(folder, tmp_path / "moved")
    assert key(tmp_path / "moved") == before
    (folder / "a" / "one.txt").write_text("longer than before, surely")
    assert key(folder) != before


def test_a_table_without_row_groups_has_no_parts(tmp_path):
    table = pyarrow.table({"number": [1, 2], "text": ["one", "two"]})
    parquet.write_table(table, tmp_path / "full.parquet")
    with parquet.ParquetWriter(tmp_path / "none.parquet", table.schema):
        pass
    (part,) = plan(TextFiles(tmp_path).files(), Reading(), 1 << 20)
    assert [segment.path.name for segment in part.segments] == ["full.parquet"]


def test_a_part_is_a_64th_of_the_text_within_bounds(tmp_path):
    def size(name, megabytes):
        with (tmp_path / name).open("wb") as stream:
            stream.truncate(megabytes << 20)  # sparse
        return part_size([File(name, tmp_path / name)]) / 2**20

    assert [size("a.txt", n) for n in (1, 256, 640, 1 << 15)] == [4, 4, 10, 256]
    assert size("a.txt.gz", 640) == 40, "text in it takes more than the file"


def test_small_files_share_a_part_and_large_ones_are_cut(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("x" * 10)
    (tmp_path / "large.jsonl").write_text('{"text": "a"}\n' * 10)
    files = TextFiles(tmp_path).files()
    parts = plan(files, Reading(), 30)
    assert [part.number for part in parts] == [*range(len(parts))]
    assert max(part.size for part in parts) <= 30
    assert [len(part.segments) for part in parts] == [3, 3, 3, 1, 1, 1, 1, 1, 1]
    assert plan(files, Reading(), 30) == parts


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, (0, 1, 1)),
        ({"RANK": "2", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, (2, 8, 4)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"}, (1, 3, 1)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, (1, 2, 1)),
        # A batch script sees these, but is one process.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1, 1)),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8"}, (5, 8, 1)),
        (
            {
                **{"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8"},
                **{"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "3(x2)"},
            },
            (5, 6, 3),
        ),
    ],
)
def test_the_rank_is_that_of_the_launcher(environment, found):
    assert rank_and_world(environment) == found


def test_a_rank_waits_for_others_only_while_they_write(tmp_path):
    looks = iter([[1, 2], [1, 2], [2], [2]])

    def missing():
        left = next(looks, [])
        (tmp_path / f"written-{len(left)}-{id(left)}").touch()
        return left

    assert wait_for_others(missing, tmp_path, patience=5, interval=0.01) == []
    assert wait_for_others(lambda: [7], tmp_path, patience=0.05, interval=0.01) == [7]
