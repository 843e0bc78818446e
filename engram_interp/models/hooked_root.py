"""What does every model of this package add to TransformerLens's hooks?

The model's lock is held while hooks are attached, so that two threads never see each other's, and a name that matches no hook
point is an error with near matches instead of a hook that never fires.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from engram_interp.models.cache import matching_hooks
from engram_interp.models.lock import ModelLock
from engram_interp.models.protocol import NamesFilter
from engram_interp.shapes import Tensor


class LockedHooks(HookedRootModule):
    """A root module with a `lock`, which a subclass sets."""

    lock: ModelLock

    def add_hook(self, name: str | Callable[[str], bool], *args: object, **kwargs: object) -> None:
        """As TransformerLens, but a name that matches no hook point raises a KeyError that lists near matches."""
        if isinstance(name, str):
            matching_hooks(self.hook_dict, name)
        super().add_hook(name, *args, **kwargs)  # type: ignore[arg-type]

    @contextmanager
    def hooks(self, *args: object, **kwargs: object) -> Iterator[HookedRootModule]:
        """As TransformerLens, holding the model's lock; names are checked before any hook is attached."""
        for key in ("fwd_hooks", "bwd_hooks"):
            for name, _ in kwargs.get(key, ()):  # type: ignore[union-attr]
                if isinstance(name, str):
                    matching_hooks(self.hook_dict, name)
        with self.lock, super().hooks(*args, **kwargs) as model:  # type: ignore[arg-type]
            yield model

    def _recorded(
        self, inputs: Sequence[object], names_filter: NamesFilter, clone: bool
    ) -> tuple[object, dict[str, Tensor]]:
        """The forward's result and what the chosen hook points saw, each record copied where `clone` says so."""
        records: dict[str, Tensor] = {}

        def save(value: Tensor, hook: HookPoint) -> None:
            records[hook.name] = value.detach().clone() if clone else value.detach()  # type: ignore[index]

        names = matching_hooks(self.hook_dict, names_filter)
        with self.hooks(fwd_hooks=[(name, save) for name in names]):
            out = self(*inputs)
        return out, records
