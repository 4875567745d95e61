"""Export an embedding model as a folder for sentence-transformers."""

# No `from __future__ import annotations`: see `ditty_di.export.base`.
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ditty_di.export.full import HuggingFaceExport
from ditty_di.processors.pooling import MODES, Pooling

_MODULES = "sentence_transformers.models"
_NO_POOLING = """\
export: sentence-transformers needs to know how an embedding is made of the tokens, but there is \
no ditty_di.processors.Pooling among trainer.postprocessors; write export=hugging_face for the \
model alone"""


@dataclass(eq=False)
class SentenceTransformersExport(HuggingFaceExport):
    """Write what `HuggingFaceExport` does, and how embeddings are made, for sentence-transformers.

    `sentence_transformers.SentenceTransformer(path)` opens the folder, and so does transformers'
    `AutoModel`. Its files are those of sentence-transformers 5: `modules.json`, `1_Pooling`,
    `2_Normalize`, `sentence_bert_config.json` and `config_sentence_transformers.json`.

    Arguments are those of `HuggingFaceExport`, and:

    Args:
        postprocessors: of the trainer; one of them is a `Pooling`.
        normalize: embeddings have length 1.
        cosine: similarity of the embeddings is the cosine, else the dot product.
        max_seq_length: of a text, in tokens; None is the tokenizer's.

    Raises:
        ValueError: as `HuggingFaceExport`, or no `Pooling`.
    """

    about: ClassVar[dict[str, str]] = {"library": "sentence-transformers"}

    postprocessors: Sequence[Any] = ()
    normalize: bool = True
    cosine: bool = True
    max_seq_length: int | None = None

    def check(self, model: Any) -> None:
        """Raise ValueError for a model that cannot be exported, or unknown pooling."""
        super().check(model)
        self._pooling()

    def _pooling(self) -> Pooling:
        found = [one for one in self.postprocessors if isinstance(one, Pooling)]
        if len(found) != 1:
            raise ValueError(_NO_POOLING)
        return found[0]

    def write_beside(self, folder: Path, model: nn.Module) -> None:
        """Write the files that describe the embeddings."""
        config: Any = model.config
        kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        modules = [
            {"idx": n, "name": str(n), "path": path, "type": f"{_MODULES}.{kind}"}
            for n, (path, kind) in enumerate(kinds[: 3 if self.normalize else 2])
        ]
        mode = self._pooling().mode
        pooling = {
            "word_embedding_dimension": config.get_text_config().hidden_size,
            "include_prompt": True,
            **{f"pooling_mode_{name}": MODES[mode] == key for key, name in _POOLING_KEYS.items()},
        }
        limit = self.max_seq_length or self.tokenizer.model_max_length
        files: dict[str, Any] = {
            "modules.json": modules,
            "1_Pooling/config.json": pooling,
            "sentence_bert_config.json": {"max_seq_length": limit, "do_lower_case": False},
            "config_sentence_transformers.json": {
                "model_type": "SentenceTransformer",
                "__version__": {name: _version(name) for name in ("transformers", "torch")},
                "prompts": {},
                "default_prompt_name": None,
                "similarity_fn_name": "cosine" if self.cosine else "dot",
            },
        }
        if self.normalize:
            files["2_Normalize/config.json"] = {}
        for name, content in files.items():
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


#: What sentence-transformers calls its modes, and the rest of their keys in the configuration.
_POOLING_KEYS = {
    "cls": "cls_token",
    "mean": "mean_tokens",
    "max": "max_tokens",
    "mean_sqrt_len": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean_tokens",
    "lasttoken": "lasttoken",
}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
