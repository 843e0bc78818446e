"""One question to a language model: a prompt and its possible continuations."""

from __future__ import annotations

from dataclasses import dataclass

Text = str | tuple[int, ...]


@dataclass(frozen=True)
class Item:
    """A prompt and its continuations, the right one first.

    Both are text (a continuation starts with its space) or token ids. `group` names what items share (a document, a
    relation): rows of one group are not independent.
    """

    id: str
    prompt: Text
    choices: tuple[Text, ...]
    group: str = ""

    @property
    def chance(self) -> float:
        """What guessing scores: 1/n among n continuations, 0 when any token may follow."""
        return 1 / len(self.choices) if len(self.choices) > 1 else 0.0
