"""A tokenization: the same bytes whoever does it, restarts, and what goes wrong."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from ditty_di.data.reading.splits import content_hash
from ditty_di.data.shards import Manifest, MegatronIndex
from ditty_di.data.tokenization import DocumentError, Pool, TextFiles
from ditty_di.data.tokenization.documents import Reading
from ditty_di.data.tokenization.finish import UnfinishedError
from ditty_di.data.tokenization.part import Job, run_part
from ditty_di.data.tokenization.plan import plan
from ditty_di.data.tokenization.words import separator_of
from ditty_di.data.tokens import tokenizer_fingerprint
from ditty_di.models.auto import tokenizer as auto_tokenizer
from ditty_di.tasks.tokenize import tokenize
from tests.data.tokenization.conftest import content, without_ranks
from tests.toy import REPOSITORY

#: Of a corpus of 100 kB: about ten parts.
SMALL = {"part_mb": 0.01, "report_mb": 0, "patience": 0}
ALONE = Pool(workers=1, rank=0, world=1)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(corpus, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "shards"
    tokenize(tokenizer, str(folder), TextFiles(corpus), engine=ALONE, **SMALL)
    return folder


def start(corpus, folder, saved, workers=1, slow=0.0, largest_file=-1, **environment):
    arguments = [str(a) for a in (corpus, folder, saved, workers, slow, largest_file)]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.data.tokenization.rank", *arguments],
        env=without_ranks(PYTHONPATH=str(REPOSITORY), **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def receipts(folder) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (folder / "receipts").glob("*.json")}


def documents(folder, split):
    """The ids of each document of a split, in the order of the input."""
    for shard in Manifest.read(folder).of_split(split):
        index = MegatronIndex(folder / f"{shard.name}.idx")
        ids = np.fromfile(folder / f"{shard.name}.bin", index.dtype)
        starts = [*index.document_starts(0, len(ids)), len(ids)]
        yield from (ids[a:b].tolist() for a, b in pairwise(starts))


def variant(tokenizer, *, normalizer=None, pre_tokenizer=None, eos=None, also=()):
    """A copy of a tokenizer with other parts, whose EOS is `<|endoftext|>`."""
    made = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizer or made.pre_tokenizer
    if eos:
        state = json.loads(made.to_str())
        state["added_tokens"][0] |= eos
        made = Tokenizer.from_str(json.dumps(state))
    made.add_special_tokens([AddedToken(token, **how) for token, how in also])
    return made


#: Whether documents are encoded as one text.
VARIANTS = {
    "plain": ({}, True),
    "prefix space": ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, True),
    "first": ({"pre_tokenizer": pre_tokenizers.Metaspace("b", "first")}, False),
    "prepend": ({"normalizer": normalizers.Prepend("b")}, True),
    "stripped": ({"eos": {"rstrip": True}}, False),
    "normalized": ({"eos": {"normalized": True}, "normalizer": normalizers.Lowercase()}, False),
    "overlapping": ({"also": [("x<|", {})]}, False),
    "longer": ({"also": [("<|endoftext|>x", {})]}, False),
    "single word": ({"also": [("xx", {"single_word": True})]}, False),
    "other": ({"also": [("<|start|>", {"lstrip": True, "rstrip": True})]}, True),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_documents_have_the_ids_that_each_has_alone(name, tokenizer, tmp_path):
    changes, as_one = VARIANTS[name]
    changed = variant(tokenizer, **changes)
    changed.save(str(tmp_path / "tokenizer.json"))
    eos = changed.token_to_id("<|endoftext|>")
    job = Job(tmp_path, tmp_path / "tokenizer.json", "key", eos, 300, Reading())
    parts = ["a", "dog ", " ", "\n", "x", "xx", "x<|", "<|start|>", "<|endof", "text|>", "é"]
    drawn = random.Random(0)
    texts = ["".join(drawn.choices(parts, k=drawn.randrange(9))) + "a" for _ in range(400)]
    texts = [text for text in texts if "<|endoftext|>" not in text][:300]
    texts.append("a<|endoftext|>b")
    (tmp_path / "receipts").mkdir()
    for numbers in (range(300), range(299, 301)):  # without EOS in a text, and with it
        file = tmp_path / f"{numbers.start}.jsonl"
        file.write_text("".join(json.dumps({"text": texts[n]}) + "\n" for n in numbers))
        (part,) = plan(TextFiles(file).files(), job.reading, 1 << 30)
        part = replace(part, number=numbers.start)
        receipt = run_part(job, part)
        wanted: dict[str, list[int]] = {"train": [], "validation": []}
        for text in (texts[n] for n in numbers):
            split = "validation" if content_hash(text) < int(0.01 * 2**64) else "train"
            wanted[split] += [*changed.encode(text, add_special_tokens=False).ids, eos]
        for split, ids in wanted.items():
            found = tmp_path / f"{split}-{numbers.start:06d}.bin"
            assert (np.fromfile(found, "<u2").tolist() if found.exists() else []) == ids, split
        assert (receipt.documents, receipt.tokens) == (len(numbers), sum(map(len, wanted.values())))
        assert receipt.bytes == sum(len(texts[n].encode()) for n in numbers)
    assert bool(separator_of(changed, eos)) == as_one


def test_the_shards_are_the_documents_with_eos_in_their_order(whole, texts, tokenizer):
    manifest = Manifest.read(whole)
    assert len(receipts(whole)) > 5
    assert manifest.tokenizer == tokenizer_fingerprint(tokenizer)
    limit = int(manifest.validation * 2**64)
    for split, held_out in (("train", False), ("validation", True)):
        kept = [text for text in texts if (content_hash(text) < limit) == held_out]
        wanted = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(kept)["input_ids"]]
        assert [*documents(whole, split)] == wanted
    assert manifest.check(whole) == []


@pytest.mark.slow
def test_the_bytes_are_the_same_for_any_number_of_workers_and_ranks(whole, corpus, saved, tmp_path):
    wanted = content(whole)
    for workers in (2, 3):
        process = start(corpus, tmp_path / str(workers), saved, workers)
        assert process.wait() == 0, process.stdout.read()
        assert content(tmp_path / str(workers)) == wanted
    for rank, world in (("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")):
        started = [
            start(corpus, tmp_path / rank, saved, **{rank: str(r), world: "3"}) for r in range(3)
        ]
        said = [process.communicate()[0] for process in started]
        assert [process.returncode for process in started] == [0, 0, 0], said
        assert content(tmp_path / rank) == wanted


def test_a_killed_tokenization_goes_on_and_gives_the_same_bytes(whole, corpus, saved, tmp_path):
    """SIGKILL of the command alone, three times: its workers die with it."""
    folder, before = tmp_path / "shards", {}
    for kill in range(3):
        process = start(corpus, folder, saved, workers=2, slow=0.3)
        deadline = time.monotonic() + 300
        while len(receipts(folder)) < 2 * kill + 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()  # until the workers, who share its output, are gone
        found = receipts(folder)
        assert before.items() <= found.items(), "finished parts were done again"
        assert not (folder / "manifest.json").exists()
        before = found
    process = start(corpus, folder, saved)
    assert process.wait() == 0, process.stdout.read()
    assert before.items() <= receipts(folder).items()
    assert content(folder) == content(whole)
    assert not [*folder.glob(".*-0*")], "leftovers of killed workers"


def test_a_lost_rank_is_told_and_its_parts_are_done_by_a_later_call(
    whole, corpus, tokenizer, tmp_path, capsys
):
    def ranks(rank, world):
        engine = Pool(workers=1, rank=rank, world=world)
        tokenize(tokenizer, str(tmp_path), TextFiles(corpus), engine=engine, **SMALL)

    with pytest.raises(UnfinishedError, match=r"\d+ of \d+ parts are with others.*\(parts 1, 3"):
        ranks(0, 2)
    assert "are with others: waiting" in capsys.readouterr().out
    assert not (tmp_path / "manifest.json").exists()
    mine = receipts(tmp_path)
    ranks(0, 1)
    assert mine.items() <= receipts(tmp_path).items()
    assert content(tmp_path) == content(whole)


@pytest.mark.parametrize("limit", [1500, 9000])
def test_a_full_disk_ends_it_with_whole_parts_only(whole, corpus, saved, tmp_path, limit):
    """A limit of file sizes fails writes as a full disk does, at the manifest or within a shard."""
    folder = tmp_path / "shards"
    begun_as(whole, folder)
    process = start(corpus, folder, saved, largest_file=limit)
    said = process.communicate()[0]
    assert process.returncode == 1 and "File too large" in said, said
    assert not (folder / "manifest.json").exists()
    assert (limit > 5000) == bool(receipts(folder))
    for name in receipts(folder):
        for shard in json.loads((folder / "receipts" / name).read_text())["shards"]:
            assert (folder / f"{shard['name']}.bin").stat().st_size == 2 * shard["tokens"]
    tokenize(
        auto_tokenizer(shards=str(folder)), str(folder), TextFiles(corpus), engine=ALONE, **SMALL
    )
    assert content(folder) == content(whole)


def begun_as(whole: Path, folder: Path) -> None:
    """The beginning of the same tokenization: settings and tokenizer are written already."""
    for path in [whole / "settings.json", *(whole / "tokenizer").iterdir()]:
        target = folder / path.relative_to(whole)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())


def test_too_little_space_is_told_before_the_work(corpus, tokenizer, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"about .* to write for .* and 1\.0 kB of free space"):
        tokenize(tokenizer, str(tmp_path / "s"), TextFiles(corpus), engine=ALONE, **SMALL)
    assert receipts(tmp_path / "s") == {}


def test_bad_lines_end_it_or_are_counted(tokenizer, tmp_path):
    file, folder = tmp_path / "bad.jsonl", tmp_path / "shards"
    lines = [json.dumps({"text": f"document {i}"}).encode() for i in range(60)]
    lines[20:20] = [b'{"text": "no end', b'{"text": "\xff"}', b'{"txt": 1}', b'{"txt": 2}']
    file.write_bytes(b"\n".join(lines))
    at = sum(len(line) + 1 for line in lines[:20])

    def run(**options):
        source = TextFiles(file)
        return tokenize(tokenizer, str(folder), source, engine=ALONE, **SMALL, **options)

    with pytest.raises(DocumentError, match=rf"bad\.jsonl: byte {at + 9}: not JSON"):
        run()
    assert not [*folder.glob("*.bin")]
    result = run(on_error="skip")
    assert result["skipped"] == {"no text": 2, "not JSON": 1, "not UTF-8": 1}
    assert result["documents"] == 60
    assert result["skipped_first"][0].startswith(f"{file}: byte {at + 9}: ")
    kept = [*documents(folder, "train"), *documents(folder, "validation")]
    assert sorted(tokenizer.decode(ids[:-1]) for ids in kept) == sorted(
        f"document {i}" for i in range(60)
    )


def test_a_long_document_is_one_document_with_one_eos(tokenizer, tmp_path):
    text = "the green tree\n" * 40 + "and one dog\n" * 40
    (tmp_path / "book.txt").write_text(text)
    source, folder = TextFiles(tmp_path / "book.txt"), tmp_path / "shards"
    limit = 100 / 2**20
    tokenize(tokenizer, str(folder), source, engine=ALONE, max_document_mb=limit, **SMALL)
    (ids,) = documents(folder, "train")
    assert ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def test_the_good_beginning_of_a_document_that_is_bad_further_on_is_left_out(tokenizer, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"the tree\n" * 50 + b"\xff")
    (tmp_path / "in" / "b.txt").write_text("one dog")
    options = {"engine": ALONE, "max_document_mb": 100 / 2**20, "on_error": "skip", **SMALL}
    result = tokenize(tokenizer, str(tmp_path / "s"), TextFiles(tmp_path / "in"), **options)
    assert result["documents"] == 1 and result["skipped"] == {"not UTF-8": 1}
    assert [tokenizer.decode(ids[:-1]) for ids in documents(tmp_path / "s", "train")] == ["one dog"]


@pytest.mark.parametrize("how", ["tokenizer", "input", "validation_fraction", "part_bytes"])
def test_a_folder_of_other_input_or_settings_is_refused(how, whole, corpus, tokenizer, tmp_path):
    options = dict(SMALL)
    if how == "tokenizer":
        tokenizer = auto_tokenizer(str(whole / "tokenizer"), special_tokens=["<other>"])
    elif how == "input":
        (tmp_path / "corpus.jsonl").write_text('{"text": "short"}\n')
        corpus, how = tmp_path / "corpus.jsonl", "names_and_sizes"
    else:
        options |= {"validation_fraction": 0.5} if how != "part_bytes" else {"part_mb": 1}
    before = content(whole)
    with pytest.raises(ValueError, match=rf"was begun with .*{how}.*give another folder"):
        tokenize(tokenizer, str(whole), TextFiles(corpus), engine=ALONE, **options)
    assert content(whole) == before


def test_a_folder_with_other_files_is_refused(corpus, tokenizer, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="holds other files"):
        tokenize(tokenizer, str(tmp_path), TextFiles(corpus), engine=ALONE, **SMALL)


def test_check_finds_a_damaged_shard(corpus, tokenizer, tmp_path):
    def run(**options):
        tokenize(tokenizer, str(tmp_path), TextFiles(corpus), engine=ALONE, **SMALL, **options)

    run()
    data = bytearray((tmp_path / "train-000003.bin").read_bytes())
    data[10] ^= 1
    (tmp_path / "train-000003.bin").write_bytes(data)
    run()
    with pytest.raises(ValueError, match=r"1 damaged shards:\n.*train-000003\.bin: SHA-256"):
        run(check=True)


def test_special_tokens_in_a_document_are_text_if_told(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two")
    for split, eos in ((False, 2), (True, 1)):
        folder = tmp_path / str(split)
        source = TextFiles(tmp_path / "a.txt")
        options = {"split_special_tokens": split, "engine": ALONE, **SMALL}
        tokenize(tokenizer, str(folder), source, **options)
        (ids,) = documents(folder, "train")
        assert ids.count(tokenizer.eos_token_id) == eos
        assert tokenizer.decode(ids[:-1]) == "one<|endoftext|>two"


def test_sources_have_a_folder_each_and_training_finds_the_tokenizer(corpus, tokenizer, tmp_path):
    (tmp_path / "b.txt").write_text("one dog\n" * 30)
    sources = {"web": TextFiles(corpus), "book": TextFiles(tmp_path / "b.txt")}
    folder = tmp_path / "shards"
    results = tokenize(tokenizer, str(folder), sources=sources, engine=ALONE, **SMALL)
    assert results["book"]["documents"] == 1 and results["web"]["documents"] == 300
    found = auto_tokenizer(shards=str(folder), vocab_size=None, documents=[])
    assert tokenizer_fingerprint(found) == Manifest.read(folder / "book").tokenizer


def test_a_vocabulary_above_65536_has_four_bytes_a_token(corpus, tokenizer, tmp_path):
    large = auto_tokenizer(None, documents=["a b c"] * 3, vocab_size=300)
    large.add_tokens([f"<{i}>" for i in range(66_000)])
    (tmp_path / "a.txt").write_text("one <65999>")
    source = TextFiles(tmp_path / "a.txt")
    tokenize(large, str(tmp_path / "s"), source, engine=ALONE, **SMALL)
    (ids,) = documents(tmp_path / "s", "train")
    assert max(ids) > 65_536 and large.decode(ids[:-1]) == "one <65999>"
