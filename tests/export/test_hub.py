"""Uploads against a hub on loopback: what arrives, what can go wrong, and how it goes on."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

import ditty_di
from ditty_di.export import AdapterExport, HuggingFaceExport
from ditty_di.export.hub import HubError, push_folder
from ditty_di.tasks.generate import generate
from tests.export.hub_server import READ_ONLY, TOKEN, drop, running, status

ROOT = os.path.dirname(os.path.dirname(ditty_di.__file__))
NAME = "someone/model"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))
    with running() as hub:
        yield hub


@pytest.fixture
def no_waiting(monkeypatch):
    """Repeats of a failed request follow at once."""
    sleep = time.sleep
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: sleep(0))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    for part in (1, 2, 3):
        tensors = {f"w{part}": torch.randn(300, 300)}
        save_file(tensors, folder / f"model-{part:05}-of-00003.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "README.md").write_text("---\ntags:\n- a\n---\n# A card\n")
    return folder


def arrived(hub, name=NAME):
    return hub.repositories[name].files


def local(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def push(hub, folder, to=NAME, **options):
    return push_folder(folder, to, endpoint=hub.address, **options)


def test_what_arrives_is_what_was_there(hub, folder, capsys):
    assert push(hub, folder) == f"{hub.address}/{NAME}"
    assert arrived(hub) == local(folder) and not hub.problems
    assert hub.repositories[NAME].private and len(hub.repositories[NAME].commits) == 1
    assert len(hub.repositories[NAME].large) == 3
    assert f"pushed to {hub.address}/{NAME} (private)" in capsys.readouterr().out


def test_a_second_push_sends_only_what_changed_and_takes_old_shards_away(hub, folder):
    push(hub, folder)
    hub.requests.clear()
    (folder / "model-00001-of-00003.safetensors").unlink()
    (folder / "config.json").write_text("{}")
    hub.repositories[NAME].files["notes.txt"] = b"somebody's own"
    push(hub, folder)
    assert arrived(hub) == local(folder) | {"notes.txt": b"somebody's own"}
    assert not [request for request in hub.requests if request.startswith("PUT")]


@pytest.mark.parametrize("how", [drop(), status(500)], ids=["hangs up", "500"])
def test_an_interrupted_upload_is_completed_by_repeating_it(hub, folder, no_waiting, how):
    import hashlib

    last = (folder / "model-00003-of-00003.safetensors").read_bytes()
    hub.fail("PUT", hashlib.sha256(last).hexdigest(), how)
    with pytest.raises(HubError) as error:
        push(hub, folder)
    assert f"task=push folder={folder} to={NAME}" in str(error.value)
    assert arrived(hub) == {} and len(hub.storage) == 2, "the others got through, nothing committed"
    hub.faults.clear()
    hub.requests.clear()
    push(hub, folder)
    assert arrived(hub) == local(folder) and not hub.problems
    assert len([request for request in hub.requests if request.startswith("PUT")]) == 1


def test_a_hub_that_only_hiccups_is_asked_again(hub, folder, no_waiting):
    failures = iter([1, 2])

    def sometimes(handler):
        if next(failures, None):
            status(503)(handler)
        else:
            handler.store(handler.path.rpartition("/")[2])

    hub.fail("PUT", "storage", sometimes)
    push(hub, folder)
    assert arrived(hub) == local(folder)


def test_without_a_token(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="no token for the Hub: type `hf auth login`, or set"):
        push(hub, folder)
    assert hub.requests == [] and folder.is_dir()


@pytest.mark.parametrize(
    ("token", "to", "message"),
    [
        ("hf_expired", NAME, r"does not accept the token \(401\)"),
        (READ_ONLY, NAME, r"may not write to someone/model \(403\)"),
        (TOKEN, "another/model", r"may not write to another/model \(403\)"),
        (TOKEN, "a/b/c", "'a/b/c' is not a repository's name; write user/name"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub, folder, monkeypatch, token, to, message):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=message) as error:
        push(hub, folder, to)
    _, second = str(error.value).splitlines()
    assert second.startswith(f"  the export is whole in {folder}; to upload it, type: ")
    assert token not in str(error.value)


def test_what_cannot_be_uploaded_is_said_before_training(hub, tokenizer, monkeypatch, tmp_path):
    def export(to):
        HuggingFaceExport(tokenizer, str(tmp_path / "export"), push_to=to)

    export(NAME)
    with pytest.raises(HubError, match="push_to=mine: 'mine' is not a repository's name"):
        export("mine")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=f"push_to={NAME}: there is no token"):
        export(NAME)
    monkeypatch.setenv("RANK", "1")
    export(NAME)  # only the first rank uploads: others need no token
    assert hub.requests == []


def test_without_a_network(folder, hub, no_waiting):
    with pytest.raises(HubError, match=r"no connection to http://127\.0\.0\.1:9 \(Connect"):
        push_folder(folder, NAME, endpoint="http://127.0.0.1:9")


def test_offline_mode(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, so nothing can be uploaded"):
        push(hub, folder)


def test_a_public_repository_is_never_filled_by_default(hub, folder):
    push(hub, folder, private=False)
    assert not hub.repositories[NAME].private
    (folder / "config.json").write_text("secret")
    with pytest.raises(HubError, match="is public: say private=false if that is meant"):
        push(hub, folder)
    assert arrived(hub)["config.json"] != b"secret"


def test_a_folder_that_is_no_export(hub, tmp_path):
    with pytest.raises(HubError, match=r"not an exported folder: it has no \.safetensors"):
        push(hub, tmp_path / "nowhere")
    assert hub.requests == []


def ditty_di_command(hub, *arguments, folder, token=TOKEN, code=0):
    outside = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "RANK")}
    env = {
        "PYTHONPATH": ROOT,
        "OMP_NUM_THREADS": "1",
        "HF_ENDPOINT": hub.address,
        "HF_TOKEN": token,
        "HF_HOME": str(folder / "hf_home"),
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=outside | env,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_pushed_model_opens_from_the_hub(hub, llama, tmp_path, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama)
    HuggingFaceExport(tokenizer, str(tmp_path / "export"), max_shard_size="40KB")([model])
    push(hub, tmp_path / "export")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.save(model(ids).logits, tmp_path / "logits.pt")
    program = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{NAME}")
assert len(AutoTokenizer.from_pretrained("{NAME}")) == {len(tokenizer)}
assert torch.equal(model(torch.arange(5, 25)[None]).logits, torch.load("logits.pt"))
"""
    ditty_di_command(hub, "-c", program, folder=tmp_path)


