"""Which texts does a study read: to fit statistics, to score as text, to look for side effects in?"""

from __future__ import annotations

from functools import lru_cache
from itertools import islice
from pathlib import Path

from engram_interp.gallery.sentences import load_gallery
from engram_interp.models.protocol import Decoder
from engram_interp.models.text import start_tokens, windows
from engram_interp.probes.task_items import Item
from engram_interp.probes.tasks import Task, load_tasks
from engram_interp.studies.config import StudyConfig
from engram_interp.training.corpus import read_documents

_CHARACTERS = 1500  # about one context of the mini models


@lru_cache(maxsize=8)
def _opening(path: Path, count: int) -> tuple[str, ...]:
    """The beginnings of the first `count` documents of a corpus."""
    return tuple(d.text[:_CHARACTERS] for d in islice(read_documents([path]), count))


def fit_texts(config: StudyConfig) -> tuple[str, ...]:
    """Documents for statistics: never evaluated ones, when there is a data folder.

    Raises: CorpusError when the corpus is missing or damaged.
    """
    if config.data is not None:
        return _opening(config.data / config.fit_corpus, config.fit_texts)
    return tuple(s.text for s in load_gallery())[-config.fit_texts :]


def study_tasks(config: StudyConfig, model: Decoder, seed: int) -> list[Task]:
    """The configured tasks, and the held-out texts as one more (its loss is what counts).

    Raises: ValueError for an unknown task, or one that needs a data folder when there is none.
    """
    tasks = load_tasks(config.tasks, model.tokenizer, data=config.data, limit=config.items, seed=seed)
    if config.loss_texts:
        if config.data is None:
            raise ValueError(f"loss_texts reads {config.loss_corpus}: give the data folder with --data")
        texts = _opening(config.data / config.loss_corpus, config.loss_texts)
        tasks.append(Task("held_out_text", "language", _text_items(model, texts), config.loss_corpus))
    return tasks


def _text_items(model: Decoder, texts: tuple[str, ...]) -> tuple[Item, ...]:
    """The first window of each text, predicted from the start token on (from its first token where there is none)."""
    start, items = len(start_tokens(model)), []
    for number, text in enumerate(texts):
        ids = tuple(next(iter(windows(model, text))).tokens[0, start:].tolist())
        prompt, rest = ((), ids) if start else (ids[:1], ids[1:])
        items.append(Item(f"text.{number}", prompt, (rest,)))
    return tuple(items)
