"""What would a site predict if it spoke the final basis?

A tuned lens (Belrose et al. 2023, arXiv 2303.08112): per site below the last an affine translator h + A h + b, applied
to every stream (for a mean over streams the same as after it), then the model's own exit path. Starts as the identity,
i.e. the logit lens; trained on KL(final || lens) with Adam. Cost: per step one forward and three unembeddings per site.
Misleads: a translator can learn to predict what the model has not computed, so compare both lenses; a lens that was not
trained to convergence, which `history` on held-out texts shows, penalises the model whose sites lie further from the
final basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float as NumpyFloat
from pydantic import Field, ValidationError

from engram_interp.gallery import GallerySentence
from engram_interp.kernels.lens import LensError
from engram_interp.measure.divergence import kl_divergence, log_probabilities
from engram_interp.models.checkpoint import CheckpointError, read_tensors, save_tensors, write_atomically
from engram_interp.models.config import StrictModel
from engram_interp.models.protocol import Decoder
from engram_interp.models.text import start_tokens, windows
from engram_interp.probes.strata import as_text
from engram_interp.runs import texts_hash
from engram_interp.shapes import Float, Tensor

if TYPE_CHECKING:
    import plotly.graph_objects as go

WEIGHTS, DESCRIPTION = "tuned_lens.safetensors", "tuned_lens.json"


class TunedLensConfig(StrictModel):
    """How a tuned lens is trained. `rows` tokens per step; `held_out` share of the texts, never trained on."""

    steps: int = Field(default=250, ge=1)
    rows: int = Field(default=128, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    held_out: float = Field(default=0.1, gt=0, lt=1)
    held_out_rows: int = Field(default=512, ge=1)
    evaluations: int = Field(default=10, ge=2)


class _Description(StrictModel):
    """The JSON file beside the weights."""

    model: str
    weights_sha256: str
    width: int
    sites: int
    texts_sha256: str
    config: TunedLensConfig
    history_steps: list[int]
    history: list[list[float]]


@dataclass(frozen=True, eq=False)
class TunedLens:
    """Translators for the sites below the last of one model, and how their training went.

    `history[i]` is KL(final || lens) per site on held-out texts after `history_steps[i]` steps, nats; the first is the
    logit lens.
    """

    model: str
    weights_sha256: str
    weight: Float[Tensor, "L D D"]
    bias: Float[Tensor, "L D"]
    config: TunedLensConfig
    texts_sha256: str
    history_steps: tuple[int, ...]
    history: NumpyFloat[np.ndarray, "evals L"]

    @property
    def name(self) -> str:
        """Printed with every result."""
        return "tuned lens"

    @property
    def remaining_gain(self) -> float:
        """How much the held-out KL (mean over sites) fell in the last quarter of the evaluations, relative."""
        means = self.history.mean(1)
        before = means[max(0, len(means) - 1 - max(1, len(means) // 4))]
        return float((before - means[-1]) / max(means[-1], 1e-12))

    @property
    def converged(self) -> bool:
        """Whether that share is below 2 %."""
        return self.remaining_gain < 0.02

    def check(self, model: Decoder) -> None:
        """Raise LensError when the lens was trained for other weights."""
        if (model.identity.weights_sha256, model.layers) != (self.weights_sha256, len(self.weight)):
            raise LensError(
                f"expected the tuned lens of {model.identity.name!r} (weights {model.identity.weights_sha256[:12]!r}), "
                f"found one of {self.model!r} (weights {self.weights_sha256[:12]!r})"
            )

    def translate(self, site: int, hidden: Float[Tensor, "B T M D"]) -> Float[Tensor, "B T M D"]:
        """The residual in the final basis."""
        return _translate(hidden, self.weight[site], self.bias[site])

    def table(self):  # noqa: ANN201 - pandas.DataFrame
        """Held-out KL per evaluation and site."""
        import pandas as pd

        steps, sites = np.meshgrid(self.history_steps, range(self.history.shape[1]), indexing="ij")
        return pd.DataFrame({"step": steps.ravel(), "layer": sites.ravel(), "held_out_kl": self.history.ravel()})

    def figure(self) -> go.Figure:
        """Held-out KL over steps, mean over sites: flat at the end when converged."""
        from engram_interp.figures.curve import Curve, curve_figure

        return curve_figure(
            [Curve(self.model, self.history.mean(1))], list(self.history_steps), x_title="step",
            y_title="held-out KL(final || lens), nats", title="Has the tuned lens converged?",
        )  # fmt: skip

    def save(self, directory: Path) -> None:
        """Write `tuned_lens.safetensors` and `tuned_lens.json`, each atomically.

        Raises: CheckpointError when a file cannot be written.
        """
        directory.mkdir(parents=True, exist_ok=True)
        description = _Description(
            model=self.model, weights_sha256=self.weights_sha256, width=self.weight.shape[-1], sites=len(self.weight),
            texts_sha256=self.texts_sha256, config=self.config, history_steps=list(self.history_steps),
            history=self.history.tolist(),
        )  # fmt: skip
        save_tensors(directory / WEIGHTS, {"weight": self.weight, "bias": self.bias})
        text = description.model_dump_json(indent=2)
        write_atomically(directory / DESCRIPTION, lambda part: part.write_text(text, encoding="utf-8"))


def load_tuned_lens(directory: Path) -> TunedLens:
    """Open a saved tuned lens.

    Raises: CheckpointError for anything missing, extra, misshaped, truncated or unknown.
    """
    path = directory / DESCRIPTION
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        found = _Description.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise CheckpointError(f"{path}: {problems}") from None
    shapes = {
        "weight": torch.empty(found.sites, found.width, found.width),
        "bias": torch.empty(found.sites, found.width),
    }
    tensors = read_tensors(directory / WEIGHTS, shapes)
    return TunedLens(
        found.model, found.weights_sha256, tensors["weight"], tensors["bias"], found.config, found.texts_sha256,
        tuple(found.history_steps), np.asarray(found.history),
    )  # fmt: skip


def train_tuned_lens(
    model: Decoder,
    texts: Sequence[str | GallerySentence],
    *,
    generator: torch.Generator,
    config: TunedLensConfig | None = None,
) -> TunedLens:
    """Train one translator per site below the last.

    Args: texts: at least 2; the last `held_out` share measures convergence. generator: draws the windows and tokens of
    every step. The best held-out evaluation of each site is kept, so no site ends worse than the logit lens on the
    held-out texts.
    Raises: LensError for fewer than 2 texts, an empty text, or a loss that is not finite (step and site named).
    """
    config = config or TunedLensConfig()
    plain = [as_text(item) for item in texts]
    if len(plain) < 2:
        raise LensError(f"expected at least 2 texts, of which some are held out, found {len(plain)}")
    cut = min(len(plain) - 1, max(1, round(len(plain) * (1 - config.held_out))))
    train, held = _windows(model, plain[:cut]), _windows(model, plain[cut:])
    held_sites, held_final = _gather(model, held, range(len(held)), config.held_out_rows)
    weight = [torch.zeros(model.width, model.width, requires_grad=True) for _ in range(model.layers)]
    bias = [torch.zeros(model.width, requires_grad=True) for _ in range(model.layers)]
    optimiser = torch.optim.Adam([*weight, *bias], lr=config.learning_rate)
    at = sorted({round(i * config.steps / config.evaluations) for i in range(config.evaluations + 1)})
    best = _Best.start(weight, bias)
    history = [best.update(weight, bias, _held_out_kl(model, held_sites, held_final, weight, bias))]
    for step in range(1, config.steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * (1 - (step - 1) / config.steps)
        order = torch.randperm(len(train), generator=generator).tolist()
        sites, final = _gather(model, train, order, config.rows)
        _backward(model, sites, final, weight, bias, step)
        optimiser.step()
        if step in at:
            history.append(best.update(weight, bias, _held_out_kl(model, held_sites, held_final, weight, bias)))
    return TunedLens(
        model.identity.name, model.identity.weights_sha256, best.weight, best.bias, config, texts_hash(plain),
        tuple(at), np.stack(history),
    )  # fmt: skip


def _translate(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return hidden + torch.nn.functional.linear(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype))


def _windows(model: Decoder, texts: Sequence[str]) -> list[tuple[Tensor, slice]]:
    """Windows as (tokens, positions to use), start tokens left out."""
    start = len(start_tokens(model))
    try:
        return [
            (w.tokens, slice(max(start, w.keep.start), w.keep.stop)) for text in texts for w in windows(model, text)
        ]
    except ValueError as error:
        raise LensError(str(error)) from None


@torch.no_grad()
def _gather(
    model: Decoder, source: list[tuple[Tensor, slice]], order: Sequence[int], rows: int
) -> tuple[list[Tensor], Tensor]:
    """Residuals [1, rows, M, D] of every site below the last and exit-ready final vectors [1, rows, D]."""
    parts: list[list[Tensor]] = []
    count = 0
    for index in order:
        tokens, keep = source[index]
        parts.append([site[:, keep] for site in model.residuals(tokens)])
        count += parts[-1][0].shape[1]
        if count >= rows:
            break
    joined = [torch.cat(site, 1)[:, :rows] for site in zip(*parts, strict=True)]
    return joined[:-1], model.exit_hidden(joined[-1])


def _backward(
    model: Decoder, sites: list[Tensor], final: Tensor, weight: list[Tensor], bias: list[Tensor], step: int
) -> None:
    """Set the gradients site by site, so that one site's logits are alive at a time."""
    with torch.no_grad():
        log_p = log_probabilities(model.unembed(final[0]))
        p, entropy = log_p.exp(), torch.linalg.vecdot(log_p.exp(), log_p).mean()
    for site, hidden in enumerate(sites):
        logits = model.unembed(model.exit_hidden(_translate(hidden, weight[site], bias[site]))[0])
        loss = entropy - torch.linalg.vecdot(p, torch.log_softmax(logits, -1)).mean()
        if not bool(torch.isfinite(loss)):
            raise LensError(f"the loss of the tuned lens at site {site}, step {step} is {float(loss)}")
        weight[site].grad, bias[site].grad = torch.autograd.grad(loss, (weight[site], bias[site]))


