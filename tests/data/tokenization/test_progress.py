"""How far a tokenization is, told from the files of all who work on it."""

from __future__ import annotations

import time

import numpy as np

from ditty_di.data.tokenization.plan import Part, Segment
from ditty_di.data.tokenization.progress import progress

PARTS = tuple(Part(n, (Segment(None, 0, None, 1_000_000),)) for n in range(4))


def said(folder, capsys, after):
    """What is printed where `after` happens to the folder in the meantime."""
    with progress("text", folder, PARTS, np.dtype("<u2"), 4.0, seconds=(0.05, 0.05)):
        time.sleep(0.06)
        after()
        time.sleep(0.3)
    first, *_, last = capsys.readouterr().out.splitlines()
    return first, last


def test_finished_and_begun_parts_of_all_ranks_count(tmp_path, capsys):
    (tmp_path / "receipts").mkdir()
    (tmp_path / "receipts" / "000002.json").touch()

    def work():
        (tmp_path / "receipts" / "000000.json").touch()
        # 100,000 and 25,000 tokens of 2 bytes, each from 4 bytes of text.
        (tmp_path / ".train-000001.bin.0f3a").write_bytes(bytes(200_000))
        (tmp_path / ".validation-000001.bin.77").write_bytes(bytes(50_000))
        (tmp_path / "train-000000.bin").write_bytes(bytes(900_000))

    first, last = said(tmp_path, capsys, work)
    assert first.startswith("text: 25%, 1.0 MB of 4.0 MB, 0.00 MB/s")
    assert "left" not in first
    assert last.startswith("text: 62%, 2.5 MB of 4.0 MB, ") and last.endswith(" s left")


def test_a_part_counts_at_most_once(tmp_path, capsys):
    (tmp_path / "receipts").mkdir()
    leftover = tmp_path / ".train-000003.bin.1"
    _, last = said(tmp_path, capsys, lambda: leftover.write_bytes(bytes(9_000_000)))
    assert last.startswith("text: 25%, ")
