"""The model card: what a bundled model is, how it was made, what it scores, and what it is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engram_interp.models.cost import active_flops, memory_parameters, parameter_count
from engram_interp.studies.evaluation import Evaluation
from engram_interp.training.config import TrainConfig

_LICENCE = """Trained on articles of the English Wikipedia as of 2015 (text: CC BY-SA 3.0 and GFDL, Wikipedia contributors). 1 % of the
articles, chosen by a hash of their titles, were never trained on, nor used for the tokenizer. The weights are the project's own
and come under the project's licence."""

_NOT = """A research object of {millions:.1f} million parameters. It writes no useful text, answers no questions, knows few facts, and says
nothing about models of other sizes; it exists so that probes have something real to measure. One seed; differences between
checkpoints are differences between checkpoints."""


CURVES = "memory.svg"


def model_card(
    config: TrainConfig, evaluation: Evaluation, config_path: str, monitor: Sequence[Mapping[str, Any]] = ()
) -> str:
    """Markdown for one model.

    Args: config_path: where the training configuration lies in the project, for the command that reproduces the model;
        monitor: the records of the memory monitor of the run, whose curves lie beside the card as `memory.svg`.
    """
    model = config.model
    flops, parameters = active_flops(model), parameter_count(model)
    memory = (
        f"Engram in blocks {list(model.engram.blocks)} (0-based), orders 2 to {model.engram.max_order}, "
        f"{model.engram.heads} heads, {model.engram.rows_per_head[0]} rows a head of {model.engram.head_width} columns, "
        f"{memory_parameters(model) / 1e6:.2f} M parameters"
        if model.engram
        else "none (baseline)"
    )
    facts = {
        "memory": memory,
        "blocks, width, attention heads": f"{model.layers}, {model.width}, {model.heads}",
        "residual streams": f"{model.streams}, static hyper-connections with doubly stochastic mixing",
        "experts": f"{model.routed_experts} routed of width {model.expert_width}, {model.active_experts} active, "
        f"1 shared of width {model.shared_width}",
        "vocabulary, context": f"{model.vocab_size}, {model.context}",
        "parameters": f"{parameters:,}",
        "work per token": f"{flops.backbone / 1e6:.2f} MFLOP backbone, {flops.router / 1e6:.2f} router, "
        f"{flops.memory / 1e6:.2f} memory projections",
        "trained positions": f"{config.steps * config.tokens_per_step:,} in {config.steps} steps of {config.tokens_per_step}",
        "optimiser": f"AdamW {config.betas}, peak rate {config.learning_rate:g}, {config.warmup_steps} warm-up steps, cosine to "
        f"{config.final_lr_fraction:g} of it, weight decay {config.weight_decay:g}, gradient clipped at {config.clip_norm:g}",
        "table": f"rate x {config.table_lr_factor:g}, no decay, start N(0, {config.table_std:g})"
        if model.engram
        else "none",
        "load-balance weight": f"{config.balance_weight:g}",
        "seed": f"{config.seed} (weights and order of the data)",
        "weights": "bfloat16, safetensors; opened in float32",
    }
    parts = [
        f"# {model.name}",
        "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())]),
        "## Scores",
        _scores(evaluation),
        *(["## The memory while training", _memory(monitor, config)] if monitor else []),
        "## Reproduce",
        f"```\nengram-interp train {config_path}\n```\nThe README says how the token files are made.",
        "## Data and licence",
        _LICENCE,
        "## What it is not",
        _NOT.format(millions=parameters / 1e6),
    ]
    return "\n\n".join(parts) + "\n"


def _memory(monitor: Sequence[Mapping[str, Any]], config: TrainConfig) -> str:
    """The monitor's numbers at a few steps; every record is in the curves."""
    steps = sorted({record["step"] for record in monitor})
    shown = {steps[0], steps[-1], *(min(steps, key=lambda s: abs(s - steps[-1] * f)) for f in (0.03, 0.1, 0.3, 0.6))}
    rows = [
        "| M tokens | block | gate mean (5 %, 95 %), a branch each | write / residual | rows ever read "
        "| reads on the busiest 1 % | table: norm, gradient, update |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in monitor:
        if r["step"] in shown:
            quantiles = [(q[0], q[-1]) for q in r["gate_quantiles"]]
            gates = "; ".join(
                f"{m:.2f} ({low:.2f}, {high:.2f})" for m, (low, high) in zip(r["gate_mean"], quantiles, strict=True)
            )
            rows.append(
                f"| {r['step'] * config.tokens_per_step / 1e6:.1f} | {r['layer']} | {gates} | {r['write_share']:.3f} "
                f"| {r['rows_hit'] / r['rows']:.2%} | {r['hit_top_percent']:.1%} "
                f"| {r['weight_norm']:.0f}, {r['gradient_norm']:.2g}, {r['update_norm']:.2g} |"
            )
    return f"![curves of gates, write, rows and norms while training]({CURVES})\n\n" + "\n".join(rows)


def _scores(evaluation: Evaluation) -> str:
    rows = ["| task | score [95 %] | chance | log p of the answer, nats | items | from |", "|---|---|---|---|---|---|"]
    for name, score in evaluation.scores.items():
        chance = "" if score.chance is None else f"{score.chance:.3f}"
        logprob = "" if score.logprob is None else f"{score.logprob.value:.2f}"
        value = f"{score.value.value:.4f} [{score.value.low:.4f}, {score.value.high:.4f}]"
        count = score.value.n if name == "heldout_loss" else score.value.rows
        rows.append(f"| {name} | {value} | {chance} | {logprob} | {count} | {score.source} |")
    if evaluation.bits_per_byte is not None:
        bits = evaluation.bits_per_byte
        rows.append(f"| held-out bits per byte | {bits.value:.4f} [{bits.low:.4f}, {bits.high:.4f}] | | | {bits.n} | |")
    note = (
        "`heldout_loss` in nats per token, lower is better; `lre` and `known_1000` by rank of the right object among its relation's "
        "(1 first, 0 last); the others are accuracies. Intervals over articles or items."
    )
    return "\n".join(rows) + "\n\n" + note
