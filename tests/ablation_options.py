"""What the kinds of ablation that need an option are given, on every model they are tested on."""

OPTIONS = {
    "gate_scale": {"scale": 0.5},
    "keep_order": {"order": 2},
    "heads": {"heads": [0, 2]},
    "slots": {"slots": [1, 5]},
    "quantise": {"bits": 2},
    "prune_rows": {"fraction": 0.5},
    "branches": {"branches": [1]},
}
