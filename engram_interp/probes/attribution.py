"""Which part of the memory, and of the model, speaks for a token?

Two exact sums. The memory's value is linear in its rows: e_t is a concatenation over (order, head), so `W_V e_t = sum
over slots of W_V[:, slot] e_t[slot]` (+ bias), and given the gate so is the gated write; the convolution is not linear
(norm, SiLU) and stays a part of its own. The logits are linear in the residual once the final norm's scale is frozen at
its own value, so every component's `w . (component * gain / scale)` sums to the logit (Elhage et al. 2021); the
memory's component splits further into slots, bias and convolution. Cost: one recorded forward. Misleads: a frozen scale
and a given gate make this an accounting of the direct path only; what later layers make of a write, and what a slot
does to the gate, is found by intervening. Contributions are of raw logits, in which a constant over the vocabulary
means nothing: use `against` for a difference of two tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from jaxtyping import Float as NumpyFloat
from jaxtyping import Int64 as NumpyInt64

from engram_interp.figures.attribution import contribution_heatmap
from engram_interp.memory import Engram
from engram_interp.models.cache import EngramCache
from engram_interp.models.house import HouseModel
from engram_interp.models.protocol import Decoder
from engram_interp.models.text import show_tokens
from engram_interp.runs import Provenance, texts_hash
from engram_interp.shapes import Float, Int64, Tensor

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


class AttributionError(ValueError):
    """What cannot be split; the message says what was expected and what was found."""


@dataclass(frozen=True, eq=False)
class LogitAttribution:
    """Direct contribution of every component (axis C) to one logit per position, or to a difference of two.

    Logit units. `components`: `embed`, `{i}_engram_out`, `{i}_attn_out`, `{i}_mlp_out`; they sum to `logit` up to
    `residue` (rounding). `targets` is the token whose logit is explained; `against` the one subtracted, if any.
    """

    model: str
    tokens: tuple[str, ...]
    targets: NumpyInt64[np.ndarray, " T"]
    target_tokens: tuple[str, ...]
    against: NumpyInt64[np.ndarray, " T"] | None
    components: tuple[str, ...]
    contributions: NumpyFloat[np.ndarray, "C T"]
    logit: NumpyFloat[np.ndarray, " T"]
    provenance: Provenance

    @property
    def residue(self) -> float:
        """Largest absolute difference between a sum of components and its logit."""
        return float(np.abs(self.contributions.sum(0) - self.logit).max())

    def table(self) -> pd.DataFrame:
        """One row per position and component."""
        return _tidy(self.components, self, self.contributions)

    def figure(self) -> go.Figure:
        """Heat map: component by token."""
        title = f"Which component speaks for the next token? {self.model}"
        return contribution_heatmap(self.components, self.tokens, self.contributions, title=title, unit="logit")


@dataclass(frozen=True, eq=False)
class MemoryAttribution:
    """The memory's write in parts, per Engram layer E, token and slot S (order-major). Logit units unless said.

    `slot_logits`, `bias_logits` and `conv_logits` sum to the layer's component in `direct`. `value_share[s]` is the
    part of |v|^2 that slot s carries along v; the shares and `bias_share` sum to 1. `gate` in (0, 1).
    """

    direct: LogitAttribution
    layers: tuple[int, ...]
    orders: tuple[int, ...]
    heads: int
    slot_logits: NumpyFloat[np.ndarray, "E T S"]
    bias_logits: NumpyFloat[np.ndarray, "E T"]
    conv_logits: NumpyFloat[np.ndarray, "E T"]
    value_share: NumpyFloat[np.ndarray, "E T S"]
    bias_share: NumpyFloat[np.ndarray, "E T"]
    gate: NumpyFloat[np.ndarray, "E T M"]

    @property
    def provenance(self) -> Provenance:
        """Where the numbers come from."""
        return self.direct.provenance

    @property
    def order_logits(self) -> NumpyFloat[np.ndarray, "E T N"]:
        """Slots summed over heads: what each n-gram order says."""
        layers, tokens, _ = self.slot_logits.shape
        return self.slot_logits.reshape(layers, tokens, len(self.orders), self.heads).sum(-1)

    @property
    def slot_names(self) -> tuple[str, ...]:
        """`2-gram head 0`, ..."""
        return tuple(f"{order}-gram head {head}" for order in self.orders for head in range(self.heads))

    def parts(self) -> tuple[tuple[str, ...], NumpyFloat[np.ndarray, "parts T"]]:
        """Every part of every layer's write, and its contribution per token."""
        names, rows = [], []
        for e, layer in enumerate(self.layers):
            names += [f"block {layer} {slot}" for slot in (*self.slot_names, "bias", "conv")]
            rows += [*self.slot_logits[e].T, self.bias_logits[e], self.conv_logits[e]]
        return tuple(names), np.stack(rows)

    def table(self) -> pd.DataFrame:
        """One row per position and part of a write."""
        return _tidy(*self._labelled())

    def _labelled(self) -> tuple[tuple[str, ...], LogitAttribution, np.ndarray]:
        names, rows = self.parts()
        return names, self.direct, rows

    def figure(self) -> go.Figure:
        """Heat map: part of the write by token."""
        names, rows = self.parts()
        title = f"Which slot speaks for the next token? {self.direct.model}"
        return contribution_heatmap(names, self.direct.tokens, rows, title=title, unit="logit")


