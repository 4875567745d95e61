"""Checkpoints that are copied to object stores, good and bad ones, and read from there."""

import os
import shutil
import threading
import time

import fsspec
import pytest
import torch
from torch import nn

from ditty_di.api import ModelFactory
from ditty_di.checkpoint import CheckpointError, latest, mirror, remote
from ditty_di.checkpoint.folder import MANIFEST, Checkpoint
from ditty_di.checkpoint.model_state import ModelState
from ditty_di.checkpoint.read import load_model
from tests.checkpoint import ranks
from tests.checkpoint.cases import Box, checkpointer
from tests.checkpoint.stores import Faulty, Proxy

pytestmark = pytest.mark.usefixtures("process_group")
URL = "faulty://runs/mine"


@pytest.fixture
def faulty(monkeypatch):
    Faulty.reset()
    monkeypatch.setattr(mirror, "_FIRST_DELAY", 0.01)
    monkeypatch.setattr(mirror, "_LONGEST_DELAY", 0.02)
    monkeypatch.setattr(mirror, "_LAST_ATTEMPTS", 1)
    monkeypatch.setattr(remote, "_DELAYS", ())
    return Faulty


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DITTY_DI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "remote" / "checkpoints"


def saver(folder, url=URL, **options):
    box = Box({"weight": torch.zeros(64), "other": {"step": 0}})
    options = {"save_interval": 1, "keep_latest_k": 1} | options
    return box, checkpointer(folder, {"box": box}, mirror=url, **options)


def save(box, checkpoints, step, value=None, **options):
    box.state = {
        "weight": torch.full((64,), float(value or step)),
        "other": {"step": step, "x": os.urandom(100)},
    }
    return checkpoints.save(step, **options)


def require_loads(folder, step, url=URL, value=None):
    """A new machine finds this step, with the values it was saved with."""
    box, checkpoints = saver(folder, url)
    assert checkpoints.load() == step
    checkpoints.close()
    assert box.state["weight"].eq(value or step).all() and box.state["other"]["step"] == step


def objects(url):
    fs, root = fsspec.core.url_to_fs(url)
    root = root.rstrip("/")
    return {name.removeprefix(root)[1:]: fs.cat_file(name) for name in fs.find(root)}


