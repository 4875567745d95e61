"""From text to a trained model, at any size, with the tokens a second of each step.

The text is what packages of this machine ship: Debian's /usr/share/doc and manual pages, and of
Python's packages the .rst, .md and .txt files and what stands in triple quotes; equal documents
once. Each step is a command as a person types it, in a process of its own. Then two network
namespaces without any network between them tokenize the same text into one folder, as two machines
with a shared folder would: the shards must be the same bytes.

    launch/real-data --megabytes 200 --json real_data.json
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import re
import resource
import shlex
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from _here import environment

ROOT = Path(__file__).parents[2]
#: Suffixes of documentation that is not prose.
NO_TEXT = {".ps", ".tar", ".svg", ".html", ".js", ".css", ".eps", ".pdf", ".png", ".xml", ".json"}
QUOTED = re.compile(r'"""(.{80,}?)"""', re.DOTALL)
STEP_LIMIT = 7200  # seconds


# --- the text ------------------------------------------------------------------------------------


def files_below(folder: str | Path) -> Iterator[Path]:
    """Yield the files of a folder, sorted, without links."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        yield from (path for name in sorted(names) if not (path := Path(place, name)).is_symlink())


def text_of(path: Path) -> str | None:
    """Return the text of a file, unpacked; None where it is none."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error):
        return None
    return text if text.strip() and "\0" not in text else None


def debian() -> Iterator[tuple[Path, str | None]]:
    """Yield the documentation of Debian's packages."""
    for folder in ("/usr/share/doc", "/usr/share/info"):
        for path in files_below(folder):
            if not NO_TEXT & {*path.suffixes}:
                yield path, text_of(path)


def manual() -> Iterator[tuple[Path, str | None]]:
    """Yield the manual pages."""
    for path in files_below("/usr/share/man"):
        yield path, text_of(path)


def python() -> Iterator[tuple[Path, str | None]]:
    """Yield the documentation of Python and its packages: text files, and texts in sources."""
    paths = sysconfig.get_paths()
    for folder in dict.fromkeys([paths["purelib"], paths["stdlib"]]):
        for path in files_below(folder):
            if path.suffix in (".rst", ".md", ".txt"):
                yield path, text_of(path)
            elif path.suffix == ".py":
                yield path, "\n\n".join(QUOTED.findall(text_of(path) or ""))


SOURCES = {"debian": debian, "manual": manual, "python": python}


def collect(folder: Path, megabytes: float) -> dict[str, dict[str, int]]:
    """Write the text as one .jsonl a source; return documents and bytes of each.

    The next document is of the source that has the fewest bytes so far, so that a small text is a
    mixture as well.
    """
    folder.mkdir(parents=True)
    sources = {name: read() for name, read in SOURCES.items()}
    sizes, documents, left_out = Counter(dict.fromkeys(sources, 0)), Counter[str](), Counter[str]()
    streams = {name: (folder / f"{name}.jsonl").open("w", encoding="utf-8") for name in sources}
    seen: set[bytes] = set()
    left = dict(sources)
    while left and sum(sizes.values()) < megabytes * 1e6:
        name = min(left, key=sizes.__getitem__)
        path, text = next(left[name], (None, None))
        if path is None:
            del left[name]
            continue
        if not text or not text.strip():
            left_out["not text"] += 1
            continue
        data = text.encode()
        if (digest := hashlib.sha256(data).digest()) in seen:
            left_out["duplicates"] += 1
            continue
        seen.add(digest)
        streams[name].write(json.dumps({"text": text, "file": str(path)}) + "\n")
        sizes[name] += len(data)
        documents[name] += 1
    for name, stream in streams.items():
        stream.close()
        if not documents[name]:
            (folder / f"{name}.jsonl").unlink()
    found = {name: {"documents": documents[name], "bytes": sizes[name]} for name in sources}
    return found | {"left_out": dict(left_out)}


# --- the steps -----------------------------------------------------------------------------------


