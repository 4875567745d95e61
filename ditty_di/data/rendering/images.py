"""Images beside text: read files, expand their placeholders, make a model's inputs of them."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ditty_di.data.cache import cache_folder, fingerprint
from ditty_di.data.collate import one_by_one
from ditty_di.data.options import require
from ditty_di.io import replacing
from ditty_di.protocols import LoadedBatch

#: Key of a row: paths of its images, in the order of their tokens.
IMAGES = "images"
#: Names that models have for "which tokens are an image's", 1 for those.
_KINDS = ("mm_token_type_ids", "token_type_ids")
_TEXT = {"input_ids", "attention_mask", "text_replacement_offsets", *_KINDS}
_PLACEHOLDERS_KEPT = 1024
_BLANK = (32, 32)  # pixels of the image that a batch without images gets
_URL = re.compile(r"data:|\w+://")
_NAME_SHOWN = 60  # characters of a URL in a message


def read_image(path: str) -> Image.Image:
    """Return an image file in RGB, turned as its EXIF data say.

    Args:
        path: of a file in any format of Pillow.

    Raises:
        ValueError: there is no such file, or it cannot be read.
    """
    named = path if len(path) <= _NAME_SHOWN else f"{path[:_NAME_SHOWN]}..."
    text = f"the image {named} is a URL: download it, and write the path of the file"
    require(_URL.match(path) is None, text)
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"the image {path} does not exist") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image {path} cannot be read: {error}") from error


class Images:
    """Use the processor of a vision-language model (`transformers.ProcessorMixin`).

    A chat template writes one placeholder for an image, which the processor replaces by as many
    tokens as the model has features for it.

    Args:
        processor: has an image processor, a tokenizer and an `image_token`.

    Raises:
        ValueError: a processor without images.
    """

    def __init__(self, processor: Any) -> None:
        token = getattr(processor, "image_token", None)
        text = f"the processor {type(processor).__name__} has no image token: it reads no images"
        require(token is not None and hasattr(processor, "image_processor"), text)
        self.processor, self.token = processor, str(token)
        #: A black image.
        self.blank = Image.new("RGB", _BLANK)
        self._placeholders: dict[str, str] = {}

    @cached_property
    def token_ids(self) -> list[int]:
        """Ids of the tokens in whose places features of images are put."""
        return [token for token in self.processor.image_token_ids if token is not None]

    def fingerprint(self) -> str:
        """Return a digest of the settings."""
        return fingerprint(self.processor.to_json_string())

    def count(self, ids: Any) -> int:
        """Return how many of some token ids are an image's."""
        return int(torch.isin(torch.as_tensor(ids), torch.tensor(self.token_ids)).sum())

    def expanded(
        self, text: str, paths: Sequence[str], spans: Sequence[tuple[int, int]] = ()
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return a text with its placeholders replaced, and spans of it at their new positions.

        Args:
            text: as a chat template renders it.
            paths: of the images, one for each placeholder.
            spans: first character and last + 1, none of which begins or ends in a placeholder.

        Raises:
            ValueError: another number of images than of placeholders, or one cannot be read.
        """
        parts = text.split(self.token)
        found = len(parts) - 1
        require(
            found == len(paths),
            f"the chat template renders {found} image placeholders {self.token} for {len(paths)} "
            f"image{'s' * (len(paths) != 1)}: give each an image",
        )
        replaced = [self._placeholder(path) for path in paths]
        growth = [len(new) - len(self.token) for new in replaced]

        def moved(at: int) -> int:
            return at + sum(growth[: text.count(self.token, 0, at)])

        whole = "".join(part + new for part, new in zip(parts, [*replaced, ""], strict=True))
        return whole, [(moved(start), moved(end)) for start, end in spans]

    def _placeholder(self, path: str) -> str:
        if path not in self._placeholders:
            if len(self._placeholders) >= _PLACEHOLDERS_KEPT:
                self._placeholders.clear()
            self._placeholders[path] = self._text_of(read_image(path))
        return self._placeholders[path]

    def _text_of(self, image: Image.Image) -> str:
        made = self.processor(
            text=[self.token], images=[image], return_text_replacement_offsets=True
        )
        return str(made["text_replacement_offsets"][0][0]["replacement"])

    @cached_property
    def blank_ids(self) -> Tensor:
        """Token ids of the black image, `[tokens]`."""
        text = self._text_of(self.blank)
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids)

    def blank_documents(self) -> list[Tensor]:
        """Return token ids of three documents, each with the black image among other tokens."""
        size = len(self.processor.tokenizer)
        others = torch.tensor([i for i in range(size) if i not in self.token_ids][:32])
        text = others.repeat(-(-32 // len(others)))
        return [
            torch.cat([text[before:at], self.blank_ids, text[at:]])
            for before, at in ((0, 4), (2, 24), (5, 12))
        ]

    def inputs(self, ids: Tensor, images: Sequence[str | Image.Image]) -> dict[str, Tensor]:
        """Return what the model takes beside its token ids, such as `pixel_values`.

        Args:
            ids: `[rows, length]`, with the tokens of the images.
            images: paths or images, in the order of their tokens over all rows.

        Raises:
            ValueError: an image cannot be read, or has another number of tokens than in `ids`.
        """
        opened = [read_image(image) if isinstance(image, str) else image for image in images]
        made = self.processor(text=[self.token * len(opened)], images=opened, return_tensors="pt")
        in_image = torch.isin(ids, torch.tensor(self.token_ids))
        there, made_of_it = int(in_image.sum()), self.count(made["input_ids"])
        if there != made_of_it:
            names = ", ".join(str(image) for image in images[:3] if isinstance(image, str))
            raise ValueError(
                f"images with {made_of_it} tokens in a batch that has {there} for them: files have "
                f"changed since they were tokenized ({names}, ...), or rows were cut; remove the "
                f"cache folder, or raise data.seq_len"
            )
        kinds = {name: in_image.long() for name in _KINDS if name in made}
        return {name: value for name, value in made.items() if name not in _TEXT} | kinds


@dataclass(frozen=True)
class ImageTextCollate:
    """Collate token ids by another collate function, and add the inputs of the rows' images.

    A batch without images gets one more row, of a black image whose labels are all `ignore_index`:
    on every rank the tower takes part in each forward pass, which a sharded model needs.

    Args:
        processor: of the model.
        collate: makes the batch of token ids, such as `PaddedCollate`.
        ignore_index: label excluded from the loss.
    """

    processor: Any
    collate: Callable[[Sequence[LoadedBatch | None]], LoadedBatch]
    ignore_index: int = -100

    contract = "-> input:2:i64 | ctx.target:2:i64"

    @property
    def pads_rows(self) -> bool:
        """Whether None may stand for a row of padding."""
        return bool(getattr(self.collate, "pads_rows", False))

    @property
    def packs_documents(self) -> bool:
        """Whether rows have several documents."""
        return bool(getattr(self.collate, "packs_documents", False))

    @cached_property
    def images(self) -> Images:
        """What reads the images."""
        return Images(self.processor)

    def __call__(self, rows: Sequence[LoadedBatch | None]) -> LoadedBatch:
        """Return the micro-batch of the rows.

        Raises:
            ValueError: see `Images.inputs`.
        """
        given = [row for row in one_by_one(rows) if row is not None]
        images: list[Any] = [path for row, _ in given for path in row.get(IMAGES, ())]
        text = _without_images(rows)
        if not images:
            text, images = [*text, self._blank_row(given)], [self.images.blank]
        inputs, labels = self.collate(text)
        return inputs | self.images.inputs(inputs["input"], images), labels

    def without_images(self, rows: Sequence[LoadedBatch | None]) -> LoadedBatch:
        """Return the micro-batch of the rows' token ids alone, as a probe of the model needs it."""
        return self.collate(_without_images(rows))

    def _blank_row(self, rows: Sequence[LoadedBatch]) -> LoadedBatch:
        """Return a row of a black image, in the form of the others."""
        ids = self.images.blank_ids
        others, labels = rows[0] if rows else ({}, ids)
        inputs: dict[str, Any] = {"input": ids}
        if "position_ids" in others:  # packed rows have one length
            length = len(labels)
            text = f"a row of {length} tokens has no room for the {len(ids)} of a blank image"
            require(len(ids) <= length, f"{text}; raise data.seq_len")
            inputs["input"] = torch.cat([ids, ids.new_zeros(length - len(ids))])
            inputs["position_ids"] = torch.arange(length)
        if "source" in others:
            inputs["source"] = torch.zeros_like(others["source"])
        return inputs, torch.full_like(inputs["input"], self.ignore_index)


def _without_images(rows: Sequence[LoadedBatch | None]) -> list[LoadedBatch | None]:
    def without(inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in inputs.items() if name != IMAGES}

    return [None if row is None else (without(row[0]), row[1]) for row in one_by_one(rows)]


# -- images in records ----------------------------------------------------------------------------


def given_images(record: Mapping[str, Any]) -> list[str]:
    """Return the paths under `image` (one, or a list) and `images` of a record.

    Args:
        record: with paths in place of images (`ImageFiles.path`).

    Raises:
        ValueError: something else.
    """
    found: list[str] = []
    for key in ("image", IMAGES):
        value = record.get(key)
        for path in value if isinstance(value, list) else [value] if value is not None else []:
            text = f'"{key}" must be an image: the path of a file, or a column of the type Image'
            require(isinstance(path, str) and bool(path), text)
            found.append(path)
    return found


class ImageFiles:
    """Find the files of images in records; those inside the records are unpacked into the cache.

    Args:
        cache_dir: cache folder; None: `$DITTY_DI_CACHE`, or `~/.cache/ditty_di`.
    """

    def __init__(self, cache_dir: str | os.PathLike[str] | None = None) -> None:
        self._folder = cache_folder(cache_dir).absolute() / IMAGES

    def path(self, image: Any, folder: Path | None) -> Any:
        """Return the path of an image's file; any other value as it is.

        Args:
            image: a path, the bytes of a file, an image of Pillow, or `{"bytes": ..., "path": ...}`
                as the type `datasets.Image` stores them.
            folder: that paths are relative to; None: the working folder.
        """
        if isinstance(image, Mapping) and (image.get("bytes") or image.get("path")):
            image = image.get("bytes") or image["path"]
        if isinstance(image, Image.Image):
            stream = io.BytesIO()
            ImageOps.exif_transpose(image).convert("RGB").save(stream, "PNG")
            image = stream.getvalue()
        if isinstance(image, bytes):
            return self._unpacked(image)
        if not isinstance(image, str) or _URL.match(image):
            return image
        return str((folder or Path()).absolute() / image)

    def _unpacked(self, data: bytes) -> str:
        name = hashlib.sha256(data).hexdigest()[:32]  # equal images are one file
        file = self._folder / name[:2] / name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as temporary:
                temporary.write_bytes(data)
        return str(file)
