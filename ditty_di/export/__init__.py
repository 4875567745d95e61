"""Exports: a whole model, adapters, or adapters merged into their base; uploads to the Hub."""

from ditty_di.export.adapter import AdapterExport
from ditty_di.export.auto import AutoExport
from ditty_di.export.full import HuggingFaceExport, SafetensorsExport
from ditty_di.export.hub import HubError, push_folder
from ditty_di.export.merged import MergedExport
from ditty_di.export.sentence_transformers import SentenceTransformersExport

__all__ = [
    "AdapterExport",
    "AutoExport",
    "HubError",
    "HuggingFaceExport",
    "MergedExport",
    "SafetensorsExport",
    "SentenceTransformersExport",
    "push_folder",
]
