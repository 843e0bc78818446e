"""Items from Hugging Face data sets, for people with a network (or with a local folder in the same form).

Named `hub:lambada`, `hub:blimp`, `hub:popqa`, `hub:triviaqa`; `hub:lambada=ID` reads another repository or folder with the
same columns. Needs the package `datasets` (`pip install "engram-interp[hub]"`); nothing is fetched unless a task is named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram_interp.probes.task_items import Item

HUB_PREFIX = "hub:"


@dataclass(frozen=True)
class HubSource:
    """A data set's id, configuration and split, and how a record becomes an item."""

    family: str
    id: str
    config: str | None
    split: str
    item: Callable[[Mapping[str, Any], str], Item]


def _lambada(record: Mapping[str, Any], name: str) -> Item:
    context, last = str(record["text"]).rsplit(" ", 1)
    return Item(name, context, (f" {last}",))


def _minimal_pair(record: Mapping[str, Any], name: str) -> Item:
    return Item(name, (), (str(record["sentence_good"]), str(record["sentence_bad"])), str(record["UID"]))


def _popqa(record: Mapping[str, Any], name: str) -> Item:
    answer = json.loads(record["possible_answers"])[0]
    return Item(name, f"Q: {record['question']} A:", (f" {answer}",), str(record["prop"]))


def _triviaqa(record: Mapping[str, Any], name: str) -> Item:
    return Item(name, f"Q: {record['question']} A:", (f" {record['answer']['value']}",))


HUB_SOURCES = {
    "lambada": HubSource("reading", "EleutherAI/lambada_openai", "default", "test", _lambada),
    "blimp": HubSource("grammar", "nyu-mll/blimp", "regular_plural_subject_verb_agreement_1", "train", _minimal_pair),
    "popqa": HubSource("facts", "akariasai/PopQA", None, "test", _popqa),
    "triviaqa": HubSource("facts", "mandarjoshi/trivia_qa", "rc.nocontext", "validation", _triviaqa),
}


def hub_items(task: str, limit: int | None, rng: np.random.Generator) -> tuple[HubSource, list[Item]]:
    """At most `limit` items (None: all) of a task such as `hub:lambada` or `hub:lambada=my-org/my-set`, in file order.

    Raises: ValueError for an unknown task, without the package `datasets`, when the data set cannot be read (no network), or
        when its records lack a column.
    """
    name, _, identity = task.removeprefix(HUB_PREFIX).partition("=")
    if name not in HUB_SOURCES:
        raise ValueError(f"unknown task {task!r}: expected one of {', '.join(HUB_PREFIX + key for key in HUB_SOURCES)}")
    source = HUB_SOURCES[name]
    records = _read(source, identity)
    chosen = np.sort(rng.choice(len(records), size=min(limit or len(records), len(records)), replace=False)).tolist()
    try:
        return source, [source.item(records[i], f"{name}.{i}") for i in chosen]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{identity or source.id}: not the records of {name} ({type(error).__name__}: {error})"
        ) from None


def _read(source: HubSource, identity: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError('hub tasks need the package `datasets`: pip install "engram-interp[hub]"') from None
    try:
        return load_dataset(identity or source.id, None if identity else source.config, split=source.split)
    except Exception as error:  # noqa: BLE001 - datasets raises many kinds without a common base
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{identity or source.id}: cannot be read from the Hugging Face hub ({type(error).__name__}: {reason}); "
            "without a network use --data DIR"
        ) from None
