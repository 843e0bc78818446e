"""Can a fact be changed by rewriting the few rows its trigger reads?

The S rows that one position reads in each chosen memory are rewritten so that the target follows the prompt. Two ways:

- closed form: the direction d that raises target over rival at the exit (gradient of the exit path alone) becomes a
  change of the rows by the pseudo-inverse of W_V, `delta e = s W_V^+ d`, with the smallest s on a geometric grid for
  which the running model answers with the target. Needs a trigger at the prompt's last token, whose write reaches the
  exit directly.
- gradient: Adam on the rows themselves, `-log p(target) + penalty |delta|^2 / |e|^2`, through the whole model, for any
  trigger.

The result is an overlay; the checkpoint is never rewritten. Cost: about 15 forwards, or one forward and backward per
step. Misleads when judged at the trigger alone: see `edit_specificity` for later positions and for n-grams that share
the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from engram_interp.hooks.overlay import Overlay, RowEdit, edit_hooks
from engram_interp.hooks.site import Site
from engram_interp.models.protocol import MemoryModel
from engram_interp.models.text import show_tokens
from engram_interp.runs import Provenance, texts_hash
from engram_interp.shapes import Float, Int64, Tensor

_SCALES = tuple(0.125 * 2**k for k in range(12))  # of the value's own norm
_BISECTIONS = 4
_CONFIDENT = 0.9  # probability at which gradient steps stop


@dataclass(frozen=True, eq=False)
class EditResult:
    """An edit and whether it took. Log-probabilities of the target's first token after the prompt, in nats.

    `relative_size`: |change of the rows| / |rows|, over all edited rows.
    """

    overlay: Overlay = field(repr=False)
    target: str
    trigger: str
    logprob_before: float
    logprob_after: float
    success: bool
    relative_size: float
    provenance: Provenance = field(repr=False)

    def as_dict(self) -> dict[str, object]:
        """Plain data, without the rows."""
        names = ("target", "trigger", "logprob_before", "logprob_after", "success", "relative_size")
        return {name: getattr(self, name) for name in names} | {
            "rows": self.overlay.rows,
            "provenance": self.provenance.as_dict(),
        }


def edit_slots(
    model: MemoryModel,
    prompt: str,
    target: str,
    *,
    method: str = "closed_form",
    position: int = -1,
    blocks: Sequence[int] | None = None,
    steps: int = 60,
    step_size: float = 0.1,
    penalty: float = 0.01,
) -> EditResult:
    """Make `target` (its first token, with its space) the model's answer to `prompt`.

    Args: position: of the trigger in the prompt's tokens, negative from the end; blocks: memories to edit, None for
        all; steps, step_size (of the rows' RMS), penalty: of the gradient method.
    Raises: ValueError for an unknown method, an empty target, a position outside the prompt, the closed form with a
        trigger before the last token, or a block without a memory.
    """
    job = _Job.of(model, prompt, target, position, blocks)
    if method == "closed_form":
        if job.position != job.tokens.shape[1] - 1:
            raise ValueError("the closed form needs a trigger at the prompt's last token; use method='gradient'")
        new = _closed_form(job)
    elif method == "gradient":
        new = _by_gradient(job, steps, step_size, penalty)
    else:
        raise ValueError(f"expected method 'closed_form' or 'gradient', found {method!r}")
    about = {"prompt": prompt, "target": target, "position": str(job.position), "method": method}
    overlay = Overlay(job.edits(new), model.identity.weights_sha256, about)
    with torch.no_grad():
        before, after = job.logprobs({}), job.logprobs(new)
    provenance = Provenance(
        {model.identity.name: model.identity.weights_sha256}, texts_hash([prompt, target]), 1, {**about, "steps": steps}
    )
    return EditResult(
        overlay, target, show_tokens(model.tokenizer, [int(job.tokens[0, job.position])])[0],
        float(before[job.target]), float(after[job.target]), int(after.argmax()) == job.target,
        job.relative_size(new), provenance,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Job:
    """A model, a prompt, and the rows its trigger reads in each block."""

    model: MemoryModel
    tokens: Int64[Tensor, "1 T"]
    target: int
    position: int
    rows: dict[int, Int64[Tensor, " S"]]
    old: dict[int, Float[Tensor, "S head"]]

    @classmethod
    def of(cls, model: MemoryModel, prompt: str, target: str, position: int, blocks: Sequence[int] | None) -> _Job:
        tokens = model.to_tokens(prompt)
        ids = model.tokenizer.encode(target, add_special_tokens=False).ids
        length = tokens.shape[1]
        if not ids or not -length <= position < length:
            raise ValueError(f"expected a target and a position in [-{length}, {length}), found {target!r}, {position}")
        place = position % length
        rows, old = {}, {}
        for block in model.engram_layers if blocks is None else blocks:
            memory = Site(model, block).memory
            slots = memory.ngram_hash.slots(tokens)[0, place]  # type: ignore[attr-defined]
            rows[block] = memory.ngram_hash.rows_of_slots(slots)  # type: ignore[attr-defined]
            old[block] = memory.table.weight.detach()[rows[block]].float()  # type: ignore[attr-defined]
        return cls(model, tokens, ids[0], place, rows, old)

    def edits(self, new: dict[int, Tensor]) -> dict[int, RowEdit]:
        """Rows in the order an overlay wants: each slot has a range of rows of its own, so they ascend already."""
        return {block: RowEdit(self.rows[block], values) for block, values in new.items()}

    def logprobs(self, new: dict[int, Tensor]) -> Float[Tensor, " V"]:
        """log p of every next token with these rows in place."""
        hooks = [hook for block, edit in self.edits(new).items() for hook in edit_hooks(Site(self.model, block), edit)]
        with self.model.hooks(hooks):
            return self.model(self.tokens)[0, -1].float().log_softmax(-1)

    def relative_size(self, new: dict[int, Tensor]) -> float:
        """|change| / |rows| over all blocks."""
        change = sum(float((new[b].detach() - self.old[b]).square().sum()) for b in new)
        size = sum(float(self.old[b].square().sum()) for b in new)
        return (change / size) ** 0.5 if size else float("inf")


def _closed_form(job: _Job) -> dict[int, Tensor]:
    direction = _exit_direction(job)
    unit: dict[int, Tensor] = {}
    for block, old in job.old.items():
        weight = job.model.engram(block).value_proj.weight.detach().float()  # type: ignore[attr-defined]
        value = (weight @ old.flatten()).norm().clamp_min(1e-6)
        step = torch.linalg.pinv(weight) @ (direction / direction.norm() * value)
        unit[block] = step.view_as(old)

    def scaled(scale: float) -> dict[int, Tensor]:
        return {block: job.old[block] + scale * unit[block] for block in unit}

    def works(scale: float) -> bool:
        with torch.no_grad():
            return int(job.logprobs(scaled(scale)).argmax()) == job.target

    high = next((scale for scale in _SCALES if works(scale)), None)
    if high is None:
        with torch.no_grad():
            return scaled(max(_SCALES, key=lambda s: float(job.logprobs(scaled(s))[job.target])))
    low = high / 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if works(middle) else (middle, high)
    return scaled(high)


def _exit_direction(job: _Job) -> Float[Tensor, " D"]:
    """What, added to every stream at the last position, raises the target over its strongest rival fastest."""
    hidden = job.model.residuals(job.tokens)[-1][:, -1:].detach().requires_grad_()
    with torch.enable_grad():
        logits = job.model.unembed(job.model.exit_hidden(hidden))[0, 0].float()
        rivals = logits.detach().clone()
        rivals[job.target] = -torch.inf
        gap = logits[job.target] - logits[int(rivals.argmax())]
        (gradient,) = torch.autograd.grad(gap, hidden)
    return gradient[0, 0].sum(0)


def _by_gradient(job: _Job, steps: int, step_size: float, penalty: float) -> dict[int, Tensor]:
    new = {block: old.clone().requires_grad_() for block, old in job.old.items()}
    groups = [
        {"params": [values], "lr": step_size * float(job.old[b].square().mean().sqrt().clamp_min(1e-6))}
        for b, values in new.items()
    ]
    optimiser = torch.optim.Adam(groups)
    for _ in range(steps):
        optimiser.zero_grad()
        with torch.enable_grad():
            logprob = job.logprobs(new)[job.target]
            size = sum(
                (new[b] - old).square().sum() / old.square().sum().clamp_min(1e-12) for b, old in job.old.items()
            )
            if float(logprob.detach().exp()) >= _CONFIDENT:
                break
            gradients = torch.autograd.grad(penalty * size - logprob, list(new.values()))
        for values, gradient in zip(new.values(), gradients, strict=True):
            values.grad = gradient
        optimiser.step()
    return {block: values.detach() for block, values in new.items()}
