"""An embedding model opens in sentence-transformers, with the embeddings of the training."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForMaskedLM, BertConfig

from ditty_di.batch import Batch, Context
from ditty_di.data.collate import PairsCollate
from ditty_di.export import SentenceTransformersExport
from ditty_di.models import encoder
from ditty_di.processors import KeepInput, Pooling
from ditty_di.tasks.loading import ready
from tests.data.words import word_tokenizer

TEXTS = ["a b c", "d", "e f g h a b", "h g f"]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(bos=True, model_max_length=32)


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = BertConfig(
        **sizes, num_attention_heads=4, vocab_size=len(tokenizer), initializer_range=0.3
    )
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    built = encoder.from_pretrained(folder, tokenizer=tokenizer)
    ready(built, built.default_weights, torch.device("cpu"))
    return built


def embeddings(model, tokenizer, pooling):
    """What the training makes of the texts: two anchors, and their positives."""
    ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]
    pairs = zip(ids[:2], ids[2:], strict=True)
    rows = [({"anchor": a, "positive": b}, torch.tensor([0])) for a, b in pairs]
    batch = Batch.of(PairsCollate(pad_id=0)(rows))
    inputs = {name: value for name, value in batch.inputs.items() if name != "input"}
    with torch.no_grad():
        output = model(batch.inputs["input"], **inputs)
    return pooling.process(output, Context(forward_kwargs=inputs))[0]


@pytest.mark.parametrize("mode", ["mean", "cls", "last"])
def test_sentence_transformers_makes_the_same_embeddings(model, tokenizer, tmp_path, mode):
    library = pytest.importorskip(
        "sentence_transformers", reason="pip install sentence-transformers"
    )
    pooling = Pooling(mode=mode)
    export = SentenceTransformersExport(
        tokenizer, str(tmp_path / "out"), postprocessors=[pooling], normalize=mode == "mean"
    )
    export.prepare([model])
    export([model])
    opened = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    found = opened.encode(TEXTS, convert_to_tensor=True)
    expected = embeddings(model, tokenizer, pooling)
    expected = F.normalize(expected, dim=-1) if mode == "mean" else expected
    assert torch.allclose(found, expected, atol=1e-6) and opened.max_seq_length == 32


def test_the_folder_says_how_embeddings_are_made(model, tokenizer, tmp_path):
    """The files of the layout, for those without the library."""
    export = SentenceTransformersExport(
        tokenizer,
        str(tmp_path / "out"),
        postprocessors=[Pooling(mode="last")],
        cosine=False,
        max_seq_length=16,
    )
    export([model])
    read = {
        str(file.relative_to(tmp_path / "out")): json.loads(file.read_text())
        for file in (tmp_path / "out").rglob("*.json")
    }
    paths = [module["path"] for module in read["modules.json"]]
    assert paths == ["", "1_Pooling", "2_Normalize"]
    pooling = read["1_Pooling/config.json"]
    chosen = [name for name, value in pooling.items() if value is True and "mode" in name]
    assert chosen == ["pooling_mode_lasttoken"] and pooling["word_embedding_dimension"] == 32
    assert read["sentence_bert_config.json"]["max_seq_length"] == 16
    assert read["config_sentence_transformers.json"]["similarity_fn_name"] == "dot"
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "pipeline_tag: sentence-similarity" in card
        and "library_name: sentence-transformers" in card
    )


def test_a_run_without_pooling_is_refused_before_it_trains(model, tokenizer, tmp_path):
    export = SentenceTransformersExport(tokenizer, str(tmp_path), postprocessors=[KeepInput()])
    with pytest.raises(ValueError, match=r"no ditty_di\.processors\.Pooling among"):
        export.prepare([model])
