"""The conf files of examples and batching, built as the command line builds them."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ditty_di.cli.searchpath import conf_dir
from ditty_di.config import Graph
from tests.data.words import CHAT, word_tokenizer
from tests.warm import ditty_di

BATCHINGS = ["padded", "length_grouped", "token_budget", "packed", "padding_free", "seq2seq"]
PAIRS = [{"input": "a b", "output": "c"}, {"input": "d", "output": "e f"}] * 20


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, lines)))


@pytest.fixture(autouse=True)
def cache(cache_dir, monkeypatch):
    monkeypatch.setenv("DITTY_DI_CACHE", str(cache_dir))


@pytest.fixture
def folder(tmp_path):
    """A folder of examples, and a tokenizer beside it."""
    word_tokenizer(chat_template=CHAT, model_max_length=16).save_pretrained(tmp_path / "tokenizer")
    write(tmp_path / "train.jsonl", PAIRS)
    write(tmp_path / "val.jsonl", PAIRS[:3])
    return tmp_path


def graph(folder, *overrides, model=None):
    tokenizer = f"tokenizer.pretrained_model_name_or_path={folder / 'tokenizer'}"
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", ["tokenizer=pretrained", tokenizer, *overrides])
    config.run = "run"
    OmegaConf.set_struct(config, False)
    config.model = model or config.model
    return Graph(config)


@pytest.mark.parametrize("batching", BATCHINGS[:-1])
def test_a_folder_of_ones_own_in_every_batching(folder, batching):
    program = graph(
        folder, "data=jsonl", f"data.path={folder}", f"batching={batching}", "data.seq_len=16"
    )
    tokenizer = program.build("tokenizer")
    loader = program.build("data.loader")(dp_rank=0, dp_world_size=1)
    inputs, labels = next(iter(loader))
    assert inputs["input"].shape == labels.shape
    assert tokenizer.eos_token_id in labels, "the end of outputs is learnt"
    assert tokenizer.pad_token_id not in labels
    validation = program.build("data.validation_loader")(dp_rank=0, dp_world_size=2)
    count = sum((labels != -100).sum() for _, labels in validation)
    other = program.build("data.validation_loader")(dp_rank=1, dp_world_size=2)
    count += sum((labels != -100).sum() for _, labels in other)
    assert count == 2 + 4 + 2


def test_epochs_are_counted_in_rows_of_the_batching(folder):
    overrides = (
        "data=jsonl",
        f"data.path={folder}",
        "max_steps=null",
        "epochs=2",
        "data.seq_len=16",
    )
    sized = (*overrides, "global_batch_size=5")
    assert graph(folder, *sized).build("training_steps") == 16
    # 20 examples of 4 tokens and 20 of 4: four in a row of 16.
    assert graph(folder, *sized, "batching=packed").build("training_steps") == 4


def test_micro_batches_of_a_number_of_tokens(folder):
    program = graph(
        folder, "data=jsonl", f"data.path={folder}", "batching=token_budget", "data.seq_len=16",
        "batching.max_tokens=24", "epochs=1",
    )  # fmt: skip
    loader = program.build("data.loader")(dp_rank=0, dp_world_size=1)
    sizes = [inputs["input"].shape for inputs, _ in loader]
    assert max(shape.numel() for shape in sizes) <= 24
    assert sum(rows for rows, _ in sizes) == 40 and len(sizes) < 10


def test_an_encoder_and_a_decoder(folder):
    config = {"_target_": "types.SimpleNamespace", "decoder_start_token_id": 0}
    model = {"_target_": "types.SimpleNamespace", "config": config}
    program = graph(folder, "data=jsonl", f"data.path={folder}", "batching=seq2seq", model=model)
    inputs, labels = next(iter(program.build("data.loader")(dp_rank=0, dp_world_size=1)))
    assert inputs.keys() == {"input", "attention_mask", "decoder_input_ids"}
    assert (inputs["decoder_input_ids"][:, 0] == 0).all()
    assert torch.equal(inputs["decoder_input_ids"][0, 1:2], labels[0, :1])


def texts_of(folder, name, records, *overrides):
    """The examples that a dataset's conf file makes of records of its kind."""
    write(folder / "own" / "train.jsonl", records)
    program = graph(
        folder, f"data={name}", f"data.path={folder / 'own'}", "data.validation_fraction=0",
        *overrides,
    )  # fmt: skip
    tokenizer, examples = program.build("tokenizer"), program.build("data.examples")
    return [
        "".join(tokenizer.convert_ids_to_tokens(examples.tokens_of(i)[0].tolist()))
        for i in range(len(examples))
    ]


