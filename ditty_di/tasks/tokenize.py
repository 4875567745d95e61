"""Text into shards of token ids."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ditty_di.data import options
from ditty_di.data.cache import build_once
from ditty_di.data.reading import remote
from ditty_di.data.reading.remote import is_url
from ditty_di.data.shards.manifest import NAME, Manifest
from ditty_di.data.shards.megatron import token_dtype
from ditty_di.data.tokenization.documents import Reading
from ditty_di.data.tokenization.engines import Engine, Pool
from ditty_di.data.tokenization.finish import (
    UnfinishedError,
    begin,
    finish,
    missing,
    require_space,
)
from ditty_di.data.tokenization.part import Job, Receipt, Totals, run_part
from ditty_di.data.tokenization.plan import Part, part_size, plan, settings_of
from ditty_di.data.tokenization.progress import progress
from ditty_di.data.tokenization.ranks import wait_for_others
from ditty_di.data.tokenization.sample import TextSample, report
from ditty_di.data.tokenization.sources import Source, all_sources
from ditty_di.data.tokenizer import document_end_id, tokenizer_fingerprint, without_limits
from ditty_di.io import write_json
from ditty_di.messages import readable
from ditty_di.protocols import early_checks

_REMOTE_FOLDER = """\
folder={folder!r}: shards are written to a folder of this machine, and copied to a store when they \
are whole: data.shards=FOLDER task.upload={folder}"""
_NO_VALIDATION = """\
no document is held out, by chance: to validate, raise data.validation_fraction, or take smaller \
documents (data.source.documents=paragraph)"""


def _validate(
    *,
    validation_fraction: float = 0.01,
    part_mb: float | None = None,
    on_error: str = "raise",
    folder: Any = ...,
    upload: Any = None,
    source: Any = ...,
    sources: Any = ...,
) -> None:
    options.require(not is_url(folder), _REMOTE_FOLDER.format(folder=folder))
    given = f"upload={upload!r}: write the URL of a folder, such as s3://bucket/shards"
    options.require(upload is None or upload is ... or is_url(upload), given)
    options.fraction(validation_fraction=validation_fraction)
    options.require(part_mb is None or part_mb > 0, f"part_mb={part_mb} must be above 0")
    options.one_of(("raise", "skip"), on_error=on_error)
    if source is None and not sources:
        all_sources()


@early_checks(validate=_validate)
def tokenize(
    tokenizer: Any,
    folder: str,
    source: Source | None = None,
    sources: Mapping[str, Source] | None = None,
    *,
    engine: Engine | None = None,
    validation_fraction: float = 0.01,
    part_mb: float | None = None,
    max_document_mb: float = 1.0,
    long_documents: str = "split",
    split_special_tokens: bool = False,
    on_error: str = "raise",
    check: bool = False,
    report_mb: float = 4.0,
    patience: float = 60.0,
    upload: str | None = None,
) -> dict[str, Any]:
    """Write `.bin`, `.idx` and `manifest.json` of text, or go on with it.

    The bytes depend on the text, the tokenizer and the settings alone: not on the number of
    processes, machines or starts. A finished part is never done again.

    Args:
        tokenizer: A fast tokenizer of transformers, with EOS.
        folder: Folder of the shards; with `sources`, one folder in it for each.
        source: The text.
        sources: Or several, by name.
        engine: Runs the parts; None: a `Pool` with one process a core.
        validation_fraction: Fraction of the documents that is held out, by the documents' hashes.
        part_mb: Text of a part, and so of a shard, in MiB; None: a 64th of the text, from 4 to 256.
        max_document_mb: Largest document that is encoded at once, in MiB.
        long_documents: A longer one is encoded in pieces (`split`) or refused (`error`).
        split_special_tokens: Take special tokens that are spelled out in a document as text; else
            they become special tokens, as in Hugging Face.
        on_error: Action for a bad document: `raise`, or `skip`, which counts it.
        check: Hash all shards again at the end.
        report_mb: Text that the tokenizer's report is made from, in MiB; 0: no report.
        patience: Seconds that a rank which is done waits for others that show no progress.
        upload: URL of a folder that the first rank copies the shards to when all are there, the
            manifest last; None: they stay here.

    Returns:
        `documents`, `tokens`, `bytes`, `skipped`, and of what was done since the start `seconds`,
        `bytes_per_second`, `tokens_per_second`; by source where there are several.

    Raises:
        ValueError: Options out of range; a bad document (file, byte, reason); a folder that was
            begun with other input or settings.
        UnfinishedError: Parts are with other ranks, which show no progress.
        OSError: The disk has not enough space.
        ImportError, PermissionError, ConnectionError: Of a URL, see `remote.explained`.
    """
    _validate(
        validation_fraction=validation_fraction,
        part_mb=part_mb,
        on_error=on_error,
        folder=folder,
        upload=upload,
    )
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("tokenizer: a fast tokenizer is needed, with a tokenizer.json")
    engine = engine or Pool()
    results = {}
    for name, each in all_sources(source, sources).items():
        work = _Tokenization(
            Path(folder).expanduser() / name,
            name,
            each,
            Reading(each.text_key, each.documents, max_document_mb, long_documents),
            part_bytes=None if part_mb is None else int(part_mb * 2**20),
        )
        work.begin(tokenizer, validation_fraction, split_special_tokens, on_error)
        results[name] = work.run(engine, tokenizer, report_mb, check, patience)
        if upload is not None and getattr(engine, "rank", 0) == 0:
            work.upload(f"{upload.rstrip('/')}/{name}".rstrip("/"))
    return results.get("", results)


class _Tokenization:
    """The tokenization of one source."""

    def __init__(
        self, folder: Path, name: str, source: Source, reading: Reading, part_bytes: int | None
    ) -> None:
        self.folder, self.title, self.source, self.reading = folder, name or "text", source, reading
        files = source.files()
        part_bytes = part_bytes or part_size(files)
        self.parts = plan(files, reading, part_bytes)
        self.settings = partial(settings_of, files, reading, part_bytes)

    def begin(
        self,
        tokenizer: Any,
        validation_fraction: float,
        split_special_tokens: bool,
        on_error: str,
    ) -> None:
        """Make the folder, which has the tokenizer."""
        self.digest, eos = tokenizer_fingerprint(tokenizer), document_end_id(tokenizer)
        settings = self.settings(
            tokenizer=self.digest,
            eos=eos,
            validation_fraction=validation_fraction,
            split_special_tokens=split_special_tokens,
        )
        self.job = Job(
            folder=self.folder,
            tokenizer=self.folder / "tokenizer" / "tokenizer.json",
            key=begin(self.folder, settings),
            eos=eos,
            vocab_size=len(tokenizer),
            reading=self.reading,
            validation_fraction=validation_fraction,
            split_special_tokens=split_special_tokens,
            on_error=on_error,
        )
        with without_limits(tokenizer):
            build_once(self.folder / "tokenizer", tokenizer.save_pretrained)

    def run(
        self, engine: Engine, tokenizer: Any, report_mb: float, check: bool, patience: float
    ) -> dict[str, Any]:
        """Tokenize what is not done yet, and write the manifest."""
        self.todo = self._left(self.parts)
        tells = getattr(engine, "rank", 0) == 0  # one of several ranks, what all of them do
        with ExitStack() as stack:
            if tells and self.todo:
                size, finished = sum(x.size for x in self.parts), len(self.parts) - len(self.todo)
                done = f", {finished} of them done" if finished else ""
                text = f"{self.title}: {readable(size)} in {len(self.parts)} parts{done}"
                print(text, flush=True)
                bytes_per_token = self._report(tokenizer, report_mb) if report_mb else 4.0
                dtype = token_dtype(self.job.vocab_size)
                require_space(self.folder, self.todo, bytes_per_token, dtype.itemsize)
                watched = progress(self.title, self.folder, self.parts, dtype, bytes_per_token)
                stack.enter_context(watched)
            self.started, mine = time.monotonic(), engine.mine(self.parts)
            for _ in engine.run(partial(run_part, self.job), self._left(mine)):
                pass
            self._wait(mine, patience)
        manifest, totals = finish(self.job, self.parts, self.digest, check)
        self.manifest = manifest
        found = self._speed()
        if tells:
            self._tell(manifest, totals, found)
        return {
            **asdict(totals),
            "folder": str(self.folder),
            "tokens_by_split": manifest.tokens,
            **found,
        }

    def upload(self, url: str) -> None:
        """Copy the shards and their tokenizer to a remote folder."""
        shards = [f"{s.name}{suffix}" for s in self.manifest.shards for suffix in (".bin", ".idx")]
        saved = sorted(path for path in (self.folder / "tokenizer").rglob("*") if path.is_file())
        names = [*shards, *(path.relative_to(self.folder).as_posix() for path in saved), NAME]
        copied = remote.upload(self.folder, url, names)
        print(f"{self.title}: copied {copied} of {len(names)} files to {url}", flush=True)

    def _left(self, parts: Sequence[Part]) -> list[Part]:
        left = {*missing(self.folder, self.parts)}
        return [part for part in parts if part.number in left]

    def _report(self, tokenizer: Any, report_mb: float) -> float:
        """Write the tokenizer's report; return its bytes a token."""
        found = report(tokenizer, TextSample(self.source, sample_mb=report_mb))
        write_json(self.folder / "tokenizer_report.json", found)
        (measured,) = found["sources"].values()
        print(
            f"tokenizer: {found['vocab_size']:,} entries, {found['unused']:,} of them unused in "
            f"{readable(measured['bytes'])}; {measured['characters_per_token']:.2f} characters a "
            "token",
            flush=True,
        )
        return float(measured["bytes_per_token"])

    def _wait(self, mine: Sequence[Part], patience: float) -> None:
        """Wait for others, ranks or submitted jobs, as long as they make progress."""
        look = partial(missing, self.folder, self.parts)
        if not (left := look()):
            return
        here = len(mine) - len(self._left(mine))
        print(
            f"{self.title}: {here} parts done here, {len(left)} of {len(self.parts)} are with "
            f"others: waiting until they write nothing for {patience:g} seconds",
            flush=True,
        )
        if left := wait_for_others(look, self.folder, patience):
            raise UnfinishedError(
                f"{self.title}: {len(left)} of {len(self.parts)} parts are with others, and "
                f"nothing was written for {patience:g} seconds (parts {_some(left)}); the last "
                "one to finish writes the manifest, and if they were lost, run the command "
                "again: finished parts are kept"
            )

    def _speed(self) -> dict[str, float]:
        """Return the speed of all who worked since this process began."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        found = [Receipt.read(self.job.receipt(part)) for part in self.todo]
        done = [receipt for receipt in found if receipt is not None]
        return {
            "seconds": seconds,
            "bytes_per_second": sum(receipt.bytes for receipt in done) / seconds,
            "tokens_per_second": sum(receipt.tokens for receipt in done) / seconds,
        }

    def _tell(self, manifest: Manifest, totals: Totals, speed: dict[str, float]) -> None:
        splits = ", ".join(f"{count:,} {split}" for split, count in manifest.tokens.items())
        new = ""
        if self.todo:
            new = (
                f"; {speed['seconds']:.0f} s, {speed['bytes_per_second'] / 1e6:.2f} MB/s, "
                f"{speed['tokens_per_second']:,.0f} tokens/s"
            )
        print(f"{self.title}: {totals.documents:,} documents, tokens: {splits}{new}")
        if self.job.validation_fraction and "validation" not in manifest.tokens:
            print(f"{self.title}: {_NO_VALIDATION}")
        if totals.skipped:
            kinds = ", ".join(f"{n} {kind}" for kind, n in totals.skipped.items())
            print(f"{self.title}: skipped {kinds}; the first: {totals.skipped_first[0]}")


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (" ..." if len(numbers) > 5 else "")