def value_split(engram: Engram, embedding: Float[Tensor, "B T mem"]) -> Float[Tensor, "B T S D"]:
    """The value by slot: they sum, with `value_proj.bias` where there is one, to `hook_value`."""
    slots = len(engram.ngram_hash.sizes)
    weight = engram.value_proj.weight.unflatten(1, (slots, -1))
    return torch.einsum("btsh,dsh->btsd", embedding.unflatten(-1, (slots, -1)), weight)


def direct_logit_attribution(
    model: Decoder, text: str, *, targets: Sequence[int] | None = None, against: Sequence[int] | None = None
) -> LogitAttribution:
    """Split one logit per position among the components of the residual.

    Args: targets: a token id per position, by default the true next token (the prediction, at the last position);
        against: subtract these tokens' logits.
    Raises: AttributionError for a model whose residual cannot be decomposed, or ids that do not fit; ValueError for an
        empty or too long text.
    """
    return _attribute(model, text, targets, against)[0]


def memory_attribution(
    model: Decoder, text: str, *, targets: Sequence[int] | None = None, against: Sequence[int] | None = None
) -> MemoryAttribution:
    """Split every memory's write by order, head, bias and convolution, in contributions to one logit per position.

    Args: as for `direct_logit_attribution`.
    Raises: AttributionError also for a model without memory.

    >>> import engram_interp
    >>> from engram_interp.probes import memory_attribution
    >>> parts = memory_attribution(engram_interp.load("mini-engram"), "Alexander the Great")
    >>> bool(abs(parts.value_share.sum(-1) + parts.bias_share - 1).max() < 1e-3)  # the rows make up the value
    True
    >>> parts.direct.residue < 1e-3  # and the components the logit
    True
    """
    if not getattr(model, "engram_layers", ()):
        raise AttributionError(f"expected a model with memory, found none in {model.identity.name!r}")
    direct, cache, direction = _attribute(model, text, targets, against)
    parts = [_split_layer(model, layer, cache, direction) for layer in model.engram_layers]  # type: ignore[attr-defined]
    engram = model.engram(model.engram_layers[0])  # type: ignore[attr-defined]
    orders = tuple(engram.ngram_hash.orders)
    return MemoryAttribution(
        direct=direct, layers=tuple(model.engram_layers), orders=orders,  # type: ignore[attr-defined]
        heads=len(engram.ngram_hash.sizes) // len(orders),
        **{name: np.stack([part[name] for part in parts]) for name in parts[0]},
    )  # fmt: skip


