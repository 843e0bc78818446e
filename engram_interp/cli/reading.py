"""Commands that read models: list, gates, check, lens, cka, ablate, corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from engram_interp.cli.output import Base, Model, app, read_corpus, show, show_json, write_result


@app.command
def models(*, json: bool = False) -> int:
    """List the bundled models."""
    from engram_interp.models.registry import describe_bundled

    rows = describe_bundled()
    if json:
        show_json(rows)
    else:
        show(*(f"{row['name']:<18} {row['description']}" for row in rows))
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
        show_json(result.as_dict())
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
    quantities: Literal["all", "kl"] | None = None,
    precision: Literal["exact", "fast"] = "exact",
    base: Base = None,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Compare how early two models' predictions form: KL(final || layer), paired by document.

    Args:
        engram: The model whose difference is taken, usually the one with a memory.
        moe: The model it is compared with; any Hugging Face causal language model will do.
        texts: One text per line, or .jsonl; the bundled gallery if absent.
        quantities: kl leaves out everything but KL, cross-entropy and top-1, at half the cost; fast implies it.
        precision: fast multiplies in bfloat16 and states its error (about 0.01 nats); no top-1, so no settling depth.
        base: The base model of an adapter among the two.
        out: Write the figure (.html) or the table (.csv) here.
        json: Print the curves and their difference as JSON.
    """
    from engram_interp.models.adapters.opening import open_decoders
    from engram_interp.probes.lens_comparison import read_and_compare

    corpus = read_corpus(texts)
    first, second = open_decoders(engram, moe, base=base)
    quantities = quantities or ("kl" if precision == "fast" else "all")
    result = read_and_compare(first, second, corpus, quantities=quantities, precision=precision)
    write_result(result, out)
    if json:
        show_json(result.as_dict())
    elif out is None:
        show(result.table().query("stratum == 'all'").to_string(index=False), result.statement, result.arithmetic)
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
def corpus(
    model: Positional[Model],
    *,
    texts: Path,
    out: Path,
    read: tuple[Literal["gates", "lens"], ...] = (),
    documents: int = 0,
    per_token: bool = False,
    shard_documents: int = 8,
    batch: int = 8,
    threads: int = 1,
    device: Literal["cpu", "cuda"] = "cpu",
    device_map: str | None = None,
    base: Base = None,
    json: bool = False,
) -> int:
    """Read gates and lens over a corpus of any size; started again it goes on. Over N processes:
    `torchrun --nproc-per-node N -m engram_interp corpus ...`, with the same result to the last bit.

    Args:
        model: A bundled name, a model directory or a GGUF file.
        texts: A token file (.bin, from tokenize) or JSON lines with a `text` (.jsonl, .jsonl.zst).
        out: The run folder to write or to go on with.
        read: What to read; by default the gates of a model that has a memory, and the lens.
        documents: Read only this many from the front; 0 reads all.
        per_token: Keep a row per token too (`shards/tokens/*.parquet`).
        shard_documents: Documents per piece that a stop cannot undo.
        batch: Windows per forward.
        threads: Threads per process.
        device: With cuda, every process takes the GPU of its local rank.
        device_map: Where transformers puts the weights of a large Hugging Face model (auto, balanced, ...); one process only.
        base: The base model an adapter belongs to.
        json: Print the summary as JSON.
    """
    from engram_interp.corpus.command import run_corpus

    done = run_corpus(
        model, texts, out, read, base=base, device=device, device_map=device_map, documents=documents, per_token=per_token,
        shard_documents=shard_documents, batch=batch, threads=threads,
    )  # fmt: skip
    if done is None:
        return 0
    result, cost = done
    if json:
        show_json({"run": str(out), "shards": result.shards, **cost, "summary": result.summary.to_dict("records")})
        return 0
    columns = ["kind", "layer", "branch", "tokens", "mean", "low", "high", "q05", "q50", "q95"]
    show(
        result.summary[columns].to_string(index=False, float_format="%.4g"),
        f"{result.read} of {result.shards} shards read now by this process, {cost['cpu_seconds']:.1f} s of it, "
        f"at most {cost['peak_bytes'] / 2**20:.0f} MB in memory; run folder: {out}",
    )
    return 0
