"""Copies of remote files: bounded, whole, and shared by processes; whatever is killed meanwhile."""

import errno
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections import OrderedDict
from functools import partial

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from ditty_di.data.reading.file_cache import FileCache
from ditty_di.data.reading.remote import RemoteFile

SIZE = 1000
FORK = multiprocessing.get_context("fork")


class Trouble(MemoryFileSystem):
    """A store of which a test decides what fetching a file does."""

    protocol = "trouble"
    fetch = staticmethod(shutil.copyfileobj)  # (source, target)

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("trouble://").lstrip("/")

    def get_file(self, rpath, lpath, **kwargs):
        with self.open(rpath, "rb") as source, open(lpath, "wb") as target:
            type(self).fetch(source, target)


fsspec.register_implementation("trouble", Trouble, clobber=True)


def content_of(number):
    return random.Random(number).randbytes(SIZE + number)


@pytest.fixture(scope="module")
def files():
    found = []
    for number in range(12):
        fsspec.filesystem("trouble").pipe_file(f"/{number}.bin", content_of(number))
        found.append(RemoteFile(f"trouble://{number}.bin", SIZE + number))
    return found


def size_of(folder):
    return sum(path.stat().st_size for path in folder.glob("*") if path.is_file())


@settings(max_examples=60, deadline=None)
@given(wanted=st.lists(st.integers(0, 11), max_size=40), held=st.integers(1, 6))
def test_what_was_used_least_recently_goes(files, wanted, held, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    limit = held * (SIZE + 12)
    cache, expected = FileCache(folder, limit / 1e9), OrderedDict[int, None]()
    for number in wanted:
        with cache.held(files[number]) as path:
            assert path.read_bytes() == content_of(number)
        expected[number] = None
        expected.move_to_end(number)
        while sum(SIZE + n for n in expected) > limit:
            expected.popitem(last=False)
        assert {*folder.glob("[!.]*")} == {cache.path(files[n]) for n in expected}
        assert size_of(folder) <= limit
        time.sleep(0.001)  # file systems have coarse clocks


def test_a_file_above_the_limit_is_refused(files, tmp_path):
    with pytest.raises(ValueError, match=r"trouble://3.bin has 1e-06 GB, more than limit_gb=1e-07"):
        FileCache(tmp_path, 1e-7).fetch(files[3])
    with pytest.raises(ValueError, match="limit_gb=0 must be above 0"):
        FileCache(tmp_path, 0)


def test_damage_on_the_way_is_repaired_and_in_the_store_refused(files, tmp_path, monkeypatch):
    def damaged(source, target, times=[1]):  # noqa: B006  # counts the calls
        target.write(source.read() if not times.pop() else b"")
        times.append(0)

    digest = hashlib.sha256(content_of(5)).hexdigest()
    monkeypatch.setattr(Trouble, "fetch", staticmethod(damaged))
    cache = FileCache(tmp_path)
    assert cache.fetch(files[5], sha256=digest)
    assert cache.path(files[5]).read_bytes() == content_of(5)
    wrong = hashlib.sha256(b"").hexdigest()
    with pytest.raises(ValueError, match=rf"^trouble://6.bin: SHA-256 \w+, expected {wrong[:12]}"):
        cache.fetch(files[6], sha256=wrong)
    larger = RemoteFile(files[6].url, 5000)
    with pytest.raises(
        ValueError, match=r"^trouble://6.bin: 1006 bytes were fetched, expected 5000"
    ):
        cache.fetch(larger)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [
        cache.path(files[5]).name
    ]


def test_a_full_disk_is_told_and_leaves_nothing(files, tmp_path, monkeypatch):
    def full(source, target):
        target.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Trouble, "fetch", staticmethod(full))
    with pytest.raises(
        OSError, match=r"No space left on device: fetching trouble://1.bin .* lower"
    ):
        FileCache(tmp_path).fetch(files[1])
    assert size_of(tmp_path) == 0


def _fetch_slowly(folder, file, started):
    def slow(source, target):
        target.write(source.read(100))
        target.flush()
        started.set()
        time.sleep(60)

    Trouble.fetch = staticmethod(slow)
    FileCache(folder, 1e-5).fetch(file)


def test_a_killed_fetch_leaves_nothing_that_is_taken_for_whole(files, tmp_path):
    started = FORK.Event()
    process = FORK.Process(target=_fetch_slowly, args=(tmp_path, files[2], started))
    process.start()
    assert started.wait(20)
    assert not FileCache(tmp_path).fetch(files[2], wait=False)  # the other one fetches it
    os.kill(process.pid, signal.SIGKILL)
    process.join(20)
    assert sorted(path.stat().st_size for path in tmp_path.glob(".*") if path.is_file()) == [
        100,
        SIZE + 2,  # reserved, and sparse
    ]
    # Another file is fetched: what was reserved counts no more, and is removed.
    cache = FileCache(tmp_path, (2 * SIZE + 20) / 1e9)
    assert cache.fetch(files[3]) and cache.fetch(files[4])
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        cache.path(files[n]).name for n in (3, 4)
    }
    with cache.held(files[2]) as path:
        assert path.read_bytes() == content_of(2)


def _read_all(folder, files, limit, seed):
    cache, draw = FileCache(folder, limit), random.Random(seed)
    for number in draw.choices(range(len(files)), k=60):
        with cache.held(files[number]) as path:
            assert path.read_bytes() == content_of(number)


def test_processes_share_a_folder_within_its_limit(files, tmp_path):
    limit = 4 * (SIZE + 12)
    processes = [
        FORK.Process(target=_read_all, args=(tmp_path, files, limit / 1e9, seed))
        for seed in range(4)
    ]
    for process in processes:
        process.start()
    largest, before = 0, None
    while any(process.is_alive() for process in processes):
        found = {}
        for entry in os.scandir(tmp_path):
            try:
                if entry.is_file():
                    found[entry.name] = entry.stat().st_size, entry.stat().st_mtime_ns
            except FileNotFoundError:
                continue
        if found == before:  # otherwise it may have changed between its first and its last file
            sizes = [size for name, (size, _) in found.items() if not name.endswith(".reserved")]
            largest = max(largest, sum(sizes))
        before = found
        time.sleep(0.001)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert 0 < largest <= limit
    assert size_of(tmp_path) <= limit and not [*tmp_path.glob(".[!l]*")]


def test_a_file_is_fetched_by_one_of_many(files, tmp_path, monkeypatch):
    fetched = []

    def counted(source, target):
        time.sleep(0.2)
        fetched.append(source)
        shutil.copyfileobj(source, target)

    monkeypatch.setattr(Trouble, "fetch", staticmethod(counted))
    threads = [
        threading.Thread(target=partial(FileCache(tmp_path).fetch, files[7])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(fetched) == 1 and FileCache(tmp_path).has(files[7])
