"""What does each probe cost per token, in work and in memory, for a model of any size?

Formulas over the shape of a model: products of matrices alone (2 FLOPs per multiply-add), tensors that are alive at once, float32
unless a stored row says otherwise. They are checked against what torch counts and what the tensors hold at three sizes
(`tests/test_scaling.py`), and worked out in `docs/scaling.md`, whose table `python -m engram_interp.studies.scaling FILE` writes
again. Misleads: FLOPs are not seconds; exponentials cost a lens about as much as its products at width 256 and are not counted;
where a forward is twice the active parameters, attention over a long context comes on top.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from engram_interp.kernels.lens_kl import SAMPLE
from engram_interp.models.config import ModelConfig
from engram_interp.models.cost import active_flops, memory_parameters, parameter_count
from engram_interp.models.paper_scale import PAPER_MODELS
from engram_interp.models.registry import find
from engram_interp.runs.atomic import write_atomically
from engram_interp.studies.marked_page import replace_marked

FLOAT = 4  # bytes; every probe computes in float32
DOUBLE = 8


@dataclass(frozen=True)
class ModelShape:
    """What the costs depend on.

    `layers` L, `width` D, `streams` M, `vocab_size` V; `memories` E, each of `slots` S rows of `head_width`; `forward`: FLOPs per
    token up to the exit norm, None where it is not published; `backbone`: parameters outside the tables; `rows` of all tables, of
    `row_bytes` each as stored; `context`: tokens of a window.
    """

    name: str
    layers: int
    width: int
    streams: int
    vocab_size: int
    memories: int
    slots: int
    head_width: int
    forward: float | int | None
    backbone: float | int
    rows: int
    row_bytes: int
    context: int

    @classmethod
    def of(cls, config: ModelConfig) -> ModelShape:
        """Of a house model, its table in float32."""
        flops, engram = active_flops(config), config.engram
        slots = engram.heads * len(engram.rows_per_head) if engram else 0
        head, memories = (engram.head_width, len(engram.blocks)) if engram else (0, 0)
        branches = 1 if engram and engram.fusion == "mean" else config.streams
        taps = (2 + (engram.conv_kernel + 1 if engram.conv_kernel else 0)) * branches * config.width if engram else 0
        biases = (1 + branches) * config.width if engram and engram.biases else 0
        projections = memories * (slots * head * config.width * (1 + branches) + taps + biases)
        table = memory_parameters(config) - projections
        return cls(
            config.name, config.layers, config.width, config.streams, config.vocab_size, memories, slots, head,
            flops.total - flops.unembedding, parameter_count(config) - table, table // head if head else 0, FLOAT * head,
            config.context,
        )  # fmt: skip

    @property
    def unembedding(self) -> int:
        """U, FLOPs of one token's logits."""
        return 2 * self.width * self.vocab_size

    @property
    def sites(self) -> int:
        """Residual sites, L + 1."""
        return self.layers + 1


@dataclass(frozen=True)
class ProbeCost:
    """Per token: FLOPs beyond `forwards` whole forwards up to the exit norm, and bytes held until a window or batch is done.

    `fixed`: bytes held whatever the number of tokens, beside the model.
    """

    probe: str
    forwards: float | int
    flops: float | int
    bytes: float | int
    fixed: float | int = 0

    def total(self, shape: ModelShape) -> float | int | None:
        """FLOPs per token, forwards included; None where the forward is not known."""
        if not self.forwards:
            return self.flops
        return None if shape.forward is None else self.forwards * shape.forward + self.flops


def memory_read(shape: ModelShape) -> ProbeCost:
    """Rows of every memory and their projection to M keys and a value: 2 E S h D (M + 1) FLOPs, E S h floats."""
    mem = shape.memories * shape.slots * shape.head_width
    return ProbeCost("memory read", 0, 2 * mem * shape.width * (shape.streams + 1), FLOAT * mem)


def gates(shape: ModelShape) -> ProbeCost:
    """`read_gates`: forward and logits; gate, score, the write and the streams before it, and the logits."""
    records = shape.memories * shape.streams * (2 + 2 * shape.width)
    return ProbeCost("gates", 1, shape.unembedding, FLOAT * (records + shape.vocab_size))


def lens(shape: ModelShape, tokens: int = 1024) -> ProbeCost:
    """`logit_lens_kl(quantities="kl")`, `tokens` at once: L + 2 products with the unembedding; streams and exit vectors of all sites.

    A value below 1e-3 nats is formed again, 2 U more, which is not counted.
    """
    again = 1 + min(SAMPLE, tokens) / tokens
    held = shape.sites * shape.width * (shape.streams + 1)
    return ProbeCost("lens, KL", 1, (shape.layers + 2) * shape.unembedding * again, FLOAT * held)