class Steps:
    """Commands that are run in a folder, one after the other, and what each took.

    Args:
        folder: Working folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, list[dict[str, Any]]()
        cache = str(folder / "cache")
        self.variables = {**os.environ, "PYTHONPATH": str(ROOT), "DITTY_DI_CACHE": cache}

    def run(self, step: str, arguments: str, lines: int = 40) -> str:
        """Run `python -m ditty_di ARGUMENTS`, print its first lines, and return all it printed."""
        print(f"$ python -m ditty_di {arguments}", flush=True)
        before, started = _cpu_seconds(), time.perf_counter()
        output = self.finish(self.start(arguments), arguments)
        seconds, cpu = time.perf_counter() - started, _cpu_seconds() - before
        shown = output.splitlines()
        more = ["[...]"] if len(shown) > lines else []
        print("\n".join([*shown[:lines], *more, ""]), flush=True)
        self.rows.append({"step": step, "seconds": seconds, "cpu_seconds": cpu})
        return output

    def start(self, arguments: str, *before: str) -> subprocess.Popen[str]:
        """Start a command, behind such words as `ip netns exec NAME`."""
        return subprocess.Popen(
            [*before, sys.executable, "-m", "ditty_di", *shlex.split(arguments)],
            cwd=self.folder,
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @staticmethod
    def finish(process: subprocess.Popen[str], arguments: str) -> str:
        """Wait for a command and return what it printed; exit where it failed."""
        try:
            output, _ = process.communicate(timeout=STEP_LIMIT)
        finally:
            process.kill()
        if process.returncode:
            sys.exit(f"failed with {process.returncode}: {arguments}\n{output}")
        return output

    def add(self, tokens: float, tokens_per_second: float | None = None, **more: Any) -> None:
        """Add the tokens of the last step, and their speed where the step told it."""
        row = self.rows[-1]
        row |= {"tokens": tokens, "tokens_per_second": tokens_per_second, **more}
        if tokens_per_second is None:
            row["tokens_per_second"] = tokens / row["seconds"]


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def tokens_of(shards: Path) -> dict[str, int]:
    """Return the tokens of each split, from the manifest."""
    return json.loads((shards / "manifest.json").read_text())["tokens"]


def digest_of(shards: Path) -> str:
    """Return a digest of the manifest and all shards, names included."""
    digest = hashlib.sha256()
    for path in sorted([*shards.glob("*.bin"), *shards.glob("*.idx"), shards / "manifest.json"]):
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def number(pattern: str, text: str) -> float:
    """Return the number that a pattern finds."""
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern} in:\n{text}"
    return float(found[1].replace(",", ""))


def walk_through(steps: Steps, options: argparse.Namespace, data: str, size: float) -> None:
    """Tokenize the text, look at the tokens, train a model."""
    shards = steps.folder / "shards" / "files"
    vocab = f"tokenizer.vocab_size={options.vocab_size}"
    output = steps.run("tokenize", f"task=tokenize {data} {vocab} workers={options.workers}")
    tokens = tokens_of(shards)
    total = sum(tokens.values())
    steps.add(total, number(r"([\d,]+) tokens/s", output))
    # Of the same command: the tokenizer was trained on a sample before.
    seconds = number(r"trained a tokenizer of \d+ tokens in (\d+) s", output)
    part = total * min(1.0, 100 * 2**20 / size)
    row = {"step": "train a tokenizer", "seconds": seconds, "cpu_seconds": None, "tokens": part}
    steps.rows.insert(0, row | {"tokens_per_second": part / max(seconds, 1)})

    steps.run("check all hashes", f"task=tokenize {data} task.check=true")
    steps.add(total)
    output = steps.run("stats", f"task=stats {data} output=stats.json rows={options.rows}")
    read = json.loads((steps.folder / "stats.json").read_text())
    steps.add(sum(source["tokens"] for source in read["sources"].values()), rows=read["rows"])
    steps.run("preview", f"task=preview {data} max_chars=200", lines=24)
    steps.add(8 * 256)
    steps.run(
        "train a model",
        f"+experiment=pretrain {data} run=run max_steps={options.steps} "
        "data.loader.num_workers=2 validator.max_batches=10 logger.log_interval=10",
    )
    lines = (steps.folder / "run" / "metrics.jsonl").read_text().splitlines()
    found = [line for line in map(json.loads, lines) if "tokens_per_second" in line]
    # Without the first report, which has the warm-up.
    speed, waited = (
        statistics.median(line[key] for line in found[1:] or found)
        for key in ("tokens_per_second", "data_loading_share")
    )
    steps.add(options.steps * 16 * 256, speed, data_loading_share=waited)


def two_machines(steps: Steps, options: argparse.Namespace, data: str) -> dict[str, Any]:
    """Tokenize from two network namespaces into one folder, and compare with the first shards."""
    names = [f"ditty-di-{os.getpid()}-{i}" for i in range(2)]
    made = list[str]()
    try:
        for name in names:
            command = ["ip", "netns", "add", name]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
            made.append(name)
        started = time.perf_counter()
        running = []
        for rank, name in enumerate(names):
            arguments = (
                f"task=tokenize {data} data.shards=shards/two workers=1 "
                f"tokenizer.vocab_size={options.vocab_size} "
                f"engine.rank={rank} engine.world=2"
            )
            print(f"$ ip netns exec {name} python -m ditty_di {arguments}", flush=True)
            process = steps.start(arguments, "ip", "netns", "exec", name)
            running.append((process, arguments))
        for process, arguments in running:
            print(steps.finish(process, arguments), flush=True)
        seconds = time.perf_counter() - started
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        return {
            "skipped": f"no network namespaces here (`ip netns` of iproute2, as root): {reason}"
        }
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False, timeout=60)
    digests = [digest_of(steps.folder / "shards" / name) for name in ("files", "two")]
    if digests[0] != digests[1]:
        sys.exit(f"the shards differ: {digests}")
    return {"seconds": seconds, "sha256": digests[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=200, help="of text")
    parser.add_argument("--vocab-size", type=int, default=16384, help="of the tokenizer")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument(
        "--rows", type=int, default=20_000, help="rows of 256 tokens for task=stats"
    )
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of the training")
    parser.add_argument("--folder", help="where to work; kept (a temporary one is not)")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    here = environment()
    with ExitStack() as stack:
        folder = Path(options.folder or stack.enter_context(tempfile.TemporaryDirectory()))
        started = time.perf_counter()
        found = collect(folder / "texts", options.megabytes)
        size = sum(found[name]["bytes"] for name in SOURCES)
        print(f"{size / 1e6:.1f} MB of text in {time.perf_counter() - started:.0f} s")
        for name in SOURCES:
            print(
                f"  {name}: {found[name]['documents']:,} documents, {found[name]['bytes']:,} bytes"
            )
        steps = Steps(folder)
        data = "data=files data.path=texts"
        if (documents := sum(found[name]["documents"] for name in SOURCES)) < 1000:
            # Documents are held out by their hashes: of few, the default 1 % can be none at all.
            data += f" data.validation_fraction={min(0.3, 30 / documents):.2f}"
        walk_through(steps, options, data, size)
        machines = two_machines(steps, options, data)
    print(f"{here['processor']}, {here['cores']} cores, load {here['load_average']:.1f}\n")
    print(f"{'':20}{'seconds':>10}{'of CPU':>10}{'tokens':>14}{'tokens/s':>12}")
    for row in steps.rows:
        cpu = "" if row["cpu_seconds"] is None else f"{row['cpu_seconds']:.0f}"
        print(
            f"{row['step']:20}{row['seconds']:10.0f}{cpu:>10}{row['tokens']:14,.0f}"
            f"{row['tokens_per_second']:12,.0f}"
        )
    print(f"\ntwo network namespaces, one folder: {machines}")
    if options.json:
        kept = {k: v for k, v in vars(options).items() if k not in ("json", "folder")}
        results = {"text": found, "steps": steps.rows, "two_namespaces": machines}
        report = {"environment": here, "settings": kept, "results": results}
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
