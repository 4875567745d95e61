"""Finding a model's files: in folders, and on a hub that is a real server on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

from ditty_di.models.files import ModelFiles
from ditty_di.models.safetensors import Safetensors
from tests.models.hub_server import COMMIT, GATED, PRIVATE, TOKEN, asked, hub
from tests.toy import REPOSITORY

#: Run with the hub's address in the environment: huggingface_hub reads that when it is imported.
ASK = """
import json, sys, time
time.sleep = lambda seconds: None  # huggingface_hub waits 23 s in all before it gives up
from ditty_di.models.files import ModelFiles

answers = []
for path, revision, what in json.loads(sys.argv[1]):
    try:
        found = getattr(ModelFiles(path, revision), what)()
        answers.append(["", str(found) if what == "config" else found and
                        ([str(f) for f in found] if what == "weights" else found)])
    except Exception as error:
        answers.append([type(error).__name__, str(error)])
print("ANSWERS" + json.dumps(answers))
"""


def ask(cache, endpoint, *questions, **environment):
    """What `ModelFiles(path, revision).<method>()` does, for each of the questions."""
    return asked(ASK, questions, HF_ENDPOINT=endpoint, HF_HOME=str(cache), **environment)


@pytest.fixture
def model(tmp_path):
    """A model in two files, with others beside them that are none of its own."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for i in (1, 2):
        save_file({f"w{i}": torch.full((4, 3), float(i))}, folder / f"model-{i}.safetensors")
    index = {"weight_map": {"w1": "model-1.safetensors", "w2": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "pytorch_model.bin").write_bytes(b"x" * 100)
    save_file({"other": torch.zeros(1)}, folder / "consolidated.safetensors")
    return folder


def names(answer):
    assert answer[0] == "", answer
    return [path.rpartition("/")[2] for path in answer[1]]


def test_a_download_takes_what_is_needed_and_works_offline_afterwards(model, tmp_path):
    with hub({"user/small": model}) as (endpoint, requested):
        config, weights, identity = ask(
            tmp_path / "cache",
            endpoint,
            ["user/small", None, "config"],
            ["user/small", "v1", "weights"],
            ["user/small", None, "identity"],
        )
        fetched = {
            r.rpartition("/")[2] for r in requested if r.startswith("GET") and "resolve" in r
        }
    assert f"/snapshots/{COMMIT}/config.json" in config[1]
    assert names(weights) == ["model-1.safetensors", "model-2.safetensors"]
    assert not fetched & {"pytorch_model.bin", "consolidated.safetensors"}
    assert identity[1]["path"] == "user/small" and identity[1]["revision"] == COMMIT
    assert identity[1]["hash"] == ModelFiles(model).identity()["hash"]

    again = ask(
        tmp_path / "cache",
        endpoint,
        ["user/small", None, "weights"],
        ["user/other", None, "config"],
        HF_HUB_OFFLINE="1",
    )
    assert names(again[0]) == names(weights)
    assert again[1][0] == "ConnectionError" and "HF_HUB_OFFLINE is set" in again[1][1]


def test_names_of_tensors_need_no_download_of_weights(model, tmp_path):
    single = tmp_path / "single"
    single.mkdir()
    (single / "config.json").write_text("{}")
    save_file({"w1": torch.zeros(2), "w2": torch.zeros(2)}, single / "model.safetensors")
    with hub({"user/sharded": model, "user/single": single}) as (endpoint, _):
        asked = [[name, None, "tensor_names"] for name in ("user/sharded", "user/single")]
        answers = ask(tmp_path / "cache", endpoint, *asked)
        again = ask(tmp_path / "cache", endpoint, ["user/single", None, "weights"], asked[1])
    assert answers == [["", ["w1", "w2"]], ["", ["w1", "w2"]]]
    assert not list((tmp_path / "cache").glob("hub/models--user--sharded/**/*.safetensors"))
    assert names(again[0]) == ["model.safetensors"] and again[1] == answers[1]


def test_a_mixture_of_the_hub_is_built_without_a_download_of_its_fused_experts(tmp_path):
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    fused = tmp_path / "fused"
    MixtralForCausalLM(config).save_pretrained(fused, save_original_format=False)
    build = "from ditty_di.models import causal_lm; causal_lm.from_pretrained('user/fused')"
    with hub({"user/fused": fused}) as (endpoint, _):
        done = subprocess.run(
            [sys.executable, "-c", build],
            env=os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache")},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "cache").glob("hub/**/config.json"))
    assert not list((tmp_path / "cache").glob("hub/**/*.safetensors"))


def test_what_the_hub_refuses_is_said_in_one_sentence(model, tmp_path):
    questions = [
        [GATED, None, "config"],
        [PRIVATE, None, "config"],
        ["nobody/nothing", None, "config"],
        ["user/small", "v9", "config"],
        ["user/small", None, "config"],
        ["user/bare", None, "weights"],
    ]
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    (bare / "flax_model.msgpack").write_bytes(b"x")
    (model / "config.json").unlink()
    with hub({"user/small": model, GATED: model, "user/bare": bare}) as (endpoint, _):
        answers = ask(tmp_path / "cache", endpoint, *questions)
        (allowed,) = ask(tmp_path / "c2", endpoint, [GATED, None, "weights"], HF_TOKEN=TOKEN)
    gated, private, nothing, revision, no_config, no_weights = answers
    assert gated == [
        "PermissionError",
        f"{GATED} is gated: accept its license at {endpoint}/{GATED}, then set HF_TOKEN or run "
        f"`hf auth login`",
    ]
    for kind, message in (private, nothing):
        assert kind == "FileNotFoundError"
        assert "there is no folder" in message and "hf auth login" in message
    assert revision[0] == "FileNotFoundError" and "no revision 'v9'" in revision[1]
    assert no_config[0] == "FileNotFoundError"
    assert no_config[1].startswith("user/small on the hub has no config.json")
    assert "user/bare on the hub has no .safetensors file" in no_weights[1]
    assert "has no config.json" in allowed[1], "with the token it is the model's own fault"
    assert not any("\n" in message for _, message in answers)


def test_without_a_network_the_answer_names_the_cache_and_the_address(tmp_path):
    with hub({}) as (endpoint, _):
        pass
    ((kind, message),) = ask(tmp_path / "cache", endpoint, ["user/small", None, "config"])
    assert kind == "ConnectionError"
    assert f"{endpoint} cannot be reached" in message and str(tmp_path / "cache") in message


def test_a_download_that_broke_off_is_not_taken_for_the_model(model, tmp_path):
    """Only the configuration and the index came; without the hub, that is said."""
    with hub({"user/small": model}) as (endpoint, _):
        ask(tmp_path / "cache", endpoint, ["user/small", None, "weights"])
    (snapshot,) = (tmp_path / "cache").glob("hub/models--user--small/snapshots/*")
    (snapshot / "model-2.safetensors").unlink()
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        ((kind, message),) = ask(
            tmp_path / "cache", endpoint, ["user/small", None, "weights"], **environment
        )
        assert kind == "ConnectionError"
        assert "the model is not (wholly) in the cache" in message


# -- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "a/b/c", "~/nowhere at all"])
def test_what_can_only_be_a_folder_is_never_looked_up(path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ModelFiles(path)


def test_a_folder_has_no_revisions(model):
    with pytest.raises(ValueError, match=r"revision='v1'.*leave it out"):
        ModelFiles(model, "v1")


def test_a_folder_without_a_configuration_is_no_model(model):
    (model / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        ModelFiles(model).config()


def test_a_file_of_the_index_that_is_not_there_is_named(model):
    (model / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-2\.safetensors"):
        ModelFiles(model).weights()


def test_a_file_that_was_cut_short_is_named(model):
    whole = (model / "model-2.safetensors").read_bytes()
    for size in (len(whole) - 5, 3, 0):
        (model / "model-2.safetensors").write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=r"model-2\.safetensors is not a complete safetensors file"
        ):
            Safetensors(ModelFiles(model).weights())


def test_of_several_sets_of_weights_the_one_that_transformers_takes_is_read(model):
    """One file, the index's, torch's file, torch's index; without any, all safetensors."""

    def found():
        return [file.name for file in ModelFiles(model).weights()]

    save_file({"w": torch.zeros(2)}, model / "model.safetensors")
    save_file({"stale": torch.zeros(2)}, model / "model-3.safetensors")
    index = {"weight_map": {"w1": "pytorch_model-1.bin"}}
    torch.save({"w1": torch.zeros(2)}, model / "pytorch_model-1.bin")
    (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert found() == ["model.safetensors"]
    (model / "model.safetensors").unlink()
    assert found() == ["model-1.safetensors", "model-2.safetensors"]
    (model / "model.safetensors.index.json").unlink()
    assert found() == ["pytorch_model.bin"]
    (model / "pytorch_model.bin").unlink()
    assert found() == ["pytorch_model-1.bin"]
    (model / "pytorch_model.bin.index.json").unlink()
    assert found() == ["consolidated.safetensors"] + [f"model-{i}.safetensors" for i in (1, 2, 3)]
    (model / "config.json").write_text('{"transformers_weights": "model-3.safetensors"}')
    assert found() == ["model-3.safetensors"]
    (model / "model-3.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model-3\.safetensors, which its config\.json"):
        found()


@pytest.mark.parametrize("mapped", [True, False])
def test_tensors_that_torch_saved_are_read_and_nothing_else_is_unpickled(tmp_path, mapped):
    file, weight = tmp_path / "pytorch_model.bin", torch.arange(12.0).reshape(4, 3)
    torch.save({"w": weight, "tied": weight}, file, _use_new_zipfile_serialization=mapped)
    files = Safetensors([file])
    assert files.names() == ["w", "tied"] and files.shape("w") == (4, 3)
    assert torch.equal(files.read("w", (slice(1, 3),)), weight[1:3])
    torch.save({"w": shutil.rmtree}, file)
    for content in (file.read_bytes(), file.read_bytes()[:-9], b"x", b""):
        file.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"pytorch_model\.bin is not a complete file of tensors"
        ):
            Safetensors([file])


def test_the_identity_is_the_content_wherever_it_lies(model, tmp_path):
    first = ModelFiles(model).identity()
    copy = tmp_path / "elsewhere"
    shutil.copytree(model, copy)
    assert ModelFiles(copy).identity()["hash"] == first["hash"]
    save_file({"w2": torch.full((4, 3), 3.0)}, copy / "model-2.safetensors")
    assert ModelFiles(copy).identity()["hash"] != first["hash"]
