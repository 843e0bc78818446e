"""Commands that make models and measure what they know: tokenize, train, evaluate, card."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from engram_interp.cli.output import Model, app, show, show_json


@app.command
def tokenize(
    files: Positional[tuple[Path, ...]], *, out: Path, tokenizer: Path, vocab_size: int = 8192, held_out: bool = False
) -> int:
    """Turn corpus files (.jsonl, .jsonl.zst) into a token file; learn the tokenizer first if it does not exist.

    Args:
        files: Corpus files, one JSON object with a `text` per line.
        out: The token file to write.
        tokenizer: The tokenizer to use, or to learn from every 8th document.
        vocab_size: Size of a tokenizer learnt here.
        held_out: Keep the held-out titles instead of the training titles.
    """
    from tokenizers import Tokenizer

    from engram_interp.training.corpus import is_held_out, read_documents, train_tokenizer, write_token_file

    if not tokenizer.is_file():
        sample = (d for i, d in enumerate(read_documents(files)) if i % 8 == 0 and not is_held_out(d.title))
        train_tokenizer(sample, vocab_size).save(str(tokenizer))
    header = write_token_file(out, files, Tokenizer.from_file(str(tokenizer)), held_out=held_out)
    show(f"{out}: {header.tokens} tokens of {header.documents} documents")
    return 0


@app.command
def train(config: Positional[Path], *, speed: bool = False) -> int:
    """Train a model from a YAML file; run again to resume.

    Args:
        config: The run (see experiments/configs/mini).
        speed: Only measure how fast it trains here, one process per core, beside the machine's matrix-product rate.
    """
    from engram_interp.training.config import load_train_config

    if speed:
        from engram_interp.training.speed import measure_training_speed

        show(measure_training_speed(load_train_config(config), len(os.sched_getaffinity(0))))
        return 0
    from engram_interp.training.train import Trainer

    result = Trainer(load_train_config(config)).run()
    held_out = "" if result.held_out_loss is None else f", held-out loss {result.held_out_loss:.4f} nats per token"
    show(f"{result.directory}: {result.steps} steps{held_out}, {result.tokens_per_second:.0f} tokens per second")
    return 0


@app.command
def evaluate(
    model: Positional[Model],
    *,
    against: str | None = None,
    suite: Literal["mini"] = "mini",
    data: Path | None = None,
    items: int = 2000,
    articles: int | None = None,
    seed: int = 0,
    hub: tuple[str, ...] = (),
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Measure what a model knows: held-out loss, phrases, copying, facts, LAMBADA, BLiMP, induction.

    Args:
        model: A bundled name or a model directory.
        against: Another model to compare with, item by item.
        suite: The set of tasks.
        data: Evaluation data (enwiki_2015_core.heldout.jsonl.zst, eval/*.jsonl.zst); the bundled gallery if absent.
        items: Items per task at the most.
        articles: Held-out articles at the most.
        seed: Seed of everything drawn.
        hub: Further tasks from Hugging Face data sets, such as hub:lambada or hub:popqa (needs a network).
        out: The run folder; by default one below runs/evaluate named by what is evaluated.
        json: Print the scores as JSON.
    """
    from engram_interp.studies.evaluation_command import run_evaluate

    results, differences, folder = run_evaluate(
        (model,) if against is None else (model, against),
        data,
        items=items,
        articles=articles,
        seed=seed,
        hub=hub,
        out=out,
    )
    if data is None:
        print("no --data: bundled gallery and generated tasks only", file=sys.stderr)
    for name in results[0].missing:
        print(f"left out: {name} (no data)", file=sys.stderr)
    print(f"run folder: {folder}", file=sys.stderr)
    difference = differences[0] if against else None
    if json:
        rows = None if difference is None else difference.to_dict("records")
        show_json({**results[0].as_dict(), "against": results[1].as_dict() if against else None, "difference": rows})
        return 0
    for result in results:
        show(result.model, result.table().to_string(index=False))
        if result.bits_per_byte:
            show(f"held-out bits per byte: {result.bits_per_byte}")
    if difference is not None:
        show(f"{results[0].model} minus {results[1].model}", difference.to_string(index=False))
    return 0


@app.command
def card(
    config: Positional[Path],
    *,
    data: Path | None = None,
    items: int = 2000,
    articles: int | None = None,
    out: Path | None = None,
) -> int:
    """Evaluate the model a training configuration made and write its model card, with the curves of its memory beside it.

    Args:
        config: The training configuration; its `out` holds the checkpoint.
        data: Evaluation data; the bundled gallery if absent.
        items: Items per task at the most.
        articles: Held-out articles at the most.
        out: The file to write; printed if absent.
    """
    from engram_interp.studies.card_command import run_card

    text = run_card(config, data, items=items, articles=articles, out=out)
    if out is None:
        show(text)
    return 0
