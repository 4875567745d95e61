import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from ditty_di.data import cache
from ditty_di.data.cache import build_once, cache_folder, fingerprint


def _build_slowly(target, log):
    def build(aside):
        with open(log, "a") as stream:
            stream.write("built\n")
        aside.mkdir()
        (aside / "a").write_text("whole")
        time.sleep(0.3)
        (aside / "b").write_text("whole")

    build_once(target, build)
    assert (target / "b").read_text() == "whole"


def test_many_processes_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "deep" / "target", tmp_path / "log")
    workers = [context.Process(target=_build_slowly, args=arguments) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_killed_build_leaves_nothing_that_looks_finished(tmp_path):
    target = tmp_path / "target"

    def die(aside):
        aside.write_text("half")
        os._exit(3)

    child = multiprocessing.get_context("fork").Process(target=build_once, args=(target, die))
    child.start()
    child.join()
    assert child.exitcode == 3 and not target.exists()
    build_once(target, lambda aside: aside.write_text("whole") and None)
    assert target.read_text() == "whole"
    assert not list(tmp_path.glob(".target.*"))


def test_a_failed_build_is_cleaned_up_and_may_be_tried_again(tmp_path):
    target = tmp_path / "target"

    def fail(aside):
        aside.write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        build_once(target, fail)
    assert not target.exists() and not list(tmp_path.glob(".target.*"))
    assert build_once(target, Path.touch).exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="DITTY_DI_CACHE"):
        build_once(tmp_path / "file" / "folder" / "target", Path.touch)


def test_the_folder_is_the_parameter_then_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DITTY_DI_CACHE", "/from/environment")
    assert cache_folder(tmp_path) == tmp_path
    assert cache_folder() == Path("/from/environment")
    monkeypatch.delenv("DITTY_DI_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "ditty_di"


def test_fingerprints_know_where_a_text_ends():
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert fingerprint("a", b"b") == fingerprint("a", "b") != fingerprint("ab")


def test_the_package_imports_without_the_libraries_of_some_formats():
    code = (
        "import sys, ditty_di.data as data; data.Loader; data.train_bpe; data.tokenize; "
        "unwanted = {'datasets', 'pandas', 'pyarrow', 'torchtitan'}; "
        "sys.exit(', '.join(unwanted & set(sys.modules)) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_work_is_said_when_it_begins_and_counted_while_it_lasts(caplog, monkeypatch):
    monkeypatch.setattr(cache, "_REPORT_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, logger="ditty_di"):
        items = cache.counted(iter("ab"), "tokenizing records", "records")
        assert next(items) == "a" and caplog.messages == ["tokenizing records ..."]
        assert list(items) == ["b"]
    assert caplog.messages[1:] == [
        "tokenizing records: 1 records so far",
        "tokenizing records: 2 records so far",
    ]


def test_who_waits_for_the_cache_says_so(tmp_path, caplog):
    target, held = tmp_path / "built", threading.Event()

    def hold():
        with FileLock(f"{target}.lock"):
            held.set()
            time.sleep(1.5)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    with caplog.at_level(logging.INFO, logger="ditty_di"):
        build_once(target, lambda aside: aside.write_text("x"))
    holder.join()
    assert "waiting for another process" in caplog.text and target.read_text() == "x"
