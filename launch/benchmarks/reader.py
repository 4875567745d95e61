"""Rows a second of shards against a bare np.memmap slice and other readers; opening 1e12 tokens.

Rows of 2,049 tokens are read in random order from a warm cache, in one process. The readers take
short turns, and reported is the median of each one's CPU time, which other programs disturb less
than wall time. megatron-core, datatrove and mosaicml-streaming take part where they are installed.

Then 1e12 tokens are opened, 5,000 shards whose files are sparse, in a process of its own: seconds,
resident memory, the first row, and 2,048 rows in shuffled order over all of them. At last the
tiny Llama is trained on shards with 0 and 2 workers: the share of its time in which it waits for
data, as the run itself reports it (`data_loading_share`).

    launch/bench reader --json reader.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from _here import environment

from ditty_di.data import KeyedSampler, Shards, train_bpe
from ditty_di.data.shards import IndexWriter, Manifest, Shard, write_index
from ditty_di.data.tokenization import Pool, TextFiles
from ditty_di.tasks.tokenize import tokenize

SEQ, VOCAB = 2048, 50_000
Reader = Callable[[int], Any]


def make(folder: Path, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Write one shard of random documents of about 700 tokens; return its tokens and lengths."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, VOCAB, rows * SEQ + 1, dtype=np.uint16)
    cuts = np.sort(draw.choice(np.arange(1, len(tokens)), len(tokens) // 700, replace=False))
    tokens[cuts - 1] = 0
    with IndexWriter.open(folder / "train-000000", "<u2") as writer:
        for document in np.split(tokens, cuts):
            writer.add(document)
    Manifest("bench", "none", VOCAB, 0, 0.0, (writer.shard("train"),)).write(folder)
    return tokens, np.diff([0, *cuts, len(tokens)])


def megatron(folder: Path, tokens: np.ndarray, lengths: np.ndarray, rows: int) -> Reader:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        vocab_size, eod, pad, unique_identifiers = VOCAB, 0, 1, {"name": "bench"}

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQ,
        tokenizer=Tokenizer(),
        split="1",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=str(folder / "cache"),
        mid_level_dataset_surplus=0.0,
    )
    low = IndexedDataset(str(folder / "train-000000"))
    indices = np.arange(len(low), dtype=np.int32)
    data = GPTDataset(low, "bench", indices, rows - 10, Split.train, config)
    return lambda row: data[row % (rows - 20)]["tokens"]


def datatrove(folder: Path, tokens: np.ndarray, lengths: np.ndarray, rows: int) -> Reader:
    from datatrove.utils.dataset import DatatroveFileDataset

    tokens.tofile(folder / "bench.ds")
    np.cumsum(lengths).astype("<u8").tofile(folder / "bench.ds.index")
    data = DatatroveFileDataset(str(folder / "bench.ds"), SEQ, token_size=2)
    return lambda row: data[row % (len(data) - 1)]


def mosaic(folder: Path, tokens: np.ndarray, lengths: np.ndarray, rows: int) -> Reader:
    from streaming import MDSWriter, StreamingDataset

    columns = {"tokens": f"ndarray:uint16:{SEQ + 1}"}
    with MDSWriter(out=str(folder / "mds"), columns=columns) as writer:
        for row in range(rows):
            writer.write({"tokens": tokens[row * SEQ : row * SEQ + SEQ + 1]})
    data = StreamingDataset(local=str(folder / "mds"), batch_size=1, shuffle=False)
    return lambda row: data[row]["tokens"]


def readers(folder: Path, rows: int) -> dict[str, Reader]:
    tokens, lengths = make(folder, rows)
    flat = np.memmap(folder / "train-000000.bin", np.uint16, "r")
    masked, joined = Shards(folder, SEQ), Shards(folder, SEQ, documents="joined")
    found: dict[str, Reader] = {
        "np.memmap slice": lambda row: np.asarray(flat[row * SEQ : row * SEQ + SEQ + 1], np.int64),
        "Shards.window": masked.window,
        "Shards, joined": joined.__getitem__,
        "Shards, masked": masked.__getitem__,
    }
    for make_other in (megatron, datatrove, mosaic):
        try:
            found[make_other.__name__] = make_other(folder, tokens, lengths, rows)
        except ImportError as error:
            print(f"{make_other.__name__} is not installed: {error}")
    return found


def speed(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found = readers(Path(folder), options.rows)
        rows = np.random.default_rng(1).integers(0, options.rows - 1, options.reads).tolist()
        seconds: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(options.rounds):
            for name, read in found.items():
                start = time.process_time()
                for row in rows:
                    read(row)
                seconds[name].append(time.process_time() - start)
        base = statistics.median(seconds["np.memmap slice"])
        return {
            name: {
                "rows_per_second": options.reads / statistics.median(times),
                "ratio_to_memmap": base / statistics.median(times),
            }
            for name, times in seconds.items()
        }


def resident() -> float:
    """Return the resident memory of this process, in MB."""
    status = Path("/proc/self/status").read_text().split("VmRSS:")[1]
    return int(status.split()[0]) / 1000


def trillion(folder: str) -> dict[str, float]:
    """Open a folder and read from it, in a fresh process."""
    before, start, cpu = resident(), time.perf_counter(), time.process_time()
    data = Shards(folder, SEQ)
    sampler = KeyedSampler(len(data), 0, True)
    opened, cpu, first = time.perf_counter() - start, time.process_time() - cpu, time.perf_counter()
    data[sampler.between(0, 1)[0]]
    first = time.perf_counter() - first
    after_first, reads, start = resident(), 2048, time.process_time()
    for row in sampler.between(1, 1 + reads):
        data[row]
    seconds = time.process_time() - start
    return {
        "rows": len(data),
        "seconds_to_open": opened,
        "cpu_seconds_to_open": cpu,
        "seconds_of_first_row": first,
        "megabytes_after_first_row": after_first - before,
        "megabytes_after_shuffled_rows": resident() - before,
        "shuffled_rows_per_second": reads / seconds,
        "open_files": data.files.descriptors,
    }


def sparse(options: argparse.Namespace) -> dict[str, float]:
    tokens, document = 200_000_000, 20_000
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "shared.idx"
        write_index(index, np.full(tokens // document, document))
        shards = []
        for number in range(options.shards):
            name = f"train-{number:06d}"
            with (Path(folder) / f"{name}.bin").open("wb") as stream:
                stream.truncate(2 * tokens)
            os.link(index, Path(folder) / f"{name}.idx")
            shards.append(Shard(name, "train", tokens // document, tokens, "<u2", "0" * 64))
        Manifest("bench", "none", VOCAB, 0, 0.0, tuple(shards)).write(folder)
        command = [sys.executable, __file__, "--open", folder]
        made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(made.stdout.splitlines()[-1])


def feeding(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Train on shards; return the share of the time that waits for data, and the step's time."""
    found = {}
    texts = ["one two three four five six seven eight nine ten " * 40] * 400
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_bpe(texts[:1], 300, cache_dir=folder)
        (Path(folder) / "texts.jsonl").write_text(
            "".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i, text in enumerate(texts))
        )
        source = TextFiles(Path(folder) / "texts.jsonl")
        tokenize(tokenizer, f"{folder}/shards", source, engine=Pool(1), report_mb=0)
        for workers in (0, 2):
            command = (
                "+experiment=pretrain data=shards data.path=shards tokenizer=auto "
                f"run=run{workers} data.loader.num_workers={workers} max_steps={options.steps} "
                "logger.log_interval=5 validator=null checkpoint=null export=null"
            )
            subprocess.run(
                [sys.executable, "-m", "ditty_di", *command.split()],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
                check=True,
                stdout=subprocess.DEVNULL,
            )
            lines = (Path(folder) / f"run{workers}" / "metrics.jsonl").read_text().splitlines()
            steps = [line for line in map(json.loads, lines) if "data_loading_share" in line]
            # Not the first report, in which the workers start.
            found[f"{workers}_workers"] = {
                name: statistics.median(line[name] for line in steps[1:])
                for name in ("data_loading_share", "seconds_per_step")
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000, help="of 2,049 tokens in the file")
    parser.add_argument("--reads", type=int, default=3_000, help="rows that a turn reads")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each reader")
    parser.add_argument("--shards", type=int, default=5_000, help="of 2e8 tokens each")
    parser.add_argument("--steps", type=int, default=40, help="of each training")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--open", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        print(json.dumps(trillion(options.open)))
        return
    here = environment()
    results = {
        "readers": speed(options),
        "trillion": sparse(options),
        "feeding": feeding(options),
    }
    print(f"\n{here['processor']}, load {here['load_average']:.1f}\n")
    print(f"{'':24}{'rows/s of CPU':>16}{'to np.memmap':>16}")
    for name, found in results["readers"].items():
        print(f"{name:24}{found['rows_per_second']:16,.0f}{found['ratio_to_memmap']:16.2f}")
    print(f"\n{options.shards * 200_000_000:.0e} tokens:")
    for name, value in results["trillion"].items():
        print(f"  {name:32}{value:16,.3f}")
    print()
    for name, step in results["feeding"].items():
        share, seconds = step["data_loading_share"], step["seconds_per_step"]
        print(f"training with {name}: {share:.1%} of a step of {seconds:.2f} s waits for data")
    if options.json:
        settings = {
            name: value for name, value in vars(options).items() if name not in ("json", "open")
        }
        report = {"environment": here, "settings": settings, "results": results}
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
