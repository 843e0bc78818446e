"""Which rows of the table does a position read?

Paper eq. 1 as the released demo computes it. For the compressed ids x' and the multipliers m of a layer,

    mix[t, n]     = x'[t] m[0]  XOR  x'[t-1] m[1]  XOR ... XOR  x'[t-n+1] m[n-1]        (int64)
    slot[t, n, k] = mix[t, n] mod M[n, k]                                               (M: distinct primes)

All K heads of one order share the mix and differ in their prime alone. Multipliers are odd and below 2^63 / V', so no
product overflows. Before the start of a text the window holds the pad id. Exact integers: a result is right or wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal

import numpy as np
import torch

from engram_interp.memory.compress import CompressedVocabulary
from engram_interp.shapes import Int64, Tensor

BoundaryRule = Literal["none", "reset"]
WindowRule = Literal["aligned", "engram_peft_1_2"]

_LAYER_STRIDE = 10007  # separates the random streams of different layers
_MASK64 = 2**64 - 1
_INT64_MAX = 2**63 - 1


def pcg64_multipliers(seed: int, layer: int, vocab_size: int, count: int) -> tuple[int, ...]:
    """Odd multipliers of one layer as the demo and DeepSeek-V4.1 draw them (facts: paper code, `layer` 0-based)."""
    bound = max(1, (_INT64_MAX // vocab_size) // 2)
    draws = np.random.default_rng(seed + _LAYER_STRIDE * layer).integers(0, bound, size=(count,), dtype=np.int64)
    return tuple(int(draw) * 2 + 1 for draw in draws)


def splitmix64_multipliers(seed: int, index: int, vocab_size: int, count: int) -> tuple[int, ...]:
    """Odd multipliers as Qwen3.8-Flash-Next draws them; `index` counts Engram layers from 0."""
    bound = max(1, (_INT64_MAX // vocab_size) // 2)
    gamma = 0x9E3779B97F4A7C15
    base = seed + _LAYER_STRIDE * index
    return tuple(2 * (_splitmix64(base + gamma * (i + 1), gamma) % bound) + 1 for i in range(count))


def _splitmix64(value: int, gamma: int) -> int:
    value = (value + gamma) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def assign_primes(rows: Sequence[int], heads: int, layers: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Head moduli [layer][order][head]: ascending primes from `rows[order]` on, none used twice in the whole model."""
    from sympy import nextprime

    seen: set[int] = set()
    return tuple(tuple(_unused_primes(size, heads, seen, nextprime) for size in rows) for _ in range(layers))


def _unused_primes(start: int, count: int, seen: set[int], nextprime) -> tuple[int, ...]:  # noqa: ANN001
    primes: list[int] = []
    candidate = start - 1
    while len(primes) < count:
        candidate = int(nextprime(candidate))
        if candidate not in seen:
            seen.add(candidate)
            primes.append(candidate)
    return tuple(primes)