def test_the_task_uploads_a_folder(hub, folder, tmp_path):
    (folder / "export.json").write_text(json.dumps({"push_to": NAME, "private": False}))
    line = ["-m", "ditty_di", "task=push", f"folder={folder}", "run=here"]
    out = ditty_di_command(hub, *line, folder=tmp_path, token="hf_wrong_one", code=1)
    assert "does not accept the token (401)" in out and "hf_wrong_one" not in out
    ditty_di_command(hub, *line, folder=tmp_path)
    assert arrived(hub) == local(folder) and not hub.repositories[NAME].private
    ditty_di_command(
        hub, *line[:-1], "run=there", "to=someone/other", "private=true", folder=tmp_path
    )
    assert arrived(hub, "someone/other") == local(folder)
    assert hub.repositories["someone/other"].private
    written = [path for path in (tmp_path / "here").rglob("*") if path.is_file()]
    assert not [path for path in written if TOKEN in path.read_text(errors="replace")]


def test_pushed_adapters_bring_their_pushed_base_along(hub, llama, tmp_path, tokenizer):
    from tests.export.test_adapter import trained

    push(hub, llama, "someone/base")
    model = trained(llama)
    AdapterExport(tokenizer, str(tmp_path / "export"), base="someone/base")([model])
    assert "base_model: someone/base" in (tmp_path / "export" / "README.md").read_text()
    push(hub, tmp_path / "export", "someone/adapter")
    generated = ["task=generate_folder", "prompt=Document 3", "max_new_tokens=8", "run=here"]
    line = ["-m", "ditty_di", *generated, "folder=someone/adapter"]
    out = ditty_di_command(hub, *line, folder=tmp_path)
    text = generate(model, tokenizer, prompt="Document 3", max_new_tokens=8, device="cpu")["text"]
    assert "Document 3" + text in out


@pytest.mark.slow
def test_a_failed_upload_fails_the_run_and_the_same_command_completes_it(hub, tmp_path):
    (tmp_path / "texts").mkdir()
    words = "one two three four five six seven eight nine ten"
    for name in "abcdef":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"{name} {words}\n" * 60)
    small = "max_steps=2 data.seq_len=64 tokenizer.vocab_size=300 model.config.num_hidden_layers=1"
    data = "data=text data.corpus.path=texts validator=loss_only"
    line = ["-m", "ditty_di", "run=RUN", *f"{small} {data} export.push_to={NAME}".split()]
    out = ditty_di_command(hub, *line, folder=tmp_path, token="hf_wrong_one", code=1)
    assert "does not accept the token (401)" in out
    assert "task=push folder=" in out and f"to={NAME}" in out
    export = tmp_path / "RUN" / "export"
    assert (export / "model.safetensors").is_file() and NAME not in hub.repositories
    ditty_di_command(hub, *line, folder=tmp_path)
    assert arrived(hub) == local(export) and hub.repositories[NAME].private
    card = (export / "README.md").read_text()
    assert "| held-out loss |" in card and "| steps | 2 |" in card and "# model" in card
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path
