"""Questions asked of a model: each function returns a frozen result with `.table()`, `.figure()` and provenance."""

from __future__ import annotations

from importlib import import_module

_LAZY = {
    "Condition": "ablation",
    "GateMap": "gates",
    "GateStatistics": "gate_statistics",
    "ablation_effects": "ablation",
    "cka_heatmap": "similarity",
    "compare_lens": "lens",
    "default_conditions": "ablation",
    "edit_slots": "editing",
    "edit_specificity": "specificity",
    "gate_credit": "credit",
    "linear_cka": "similarity",
    "load_tasks": "tasks",
    "logit_lens_kl": "lens",
    "memory_attribution": "attribution",
    "patch_memory": "patching",
    "path_patch_gate": "patching",
    "read_gates": "gates",
    "record_gates": "gate_statistics",
    "slot_collisions": "collisions",
    "slot_effects": "slot_ablation",
    "soft_alignment": "similarity",
    "train_tuned_lens": "tuned_lens",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return __all__
