import hashlib
import json
import os
import random
from pathlib import Path

import pytest

from ditty_di.data import train_bpe

WORDS = ["the", "a", "dog", "cat", "runs", "over", "under", "green", "tree", "house", "one", "two"]


@pytest.fixture(scope="session")
def tokenizer(cache_dir):
    return train_bpe([" ".join(WORDS)] * 3, 300, cache_dir=cache_dir)


@pytest.fixture(scope="session")
def texts():
    drawn = random.Random(0)
    plain = [" ".join(drawn.choices(WORDS, k=drawn.randrange(5, 120))) for _ in range(200)]
    # Many more tokens for their size.
    return plain + [str(drawn.getrandbits(drawn.randrange(100, 1500))) for _ in range(100)]


@pytest.fixture(scope="session")
def corpus(texts, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def content(folder: Path) -> str:
    """A digest of everything that a tokenization leaves, names included."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        kept = path.suffix in (".bin", ".idx", ".json") and path.name != "tokenizer_report.json"
        if path.is_file() and kept:
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def without_ranks(**more: str) -> dict[str, str]:
    """The environment without variables of a launcher."""
    prefixes = ("RANK", "WORLD_SIZE", "OMPI_", "PMI", "SLURM_", "LOCAL_")
    return {k: v for k, v in os.environ.items() if not k.startswith(prefixes)} | more
