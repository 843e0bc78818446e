"""Where does an intervention act: which block, which positions, which branches?

A `Site` names the hook points of one block and puts a replacement only where it was asked for; everywhere else the old
values pass through untouched, bit for bit. Every kind of ablation is a function from a site to (hook name, function)
pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformer_lens.hook_points import HookPoint

from engram_interp.models.protocol import Decoder
from engram_interp.shapes import Bool, Shaped, Tensor

HookFunction = Callable[[Tensor, HookPoint], Tensor | None]
Hook = tuple[str, HookFunction]


class AblationError(ValueError):
    """An intervention that cannot be made; the message names what was expected and what was found."""


@dataclass(frozen=True, eq=False)
class Site:
    """One block of a model, the positions (True = change) and the branches to change; None means all."""

    model: Decoder
    block: int
    positions: Bool[Tensor, "..."] | None = None
    branches: tuple[int, ...] | None = None

    @property
    def write(self) -> str:
        """Hook of Y, what the memory adds to the streams."""
        return f"blocks.{self.block}.hook_engram_out"

    def inside(self, point: str) -> str:
        """Hook inside the memory: slots, embedding, key, value, score, gate, gated_value or conv_out."""
        return f"blocks.{self.block}.engram.hook_{point}"

    def has(self, name: str) -> bool:
        """Whether the model has a hook point of this name."""
        return name in self.model.hook_dict

    @property
    def memory(self) -> object:
        """The memory module of the block.

        Raises: AblationError when the module does not show its hash (rows cannot be addressed then).
        """
        module = self.model.engram(self.block)  # type: ignore[attr-defined]
        if not hasattr(module, "ngram_hash"):
            raise AblationError(
                f"block {self.block}: expected a memory that shows its hash, found {type(module).__name__}"
            )
        return module

    def put(self, old: Shaped[Tensor, "B T *rest"], new: Shaped[Tensor, "..."], *, branched: bool) -> Tensor:
        """`new` where this site applies, `old` elsewhere.

        Args: new: broadcasts against `old`; branched: the third axis of `old` is the branch axis.
        Raises: AblationError when the position mask or a branch does not fit what passes the hook.
        """
        mask = None
        if self.positions is not None:
            mask = self._position_mask(old)
        if branched and self.branches is not None:
            chosen = self._branch_mask(old)
            mask = chosen if mask is None else mask & chosen
        if branched and new.ndim == old.ndim == 4 and old.shape[2] == 1:
            new = new.sum(dim=2, keepdim=True)  # branches that share one residual stream are summed into it
        new = new.to(old.dtype).expand_as(old)
        return new if mask is None else new.where(mask, old)

    def _position_mask(self, old: Tensor) -> Tensor:
        mask = self.positions
        assert mask is not None
        mask = mask if mask.ndim == 2 else mask.unsqueeze(0)
        if mask.shape[1] != old.shape[1] or mask.shape[0] not in (1, old.shape[0]):
            raise AblationError(
                f"expected a position mask [{old.shape[1]}] or {list(old.shape[:2])}, found {list(mask.shape)}"
            )
        return mask.to(old.device).reshape(*mask.shape, *(1,) * (old.ndim - 2))

    def _branch_mask(self, old: Tensor) -> Tensor:
        count = old.shape[2]
        branches = self.branches or ()
        if bad := [b for b in branches if not 0 <= b < count]:
            raise AblationError(f"expected branches in [0, {count}), found {bad[0]}")
        mask = old.new_zeros(count, dtype=bool)  # type: ignore[call-overload]
        mask[list(branches)] = True
        return mask.reshape(1, 1, count, *(1,) * (old.ndim - 3))


@dataclass(frozen=True)
class Kind:
    """One way to take the memory away.

    `distribution` says whether the rest of the model meets values it was trained on; `question` what the result
    answers; `needs` which fitted statistics it cannot do without; `branched` whether it acts after the branches part.
    """

    name: str
    build: Callable[..., list[Hook]]
    distribution: str
    question: str
    needs: tuple[str, ...] = ()
    branched: bool = True
    control: bool = False


def capture(store: dict[str, Tensor], key: str) -> HookFunction:
    """A hook that remembers what passes and changes nothing."""

    def keep(value: Tensor, hook: HookPoint) -> None:
        store[key] = value

    return keep


def check_choice(name: str, chosen: Sequence[int], allowed: Sequence[int]) -> tuple[int, ...]:
    """The chosen numbers as a tuple.

    Raises: AblationError when none is chosen or one is not allowed.
    """
    chosen = tuple(chosen)
    if not chosen or any(c not in allowed for c in chosen):
        raise AblationError(f"expected {name} among {list(allowed)}, at least one; found {list(chosen)}")
    return chosen
