"""Which checkpoints are whole, which is the newest, which are removed."""

import json
import os
import shutil

import pytest

from ditty_di.checkpoint import CheckpointError, latest
from ditty_di.checkpoint import folder as folders
from ditty_di.checkpoint.folder import MANIFEST, Checkpoint, Manifest
from ditty_di.checkpoint.retention import Retention


def make(folder, step):
    aside = folders.start_saving(folder, step)
    for name in (".metadata", "__0_0.distcp"):
        (aside / name).write_bytes(b"x" * step)
    files = {path.name: path.stat().st_size for path in aside.iterdir()}
    manifest = Manifest(step=step, world_size=1, torch="2", files=files, keys=["a.b"])
    return folders.commit(aside, folder, manifest)


def names(folder):
    return sorted(os.listdir(folder))


def test_no_folder_and_no_checkpoint(tmp_path):
    assert latest(tmp_path / "missing") is None
    (tmp_path / "step-100").mkdir()
    (tmp_path / "step-00000007.bak").mkdir()
    (tmp_path / "notes.txt").touch()
    assert latest(tmp_path) is None


def test_newest_by_number(tmp_path):
    for step in (2, 10, 9, 123456789):
        make(tmp_path, step)
        assert Checkpoint(tmp_path / f"step-{step:08d}").step == step
    assert latest(str(tmp_path)).name == "step-123456789"


def edit(checkpoint, **changes):
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps(manifest | changes))


DAMAGES = {
    "has no manifest.json": lambda c: (c / MANIFEST).unlink(),
    "manifest.json cannot be read": lambda c: (c / MANIFEST).write_text('{"step": 2, "fil'),
    "manifest.json cannot be read: 'utf": lambda c: (c / MANIFEST).write_bytes(b"\xff\xfe\x00"),
    "manifest.json is not a manifest": lambda c: (c / MANIFEST).write_text("[1, 2]"),
    "unexpected keyword argument 'more'": lambda c: edit(c, more=1),
    "has no attribute 'items'": lambda c: edit(c, files=["__0_0.distcp"]),
    "has 1 bytes instead of 2": lambda c: (c / "__0_0.distcp").write_bytes(b"x"),
    "__0_0.distcp is missing": lambda c: (c / "__0_0.distcp").unlink(),
    "holds step 5": lambda c: edit(c, step=5),
    "is not a folder": lambda c: (shutil.rmtree(c), c.touch()),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_what_is_not_whole_is_passed_over_with_a_reason(tmp_path, reason, caplog):
    older, newer = make(tmp_path, 1), make(tmp_path, 2)
    DAMAGES[reason](newer)
    assert latest(tmp_path) == older
    assert reason in caplog.text and str(newer) in caplog.text
    assert not folders.is_whole(tmp_path, 2) and folders.is_whole(tmp_path, 1)


def test_damaged_checkpoint_is_replaced(tmp_path):
    make(tmp_path, 1)
    (make(tmp_path, 2) / MANIFEST).unlink()
    make(tmp_path, 2)
    assert folders.is_whole(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_link_takes_the_place_of_no_checkpoint(tmp_path):
    """`best -> step-00000001` and the like are the user's."""
    make(tmp_path, 1)
    (tmp_path / "best").symlink_to(tmp_path / "step-00000001")
    folders.prune(tmp_path, keep=Retention(1), relied_on=make(tmp_path, 2))
    assert names(tmp_path) == ["best", "step-00000002"]


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_exactly_so_many_remain(tmp_path, keep):
    for step in range(1, 7):
        folders.prune(tmp_path, keep=Retention(keep), relied_on=make(tmp_path, step))
        assert names(tmp_path) == [f"step-{s:08d}" for s in range(1, step + 1)][-keep:]


def test_only_whole_ones_count(tmp_path):
    for step in (1, 2, 3):
        make(tmp_path, step)
    (tmp_path / "step-00000003" / MANIFEST).unlink()
    folders.prune(tmp_path, keep=Retention(2), relied_on=make(tmp_path, 4))
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]


def test_what_was_just_written_remains_though_others_are_newer(tmp_path):
    for step in (8, 9):
        make(tmp_path, step)
    written = make(tmp_path, 5)
    folders.prune(tmp_path, keep=Retention(1), relied_on=written)
    assert names(tmp_path) == ["step-00000005"]


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    make(tmp_path, 1)
    for name in (".saving-step-00000002-1f", ".deleting-step-00000000-2e", ".mine", "notes"):
        (tmp_path / name / "sub").mkdir(parents=True)
    folders.remove_leftovers(tmp_path)
    assert names(tmp_path) == [".mine", "notes", "step-00000001"]


def test_what_cannot_be_removed_is_logged(tmp_path, caplog):
    make(tmp_path, 1)
    (tmp_path / ".saving-x").touch()
    folders.remove_leftovers(tmp_path)
    assert "cannot remove" in caplog.text


def test_manifest_of_a_copy_under_another_name(tmp_path):
    copy = make(tmp_path, 3).rename(tmp_path / "best")
    assert Checkpoint(copy).step == 3
    with pytest.raises(CheckpointError, match="has no manifest"):
        Checkpoint(tmp_path)


def test_checkpoints_of_which_none_is_whole_are_an_error_not_a_new_start(tmp_path):
    (tmp_path / "step-00000003").mkdir()
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole.*move it away"):
        latest(tmp_path)