def content(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# -- a good store ------------------------------------------------------------------------------


@pytest.mark.parametrize("async_save", [False, True])
def test_the_store_has_what_the_folder_has_and_a_new_machine_goes_on(s3, tmp_path, async_save):
    url = f"{s3}/runs/mine"
    box, checkpoints = saver(
        tmp_path / "a", url, keep_latest_k=2, keep_every=3, async_save=async_save
    )
    for step in range(1, 8):
        save(box, checkpoints, step)
    checkpoints.close()
    names = [f"step-0000000{step}" for step in (3, 6, 7)]
    assert sorted(os.listdir(tmp_path / "a")) == names
    assert objects(url) == content(tmp_path / "a")
    assert not [t for t in threading.enumerate() if t.name == "checkpoint-mirror"]
    require_loads(tmp_path / "b", 7, url)
    assert latest(tmp_path / "b").name == names[-1]


def test_folders_that_a_store_needs_are_made(tmp_path):
    url = f"file://{tmp_path}/there/a/b"
    box, checkpoints = saver(tmp_path / "a", url)
    save(box, checkpoints, 1)
    checkpoints.close()
    assert objects(url) == content(tmp_path / "a")


def test_a_bucket_is_not_made(s3, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(mirror, "_LAST_ATTEMPTS", 1)
    url = "s3://mistyped-bucket/runs"
    box, checkpoints = saver(tmp_path / "a", url)
    save(box, checkpoints, 1)
    checkpoints.close()
    assert f"{url}: there is no such file or folder; training goes on" in caplog.text
    assert f"{url} lacks the newest checkpoints" in caplog.text
    with pytest.raises(CheckpointError, match=r"checkpoint.mirror: .*mistyped-bucket/runs: there"):
        saver(tmp_path / "b", url)[1].load()
    assert not fsspec.filesystem("s3").exists("mistyped-bucket")


def ranks_save_and_load(folder):
    import torch.distributed as dist

    box, checkpoints = saver(folder / "a", f"file://{folder}/store")
    assert save(box, checkpoints, 1, objective=0.5)
    # The third is not among the best two, and no rank thinks so.
    box, best = saver(folder / "best", f"file://{folder}/best", save_interval=None, keep_best=2)
    saved = [save(box, best, step, objective=loss) for step, loss in ((1, 3.0), (2, 2.0), (3, 4.0))]
    best.close()
    checkpoints.close()
    dist.barrier()
    box, checkpoints = saver(folder / "b", f"file://{folder}/store")
    step = checkpoints.load()
    checkpoints.close()
    return step, box.state["weight"].tolist(), saved


def test_ranks_together(tmp_path):
    found = ranks.run(ranks_save_and_load, 2, tmp_path)
    assert found == [(1, [1.0] * 64, [True, True, False])] * 2
    assert len(objects(f"file://{tmp_path}/store")) == 4, "both ranks' files, metadata, manifest"


# -- an upload that is cut short ------------------------------------------------------------------


def stopping_at(number):
    """Fails from the so many-th call on, as a machine that is gone."""
    begin = len(Faulty.log)

    def fault(operation, path):
        if len(Faulty.log) - begin >= number:
            raise ConnectionResetError("gone")

    return staticmethod(fault)


def nothing_wrong(operation, path):
    return None


def test_cut_short_at_every_write_a_whole_checkpoint_is_found_and_the_rest_is_sent(
    faulty, tmp_path
):
    box, checkpoints = saver(tmp_path / "a")
    save(box, checkpoints, 1)
    checkpoints.close()
    before, found = {**faulty.store}, []
    for number in range(1, 99):
        faulty.reset()
        faulty.store.update(before)
        folder = tmp_path / f"{number}"
        shutil.copytree(tmp_path / "a", folder)
        box, checkpoints = saver(folder)
        faulty.fault = stopping_at(number)
        save(box, checkpoints, 2)
        checkpoints.close()
        if len(faulty.log) < number:
            break
        faulty.fault = staticmethod(nothing_wrong)
        # Another machine looks for a checkpoint, before the first one starts again.
        other, checkpoints = saver(tmp_path / f"new-{number}")
        found.append(checkpoints.load())
        checkpoints._mirror.close()
        assert other.state["weight"].eq(found[-1]).all()
        box, checkpoints = saver(folder)
        assert checkpoints.load() == 2
        checkpoints.close()
        assert objects(URL) == content(folder)
    assert len(found) >= 8 and found == sorted(found) and set(found) == {1, 2}


def test_what_was_sent_is_not_sent_again(faulty, tmp_path):
    box, checkpoints = saver(tmp_path / "a")
    faulty.fault = stopping_at(3)
    save(box, checkpoints, 1)
    checkpoints.close()
    faulty.fault = staticmethod(nothing_wrong)
    (_, first), begin = faulty.log[1], len(faulty.log)
    _, checkpoints = saver(tmp_path / "a")
    assert checkpoints.load() == 1
    checkpoints.close()
    calls = [(operation, path.rpartition("/")[2]) for operation, path in faulty.log[begin:]]
    (second,) = {".metadata", "__0_0.distcp"} - {first.rpartition("/")[2]}
    assert calls == [("put", second), ("pipe", MANIFEST), ("remove", "uploading.json")]


def test_bytes_of_another_start_are_not_mixed(faulty, tmp_path):
    """They have the same sizes and the same names."""
    box, checkpoints = saver(tmp_path / "a")
    faulty.fault = stopping_at(4)
    save(box, checkpoints, 1, value=5)
    checkpoints.close()
    assert len(objects(URL)) == 3, "what is being sent, and its two files"
    faulty.fault = staticmethod(nothing_wrong)
    shutil.rmtree(tmp_path / "a")
    box, checkpoints = saver(tmp_path / "a")
    save(box, checkpoints, 1, value=7)
    checkpoints.close()
    require_loads(tmp_path / "b", 1, value=7)


# -- a bad store ---------------------------------------------------------------------------------


def lines(caplog, level="WARNING"):
    return [r.getMessage() for r in caplog.records if r.levelname == level and "mirror" in r.name]


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def until_sent(checkpoints):
    until(lambda: checkpoints._mirror._asked == checkpoints._mirror._done)


@pytest.fixture
def proxied(s3, s3_server, monkeypatch):
    """A bucket behind a proxy, and the proxy."""
    import s3fs

    proxy = Proxy(*s3_server.get_host_and_port())
    config = {"read_timeout": 0.4, "connect_timeout": 5, "retries": {"max_attempts": 0}}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": config})
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setattr(mirror, "_FIRST_DELAY", 0.05)
    monkeypatch.setattr(remote, "_DELAYS", ())
    s3fs.S3FileSystem.clear_instance_cache()
    yield f"{s3}/runs/mine", proxy
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.shutdown()


def test_errors_and_timeouts_of_s3_do_not_stop_the_training(proxied, tmp_path, caplog):
    caplog.set_level("INFO")
    url, proxy = proxied
    box, checkpoints = saver(tmp_path / "a", url, keep_latest_k=2)
    save(box, checkpoints, 1)
    until_sent(checkpoints)
    proxy.mode = "error"
    save(box, checkpoints, 2)
    until(lambda: lines(caplog))
    proxy.mode = "hang"
    save(box, checkpoints, 3)
    failures = checkpoints._mirror._failures
    until(lambda: checkpoints._mirror._failures > failures + 1)
    proxy.mode = "ok"
    checkpoints.close()
    (line,) = lines(caplog)
    assert line.startswith(f"checkpoints cannot be copied to {url}: s3://") and "goes on" in line
    assert any("again" in text for text in lines(caplog, "INFO"))
    assert objects(url) == content(tmp_path / "a")
    require_loads(tmp_path / "b", 3, url)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), PermissionError("expired"), KeyError("bug")]
)
def test_a_store_that_takes_nothing_costs_one_line_and_the_end_names_it(
    faulty, tmp_path, caplog, error
):
    box, checkpoints = saver(tmp_path / "a")
    save(box, checkpoints, 1)
    until_sent(checkpoints)
    before = objects(URL)

    def fault(operation, path):
        raise error

    faulty.fault = staticmethod(fault)
    for step in (2, 3):
        save(box, checkpoints, step)
        begin = len(faulty.log)
        until(lambda begin=begin: len(faulty.log) > begin + 5)
    checkpoints.close()
    assert objects(URL) == before
    (line,), (end,) = lines(caplog), lines(caplog, "ERROR")
    assert URL in line and "training goes on" in line
    assert end.startswith(f"{URL} lacks the newest checkpoints") and str(tmp_path / "a") in end


