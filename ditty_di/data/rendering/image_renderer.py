"""From records with images to token ids, loss masks and the images' paths."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ditty_di.data.cache import fingerprint
from ditty_di.data.options import require
from ditty_di.data.reading.files import folder_of
from ditty_di.data.rendering.audit import Encoded
from ditty_di.data.rendering.chat_template import ChatTemplate
from ditty_di.data.rendering.conversations import Conversation, holds, paths_of, text_of
from ditty_di.data.rendering.images import IMAGES, ImageFiles, Images, given_images
from ditty_di.data.rendering.renderer import Renderer, lacks
from ditty_di.data.rendering.templates import ChatRenderer

_GIVEN = ("image", IMAGES)
#: Key of a caption: the answer of a record that has an image and no input.
_CAPTION = "text"
#: In the text, the place of an image that is given beside it.
_MARKER = "<image>"
_VIDEOS = {"video", "videos"}


class ImageTemplate(ChatTemplate):
    """Render conversations with images: each placeholder becomes the tokens of its image.

    Args:
        tokenizer: The processor's.
        images: The processor.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, images: Images) -> None:
        super().__init__(tokenizer)
        self._images = images

    def render(self, chat: Conversation, *, prompt: bool = False) -> str:
        """Return the conversation's text with the tokens of its images."""
        text = self.as_rendered(chat, prompt=prompt)
        return self._images.expanded(text, paths_of(chat.messages))[0]

    def marked(self, chat: Conversation) -> list[tuple[int, int]]:
        """Return the spans within `{% generation %}` in what `render` returns."""
        spans = super().marked(chat)
        return self._images.expanded(self.as_rendered(chat), paths_of(chat.messages), spans)[1]


