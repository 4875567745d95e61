"""Tokenization of text of any size into shards, by any number of processes and machines."""

from ditty_di.data.tokenization.documents import DocumentError, Reading
from ditty_di.data.tokenization.engines import Datatrove, Pool, Ray
from ditty_di.data.tokenization.sample import TextSample, report
from ditty_di.data.tokenization.sources import HubFiles, TextFiles

__all__ = [
    "Datatrove",
    "DocumentError",
    "HubFiles",
    "Pool",
    "Ray",
    "Reading",
    "TextFiles",
    "TextSample",
    "report",
]
