"""Text to shards on one core, against a bare loop of `encode_batch` and other libraries.

All contenders read or have the same documents (the running Python's documentation and sources) and
the same byte-level BPE, and use one thread. They take turns in random order; a turn is compared
with the bare loop of its own round, because the machine's speed drifts. `ditty_di` is the whole of
`task=tokenize`: reading .jsonl, tokens, shards with checksums and fsync, receipts, manifest.
Contenders that are not installed are left out (datatrove with orjson; mosaicml-streaming; litdata).

    launch/bench tokenize --json tokenize.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# One thread for everything, before any library reads it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["DATATROVE_COLORIZE_LOGS"] = "0"

import numpy as np
from _here import environment

from ditty_di.data import train_bpe
from ditty_di.data.reading.python_code import python_code, python_docs
from ditty_di.data.tokenization import Pool, TextFiles, part
from ditty_di.tasks.tokenize import tokenize

BATCH = 256  # documents that others encode at once
CLOCKS = ("wall", "cpu")


class Contenders:
    """The ways to make token files of the same documents."""

    def __init__(self, megabytes: float, vocab_size: int, folder: Path) -> None:
        self.folder = folder
        documents = [*python_docs().train, *python_code().train]
        self.tokenizer = train_bpe(documents, vocab_size)
        self.backend = self.tokenizer.backend_tokenizer
        self.texts: list[str] = []
        size = 0
        while size < megabytes * 1e6:
            self.texts.append(documents[len(self.texts) % len(documents)])
            size += len(self.texts[-1].encode())
        self.size = size
        self.source = folder / "in" / "corpus.jsonl"
        self.source.parent.mkdir()
        with self.source.open("w") as stream:
            stream.writelines(json.dumps({"text": text}) + "\n" for text in self.texts)
        self.batches = [self.texts[i : i + BATCH] for i in range(0, len(self.texts), BATCH)]
        self.saved = folder / "tokenizer.json"
        self.backend.save(str(self.saved))
        self.eos = self.tokenizer.eos_token_id

    def all(self) -> dict[str, Callable[[], None]]:
        return {
            "encode_batch": self.encode_batch,
            "encode_batch_fast": self.encode_batch_fast,
            "ditty_di": self.ditty_di,
            "datatrove": self.datatrove,
            "datasets.map": self.datasets_map,
            "transformers": self.transformers,
            "MDSWriter": self.mds,
            "litdata": self.litdata,
        }

    def fresh(self) -> Path:
        path = self.folder / "out"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def encode_batch(self) -> None:
        for batch in self.batches:
            self.backend.encode_batch(batch, add_special_tokens=False)

    def encode_batch_fast(self) -> None:
        for batch in self.batches:
            self.backend.encode_batch_fast(batch, add_special_tokens=False)

    def ditty_di(self) -> None:
        source = TextFiles(self.source)
        folder, engine = str(self.fresh() / "shards"), Pool(workers=1)
        part.encoder_of.cache_clear()  # it would know the words from the turn before
        tokenize(self.tokenizer, folder, source, engine=engine, report_mb=0)

    def datatrove(self) -> None:
        from datatrove.executor import LocalPipelineExecutor
        from datatrove.pipeline.readers import JsonlReader
        from datatrove.pipeline.tokens import DocumentTokenizer

        out = self.fresh()
        step = DocumentTokenizer(
            str(out / "tokens"),
            str(self.saved),
            eos_token="<|endoftext|>",
            shuffle_documents=False,
            batch_size=BATCH,
        )
        pipeline = [JsonlReader(str(self.source.parent)), step]
        LocalPipelineExecutor(pipeline, tasks=1, workers=1, logging_dir=str(out / "log")).run()

    def datasets_map(self) -> None:
        import datasets

        def encode(batch: dict[str, Any]) -> dict[str, Any]:
            found = self.backend.encode_batch_fast(batch["text"], add_special_tokens=False)
            return {"ids": [np.array([*e.ids, self.eos], np.uint16) for e in found]}

        datasets.disable_progress_bars()
        rows = datasets.Dataset.from_json(str(self.source), cache_dir=str(self.fresh()))
        rows.map(
            encode,
            batched=True,
            batch_size=BATCH,
            remove_columns=["text"],
            load_from_cache_file=False,
            new_fingerprint=str(time.time_ns()),
        )

    def transformers(self) -> None:
        for batch in self.batches:
            options = {"add_special_tokens": False, "return_attention_mask": False}
            for ids in self.tokenizer(batch, verbose=False, **options)["input_ids"]:
                np.asarray([*ids, self.eos], np.uint16)

    def mds(self) -> None:
        from streaming import MDSWriter

        out, columns = str(self.fresh() / "mds"), {"tokens": "ndarray:uint16"}
        with MDSWriter(out=out, columns=columns, compression=None) as writer:
            for batch in self.batches:
                for e in self.backend.encode_batch_fast(batch, add_special_tokens=False):
                    writer.write({"tokens": np.array([*e.ids, self.eos], np.uint16)})

    def litdata(self) -> None:
        import torch
        from litdata.streaming.writer import BinaryWriter

        writer, index = BinaryWriter(str(self.fresh()), chunk_bytes="64MB"), 0
        for batch in self.batches:
            for e in self.backend.encode_batch_fast(batch, add_special_tokens=False):
                writer[index] = torch.tensor([*e.ids, self.eos], dtype=torch.uint16)
                index += 1
        writer.done()


def measure(contenders: Contenders, rounds: int) -> dict[str, Any]:
    ways, left_out = contenders.all(), {}
    for name, way in list(ways.items()):
        try:
            way()
        except ImportError as error:
            left_out[name] = str(error).partition("\n")[0]
            del ways[name]
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    order = random.Random(0)
    for _ in range(rounds):
        # In another order each time: what ran before changes the speed by some percent.
        for name, way in order.sample([*ways.items()], len(ways)):
            start = time.perf_counter(), time.process_time()
            way()
            end = time.perf_counter(), time.process_time()
            spent = [after - before for before, after in zip(start, end, strict=True)]
            turns[name].append(dict(zip(CLOCKS, spent, strict=True)))
    results: dict[str, Any] = {"left_out": left_out}
    for name in ways:
        results[name] = {}
        for clock in CLOCKS:
            mine, bare = ([turn[clock] for turn in turns[who]] for who in (name, "encode_batch"))
            results[name][clock] = {
                "mb_per_second": contenders.size / statistics.median(mine) / 1e6,
                "ratio": statistics.median(b / m for b, m in zip(bare, mine, strict=True)),
            }
    return results


#: A worker's memory with one document of many megabytes, in a process that has nothing else.
MEMORY = """
import sys
from pathlib import Path
from ditty_di.data.tokenization.documents import Reading
from ditty_di.data.tokenization.part import Job, run_part
from ditty_di.data.tokenization.plan import plan
from ditty_di.data.tokenization.sources import TextFiles
import resource
text, tokenizer, out = map(Path, sys.argv[1:])
(out / "receipts").mkdir(parents=True)
reading = Reading()
(part,) = plan(TextFiles(text).files(), reading, 1 << 40)
run_part(Job(out, tokenizer, "key", 0, 1 << 16, reading), part)
# Not ru_maxrss: Linux counts in what the process was before it became this program.
status = Path("/proc/self/status")
if status.exists():
    print(next(x.split()[1] for x in status.read_text().splitlines() if x.startswith("VmHWM")))
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_memory(contenders: Contenders, megabytes: float) -> float:
    """Peak memory of a worker that tokenizes one document, a line of .jsonl, in MB."""
    text = contenders.folder / "long.jsonl"
    body = "\n".join(contenders.texts)
    document = (body * (1 + int(megabytes * 1e6 / len(body))))[: int(megabytes * 1e6)]
    text.write_text(json.dumps({"text": document}) + "\n")
    out = contenders.fresh() / "long"
    command = [sys.executable, "-c", MEMORY, str(text), str(contenders.saved), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    unit = 1 if sys.platform == "darwin" else 1024
    return int(done.stdout) * unit / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=11, help="of text, repeated above 11")
    parser.add_argument("--vocab-size", type=int, default=16384, help="of the tokenizer")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--long", type=float, default=64, help="MB of the longest document")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    here = environment()
    with tempfile.TemporaryDirectory() as folder:
        contenders = Contenders(options.megabytes, options.vocab_size, Path(folder))
        results = measure(contenders, options.rounds)
        results["peak_memory_mb"] = peak_memory(contenders, options.long)
    results["of_this_process_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"\n{here['processor']}, one thread; load {here['load_average']:.1f}")
    print(f"{contenders.size / 1e6:.1f} MB, {len(contenders.texts)} documents\n")
    heads = [f"{clock} {what}" for clock in CLOCKS for what in ("MB/s", "ratio")]
    print(" " * 20 + "".join(f"{head:>12}" for head in heads))
    for name in [n for n in contenders.all() if n not in results["left_out"]]:
        cells = (results[name][c][k] for c in CLOCKS for k in ("mb_per_second", "ratio"))
        print(f"{name:20}" + "".join(f"{cell:12.2f}" for cell in cells))
    print("\nratio: to encode_batch in the same round")
    print(
        f"peak of a worker, one document of {options.long:g} MB: {results['peak_memory_mb']:.0f} MB"
    )
    for name, why in results["left_out"].items():
        print(f"left out: {name} ({why})")
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        report = {"environment": here, "settings": settings, "results": results}
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
