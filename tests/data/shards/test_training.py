"""Training on mixtures of shards by the command line: one rank, two ranks, and a resume."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ditty_di.data import shards, train_bpe
from ditty_di.data.reading.remote import upload
from ditty_di.data.shards import IndexWriter, Manifest, token_dtype
from ditty_di.data.tokens import tokenizer_fingerprint
from tests.warm import ditty_di

TEXTS = {
    "web": [f"the {i} words of a page, {i * i} in all" for i in range(400)],
    "code": [f"def f{i}(x):\n    return x + {i}" for i in range(400)],
}
SMALL = [
    *("+experiment=pretrain", "data=mixed", "data.path=shards", "data.ratios.code=0.3"),
    *("data.seq_len=32", "global_batch_size=8", "data.loader.micro_batch_size=2"),
    *("lr_scheduler=none", "logger.log_interval=1", "validator.max_batches=2", "export=none"),
    *("model.config.hidden_size=32", "model.config.num_hidden_layers=1"),
    *("model.config.intermediate_size=32", "data.sample_text=null"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cache_dir):
    """Two folders of shards, made by one tokenizer."""
    folder = tmp_path_factory.mktemp("training")
    trained = train_bpe(
        [text for texts in TEXTS.values() for text in texts], 400, cache_dir=cache_dir
    )
    for source, texts in TEXTS.items():
        place = folder / "shards" / source
        trained.save_pretrained(place / "tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(place / "tokenizer")
        made = []
        for split, some in {"validation": texts[:40], "train": texts[40:]}.items():
            with IndexWriter.open(place / f"{split}-0", token_dtype(len(tokenizer))) as writer:
                for ids in tokenizer(some)["input_ids"]:
                    writer.add([*ids, tokenizer.eos_token_id])
            made.append(writer.shard(split))
        eos, digest = tokenizer.eos_token_id, tokenizer_fingerprint(tokenizer)
        Manifest("k", digest, len(tokenizer), eos, 0.1, tuple(made)).write(place)
    return folder


def logged(folder, run):
    lines = map(json.loads, (folder / run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if "loss" in line}


def test_a_resume_on_two_ranks_is_the_uninterrupted_training(folder):
    ditty_di(folder, *SMALL, "run=whole", "max_steps=6", "launcher.nproc=1")
    ditty_di(folder, *SMALL, "run=halves", "max_steps=3", "launcher.nproc=1")
    ditty_di(folder, "run=halves", "max_steps=6", "launcher.nproc=2")
    whole, halves = logged(folder, "whole"), logged(folder, "halves")
    assert [*whole] == [*halves] == [1, 2, 3, 4, 5, 6]
    for step, values in whole.items():
        assert halves[step]["loss"] == pytest.approx(values["loss"], abs=2e-5)
        for name in ("epochs/web", "rows/code", "tokens/web", "tokens/code"):
            assert halves[step][name] == values[name]
        for name in ("loss/web", "loss/code"):
            assert halves[step][name] == pytest.approx(values[name], abs=2e-5)
    # 48 rows at 7:3 (0.7 and 0.3 as they are written).
    manifest = json.loads((folder / "shards" / "code" / "manifest.json").read_text())
    rows = -(-(manifest["tokens"]["train"] - 1) // 32)
    assert whole[6]["epochs/code"] * rows == pytest.approx(14, abs=1)


@pytest.mark.slow
def test_training_from_an_object_store_is_training_from_disk(folder, s3, tmp_path, monkeypatch):
    """Resumed on two ranks with workers, which share a cache of one shard and a bit."""
    names = [
        p.relative_to(folder / "shards/web").as_posix()
        for p in (folder / "shards/web").rglob("*.*")
    ]
    upload(folder / "shards/web", f"{s3}/web", names)
    monkeypatch.setenv("DITTY_DI_CACHE", str(tmp_path))
    small = [
        argument
        for argument in SMALL
        if not argument.startswith(("data=", "data.path", "data.ratios"))
    ]
    pooled = "{_target_: ditty_di.data.PooledSampler, _partial_: true, dataset: '${data.train}'}"
    on_disk = ["data=shards", "data.path=shards/web", f"data.loader.sampler={pooled}"]
    ditty_di(folder, *small, *on_disk, "run=disk", "max_steps=6", "launcher.nproc=1")
    largest = max(path.stat().st_size for path in (folder / "shards/web").glob("*.bin"))
    remote = ["data=shards", f"data.path={s3}/web", f"data.cache.limit_gb={1.5 * largest / 1e9}"]
    ditty_di(folder, *small, *remote, "run=store", "max_steps=3", "launcher.nproc=1")
    more = ["max_steps=6", "launcher.nproc=2"]
    ditty_di(folder, "run=store", *more)
    disk, store = logged(folder, "disk"), logged(folder, "store")
    assert [*disk] == [*store] == [1, 2, 3, 4, 5, 6]
    for step, values in disk.items():
        assert store[step]["loss"] == pytest.approx(values["loss"], abs=2e-5)


def test_examples_beside_shards(folder):
    """The configuration of the README."""
    readme = Path(shards.__file__).with_name("README.md").read_text()
    (shown,) = re.findall(r"```yaml\n(# conf/data/web_and_chat.yaml\n.*?)```", readme, re.DOTALL)
    file = folder / "conf" / "data" / "web_and_chat.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(shown)
    records = [{"input": f"words {i}", "output": f" {i * i} in all"} for i in range(60)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    common = [a for a in SMALL if not a.startswith(("data=", "data.path", "data.ratios"))]
    run = ["data=web_and_chat", "data.path=shards", "run=chat", "max_steps=4"]
    ditty_di(folder, *common, *run, "launcher.nproc=2", "validator.max_batches=null")
    last = logged(folder, "chat")[4]
    assert (last["rows/web"], last["rows/chat"]) == (24, 8) and last["epochs/chat"] > 0
    assert min(last["loss/web"], last["loss/chat"]) > 0 and last["tokens/chat"] > 0
    lines = map(json.loads, (folder / "chat" / "metrics.jsonl").read_text().splitlines())
    validated = [line for line in lines if "validation/loss" in line]
    assert {"validation/loss/web", "validation/loss/code"} <= validated[-1].keys()
