"""What is opened and computed once for every tab: models, and results by weights and text.

The models a page may open are the bundled ones and the directories named when the server was started; a name from the
address bar is looked up among these and never used as a path. Results are frozen, so all sessions share them.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

import streamlit as st

from engram_interp.models.config import ModelConfig
from engram_interp.models.protocol import Decoder, MemoryModel
from engram_interp.probes.gates import GateMap
from engram_interp.probes.token_effects import TokenEffects
from engram_interp.probes.token_memory import WriteNorms

MAX_TOKENS = 8192
MAX_MODELS = 4


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--runs", default=None)
    return parser.parse_known_args(sys.argv[1:])[0]


def model_choices() -> dict[str, Path]:
    """Names shown to the user and their directories: the bundled models present, then those of the command line."""
    from engram_interp.models.checkpoint import CONFIG
    from engram_interp.models.registry import BUNDLED, find

    choices = {name: find(name) for name in BUNDLED if (find(name) / CONFIG).is_file()}
    for directory in map(Path, _arguments().model):
        name, number = directory.name, 2
        while name in choices:
            name, number = f"{directory.name} ({number})", number + 1
        choices[name] = directory
    return choices


def partners(name: str) -> list[str]:
    """The other models a model can be compared with: those with its tokenizer, as far as files show."""
    from engram_interp.models.checkpoint import TOKENIZER

    choices = model_choices()

    def content(directory: Path) -> bytes | None:
        file = directory / TOKENIZER
        return file.read_bytes() if file.is_file() else None

    own = content(choices[name])
    return [other for other, path in choices.items() if other != name and content(path) in (own, None)]


def runs_directory() -> Path | None:
    """The folder of run folders: the one named at the start, else `runs` where the server was started."""
    named = _arguments().runs
    folder = Path(named) if named else Path("runs")
    return folder if folder.is_dir() else None


def model(name: str) -> Decoder | MemoryModel:
    """The model of a name among `model_choices`; one copy for all tabs.

    Raises: ValueError for another name, CheckpointError for a checkpoint that cannot be opened.
    """
    choices = model_choices()
    if name not in choices:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(choices)}")
    return _open(str(choices[name]))


@st.cache_resource(
    max_entries=MAX_MODELS, show_spinner="Opening the model: configuration, weights, self-check of shapes"
)
def _open(directory: str) -> Decoder | MemoryModel:
    from engram_interp.models.adapters.opening import open_model

    _set_libraries_apart()
    return open_model(Path(directory))


@st.cache_resource(show_spinner=False)
def _set_libraries_apart() -> None:
    """Keep the imported libraries out of the garbage collection that Streamlit makes after every run of a script, and
    so after every click and twice a second for every job that is watched. Before a model is opened: it can be released.
    """
    import pandas  # noqa: F401
    import plotly.graph_objects  # noqa: F401
    import scipy.stats  # noqa: F401

    gc.collect()
    gc.freeze()


def config(name: str) -> ModelConfig | None:
    """The configuration of a house checkpoint, without opening its weights; None for another kind."""
    from engram_interp.models.checkpoint import CheckpointError, load_config

    try:
        return load_config(model_choices()[name])
    except CheckpointError:
        return None


def gates(name: str, text: str) -> GateMap:
    """Gates of a text.

    Raises: ValueError for an empty or too long text or a model without memory.
    """
    opened = model(name)
    return _gates(opened, opened.identity.weights_sha256, text)


@st.cache_resource(max_entries=64, show_spinner="Reading the gates")
def _gates(_model: MemoryModel, weights: str, text: str) -> GateMap:
    from engram_interp.probes.gates import read_gates

    return read_gates(_model, text, limit=MAX_TOKENS)


def write_norms(name: str, text: str, block: int) -> WriteNorms:
    """What one memory writes at every token of a text: a click on a token then runs no model."""
    opened = model(name)
    return _write_norms(opened, opened.identity.weights_sha256, text, block)


@st.cache_resource(max_entries=64, show_spinner="Reading what the memory writes")
def _write_norms(_model: MemoryModel, weights: str, text: str, block: int) -> WriteNorms:
    from engram_interp.probes.token_memory import write_norms as read

    return read(_model, text, block, limit=MAX_TOKENS)


def effects(
    name: str, text: str, positions: tuple[int, int], blocks: tuple[int, ...] | None = None, kind: str = "output_zero"
) -> TokenEffects:
    """The next token with and without memory, for a stretch of a text."""
    opened = model(name)
    return _effects(opened, opened.identity.weights_sha256, text, positions, blocks, kind)


@st.cache_resource(max_entries=128, show_spinner="Reading the text without the memory")
def _effects(
    _model: MemoryModel, weights: str, text: str, positions: tuple[int, int], blocks: tuple[int, ...] | None, kind: str
) -> TokenEffects:  # fmt: skip
    from engram_interp.probes.token_effects import token_effects

    statistics = statistics_for(_model, weights, kind)
    return token_effects(
        _model, text, positions=positions, blocks=blocks, kind=kind, statistics=statistics, limit=MAX_TOKENS
    )


def statistics_for(_model: MemoryModel, weights: str, kind: str):  # noqa: ANN201
    """Statistics fitted on the gallery for the kinds of ablation that need them, else None."""
    import inspect

    from engram_interp.hooks import KINDS

    takes = "statistics" in inspect.signature(KINDS[kind].build).parameters
    return memory_statistics(_model, weights) if takes else None


@st.cache_resource(max_entries=4, show_spinner="Measuring what the memory usually writes")
def memory_statistics(_model: MemoryModel, weights: str):  # noqa: ANN201
    """What a memory usually writes, over the bundled gallery."""
    from engram_interp.hooks import collect_memory_statistics

    return collect_memory_statistics(_model, gallery_texts())


@st.cache_data(show_spinner=False)
def gallery_texts() -> list[str]:
    """The bundled sentences."""
    from engram_interp.gallery import load_gallery

    return [sentence.text for sentence in load_gallery()]


@st.cache_resource(max_entries=8, show_spinner="Counting the n-grams of the reference corpus")
def corpus_counts(_model: MemoryModel, weights: str, block: int, texts: tuple[str, ...]):  # noqa: ANN201
    """The n-grams of some texts under the hash of one memory."""
    from engram_interp.memory.ngram_counts import count_ngrams
    from engram_interp.probes.memory_site import hash_of, site_of, token_ids

    return count_ngrams(hash_of(site_of(_model, block)), token_ids(_model, texts))


@st.cache_data(max_entries=16, show_spinner=False)
def _task_forwards(_model: MemoryModel, weights: str, limit: int) -> int:
    from engram_interp.probes.ablation import default_conditions
    from engram_interp.probes.scoring import batches, encode_items, shared_runs
    from engram_interp.probes.tasks import GENERATED_TASKS, load_tasks

    tasks = load_tasks(GENERATED_TASKS, _model.tokenizer, limit=limit)
    scored = sum(len(list(batches(shared_runs(encode_items(_model, task.items))))) for task in tasks)
    return len(gallery_texts()) + scored * (1 + len(default_conditions(_model)))


def task_forwards(model: MemoryModel, limit: int) -> int:
    """About how many forwards the ablation study takes, for its progress."""
    return _task_forwards(model, model.identity.weights_sha256, limit)
