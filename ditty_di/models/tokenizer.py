"""The tokenizer of a pretrained model, with what a task adds to it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ditty_di.models.files import ModelFiles


def from_pretrained(
    path: str,
    *,
    revision: str | None = None,
    special_tokens: Sequence[str] = (),
    mask_token: str | None = None,
    chat_template: str | None = None,
    model_max_length: int | None = None,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub id.

    Args:
        path: a folder, or the hub's `user/name`.
        revision: branch, tag or commit on the hub; None is its main branch.
        special_tokens: added where the vocabulary lacks them; a model that is given this tokenizer
            grows its embeddings to match.
        mask_token: as for `add_to`.
        chat_template: a Jinja template, or a file with one, that replaces the tokenizer's.
        model_max_length: in tokens; replaces the tokenizer's.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: see `ModelFiles`.
        ValueError: no tokenizer there, or one without an end-of-sequence token (or the separator
            of encoders such as BERT), which a model needs to learn where to stop.
    """
    ModelFiles(path, revision).find("tokenizer_config.json")  # has the clearer error messages
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise ValueError(f"tokenizer: there is none in {path}: {first}") from error
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is None:  # BERT's ends in [SEP]
        raise ValueError(
            f"tokenizer: that of {path} has no end-of-sequence token; name one of its tokens with "
            f"a tokenizer_config.json that has eos_token"
        )
    if model_max_length is not None:
        tokenizer.model_max_length = model_max_length
    return add_to(tokenizer, special_tokens, chat_template, mask_token)


def add_to(
    tokenizer: PreTrainedTokenizerBase,
    special_tokens: Sequence[str] = (),
    chat_template: str | None = None,
    mask_token: str | None = None,
) -> PreTrainedTokenizerBase:
    """Add special tokens and a chat template (Jinja text, or a file with it) to a tokenizer.

    `mask_token` stands for a hidden token of a masked language model; the vocabulary gets it where
    it lacks it.
    """
    if special_tokens:
        tokenizer.add_tokens(list(special_tokens), special_tokens=True)
    if mask_token is not None:
        tokenizer.add_special_tokens({"mask_token": mask_token})
    if chat_template is not None:
        file = Path(chat_template).expanduser()
        is_file = "\n" not in chat_template and "{" not in chat_template and file.is_file()
        tokenizer.chat_template = file.read_text(encoding="utf-8") if is_file else chat_template
    return tokenizer


def end_of_turn_ids(tokenizer: Any) -> list[int]:
    """Return the ids of the tokens that end an assistant turn as the chat template renders it.

    That is the first special token behind the content of the last turn (`<|im_end|>`, `<|eot_id|>`,
    `</s>`). A template that closes no turn ends it where the next one begins: there it is the first
    special token of a user's and of a tool's turn (`<|user|>`, `<|observation|>`). Added tokens
    that are not marked as special count where no special one follows.

    Empty without a chat template, and for one that ends turns with plain text. `eos_token_id` is
    in the list only where the template renders it.
    """
    if not getattr(tokenizer, "chat_template", None):
        return []
    closing = _first_marker(tokenizer, _behind_answer(tokenizer))
    opening = [_first_marker(tokenizer, _behind_answer(tokenizer, role)) for role in _NEXT_ROLES]
    found = [closing] if closing is not None else opening
    return sorted({token for token in found if token is not None})


def user_turn(tokenizer: Any) -> tuple[str, str]:
    """Return what the chat template writes before and behind the content of a user's last turn.

    Before it is what is the same in the first turn and in a later one, without BOS; behind it the
    text up to and including the first special token. Empty without a chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        return "", ""
    first = _rendered(tokenizer, [("user", _QUESTION)], add_generation_prompt=True)
    turns = [("user", _NEXT), ("assistant", _ANSWER), ("user", _QUESTION)]
    before, _, behind = first.rpartition(_QUESTION)
    later = _rendered(tokenizer, turns).rpartition(_QUESTION)[0].rpartition(_ANSWER)[2] or before
    backwards = zip(reversed(before), reversed(later), strict=False)
    cut = len(before) - sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], backwards))
    words = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len)
    marker = re.compile("|".join(map(re.escape, reversed(words))) or "(?!)")
    # What is the same may begin within a token: `<|eos|><|user|>` and `<|bos|><|user|>`.
    cut = next((m.start() for m in marker.finditer(before) if m.start() >= cut), cut)
    end = marker.search(behind)
    opening = before[cut:].removeprefix(tokenizer.bos_token or "")
    return opening, behind[: end.end()] if end else behind


#: Roles of turns that may follow an answer.
_NEXT_ROLES = ("user", "tool")
#: Contents that no template contains by itself, so that they can be found in the rendered text.
_QUESTION, _ANSWER, _NEXT = "qvestion1", "ansver2", "nekst3"


def _behind_answer(tokenizer: Any, next_role: str | None = None) -> str:
    """Return what the template writes behind an answer, up to the next turn's content."""
    turns = [("user", _QUESTION), ("assistant", _ANSWER)]
    turns += [(next_role, _NEXT)] if next_role else []
    rest = _rendered(tokenizer, turns).rpartition(_ANSWER)[2]
    return rest.partition(_NEXT)[0]


def _rendered(tokenizer: Any, turns: list[tuple[str, str]], **options: Any) -> str:
    """Return a conversation as the template renders it.

    Empty where the template refuses the conversation or changes its contents.
    """
    for content in (str, lambda text: [{"type": "text", "text": text}]):
        messages = [{"role": role, "content": content(text)} for role, text in turns]
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception:  # a template is code and may raise anything
            continue
        if all(word in text for _, word in turns):
            return text
    return ""


def _first_marker(tokenizer: Any, text: str) -> int | None:
    """Return the first special token of the text, else the first non-blank added one."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    words = {i for i, token in added.items() if token.content.strip(" \t\r\n▁")}
    found = (token for markers in (special, words) for token in ids if token in markers)
    return next(map(int, found), None)