class ImageRenderer(Renderer):
    """Render and tokenize records with images, and mask what is not output.

    A turn of a conversation has images as parts of its content, `{"type": "image", "path": ...}`.
    Images beside the turns, `"image": "x.png"` or `"images": [...]`, take the places of parts
    without a path, or of markers `<image>` in the text, or else stand before the first turn of the
    user. Beside an input and an output they make a conversation of two turns; beside a `text` alone
    that is the answer. Paths are relative to the folder of the file that the record is in, else to
    the working folder. Images inside the records, as a column of `datasets.Image` has them, are
    unpacked into the cache. Records without images are read as `Renderer` does.

    The tokens of an image are those that the processor makes of it, and never in the loss. An
    example that would lose some to `max_tokens` is an error.

    Args:
        tokenizer: The processor's.
        processor: Of the model (`ditty_di.models.processor`).
        cache_dir: Cache folder of images inside the records; None: `$DITTY_DI_CACHE`, or
            `~/.cache/ditty_di`.
        **options: As for `Renderer`.

    Raises:
        ValueError: See `Renderer`; a processor without images.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        processor: Any,
        cache_dir: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, **options)
        self.images, self._files = Images(processor), ImageFiles(cache_dir)
        self.chat_format = replace(self.chat_format, images=True)
        self.never_learned = self.images.token_ids

    def fingerprint(self) -> str:
        """Return a digest of everything that decides about the ids."""
        return fingerprint(super().fingerprint(), self.images.fingerprint())

    def resolved(self, record: Any, folder: Path | None) -> Any:
        """Return the record with full paths in place of its images.

        Args:
            record: Or the error in its place.
            folder: Of the record's file; None: the working folder.
        """
        if not isinstance(record, Mapping):
            return record
        path, key = partial(self._files.path, folder=folder), self.chat_format.content_key

        def of_part(part: Any) -> Any:
            if not isinstance(part, Mapping) or part.get("type") != "image":
                return part
            return {
                **part,
                **{name: path(part[name]) for name in ("path", "image") if name in part},
            }

        def of_turn(turn: Any) -> Any:
            content = turn.get(key) if isinstance(turn, Mapping) else None
            return {**turn, key: [*map(of_part, content)]} if isinstance(content, list) else turn

        whole = dict(record)
        for name in _GIVEN:
            if (value := record.get(name)) is not None:
                whole[name] = [*map(path, value)] if isinstance(value, list) else path(value)
        for name in self.chat_format.keys_of(record):
            if isinstance(turns := record[name], list):
                whole[name] = [*map(of_turn, turns)]
        return whole

    def origins(self, records: Iterable[tuple[str, Any]]) -> str:
        """Return the folders that paths in the records are relative to."""
        folders = {folder_of(position) or Path() for position, _ in records}
        return " ".join(sorted(str(folder.absolute()) for folder in folders))

    def __call__(self, records: Sequence[Any]) -> list[list[Encoded | ValueError]]:
        """Return the examples of each record; for a bad record the error in their place."""
        found = super().__call__([self._or_error(record) for record in records])
        return [[self._checked(example) for example in examples] for examples in found]

    def prompt(self, record: Mapping[str, Any]) -> list[int]:
        """Return the token ids of a record up to where the model is to answer."""
        return super().prompt(self._as_turns(record, answered=False))

    def prompt_images(self, record: Mapping[str, Any]) -> list[str]:
        """Return the paths of the images in what `prompt` returns."""
        whole = self._as_turns(record, answered=False)
        if not self.chat_format.keys_of(whole):
            return []
        return list(paths_of(self.chat_format.asked(whole).messages))

    @cached_property
    def _renderer(self) -> ChatRenderer:
        template = ImageTemplate(self.tokenizer, self.images)
        return ChatRenderer(self.tokenizer, self._assistant_turns, template)

    def _limited(self, whole: Encoded) -> Encoded:
        kept = super()._limited(whole)
        # The last id of an example is only a label.
        if whole.images and self.images.count(kept.ids[:-1]) < self.images.count(whole.ids):
            raise ValueError(
                f"{len(whole.ids)} tokens, and the limit of {self._max_ids} would cut an image: "
                "raise data.seq_len, or let the processor make fewer tokens of an image"
            )
        return kept

    def _checked(self, example: Encoded | ValueError) -> Encoded | ValueError:
        if isinstance(example, ValueError) or example.images:
            return example
        if self.images.count(example.ids):
            return ValueError(f"it has the image token {self.images.token}, and no image")
        return example

    # --- images beside the turns -----------------------------------------------------------------

    def _or_error(self, record: Any) -> Any:
        try:
            return self._as_turns(record)
        except ValueError as error:
            return error

    def _as_turns(self, record: Any, *, answered: bool = True) -> Any:
        """Return the record with its images in the turns of a conversation.

        Raises:
            ValueError: Images that have no place.
        """
        if not isinstance(record, Mapping):
            return record
        for key in sorted(_VIDEOS - self._ignored):
            text = (
                f'"{key}": videos are not read; leave the example out, or give frames as "images"'
            )
            require(not holds(record.get(key)), text)
        if not (paths := given_images(record)):
            return record
        form = self.chat_format
        rest = {key: value for key, value in record.items() if key not in _GIVEN}
        keys, content_key = form.keys_of(record), form.content_key
        if not keys:
            rest = self._as_question(rest, answered)
        key = keys[0] if keys else form.key
        require(isinstance(rest[key], list), f'"{key}" must be a list of objects beside images')
        turns = [dict(turn) if isinstance(turn, Mapping) else turn for turn in rest[key]]
        # An answer that is not part of a conversation has no images.
        said = [turn for turn in (turns if keys else turns[:1]) if isinstance(turn, dict)]
        contents = [turn.get(content_key) for turn in said]
        markers = sum(map(_markers, contents))
        images = f"{len(paths)} image{'s' * (len(paths) != 1)}"
        text = f"the text has {markers} markers {_MARKER} for {images}; write as many, or none"
        require(markers in (0, len(paths)), text)
        empty = sum(_is_empty(part) for c in contents if isinstance(c, list) for part in c)
        given = map(_image, paths)
        if markers:
            for turn in said:
                if _markers(turn.get(content_key)):
                    turn[content_key] = _at_markers(turn[content_key], given)
        elif empty:
            text = f"{empty} parts are images without a path, and {len(paths)} images given"
            require(empty == len(paths), text)
            for turn in said:
                if isinstance(parts := turn.get(content_key), list):
                    turn[content_key] = [next(given) if _is_empty(p) else p for p in parts]
        else:
            names = {"user"} | {own for own, role in (form.roles or {}).items() if role == "user"}
            first = next((turn for turn in said if turn.get(form.role_key) in names), None)
            if first is None:
                raise ValueError("an image is given, and no turn of the user to put it in")
            first[content_key] = [*given, *_parts(first.get(content_key))]
        return rest | {key: turns}

    def _as_question(self, record: dict[str, Any], answered: bool) -> dict[str, Any]:
        """Return a record of an input and an output as a conversation of two turns."""
        form, answer = self.chat_format, ""
        if self._defaults and lacks(record, (*self._keys, "prompt")):
            require(not answered or isinstance(record.get(_CAPTION), str), _NO_ANSWER)
            question, answer, read = "", str(record.get(_CAPTION, "")), {_CAPTION}
        else:
            parts = self._formats_for(record)
            question, read = parts[0](record), parts[0].keys_read(record)
            if answered:
                answer, read = parts[1](record), read | parts[1].keys_read(record)
        own = {role: name for name, role in (form.roles or {}).items()}  # the records' names
        turns = [
            {form.role_key: own.get(role, role), form.content_key: content}
            for role, content in (("user", question), ("assistant", answer))
        ]
        rest = {key: value for key, value in record.items() if key not in read}
        return rest | {form.key: turns if answered else turns[:1]}


# A configuration is checked against the signature: that of `Renderer`, and the processor.
_OWN, _OF_RENDERER = inspect.signature(ImageRenderer), inspect.signature(Renderer)
_NAMED = [p for p in _OWN.parameters.values() if p.kind is not p.VAR_KEYWORD]
_OPTIONS = [p for p in _OF_RENDERER.parameters.values() if p.kind is p.KEYWORD_ONLY]
ImageRenderer.__signature__ = inspect.Signature([*_NAMED, *_OPTIONS])  # type: ignore[attr-defined]

_NO_ANSWER = 'an image has neither "messages", "input" and "output", nor "text" beside it'


def _image(path: str) -> dict[str, str]:
    return {"type": "image", "path": path}


def _parts(content: Any) -> list[Any]:
    """Return a content as a list of parts."""
    if isinstance(content, list):
        return content
    return [{"type": "text", "text": content}] if content else []


def _markers(content: Any) -> int:
    """Return the number of markers in a content."""
    return text_of(content).count(_MARKER)


def _at_markers(content: Any, images: Iterator[Any]) -> list[Any]:
    """Return a content with the next images in place of its markers."""
    found: list[Any] = []
    for part in _parts(content):
        if not (text := text_of([part])):
            found.append(part)
            continue
        first, *rest = text.split(_MARKER)
        pieces: list[Any] = [{"type": "text", "text": first}]
        for piece in rest:
            pieces += [next(images), {"type": "text", "text": piece}]
        found += [one for one in pieces if one.get("text", True)]
    return found


def _is_empty(part: Any) -> bool:
    is_image = isinstance(part, Mapping) and part.get("type") == "image"
    return is_image and part.get("path", part.get("image")) is None