@torch.no_grad()
def _attribute(
    model: Decoder, text: str, targets: Sequence[int] | None, against: Sequence[int] | None
) -> tuple[LogitAttribution, EngramCache, Tensor]:
    if not isinstance(model, HouseModel):
        raise AttributionError(
            f"expected a house model, whose residual is a known sum of components; "
            f"{model.identity.name!r} is {model.identity.kind}"
        )
    tokens = model.to_tokens(text)
    names = ["hook_embed", "*.hook_attn_out", "*.hook_mlp_out", "ln_final.hook_scale"]
    if model.engram_layers:
        names += [
            "*.hook_engram_out",
            "*.engram.hook_embedding",
            "*.engram.hook_value",
            "*.engram.hook_gate",
            "*.hook_conv_out",
        ]
    names = [n for n in names if n != "*.hook_conv_out" or any(h.endswith("hook_conv_out") for h in model.hook_dict)]
    logits, cache = model.run_with_cache(tokens, names)
    wanted = _ids(targets, tokens.shape[1], model.vocab_size, "targets")
    if wanted is None:
        wanted = torch.cat([tokens[0, 1:], logits[0, -1:].argmax(-1)])
    other = _ids(against, tokens.shape[1], model.vocab_size, "against")
    direction = _direction(model, cache, wanted, other)
    stack, labels = cast("tuple[Tensor, list[str]]", cache.decompose_resid(return_labels=True))
    logit = logits[0].gather(1, wanted[:, None]).squeeze(1)
    if other is not None:
        logit = logit - logits[0].gather(1, other[:, None]).squeeze(1)
    result = LogitAttribution(
        model=model.identity.name,
        tokens=tuple(show_tokens(model.tokenizer, tokens[0].tolist())),  # type: ignore[arg-type]
        targets=wanted.numpy(),
        target_tokens=tuple(show_tokens(model.tokenizer, wanted.tolist())),  # type: ignore[arg-type]
        against=None if other is None else other.numpy(),
        components=tuple(labels),
        contributions=torch.einsum("ctd,td->ct", stack[:, 0], direction).numpy(),
        logit=logit.numpy(),
        provenance=Provenance(
            {model.identity.name: model.identity.weights_sha256}, texts_hash([text]), 1,
            {"targets": "next token" if targets is None else "given", "against": against is not None},
        ),
    )  # fmt: skip
    return result, cache, direction


def _ids(ids: Sequence[int] | None, length: int, vocab_size: int, what: str) -> Int64[Tensor, " T"] | None:
    if ids is None:
        return None
    if len(ids) != length or not all(0 <= int(i) < vocab_size for i in ids):
        raise AttributionError(
            f"expected {length} {what} in [0, {vocab_size}), one per position, found {list(ids)[:5]}... ({len(ids)})"
        )
    return torch.tensor([int(i) for i in ids])


def _direction(model: HouseModel, cache: EngramCache, wanted: Tensor, other: Tensor | None) -> Float[Tensor, "T D"]:
    """What a component is multiplied with: the token's unembedding times the final gain over the frozen scale."""
    unembedding = model.W_U[:, wanted] - (model.W_U[:, other] if other is not None else 0)
    return unembedding.T * model.ln_final.w / cache["ln_final.hook_scale"][0]


@torch.no_grad()
def _split_layer(model: HouseModel, layer: int, cache: EngramCache, direction: Tensor) -> dict[str, np.ndarray]:
    engram, prefix = model.engram(layer), f"blocks.{layer}.engram"
    value, gate = cache[f"{prefix}.hook_value"][0], cache[f"{prefix}.hook_gate"][0]
    slots = value_split(engram, cache[f"{prefix}.hook_embedding"])[0]
    open_ = gate.mean(-1)  # the exit reads the mean over streams, and mixing keeps it
    bias = engram.value_proj.bias
    bias = torch.zeros_like(value) if bias is None else bias.expand_as(value)
    has_conv = bool(engram.options.conv_kernel)
    conv = model.reduce_streams(cache[f"{prefix}.hook_conv_out"])[0] if has_conv else torch.zeros_like(value)
    square = value.square().sum(-1).clamp_min(torch.finfo(value.dtype).tiny)
    return {
        "slot_logits": (torch.einsum("tsd,td->ts", slots, direction) * open_[:, None]).numpy(),
        "bias_logits": ((bias * direction).sum(-1) * open_).numpy(),
        "conv_logits": (conv * direction).sum(-1).numpy(),
        "value_share": (torch.einsum("tsd,td->ts", slots, value) / square[:, None]).numpy(),
        "bias_share": ((bias * value).sum(-1) / square).numpy(),
        "gate": gate.numpy(),
    }


def _tidy(parts: Sequence[str], about: LogitAttribution, values: np.ndarray) -> pd.DataFrame:
    import pandas as pd

    part, position = np.meshgrid(np.arange(values.shape[0]), np.arange(values.shape[1]), indexing="ij")
    return pd.DataFrame(
        {
            "position": position.ravel(),
            "token": np.asarray(about.tokens, dtype=object)[position.ravel()],
            "target": np.asarray(about.target_tokens, dtype=object)[position.ravel()],
            "part": np.asarray(parts, dtype=object)[part.ravel()],
            "contribution": values.ravel(),
            "logit": about.logit[position.ravel()],
        }
    )
