"""Shards in an object store: the same rows as on disk, through a cache that may be small."""

import multiprocessing
import threading
import time
from functools import partial

import fsspec
import numpy as np
import pytest

from ditty_di.data import FileCache, KeyedSampler, Loader, Mixture, PooledSampler, Shards
from ditty_di.data.reading.remote import upload
from ditty_di.data.shards import IndexWriter, Manifest
from ditty_di.data.shards.blends import megatron_blend

SHARDS = 6
SEQ_LEN = 8


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    made = []
    for split, number in {"train": SHARDS, "validation": 1}.items():
        for shard in range(number):
            with IndexWriter.open(folder / f"{split}-{shard:06d}", "<u2") as writer:
                for _ in range(draw.integers(5, 20)):
                    writer.add([*draw.integers(1, 300, draw.integers(1, 30)), 0])
            made.append(writer.shard(split))
    Manifest("k", "t" * 64, 300, 0, 0.05, tuple(made)).write(folder)
    return folder


@pytest.fixture
def remote(local, s3):
    upload(local, f"{s3}/shards", sorted(path.name for path in local.iterdir()))
    return f"{s3}/shards"


def rows_of(dataset, numbers=None):
    for index in numbers if numbers is not None else range(len(dataset)):
        inputs, labels = dataset[index]
        yield [*inputs["input"].tolist(), *labels.tolist(), *inputs["position_ids"].tolist()]


def wait_for_fetches():
    """A thread that fetches ahead would add and remove files while they are counted."""
    for thread in threading.enumerate():
        if thread.name == "fetch ahead":
            thread.join(30)


def largest(local):
    return max(path.stat().st_size for path in local.glob("*.bin"))


def test_rows_are_those_of_the_same_folder_on_disk(local, remote, tmp_path):
    dataset = Shards(remote, SEQ_LEN, cache=FileCache(tmp_path))
    assert not [*tmp_path.iterdir()]  # opening reads the manifest only
    assert [*rows_of(dataset)] == [*rows_of(Shards(local, SEQ_LEN))]
    assert dataset.fingerprint() == Shards(local, SEQ_LEN).fingerprint()
    assert len([*tmp_path.glob("*.bin")]) == len([*tmp_path.glob("*.idx")]) == SHARDS
    validation = Shards(f"{remote}/", SEQ_LEN, "validation", cache=FileCache(tmp_path))
    assert [*rows_of(validation)] == [*rows_of(Shards(local, SEQ_LEN, "validation"))]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_takes_pools_whatever_the_cache_holds(local, remote, tmp_path, workers):
    limit = 2 * largest(local) + 2000
    dataset = Shards(remote, SEQ_LEN, cache=FileCache(tmp_path, limit / 1e9), max_open_files=2)
    assert dataset.sampler.func is PooledSampler
    sampler = partial(PooledSampler, dataset=dataset, pool=2)
    loader = Loader(dataset, 4, epochs=2, num_workers=workers, sampler=sampler)
    seen = [row.tolist() for _, labels in loader for row in labels]
    on_disk = Shards(local, SEQ_LEN)
    order = sampler(len(dataset), 0, True).between(0, 2 * len(dataset))
    assert seen[: len(order)] == [on_disk[row][1].tolist() for row in order]
    wait_for_fetches()
    assert sum(path.stat().st_size for path in tmp_path.glob("*.[bi]*")) <= limit


def _read(url, folder, limit, seed, expected, queue):
    dataset = Shards(url, SEQ_LEN, cache=FileCache(folder, limit / 1e9), max_open_files=2)
    order = PooledSampler(len(dataset), seed, True, dataset=dataset, pool=2).between(0, 80)
    queue.put([*rows_of(dataset, order)] == [expected[row] for row in order])


def test_processes_share_a_cache_that_is_too_small_for_all(local, remote, tmp_path):
    """With s3fs from a fork, and fetches ahead: each gets its rows, none waits for ever."""
    context = multiprocessing.get_context("fork")
    expected, queue = [*rows_of(Shards(local, SEQ_LEN))], context.Queue()
    limit = 3 * largest(local) + 3000
    processes = [
        context.Process(target=_read, args=(remote, tmp_path, limit, seed, expected, queue))
        for seed in range(3)
    ]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60) for _ in processes] == [True] * 3
    for process in processes:
        process.join(30)
        assert process.exitcode == 0


def test_the_shards_of_the_next_pool_are_fetched_ahead(local, remote, tmp_path):
    dataset = Shards(remote, SEQ_LEN, cache=FileCache(tmp_path))
    sampler = PooledSampler(len(dataset), 0, True, dataset=dataset, pool=1)
    assert sampler.between(0, 1)
    deadline = time.monotonic() + 30  # all pools are in the first block of positions
    while len([*tmp_path.glob("*.bin")]) < SHARDS and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len([*tmp_path.glob("*.bin")]) == SHARDS
    wait_for_fetches()


def test_orders_and_caches_that_would_fetch_over_and_over_are_refused(local, remote, tmp_path):
    dataset = Shards(remote, SEQ_LEN, cache=FileCache(tmp_path))
    with pytest.raises(ValueError, match=r"KeyedSampler shuffles all rows at once.*fetched whole"):
        Loader(dataset, 2, sampler=KeyedSampler)
    mixture = Mixture({"a": dataset, "b": Shards(local, SEQ_LEN)})
    with pytest.raises(ValueError, match="shuffles all rows at once"):
        Loader(mixture, 2)
    small = Shards(remote, SEQ_LEN, cache=FileCache(tmp_path, 1e-6))
    with pytest.raises(ValueError, match=r"rows of 6 shards .* limit_gb=1e-06: raise it, or lower"):
        Loader(small, 2)


def test_remote_sources_of_a_mixture_have_their_pools(local, remote, tmp_path):
    dataset = Shards(remote, SEQ_LEN, cache=FileCache(tmp_path))
    sources = {"a": dataset, "b": Shards(local, SEQ_LEN)}
    loader = Loader(Mixture(sources, {"a": 3, "b": 1}), 4, epochs=1)
    order = loader.sampler.between(0, len(dataset))
    own = PooledSampler(len(dataset), 0, True, dataset=dataset, purpose="a").between(0, 99)
    assert [row for row in order if row < len(dataset)][:50] == own[:50]
    assert len([*loader]) == len(loader)


def test_damaged_and_missing_shards_are_named(local, remote, tmp_path):
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    content = bytearray(fs.cat_file(f"{remote}/train-000002.bin"))
    content[10] ^= 1
    fs.pipe_file(f"{remote}/train-000002.bin", bytes(content))
    fs.rm_file(f"{remote}/train-000001.bin")
    dataset = Shards(remote, SEQ_LEN, cache=FileCache(tmp_path))
    first = [int(row) for row in np.cumsum(dataset.shard_rows)]
    with pytest.raises(FileNotFoundError, match=r"train-000001.bin: there is no such file"):
        dataset[first[0]]
    with pytest.raises(ValueError, match=r"s3://.*train-000002.bin: SHA-256 \w+, expected \w+"):
        dataset[first[1]]
    assert not [*tmp_path.glob("*2.bin")]
    fs.rm_file(f"{remote}/manifest.json")
    with pytest.raises(FileNotFoundError, match=r"s3://.*manifest.json .* shards need one"):
        Shards(remote, SEQ_LEN)


def test_a_blend_of_urls_is_refused():
    with pytest.raises(ValueError, match="s3://b/x: a blend is of files on this machine"):
        megatron_blend("s3://b/x", 8)
