"""Findings about examples that are usable, but perhaps not what their author meant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple


class Note(NamedTuple):
    """One finding about an example: its kind (a key of `KINDS`) and what it is about."""

    kind: str
    subject: str = ""


class Kind(NamedTuple):
    """`text` with `{subjects}`, and whether `audit: refuse` refuses examples with it."""

    text: str
    refused: bool = True


KINDS = {
    "unread": Kind(
        "nothing reads {subjects}: name them in data.input_format (__field__; data=alpaca does so "
        "for instructions), or list them in data.encoder.ignored_fields"
    ),
    "unread_beside_turns": Kind(
        "nothing reads {subjects}: of a conversation only the turns, tools, system and "
        "chat_template_kwargs are read; list the others in data.encoder.ignored_fields"
    ),
    "unread_in_turns": Kind(
        "the chat template does not render {subjects} of the turns: list them in "
        "data.encoder.ignored_fields if they are not needed"
    ),
    "unread_roles": Kind("the chat template leaves out turns of {subjects}"),
    "not_learnt": Kind("turns of {subjects} ask to be learnt, and only those of the assistant are"),
    "no_end": Kind(
        "no end of turn is learnt, so the model will not learn to stop: the last token learnt of "
        "an answer is not a special token. Let the template close the turn with one, inside "
        "{{% generation %}} if it has that mark, and let the tokenizer know it as special "
        "(tokenizer.special_tokens)"
    ),
    "no_end_text": Kind(
        "no end is learnt, so the model will not learn to stop: the last token that is learnt is "
        "not a special token"
    ),
    "all_learnt": Kind(
        "input_ids come without labels, so every token is learnt, inputs included; labels hold the "
        "ids, and -100 where they are not learnt",
        refused=False,
    ),
    "empty": Kind("an answer holds nothing but the end of its turn"),
    "tools": Kind("the chat template does not render tools: the model is not told of them"),
    "tool_calls": Kind("the chat template does not render tool calls: they are not learnt"),
    "kwargs": Kind("chat_template_kwargs do not change what the chat template renders"),
    "next_marker": Kind(
        "the template does not close turns, so answers end with the marker of the next one, "
        "{subjects}, which is learnt; generation has to stop there",
        refused=False,
    ),
    "other_prompt": Kind(
        "the template's generation prompt {subjects} is not how it renders an answer that is "
        "there; the answer is learnt from where the two part, and in use the model sees the former",
        refused=False,
    ),
    "border": Kind(
        "together prompt and answer would have another token at their border, such as one that "
        "spans it; they are tokenized apart, as in use",
        refused=False,
    ),
}
_SUBJECTS_SHOWN = 8


class Findings:
    """Count notes over the records of a data set, with the first record's position by kind."""

    def __init__(self) -> None:
        self._records: Counter[str] = Counter()
        self._subjects: dict[str, Counter[str]] = {}
        self._first: dict[str, str] = {}
        self._where = ""

    def add(self, where: str | None, notes: Iterable[Note]) -> None:
        """Count an example of the record at `where`; None: of the same one as before."""
        self._where = where or self._where
        notes = set(notes)
        for kind in {note.kind for note in notes}:
            self._records[kind] += 1
            self._first.setdefault(kind, self._where)
        for kind, subject in sorted(notes):
            self._subjects.setdefault(kind, Counter())[subject] += 1

    def lines(self) -> list[str]:
        """Return one line for each kind that was found, most examples first."""
        return [
            f"{_text(kind, self._subjects[kind])} ({count} example{'s' * (count > 1)}, the first: "
            f"{self._first[kind]})"
            for kind, count in self._records.most_common()
        ]


def refusal(notes: Iterable[Note]) -> str:
    """Return what `audit: refuse` says about an example; "" if it has nothing against it."""
    found: dict[str, list[str]] = {}
    for kind, subject in sorted(set(notes)):
        if KINDS[kind].refused:
            found.setdefault(kind, []).append(subject)
    return "; ".join(_text(kind, subjects) for kind, subjects in found.items())


def _text(kind: str, subjects: Iterable[str]) -> str:
    shown = [f'"{subject}"' for subject in subjects]
    if len(shown) > _SUBJECTS_SHOWN:
        shown[_SUBJECTS_SHOWN:] = [f"and {len(shown) - _SUBJECTS_SHOWN} more"]
    return KINDS[kind].text.format(subjects=", ".join(shown))