@torch.no_grad()
def _held_out_kl(
    model: Decoder, sites: list[Tensor], final: Tensor, weight: list[Tensor], bias: list[Tensor]
) -> np.ndarray:
    """Mean KL(final || lens) per site, 64 rows at a time."""
    totals = torch.zeros(len(sites), dtype=torch.float64)
    for start in range(0, final.shape[1], 64):
        part = slice(start, start + 64)
        target = model.unembed(final[0, part])
        for site, hidden in enumerate(sites):
            vectors = model.exit_hidden(_translate(hidden[:, part], weight[site], bias[site]))
            totals[site] += kl_divergence(target, model.unembed(vectors[0])).double().sum()
    return (totals / final.shape[1]).numpy()


@dataclass
class _Best:
    """The translators with the lowest held-out KL so far, site by site."""

    weight: Tensor
    bias: Tensor
    kl: np.ndarray

    @classmethod
    def start(cls, weight: list[Tensor], bias: list[Tensor]) -> _Best:
        return cls(torch.stack(weight).detach(), torch.stack(bias).detach(), np.full(len(weight), np.inf))

    def update(self, weight: list[Tensor], bias: list[Tensor], kl: np.ndarray) -> np.ndarray:
        for site in np.flatnonzero(kl < self.kl):
            self.weight[site], self.bias[site], self.kl[site] = weight[site].detach(), bias[site].detach(), kl[site]
        return kl