def test_public_datasets_are_conf_files(folder):
    with_input, without = (
        {"instruction": "a", "input": text, "output": "b", "text": "unused"} for text in ("c", "")
    )
    alpaca = texts_of(folder, "alpaca", [with_input, without])
    assert alpaca == ["a\n\n<unk>: c\n<unk>: b<eos>", "a\n\n<unk>: b<eos>"]
    dolly = [{"instruction": "a", "context": "c", "response": "b", "category": "qa"}]
    assert texts_of(folder, "dolly", dolly) == alpaca[:1]
    turns = [("system", "s"), ("human", "a"), ("gpt", "b")]
    orca = [{"conversations": [{"from": f, "value": v, "weight": None} for f, v in turns]}]
    assert texts_of(folder, "slim_orca", orca) == ["<bot><unk><end><user>a<end><bot>b<end>"]
    sst2 = [{"idx": 0, "sentence": "a", "label": "positive"}]
    assert texts_of(folder, "sst2", sst2) == ["a\n<unk>: positive<eos>"]


def test_options_of_conversations_are_keys_that_exist(folder):
    turns = [{"from": f, "value": v} for f, v in [("a", "a"), ("b", "b"), ("a", "c"), ("b", "d")]]
    overrides = (
        "data.renderer.messages_key=turns",
        "data.renderer.role_key=from",
        "data.renderer.content_key=value",
        "data.renderer.roles={a: user, b: assistant}",
        "data.renderer.assistant_turns=each",
        "data.renderer.audit=refuse",
    )
    record = {"turns": turns, "id": 0}
    texts = texts_of(folder, "jsonl", [record], *overrides, "data.renderer.ignored_fields=[id]")
    assert len(texts) == 2 and texts[0] == "<user>a<end><bot>b<end>"
    with pytest.raises(Exception, match='nothing reads "id"'):
        texts_of(folder, "jsonl", [record], *overrides)


def test_public_datasets_have_no_findings(folder, caplog):
    test_public_datasets_are_conf_files(folder)
    assert not [r.getMessage() for r in caplog.records if "nothing reads" in r.getMessage()]


def test_debug_examples(folder):
    program = graph(folder, "data=debug", "data.num_examples=5", "data.token_id=7")
    examples = program.build("data.examples")
    inputs, labels = examples[4]
    assert len(examples) == 5 and inputs["input"].tolist() == [7] * 128
    assert labels.tolist() == [-100] * 63 + [7] * 64 + [2]
    assert graph(folder, "data=debug", "data.static=false").check("data.loader").nodes


def test_without_a_path_it_is_functions_of_the_standard_library(folder):
    examples = graph(folder, "data=jsonl").build("data.validation_examples")
    assert len(examples) > 100 and examples.prompts(1)[0].count("\n") > 2


def test_training_with_workers_over_two_epochs(folder):
    """Through the command line: the last micro-batches and the validation are filled up."""
    ditty_di(
        folder,
        *("data=jsonl", f"data.path={folder}", "batching=padding_free", "data.seq_len=16"),
        *("data.loader.num_workers=1", "data.validation_loader.micro_batch_size=2"),
        *("tokenizer=pretrained", "validator=loss_only", "export=none", "checkpoint=none"),
        f"tokenizer.pretrained_model_name_or_path={folder / 'tokenizer'}",
        *(
            "max_steps=null",
            "epochs=2",
            f"run={folder / 'run'}",
            "model.config.num_hidden_layers=1",
        ),
        "global_batch_size=8",
    )
    result = json.loads((folder / "run" / "result.json").read_text())
    assert result["status"] == "finished" and result["objective"] < 3.5
    assert result["step"] == 10