def lens_all(shape: ModelShape) -> ProbeCost:
    """`logit_lens_kl`, all quantities: L + 1 unembeddings; streams and exit vectors of all sites, six rows of 64 logits."""
    held = shape.sites * shape.width * (shape.streams + 1)
    buffers = 6 * 64 * shape.vocab_size * FLOAT
    return ProbeCost("lens, all quantities", 1, shape.sites * shape.unembedding, FLOAT * held, buffers)


def cka(shape: ModelShape) -> ProbeCost:
    """`CKAGrid` of all sites of two models of this shape: two forwards, the products of every pair and of each site with itself."""
    side, sites = shape.sites * shape.width, shape.sites
    own = 2 * sites * shape.width**2
    sums = side * side + own + 4 * side * sites + 3 * sites * sites + 2 * side + 2 * sites
    flops = 2 * side * side + 2 * own + 2 * (2 * side) * (2 * sites) + 3 * 2 * sites * sites
    return ProbeCost("CKA, all pairs", 2, flops, 2 * FLOAT * side, DOUBLE * sums)


def ablation(shape: ModelShape) -> ProbeCost:
    """One condition beside the full model: two forwards with logits, one of them held."""
    return ProbeCost("ablation, one condition", 2, 2 * shape.unembedding, FLOAT * shape.vocab_size)


def corpus(shape: ModelShape, tokens: int = 1024) -> ProbeCost:
    """`engram-interp corpus`: gates and lens, with the overlap of windows in long documents.

    Windows repeat 64 tokens (a quarter of a short context): context / (context - overlap) forwards per new token.
    """
    size = shape.context - 1  # the start token
    overlap = min(64, size // 4)
    one = lens(shape, tokens)
    kept = shape.memories * shape.streams + 3 * shape.sites
    return ProbeCost("corpus, gates and lens", shape.context / (size - overlap), one.flops, one.bytes + FLOAT * kept)


def probe_costs(shape: ModelShape) -> tuple[ProbeCost, ...]:
    """Every probe of the table."""
    return tuple(cost(shape) for cost in (memory_read, gates, lens, lens_all, cka, ablation, corpus))


def known_shapes() -> tuple[ModelShape, ...]:
    """The bundled model, the paper's 27B, and the two released models with 125 and 552 billion parameters beside their tables."""
    mini = ModelConfig.model_validate_json((find("mini-engram") / "config.json").read_text(encoding="utf-8"))
    return (
        ModelShape.of(mini),
        ModelShape.of(PAPER_MODELS["engram-27b"].config),
        # 6 billion active parameters; table in bf16, 160 columns a row
        ModelShape("Qwen3.8-Flash-Next", 48, 2560, 4, 248_320, 1, 16, 160, 2 * 6e9, 125e9, 320_001_536, 320, 4096),
        # active parameters not published where we could read it; rows of 256 FP8 columns and 8 scales
        ModelShape("DeepSeek-V4.1-Flash", 40, 5120, 4, 129_280, 2, 24, 256, None, 552e9, 768_022_850, 264, 4096),
    )


def render() -> str:
    """The worked-out part of the page."""
    parts = []
    for shape in known_shapes():
        forward = "not published" if shape.forward is None else f"{shape.forward / 1e9:.3g} GFLOP per token"
        parts.append(
            f"### {shape.name}\n\nL = {shape.layers}, D = {shape.width}, M = {shape.streams}, V = {shape.vocab_size:,}, "
            f"E = {shape.memories}, S h = {shape.slots * shape.head_width}. Forward up to the exit norm: {forward}. "
            f"Weights outside the table in float32: {_size(FLOAT * shape.backbone)}. "
            f"Table as stored: {_size(shape.rows * shape.row_bytes)}, of which a token reads "
            f"{_size(shape.memories * shape.slots * shape.row_bytes)}.\n\n"
            "| probe | GFLOP per token | beyond the forward | held per token | held per window | held besides |\n"
            "|---|---|---|---|---|---|\n"
        )
        for cost in probe_costs(shape):
            total = cost.total(shape)
            cells = (
                cost.probe, "unknown" if total is None else f"{total / 1e9:.3g}", f"{cost.flops / 1e9:.3g}",
                _size(cost.bytes), _size(cost.bytes * shape.context), _size(cost.fixed) if cost.fixed else "0",
            )  # fmt: skip
            parts.append("| " + " | ".join(cells) + " |\n")
        parts.append("\n")
    return "".join(parts)


def _size(count: float | int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def rewritten(page: str) -> str:
    """A page with its worked-out part made again.

    Raises: ValueError when the page does not hold the marks.
    """
    return replace_marked(page, "costs", f"\n{render()}")


def main(path: Path) -> None:
    """Write the worked-out part of a page again."""
    text = rewritten(path.read_text(encoding="utf-8"))
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
