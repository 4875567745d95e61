"""Downloads from a hub that is a real server on loopback."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.models.hub_server import COMMIT, asked, hub

#: huggingface_hub reads the hub's address when it is imported: a fresh process for each question.
ASK = """
import json, shutil, sys, time
time.sleep = lambda seconds: None  # huggingface_hub waits 23 s in all before it gives up
from huggingface_hub import constants
from ditty_di.data.tokenization import HubFiles

constants.DOWNLOAD_CHUNK_SIZE = 1000  # so that of a small file something is kept, too
free = {}
disk_usage = shutil.disk_usage
shutil.disk_usage = lambda path: type("Usage", (), {"free": free.get("bytes", 10**9)})
answers = []
for path, patterns, options in json.loads(sys.argv[1]):
    free["bytes"], check = options.pop("free", 10**9), options.pop("check", False)
    try:
        source = HubFiles(path, patterns, **options)
        found = source.download(check)
        answers.append(["", [[f.name, str(f.path)] for f in source.files()], found])
    except Exception as error:
        answers.append([type(error).__name__, str(error)])
print("ANSWERS" + json.dumps(answers))
"""


def ask(home, endpoint, *questions, **environment):
    where = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hub"), "HF_HUB_DISABLE_XET": "1"}
    return asked(ASK, questions, DITTY_DI_CACHE=str(home / "cache"), **where, **environment)


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "dataset"
    (folder / "sample" / "10BT").mkdir(parents=True)
    for i in range(3):
        table = pa.table({"text": [f"document {i} {n}" * 9 for n in range(200)]})
        parquet.write_table(table, folder / "sample" / "10BT" / f"{i}.parquet")
    (folder / "README.md").write_text("about")
    (folder / "large.bin").write_bytes(b"x" * 10_000)
    return folder


FILES = ["sample/10BT/*.parquet"]


def names(answer):
    assert answer[0] == "", answer
    return [name for name, _ in answer[1]]


def test_a_download_takes_the_files_of_the_patterns_and_is_found_offline(dataset, tmp_path):
    everything = [f"sample/10BT/{i}.parquet" for i in range(3)]
    size = (dataset / everything[0]).stat().st_size
    with hub({"user/web": dataset}) as (endpoint, requested):
        part, found = ask(
            tmp_path,
            endpoint,
            ["user/web", FILES, {"sample": 1.5 * size / 2**20}],
            ["user/web", FILES, {"check": True}],
        )
        fetched = [r.rpartition("/")[2] for r in requested if r.startswith("GET datasets")]
    assert names(part) == everything[:1] and names(found) == everything
    assert found[2]["files"] == 3 and f"snapshots/{COMMIT}" in found[2]["folder"]
    assert sorted(fetched) == ["0.parquet", "1.parquet", "2.parquet"], "each once"

    offline = ask(
        tmp_path,
        endpoint,
        ["user/web", FILES, {}],
        ["user/web", ["*.bin"], {}],
        HF_HUB_OFFLINE="1",
    )
    assert names(offline[0]) == everything
    assert offline[1][0] == "ConnectionError"
    assert "not (wholly) in the cache" in offline[1][1] and "HF_HUB_OFFLINE is set" in offline[1][1]
    # The address answers no more.
    assert names(ask(tmp_path, endpoint, ["user/web", FILES, {}])[0]) == everything


def test_a_file_that_broke_off_goes_on_and_one_that_is_damaged_is_named(dataset, tmp_path):
    with hub({"user/web": dataset}, breaks=["1.parquet"]) as (endpoint, requested):
        (found,) = ask(tmp_path, endpoint, ["user/web", FILES, {"check": True}])
        assert [r for r in requested if r.startswith("from byte")], "it goes on where it broke off"
        path = Path(dict(found[1])["sample/10BT/1.parquet"])
        data = bytearray(path.read_bytes())
        assert data == (dataset / "sample" / "10BT" / "1.parquet").read_bytes()
        data[50] ^= 1
        path.write_bytes(data)
        unchecked, checked = ask(
            tmp_path, endpoint, ["user/web", FILES, {}], ["user/web", FILES, {"check": True}]
        )
    assert unchecked[0] == ""
    assert checked[0] == "ValueError" and "another content than the Hub's" in checked[1]


def test_what_goes_wrong_is_said_in_one_sentence(dataset, tmp_path):
    with hub({"user/web": dataset}) as (endpoint, _):
        nothing, revision, unknown, full = ask(
            tmp_path,
            endpoint,
            ["user/web", ["data/*.json"], {}],
            ["user/web", FILES, {"revision": "v9"}],
            ["user/none", FILES, {}],
            ["user/web", FILES, {"free": 2000}],
        )
    assert nothing[0] == "FileNotFoundError"
    assert "no files of patterns=['data/*.json']; it has README.md, large.bin" in nothing[1]
    assert revision[0] == "FileNotFoundError" and "no revision 'v9'" in revision[1]
    assert unknown[0] == "FileNotFoundError" and "shows no dataset user/none" in unknown[1]
    assert full[0] == "OSError" and "2.0 kB of free space" in full[1]
    assert not [*(tmp_path / "hub").glob("**/*.parquet")]
    ((kind, message),) = ask(tmp_path, endpoint, ["user/other", FILES, {}])
    assert kind == "ConnectionError" and f"{endpoint} cannot be reached" in message
    assert "\n" not in message
