"""`engram-interp`: the command line. Every command is a thin call into the library; nothing heavy is imported for `--help`."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

app = tyro.extras.SubcommandApp()

Model = Annotated[str, arg(help="a bundled name (see `engram-interp models`), a model directory or a GGUF file")]
Base = Annotated[Path | None, arg(help="the base model of an engram-peft adapter: a directory or a GGUF file")]


def _print(*lines: object) -> None:
    print(*lines, sep="\n")


def _json(value: object) -> None:
    import json

    print(json.dumps(_finite(value), allow_nan=False))


def _finite(value: object) -> object:
    """JSON has no NaN: a number that could not be estimated becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


@app.command
def models(*, json: bool = False) -> int:
    """List the bundled models."""
    from engram_interp.models.registry import describe_bundled

    rows = describe_bundled()
    if json:
        _json(rows)
    else:
        _print(*(f"{row['name']:<18} {row['description']}" for row in rows))
    return 0


@app.command
def gates(
    model: Positional[Model],
    *,
    text: str | None = None,
    file: Path | None = None,
    recorded: Path | None = None,
    item: int = 0,
    base: Base = None,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Show where the memory speaks: every gate of every token, layer and branch.

    Args:
        model: A bundled name, a model directory or a GGUF file.
        base: The base model an adapter belongs to.
        text: The text to read.
        file: Read the text from this file instead.
        recorded: Hidden states captured elsewhere (.npz, as for check), for memories without their model.
        item: Which text of the recording.
        out: Write .html, .csv or .json here.
        json: Print the record as JSON instead of coloured strips.
    """
    from engram_interp.models.adapters.opening import open_model
    from engram_interp.probes.gates import read_gates
    from engram_interp.probes.recorded_gates import read_recorded_gates

    if sum(given is not None for given in (text, file, recorded)) != 1:
        raise ValueError("expected one of --text, --file and --recorded")
    opened = open_model(model, base=base)
    if recorded is not None:
        result = read_recorded_gates(opened, recorded, item)
    else:
        result = read_gates(opened, text if text is not None else file.read_text(encoding="utf-8"))  # type: ignore[union-attr, arg-type]
    if out is not None:
        result.write(out)
    if json:
        _json(result.as_dict())
    elif out is None:
        _show_gates(result)
    return 0


def _show_gates(result) -> None:  # noqa: ANN001
    from rich.console import Console

    from engram_interp.figures.strip import terminal_strips

    console = Console(highlight=False)
    console.print(f"{result.model}: gate of every token, dark 0 to bright 1; 0.5 means no evidence")
    for label, line in terminal_strips(
        result.tokens, result.layers, result.gates, colour=console.color_system is not None
    ):
        console.print(f"\n{label}")
        console.print(line)


@app.command
def check(
    model: Positional[str | None] = None,
    *,
    vectors: Path | None = None,
    tokenizer: Path | None = None,
    recorded: Path | None = None,
    base: Base = None,
    json: bool = False,
) -> int:
    """Check that a model is what it claims to be, or the memory against a recorded run.

    Args:
        model: A bundled name, a model directory or a GGUF file.
        vectors: A recorded run of the published demo (path without suffix).
        tokenizer: The tokenizer of the recorded run.
        recorded: A recorded run of the given model (.npz).
        base: The base model an adapter belongs to.
        json: Print the report as JSON.
    """
    if vectors is not None:
        from engram_interp.memory.recorded import run_vectors_check

        if tokenizer is None:
            raise ValueError("--vectors needs --tokenizer")
        return run_vectors_check(vectors, tokenizer)
    if model is None:
        raise ValueError("expected a model, or --vectors and --tokenizer")
    from engram_interp.models.check import run_check

    return run_check(model, recorded=recorded, base=base, json=json)


@app.command
def lens(
    engram: Positional[Model],
    moe: Positional[Model],
    *,
    texts: Path | None = None,
    base: Base = None,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Compare how early two models' predictions form: KL(final || layer), paired by document.

    Args:
        engram: The model whose difference is taken, usually the one with a memory.
        moe: The model it is compared with; any Hugging Face causal language model will do.
        texts: One text per line, or .jsonl; the bundled gallery if absent.
        base: The base model of an adapter among the two.
        out: Write the figure (.html) or the table (.csv) here.
        json: Print the curves and their difference as JSON.
    """
    from engram_interp.models.adapters.opening import open_decoders
    from engram_interp.probes.lens import logit_lens_kl
    from engram_interp.probes.lens_comparison import compare_lens

    corpus = _texts(texts)
    result = compare_lens(*(logit_lens_kl(opened, corpus) for opened in open_decoders(engram, moe, base=base)))
    _write(result, out)
    if json:
        _json(result.as_dict())
    elif out is None:
        _print(result.table().query("stratum == 'all'").to_string(index=False), result.statement)
    return 0


@app.command
def cka(
    engram: Positional[str | None] = None,
    baseline: Positional[str | None] = None,
    *,
    texts: Path | None = None,
    control: str | None = None,
    positions: Literal["entity_final", "one_per_document", "all"] | None = None,
    from_heatmap: Path | None = None,
    soft_alignment: int = 5,
    permutations: int = 100,
    seed: int = 0,
    base: Base = None,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Compare the layers of two models: unbiased linear CKA with intervals, soft alignment with its null.

    Args:
        engram: The model whose depths are asked for.
        baseline: The model whose layers are the ruler.
        texts: One text per line, or .jsonl; the bundled gallery if absent. Entities need the gallery's marks.
        control: The baseline from another seed, which gives the null.
        positions: Which tokens are rows; by default entity_final on the gallery, one_per_document on a file.
        from_heatmap: Compute the soft alignment of a heat map in this JSON file instead.
        soft_alignment: k of the soft alignment index.
        permutations: Shuffles of the documents for the largest CKA of unrelated models.
        seed: Seed of everything random.
        base: The base model of the adapters among the models.
        out: Write the figure (.html) or the table (.csv) here.
        json: Print the result as JSON.
    """
    from engram_interp.probes.cka_command import run_cka, run_from_heatmap

    if from_heatmap is not None:
        return run_from_heatmap(from_heatmap, soft_alignment, as_json=json, out=out)
    if engram is None or baseline is None:
        raise ValueError("expected two models, or --from-heatmap")
    return run_cka(
        engram,
        baseline,
        texts=texts,
        control=control,
        positions=positions,
        k=soft_alignment,
        permutations=permutations,
        seed=seed,
        base=base,
        as_json=json,
        out=out,
    )


def _texts(path: Path | None) -> list:
    """The texts of a file, or the bundled gallery with its marked entities.

    Raises: ValueError when the file holds no text.
    """
    from engram_interp.gallery import load_gallery
    from engram_interp.gallery.files import read_texts

    texts = list(load_gallery()) if path is None else list(read_texts(path))
    if not texts:
        raise ValueError(f"{path}: expected at least one text, found an empty file")
    return texts


def _write(result: Any, out: Path | None) -> None:
    """Write a result's figure or table, by the suffix."""
    if out is None:
        return
    if out.suffix == ".html":
        result.figure().write_html(out, include_plotlyjs=True)
    elif out.suffix == ".csv":
        result.table().to_csv(out, index=False)
    else:
        raise ValueError(f"expected a file ending in .html or .csv, found {out.name!r}")


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
    _print(f"{out}: {header.tokens} tokens of {header.documents} documents")
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

        _print(measure_training_speed(load_train_config(config), len(os.sched_getaffinity(0))))
        return 0
    from engram_interp.training.train import Trainer

    result = Trainer(load_train_config(config)).run()
    held_out = "" if result.held_out_loss is None else f", held-out loss {result.held_out_loss:.4f} nats per token"
    _print(f"{result.directory}: {result.steps} steps{held_out}, {result.tokens_per_second:.0f} tokens per second")
    return 0


@app.command
def demo(*, text: str = "Only Alexander the Great could tame the horse Bucephalus.") -> int:
    """Show the bundled pair on the bundled gallery: gates at entities against the rest, and both models' loss.

    Args:
        text: The sentence whose gates are shown first.
    """
    from engram_interp.demo import run_demo

    return run_demo(text)


@app.command
def ablate(
    model: Positional[Model],
    *,
    config: Path,
    data: Path | None = None,
    base: Base = None,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Take the memory away in the ways a YAML file lists, beside controls of equal size.

    Args:
        model: A bundled name or a model directory.
        config: Tasks and conditions (see experiments/configs/remove_engram.yaml).
        data: Evaluation sets, laid out as in the README.
        base: The base model an adapter belongs to.
        out: Write the figure (.html), the table (.csv) or everything (.json) here.
        json: Print everything as JSON.
    """
    from engram_interp.studies.commands import run_ablate

    return run_ablate(model, config, data=data, base=base, as_json=json, out=out)


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
    from engram_interp.studies.evaluation import compare_evaluations
    from engram_interp.studies.evaluation_command import run_evaluate

    results, folder = run_evaluate(
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
    difference = compare_evaluations(*results) if against else None
    if json:
        rows = None if difference is None else difference.to_dict("records")
        _json({**results[0].as_dict(), "against": results[1].as_dict() if against else None, "difference": rows})
        return 0
    for result in results:
        _print(result.model, result.table().to_string(index=False))
        if result.bits_per_byte:
            _print(f"held-out bits per byte: {result.bits_per_byte}")
    if difference is not None:
        _print(f"{results[0].model} minus {results[1].model}", difference.to_string(index=False))
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
        _print(text)
    return 0


@app.command
def findings(
    *, pair: str = "mini", out: Path = Path("runs/findings"), items: int = 400, seed: int = 0, json: bool = False
) -> int:
    """Ask the paper's questions of a pair: paper, here, null, rule and verdict, kept as a run folder.

    Args:
        pair: A bundled pair.
        out: The run folder to write.
        items: Items per ablation task at the most.
        seed: Seed of everything drawn.
        json: Print the table as JSON.
    """
    from engram_interp.models.registry import load_pair
    from engram_interp.studies.findings import run_findings

    found = run_findings(load_pair(pair), out, items=items, seed=seed)
    if json:
        _json([vars(row) for row in found.rows])
        return 0
    for row in found.rows:
        _print(
            f"{row.verdict.upper()}: {row.claim}",
            *(f"  {k:6}{getattr(row, k)}" for k in ("paper", "here", "null", "rule")),
        )
    _print(f"run folder: {out}")
    return 0


@app.command
def report(
    *,
    pair: str = "mini",
    engram: str | None = None,
    baseline: str | None = None,
    control: str | None = None,
    data: Path | None = None,
    items: int = 400,
    seed: int = 0,
    out: Path = Path("runs/report"),
) -> int:
    """Write one self-contained page that shows what the memory of a pair does, next to the paper.

    Args:
        pair: A bundled pair.
        engram: A model directory instead, with its baseline and the baseline's other seed.
        baseline: The baseline of `engram`.
        control: The baseline from another seed: the null of every comparison.
        data: Evaluation data; the bundled gallery if absent.
        items: Items per task at the most.
        seed: Seed of everything drawn.
        out: The run folder to write; the page is report.html in it.
    """
    from engram_interp.models.registry import Pair, load, load_pair
    from engram_interp.studies.report import run_report

    given = (engram, baseline, control)
    if any(given) and not all(given):
        raise ValueError("expected --engram, --baseline and --control together: without another seed there is no null")
    models = Pair(*(load(name) for name in given if name)) if all(given) else load_pair(pair)
    page = run_report(models, out, data=data, items=items, seed=seed, progress=sys.stderr.isatty())
    _print(f"report: {page}", "dashboard: engram-interp app")
    return 0


@app.command
def bench(
    model: Positional[str | None] = None,
    *,
    group: tuple[Literal["forward", "vocabulary", "cka", "ngram"], ...] = ("forward", "vocabulary", "cka", "ngram"),
    rounds: int = 5,
    threads: tuple[int, ...] = (),
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Time the probes beside the arithmetic they need, interleaved, on one thread and on all.

    Args:
        model: A bundled name or a checkpoint directory for the forward group; without it a random model of 12 blocks.
        group: What to time.
        rounds: Interleaved repetitions.
        threads: Numbers of threads; without it one, and all.
        out: Run folder; without it one named by the time below runs/bench.
        json: Print the ratios as JSON.
    """
    from datetime import UTC, datetime

    from engram_interp.models.registry import load
    from engram_interp.studies.bench import run_bench

    folder = out or Path("runs/bench") / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    counts = threads or sorted({1, len(os.sched_getaffinity(0))})
    table = run_bench(group, load(model) if model else None, folder, rounds=rounds, threads=counts)
    if json:
        _json({"run": str(folder), "rows": table.to_dict("records")})
    else:
        _print(table.to_string(index=False, float_format="%.3f"), f"run folder: {folder}")
    return 0


@app.command(name="app")
def dashboard(
    *, model: tuple[Path, ...] = (), runs: Path | None = None, port: int | None = None, headless: bool = False
) -> int:
    """Open the dashboard on the bundled models, and on the directories named here.

    Args:
        model: Model directories the page may open besides.
        runs: A folder of run folders to show.
        port: Port to serve on.
        headless: Do not open a browser.
    """
    from engram_interp.app_launcher import run_app

    return run_app([str(path) for path in model], port, headless, str(runs) if runs else None)


@app.command
def memory() -> int:
    """Read the table itself: lookup, collisions, access, rows, neighbours, read, diff."""
    raise ValueError("expected `engram-interp memory ACTION PATH ...`; see `engram-interp memory --help`")


@app.command
def runs() -> int:
    """Look at run folders: list, show, table."""
    raise ValueError("expected `engram-interp runs list|show|table PATH`; see `engram-interp runs --help`")


def _group(name: str) -> dict[str, Callable[..., int]]:
    """The actions of a command that has several."""
    if name == "memory":
        from engram_interp.probes import memory_commands as actions
    else:
        from engram_interp.runs import commands as actions
    return {key.removeprefix("run_"): value for key, value in vars(actions).items() if key.startswith("run_")}


def _dispatch() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in ("memory", "runs"):
        return app.cli(prog="engram-interp", description=__doc__)
    return tyro.extras.subcommand_cli_from_dict(_group(name), prog=f"engram-interp {name}", args=sys.argv[2:])


def main() -> None:
    """Run a command; what a user can mend is one line on standard error and exit code 2."""
    try:
        sys.exit(_dispatch())
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError, KeyError, ArithmeticError, NotImplementedError) as error:
        if os.environ.get("ENGRAM_INTERP_TRACEBACK"):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"engram-interp: {' '.join(str(message).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("engram-interp: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
