"""Prompts as the model's own tokenizer cuts them: which token belongs to which word."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from comfy.sd1_clip import escape_important, token_weights, unescape_important

from ...stem.fatezero import LENGTH
from .naming import shown

MARKS = ".,;:!?"  # after a word; they have tokens of their own


class Word(NamedTuple):
    text: str  # as written, with marks after it
    start: int  # place of its first token in the prompt, the start token being 0
    tokens: int  # how many, with those of its marks
    own: int  # how many, without


class Prompt(NamedTuple):
    text: str
    tokens: list[Hashable]  # with start and end, without padding
    conditioning: torch.Tensor  # (1, 77, c)
    words: list[Word]

    @property
    def glued(self) -> bool:
        """Whether there are words that cannot be told apart."""
        return not self.words and len(self.tokens) > 2


def read_prompt(clip: Any, text: str, name: str) -> Prompt:
    """Tokens, words and conditioning of a prompt.

    Args:
        clip: Core's CLIP.
        text: May have weights, as "(word:1.2)"; they count in the conditioning alone.
        name: Of the input, for the error.

    Raises:
        ValueError: More tokens than one prompt holds, or a CLIP for longer prompts.
    """
    tokens = clip.tokenize(text)
    chunks = next(iter(tokens.values()))
    if len(chunks) != 1:
        raise ValueError(f"{name} takes {len(chunks)} rounds of 75 tokens; words are aligned within one. Shorten the prompt.")
    end = _first_row(clip.tokenize(""))[1][0]
    ids = _without_padding(chunks[0], end)
    [[conditioning, _], *_] = clip.encode_from_tokens_scheduled(tokens)
    if conditioning.shape[1] != LENGTH:
        raise ValueError(
            f"clip makes {conditioning.shape[1]} tokens of {name}; words are aligned in the {LENGTH} of an ordinary CLIP. Take "
            "one that has no longer prompts, such as that of the checkpoint."
        )
    return Prompt(text, ids, conditioning, _words(clip, text, len(ids) - 2, end))


def same_conditioning(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two conditionings (1, n, c) are those of one prompt, perhaps encoded on another device or in half precision."""
    if one.shape != other.shape:
        return False
    one, other = one.detach().cpu().float(), other.detach().cpu().float()
    return bool(((one - other).norm(dim=-1) <= 2e-2 * other.norm(dim=-1)).all())  # token by token: the first is long


def places(prompt: Prompt, phrase: str, name: str) -> list[int]:
    """Places of the tokens of all words of a phrase, each wherever it occurs.

    Raises:
        ValueError: A word that the prompt does not have.
    """
    found = []
    if phrase.split() and prompt.glued:
        raise ValueError(f"the words of {name} cannot be told apart: {shown(prompt.text)}. Put spaces between them.")
    for wanted in phrase.split():
        hits = [word for word in prompt.words if bare(word.text).lower() == bare(wanted).lower()]
        if not hits:
            raise ValueError(f"{shown(wanted)} is not a word of {name}: {shown(prompt.text)}. Write a word as it stands there.")
        found += [place for word in hits for place in range(word.start, word.start + word.own)]
    return sorted(set(found))


def bare(word: str) -> str:
    """A word without the marks after it."""
    return word.rstrip(MARKS) or word


def _without_padding(row: list[tuple], end: int) -> list[Hashable]:
    """Tokens up to the first end. An embedding's vectors are told apart by their numbers."""
    ids = [tuple(token.tolist()) if isinstance(token, torch.Tensor) else token for token, *_ in row]
    return ids[: ids.index(end) + 1] if end in ids else ids


def _first_row(tokens: dict[str, list]) -> list[tuple]:
    """Of the first of the text encoders, which all cut alike."""
    return next(iter(tokens.values()))[0]


def _words(clip: Any, text: str, tokens: int, end: int) -> list[Word]:
    """The words between spaces; none where they do not make up the prompt (embeddings)."""
    plain = "".join(unescape_important(part) for part, _ in token_weights(escape_important(text), 1.0))
    words, start = [], 1
    for word in plain.split():
        each = (word, bare(word))
        whole, own = (len(_without_padding(_first_row(clip.tokenize(w, disable_weights=True)), end)) - 2 for w in each)
        words.append(Word(word, start, whole, own))
        start += whole
    return words if start - 1 == tokens else []