def test_half_a_file_is_never_taken_as_whole(faulty, tmp_path, caplog):
    box, checkpoints = saver(tmp_path / "a")
    save(box, checkpoints, 1)
    until_sent(checkpoints)
    faulty.fault = staticmethod(lambda operation, path: 50 if "step-00000002/__0" in path else None)
    save(box, checkpoints, 2)
    until(lambda: lines(caplog))
    assert "but the store has 50 of its" in lines(caplog)[0]
    require_loads(tmp_path / "b", 1)
    faulty.fault = staticmethod(nothing_wrong)
    checkpoints.close()
    assert len(lines(caplog)) == 1
    require_loads(tmp_path / "c", 2)


def test_a_store_that_hangs_at_the_end_is_given_up(faulty, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(mirror, "_PATIENCE", 0.2)
    over = threading.Event()
    faulty.fault = staticmethod(lambda operation, path: over.wait(10) and None)
    box, checkpoints = saver(tmp_path / "a")
    save(box, checkpoints, 1)
    start = time.monotonic()
    checkpoints.close()
    assert time.monotonic() - start < 5
    assert "no byte was taken for 0.2 s" in lines(caplog, "ERROR")[0]
    over.set()
    checkpoints._mirror._thread.join()


def test_what_is_being_sent_is_not_removed_and_a_slow_store_gets_the_newest(faulty, tmp_path):
    started, goes_on = threading.Event(), threading.Event()

    def slow(operation, path):
        started.set()
        goes_on.wait(10)

    faulty.fault = staticmethod(slow)
    box, checkpoints = saver(tmp_path / "a")
    save(box, checkpoints, 1)
    started.wait(10)
    for step in (2, 3, 4):
        save(box, checkpoints, step)
    assert sorted(os.listdir(tmp_path / "a")) == ["step-00000001", "step-00000004"]
    goes_on.set()
    checkpoints.close()
    assert os.listdir(tmp_path / "a") == ["step-00000004"]
    assert objects(URL) == content(tmp_path / "a")


# -- the start -----------------------------------------------------------------------------------


def unreachable(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionRefusedError("nothing listens")

    monkeypatch.setattr(Faulty, "find", refuse)


def test_a_run_does_not_start_anew_while_it_cannot_see_its_store(faulty, tmp_path, monkeypatch):
    unreachable(monkeypatch)
    _, checkpoints = saver(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"not known: faulty://.*mirror=null does without"):
        checkpoints.load()


def test_a_run_goes_on_from_its_folder_while_it_cannot_see_its_store(
    faulty, tmp_path, monkeypatch, caplog
):
    box, checkpoints = saver(tmp_path / "a")
    save(box, checkpoints, 1)
    checkpoints.close()
    unreachable(monkeypatch)
    _, checkpoints = saver(tmp_path / "a")
    assert checkpoints.load() == 1
    checkpoints.close()
    assert "going on from step 1" in lines(caplog)[0]


def test_credentials_that_are_missing(s3, tmp_path, monkeypatch):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(remote, "_DELAYS", ())
    s3fs.S3FileSystem.clear_instance_cache()
    _, checkpoints = saver(tmp_path / "a", f"{s3}/runs/mine")
    with pytest.raises(CheckpointError, match=r"checkpoint.mirror.*[Cc]redentials"):
        checkpoints.load()
    s3fs.S3FileSystem.clear_instance_cache()


def flip(url, name):
    fs, root = fsspec.core.url_to_fs(url)
    found = bytearray(fs.cat_file(f"{root}/{name}"))
    found[len(found) // 2] ^= 1
    fs.pipe_file(f"{root}/{name}", bytes(found))


def mirrored(folder, steps, **options):
    box, checkpoints = saver(folder, keep_latest_k=None, **options)
    for step in steps:
        save(box, checkpoints, step)
    checkpoints.close()


def test_a_newer_one_in_the_store_is_taken_and_a_damaged_one_is_not(faulty, tmp_path, caplog):
    mirrored(tmp_path / "a", (1, 2, 3))
    shutil.copytree(tmp_path / "a" / "step-00000001", tmp_path / "b" / "step-00000001")
    flip(URL, "step-00000003/__0_0.distcp")
    require_loads(tmp_path / "b", 2)
    assert f"passing over a checkpoint that is damaged: {URL}/step-00000003/__0_0" in caplog.text


def test_a_damaged_one_in_the_folder_is_repaired_from_the_store(faulty, tmp_path):
    mirrored(tmp_path / "a", (1, 2))
    flip(f"file://{tmp_path}/a", "step-00000002/__0_0.distcp")
    before = objects(URL)
    require_loads(tmp_path / "a", 2)
    assert objects(URL) == before == content(tmp_path / "a")


def test_damaged_ones_alone_are_an_error_and_an_upload_that_was_cut_short_is_none(faulty, tmp_path):
    mirrored(tmp_path / "a", (1,))
    flip(URL, "step-00000001/__0_0.distcp")
    _, checkpoints = saver(tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole.*step-00000001/__0_0"):
        checkpoints.load()
    fs, root = fsspec.core.url_to_fs(URL)
    fs.rm_file(f"{root}/step-00000001/{MANIFEST}")
    assert saver(tmp_path / "b")[1].load() is None


def test_a_manifest_that_names_files_elsewhere_is_refused(faulty, tmp_path, cache):
    mirrored(tmp_path / "a", (1,))
    fs, root = fsspec.core.url_to_fs(URL)
    there = f"{root}/step-00000001/{MANIFEST}"
    fs.pipe_file(there, fs.cat_file(there).replace(b'"__0_0.distcp"', b'"../__0_0.distcp"'))
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        Checkpoint.find(URL)
    with pytest.raises(CheckpointError, match="outside its folder"):
        Checkpoint.find(f"{URL}/step-00000001")


# -- reading without the run -------------------------------------------------------------------


def test_whoever_reads_a_checkpoint_may_give_its_url(faulty, tmp_path, cache, caplog):
    model = nn.Linear(2, 1)
    states = {"model": ModelState([model])}
    checkpoints = checkpointer(tmp_path / "a", states, mirror=URL, keep_latest_k=None, keep_best=1)
    for step, loss in ((1, 2.0), (2, 1.0), (3, None)):
        nn.init.constant_(model.weight, step)
        checkpoints.save(step, force=True, objective=loss)
    checkpoints.close()
    for path, step in {URL: 3, f"{URL}/": 3, f"{URL}/best": 2, f"{URL}/step-00000001": 1}.items():
        read = nn.Linear(2, 1)
        assert load_model(path, read) == step and read.weight.eq(step).all()
    fetched = sorted(cache.rglob("*"))
    built, _ = ModelFactory.from_checkpoint(URL, nn.Linear, in_features=2, out_features=1).load()
    assert built.weight.eq(3).all()
    assert sorted(cache.rglob("*")) == fetched, "each was fetched once"
    flip(URL, "step-00000003/__0_0.distcp")
    shutil.rmtree(cache)
    assert Checkpoint.find(URL).step == 2 and "step-00000003" in caplog.text
    with pytest.raises(CheckpointError, match=r"faulty://nothing/here holds no whole checkpoint"):
        Checkpoint.find("faulty://nothing/here")
    with pytest.raises(ValueError, match=r"Checkpoint.find\('faulty://runs/mine'\) fetches"):
        latest(URL)


# -- the arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"url": "runs/mine"}, "checkpoint.mirror=runs/mine: write the URL of a folder"),
        ({"url": "s4://runs"}, "checkpoint.mirror=s4://runs: fsspec knows no protocol 's4'"),
        ({"keep_every": 0}, "checkpoint.keep_every=0: use 1 or more, or null for none"),
        ({"keep_best": 0}, "checkpoint.keep_best=0: use 1"),
        ({"save_every_minutes": 0}, "checkpoint.save_every_minutes=0: use more than 0"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        saver(tmp_path, **options)


def test_a_folder_that_is_a_url_says_what_to_write():
    with pytest.raises(
        ValueError, match=r"leave checkpoint.folder, and write checkpoint.mirror=s3:"
    ):
        saver("s3://bucket/run", None)