@dataclass(frozen=True, eq=False)
class NgramHash:
    """The address of every n-gram in one Engram layer.

    Fields: `token_map` is P; `multipliers[j]` belongs to the token j places back; `primes[n][k]` is the number of rows
    of head k of order n+2; `pad` is the compressed id before a text; `boundary` "reset" empties the window after each
    `eos` (a compressed id), filling it with `pad`, as Qwen does. `window_rule` "engram_peft_1_2" is what that program
    computes: multipliers go to the oldest token first, and every order's window starts at t-N+1, so orders below the
    largest do not read the current token.

    >>> import torch
    >>> from engram_interp.memory import CompressedVocabulary, NgramHash
    >>> ngram_hash = NgramHash(CompressedVocabulary.identity(10), multipliers=(3, 5), primes=((7, 11),), pad=0)
    >>> ngram_hash.slots(torch.tensor([[2, 4]]))  # 2*3 ^ 0*5 = 6 and 4*3 ^ 2*5 = 6, modulo 7 and 11
    tensor([[[6, 6],
             [6, 6]]])
    >>> ngram_hash.rows_of_slots(ngram_hash.slots(torch.tensor([[2, 4]])))[0, 0].tolist()
    [6, 13]
    """

    vocabulary: CompressedVocabulary
    multipliers: tuple[int, ...]
    primes: tuple[tuple[int, ...], ...]
    pad: int
    boundary: BoundaryRule = "none"
    eos: int | None = None
    window_rule: WindowRule = "aligned"
    _constants: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Refuse shapes that cannot describe a layer."""
        if len(self.primes) != len(self.multipliers) - 1:
            raise ValueError(
                f"expected one row of primes per order, {len(self.multipliers) - 1} for {len(self.multipliers)} "
                f"multipliers; found {len(self.primes)}"
            )
        if len({len(row) for row in self.primes}) != 1:
            raise ValueError(f"expected the same number of heads in every order, found {[len(r) for r in self.primes]}")
        if self.boundary == "reset" and self.eos is None:
            raise ValueError("boundary 'reset' needs the compressed id of the token that ends a text, found eos=None")
        if self.boundary == "reset" and self.window_rule != "aligned":
            raise ValueError(f"expected window_rule 'aligned' with boundary 'reset', found {self.window_rule!r}")

    @property
    def orders(self) -> tuple[int, ...]:
        """N-gram lengths, shortest first."""
        return tuple(range(2, len(self.multipliers) + 1))

    @property
    def heads(self) -> int:
        """K, hash heads per order."""
        return len(self.primes[0])

    @property
    def window(self) -> int:
        """Tokens back that an address can depend on, the current one not counted."""
        return len(self.multipliers) - 1

    def lag_of_multiplier(self, index: int) -> int:
        """How many tokens back multiplier `index` is applied; an order n uses multipliers 0 to n-1."""
        return index if self.window_rule == "aligned" else self.window - index

    def lags(self, order: int) -> tuple[int, ...]:
        """How far back the tokens lie that address a head of this order, ascending."""
        return tuple(sorted(self.lag_of_multiplier(index) for index in range(order)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each of the S slots, order-major."""
        return tuple(prime for row in self.primes for prime in row)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First row of each of the S slots in the flat table."""
        return (0, *accumulate(self.sizes))[:-1]

    @property
    def rows(self) -> int:
        """Rows of the whole table."""
        return sum(self.sizes)

    def with_primes(self, primes: tuple[tuple[int, ...], ...]) -> NgramHash:
        """The same hash over another table size."""
        return replace(self, primes=primes, _constants={})

    def compress(self, tokens: Int64[Tensor, "B T"]) -> Int64[Tensor, "B T"]:
        """P(x): raw ids to compressed ids.

        Raises: ValueError naming the first id outside the vocabulary.
        """
        if not torch.compiler.is_compiling() and tokens.numel():
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.vocabulary.raw_size:
                raise ValueError(
                    f"expected token ids in [0, {self.vocabulary.raw_size}), found {low if low < 0 else high}"
                )
        return self._on(tokens.device)[0].take(tokens)  # half the time of indexing

    def mix(
        self, compressed: Int64[Tensor, "B T"], before: Int64[Tensor, "B W"] | None = None
    ) -> Int64[Tensor, "B T N"]:
        """The 63-bit mix of every order, before the modulus.

        Args: before: the compressed ids just before the text (decoding); None means the text starts here.
        """
        _, multipliers, _, _ = self._on(compressed.device)
        batch, length = compressed.shape
        if before is None:
            before = compressed.new_full((batch, self.window), self.pad)
        history = torch.cat([before, compressed], dim=1)
        if self.boundary == "reset":
            shifted = [self._shift_within_segment(history, j) for j in range(self.window + 1)]
        else:
            lags = [self.lag_of_multiplier(j) for j in range(self.window + 1)]
            shifted = [history[:, self.window - lag : self.window - lag + length] for lag in lags]
        mix = shifted[0] * multipliers[0]
        mixes = []
        for j in range(1, self.window + 1):
            mix = mix ^ (shifted[j] * multipliers[j])
            mixes.append(mix)
        return torch.stack(mixes, dim=-1)

    def _shift_within_segment(self, history: Int64[Tensor, "B all"], shift: int) -> Int64[Tensor, "B T"]:
        positions = torch.arange(history.shape[1], device=history.device)
        ends = torch.where(history == self.eos, positions, -1).cummax(dim=1).values
        segment_start = torch.nn.functional.pad(ends[:, :-1], (1, 0), value=-1) + 1
        source = positions - shift
        moved = history[:, source.clamp_min(0)]
        return torch.where(source >= segment_start, moved, self.pad)[:, self.window :]

    def slots(self, tokens: Int64[Tensor, "B T"]) -> Int64[Tensor, "B T S"]:
        """Row within its own head that each slot reads, order-major."""
        return self.slots_of_mix(self.mix(self.compress(tokens)))

    def slots_of_mix(self, mix: Int64[Tensor, "B T N"]) -> Int64[Tensor, "B T S"]:
        """The last step: each order's mix modulo the primes of its heads.

        `mix[..., None] % primes` is the same in loops as short as K; over whole positions it takes two thirds of the time.
        """
        _, _, primes, _ = self._on(mix.device)
        return mix.repeat_interleave(self.heads, -1).remainder_(primes.flatten())

    def rows_of_slots(self, slots: Int64[Tensor, "*any S"]) -> Int64[Tensor, "*any S"]:
        """Row of the flat table: slot plus the offset of its head."""
        return slots + self._on(slots.device)[3]

    def addressed_rows(self, tokens: Int64[Tensor, "B T"]) -> Int64[Tensor, "B T S"]:
        """Row of the flat table that each slot reads: both steps, in the memory of one result."""
        return self.slots(tokens).add_(self._on(tokens.device)[3])

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if device not in self._constants:
            self._constants[device] = (
                torch.as_tensor(self.vocabulary.token_map, device=device),
                torch.tensor(self.multipliers, dtype=torch.int64, device=device),
                torch.tensor(self.primes, dtype=torch.int64, device=device),
                torch.tensor(self.offsets, dtype=torch.int64, device=device),
            )
        return self._constants[device]  # type: ignore[return-value]
