"""The processor of a vision-language model: what its images and placeholders become.

transformers 5 reads images by torchvision where it is installed, else by Pillow and NumPy: pixels
differ by the rounding of the resizing. Videos need torchvision. Processors with a part for videos,
such as those of SmolVLM and Qwen2.5-VL, cannot be loaded by transformers without it; here the
settings of that part are kept unread, and written again by `save_pretrained`. That of SmolVLM needs
num2words, too (extra `[vision]`). Those of Gemma 3 and Idefics3 have images only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import PushToHubMixin, is_torchvision_available

from ditty_di.models.files import ModelFiles

_VIDEOS = "video_processor"


def from_pretrained(
    path: str | None,
    *,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Any:
    """Load the processor of a folder or hub id.

    Args:
        path: a folder, or the hub's `user/name`.
        revision: branch, tag or commit on the hub; None is its main branch.
        tokenizer: replaces the processor's own, for one with more tokens or another chat template;
            without a template it gets the processor's.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: see `ModelFiles`.
        ImportError: a library that the processor needs is missing.
        ValueError: no processor there that reads images.
    """
    if path is None:
        raise ValueError(
            "processor: the folder, or the Hub's user/name, of a vision-language model is needed: "
            "model=hf_image_text model.path=..."
        )
    files = ModelFiles(str(path), revision)
    files.find("preprocessor_config.json")  # has the clearer error messages
    try:
        found = _load(files, str(path), revision)
    except (OSError, ValueError, KeyError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise ValueError(f"processor: there is none in {path}: {first}") from error
    if not hasattr(found, "image_processor"):
        raise ValueError(
            f"processor: that of {path} is a {type(found).__name__}, which reads no images; give "
            f"a vision-language model as model.path"
        )
    if tokenizer is not None:
        tokenizer.chat_template = tokenizer.chat_template or found.chat_template
        found.tokenizer = tokenizer
    found.chat_template = found.tokenizer.chat_template or found.chat_template
    found.tokenizer.chat_template = found.chat_template
    return found


def _load(files: ModelFiles, path: str, revision: str | None) -> Any:
    config = AutoConfig.from_pretrained(path, revision=revision)
    known = type(config) in PROCESSOR_MAPPING
    cls: Any = PROCESSOR_MAPPING[type(config)] if known else None
    if cls is None or is_torchvision_available() or _VIDEOS not in cls.get_attributes():
        return AutoProcessor.from_pretrained(path, revision=revision)
    parts = {
        "tokenizer": lambda: AutoTokenizer.from_pretrained(path, revision=revision),
        "image_processor": lambda: AutoImageProcessor.from_pretrained(path, revision=revision),
        _VIDEOS: lambda: _video_settings(files),
    }
    settings, _ = cls.get_processor_dict(path, revision=revision)
    with videos_unread():
        return cls.from_args_and_dict([parts[name]() for name in cls.get_attributes()], settings)


def _video_settings(files: ModelFiles) -> VideoSettings:
    for name in ("video_preprocessor_config.json", "processor_config.json"):
        if (file := files.find(name)) is not None:
            found = json.loads(file.read_text(encoding="utf-8"))
            if settings := found.get(_VIDEOS) if name.startswith("processor") else found:
                return VideoSettings(settings)
    return VideoSettings({})


class VideoSettings(PushToHubMixin):  # type: ignore[misc]
    """The settings of a processor for videos that needs torchvision, unread.

    Args:
        settings: as in its file.
    """

    _auto_class = None

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, as they are saved."""
        return dict(self.settings)


@contextmanager
def videos_unread() -> Iterator[None]:
    """Let processors be made with `VideoSettings` in place of what reads videos."""
    mixin: Any = ProcessorMixin
    checked = mixin.check_argument_for_proper_class

    def check(self: Any, name: str, argument: Any) -> Any:
        return (
            type(argument) if isinstance(argument, VideoSettings) else checked(self, name, argument)
        )

    mixin.check_argument_for_proper_class = check
    try:
        yield
    finally:
        mixin.check_argument_for_proper_class = checked
