"""Questions asked of a model: each function returns a frozen result with `.table()`, `.figure()` and provenance."""

from __future__ import annotations

from importlib import import_module

_LAZY = {
    "AblationEffects": "probes.ablation",
    "CKAHeatmap": "probes.similarity",
    "Condition": "probes.ablation",
    "GateMap": "probes.gates",
    "GateStatistics": "probes.gate_statistics",
    "LensComparison": "probes.lens_comparison",
    "LensResult": "probes.lens",
    "NgramCounts": "probes.strata",
    "TunedLens": "probes.tuned_lens",
    "TunedLensConfig": "probes.tuned_lens",
    "ablation_effects": "probes.ablation",
    "cka_heatmap": "probes.similarity",
    "compare_lens": "probes.lens_comparison",
    "compare_seeds": "probes.lens_comparison",
    "direct_logit_attribution": "probes.attribution",
    "edit_slots": "probes.editing",
    "linear_cka": "measure.cka",
    "load_tuned_lens": "probes.tuned_lens",
    "logit_lens_kl": "probes.lens",
    "lookup": "probes.memory_table",
    "memory_attribution": "probes.attribution",
    "neighbours": "probes.memory_table",
    "patch_memory": "probes.patching",
    "read_gates": "probes.gates",
    "read_slot": "probes.memory_table",
    "record_gates": "probes.gate_statistics",
    "show_figure": "probes.show",
    "show_table": "probes.show",
    "slot_collisions": "probes.collisions",
    "soft_alignment": "measure.alignment",
    "train_tuned_lens": "probes.tuned_lens",
}
__all__ = list(_LAZY)  # pyright: ignore[reportUnsupportedDunderAll] - the names exist on first use


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"engram_interp.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return __all__
