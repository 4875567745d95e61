from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf.errors import MissingMandatoryValue

from ditty_di.data import train_bpe

CONF = Path(__file__).parents[2] / "conf"


def build(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(overrides=[*overrides, "+seed=3", "+epochs=2"])
    return instantiate(config)


@pytest.fixture(autouse=True)
def cache(cache_dir, monkeypatch):
    monkeypatch.setenv("DITTY_DI_CACHE", str(cache_dir))


def test_the_default_data_train_a_language_model():
    program = build("+data=python_docs", "+tokenizer=bpe")
    data = program.data
    loader = data.loader(dp_rank=0, dp_world_size=1)
    inputs, labels = next(iter(loader))
    assert inputs["input"].shape == labels.shape == (loader.batch_size, data.seq_len)
    assert program.tokenizer.model_max_length == data.seq_len
    assert loader.seed == 3 and len(loader) == -(-2 * len(data.train) // loader.batch_size)
    validation = data.validation_loader(dp_rank=0, dp_world_size=2)
    assert len(validation) == -(-len(data.validation) // (2 * validation.batch_size))
    assert not validation.shuffle


def test_a_users_own_text_with_a_pretrained_tokenizer(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"body": "one two"}\n{"body": "three"}\n')
    train_bpe(["one two three"]).save_pretrained(tmp_path / "tokenizer")
    program = build(
        "+data=text",
        f"data.corpus.path={tmp_path / 'mine.jsonl'}",
        "data.corpus.text_key=body",
        "data.seq_len=8",
        "+tokenizer=pretrained",
        f"tokenizer.pretrained_model_name_or_path={tmp_path / 'tokenizer'}",
    )
    texts = [
        program.tokenizer.decode(split.tokens)
        for split in (program.data.train, program.data.validation)
    ]
    assert sorted(texts) == ["one two<|endoftext|>", "three<|endoftext|>"]


def test_what_must_be_given_is_missing_until_then():
    with pytest.raises(MissingMandatoryValue, match=r"corpus\.path"):
        build("+data=text", "+tokenizer=bpe")
