"""Encoded examples, and audit findings: usable, but perhaps not as their author intended."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple


class Note(NamedTuple):
    """One finding about an example: its kind (a key of `KINDS`) and its subject."""

    kind: str
    subject: str = ""


class Encoded(NamedTuple):
    """One example.

    Attributes:
        ids: Token ids `[tokens]`.
        output: Which of them are output `[tokens]`: the loss mask `output_only`.
        inputs: Number of the first ids that are the input; -1 for a conversation, which has
            several inputs.
        cut: Whether the example was truncated.
        notes: Audit findings.
        images: Paths of its images, in the order of their tokens.
    """

    ids: list[int]
    output: list[bool]
    inputs: int
    cut: bool
    notes: frozenset[Note] = frozenset()
    images: tuple[str, ...] = ()


class Kind(NamedTuple):
    """A kind of finding: its text with `{subjects}`, and whether `audit: refuse` refuses it."""

    text: str
    refused: bool = True


KINDS = {
    "unread": Kind(
        "nothing reads {subjects}: name them in data.input_format (__field__; data=alpaca does so "
        "for instructions), or list them in data.renderer.ignored_fields"
    ),
    "unread_beside_turns": Kind(
        "nothing reads {subjects} beside the turns: list them in data.renderer.ignored_fields"
    ),
    "unread_in_turns": Kind(
        "the chat template does not render {subjects} of the turns: list them in "
        "data.renderer.ignored_fields if they are not needed"
    ),
    "unread_roles": Kind("the chat template leaves out turns of {subjects}"),
    "not_trained_on": Kind("turns of {subjects} ask to be trained on; only the assistant's are"),
    "no_end": Kind(
        "no end of turn is trained on, so the model will not learn to stop: let the template close "
        "the turn with a special token (tokenizer.special_tokens), inside {{% generation %}} if it "
        "has that tag"
    ),
    "no_end_text": Kind(
        "no end is trained on, so the model will not learn to stop: the last token in the loss is "
        "not a special token"
    ),
    "all_in_loss": Kind(
        "input_ids come without labels (the ids, -100 where excluded): all are in the loss", False
    ),
    "empty": Kind("an answer has only its end-of-turn token"),
    "tools": Kind("the chat template does not render tools, so the model does not see them"),
    "tool_calls": Kind("the chat template does not render tool calls: they are not trained on"),
    "kwargs": Kind("chat_template_kwargs do not change what the chat template renders"),
    "next_marker": Kind(
        "the template does not close turns, so answers end with the marker of the next one, "
        "{subjects}, which is trained on; generation has to stop there",
        False,
    ),
    "other_prompt": Kind(
        "the template's generation prompt {subjects} differs from how it renders an answer; the "
        "answer begins where the two differ, and generation uses the former",
        False,
    ),
    "border": Kind(
        "tokenized together, prompt and answer would have another token at their border, such as "
        "one that spans it; they are tokenized apart, as for generation",
        False,
    ),
}
_SUBJECTS_SHOWN = 8


class Findings:
    """Counts of the notes about a dataset's examples, with the first position of each kind."""

    def __init__(self) -> None:
        self._examples: Counter[str] = Counter()
        self._subjects: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._first: dict[str, str] = {}

    def add(self, where: str, notes: Iterable[Note]) -> None:
        """Count the notes about an example of the record at `where` (file and line)."""
        for kind, subject in sorted(notes := set(notes)):
            self._subjects[kind][subject] += 1
            self._first.setdefault(kind, where)
        self._examples.update({note.kind for note in notes})

    def lines(self) -> list[str]:
        """Return one line for each kind that was found, the most frequent first."""
        return [
            f"{_text(kind, self._subjects[kind])} ({count} example{'s' * (count > 1)}, the first: "
            f"{self._first[kind]})"
            for kind, count in self._examples.most_common()
        ]


def refusal(notes: Iterable[Note]) -> str:
    """Return the message with which `audit: refuse` refuses an example; "" if it does not."""
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
