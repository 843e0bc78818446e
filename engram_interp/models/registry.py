"""Which models come with the project, and how is any model opened by name or path?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engram_interp.models.checkpoint import CONFIG, CheckpointError, load_config, load_model
from engram_interp.models.house import HouseModel

BUNDLED = ("mini-engram", "mini-moe", "mini-moe-control")
PAIRS = {"mini": BUNDLED}


@dataclass(frozen=True)
class Pair:
    """An Engram model, its iso-parameter baseline, and the same baseline from another seed."""

    engram: HouseModel
    moe: HouseModel
    moe_control: HouseModel


def checkpoints_directory() -> Path:
    """Where the bundled checkpoints lie: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_checkpoints"
    return installed if installed.is_dir() else package.parent / "checkpoints"


def find(name_or_path: str | Path) -> Path:
    """The directory of a bundled name or of a checkpoint path.

    Raises: CheckpointError listing the bundled names when it is neither.
    """
    path = Path(name_or_path)
    if str(name_or_path) in BUNDLED:
        return checkpoints_directory() / str(name_or_path)
    if (path / CONFIG).is_file():
        return path
    raise CheckpointError(
        f"unknown model {str(name_or_path)!r}: expected {', '.join(BUNDLED)}, or a checkpoint directory"
    )


def load(name_or_path: str | Path) -> HouseModel:
    """Open a model for inference, in float32 on the CPU.

    Raises: CheckpointError for an unknown name or a checkpoint that is not exactly what its configuration says.

    >>> import engram_interp
    >>> model = engram_interp.load("mini-engram")
    >>> tokens = model.to_tokens("Diana, Princess of Wales")
    >>> model(tokens).shape == (*tokens.shape, model.vocab_size)
    True
    """
    return load_model(find(name_or_path))


def load_pair(name: str = "mini") -> Pair:
    """Open a bundled pair and its control.

    Raises: CheckpointError for an unknown pair.

    >>> import engram_interp
    >>> pair = engram_interp.load_pair("mini")
    >>> pair.engram.layers == pair.moe.layers == pair.moe_control.layers
    True
    >>> pair.moe.engram_layers
    ()
    """
    if name not in PAIRS:
        raise CheckpointError(f"unknown pair {name!r}: expected one of {', '.join(PAIRS)}")
    return Pair(*map(load, PAIRS[name]))


def describe_bundled() -> list[dict[str, object]]:
    """Name, one line of description, and size of every bundled model that is present."""
    rows: list[dict[str, object]] = []
    for name in BUNDLED:
        config = load_config(find(name))
        memory = f"Engram in blocks {list(config.engram.blocks)}" if config.engram else "no memory"
        description = (
            f"{config.layers} blocks, width {config.width}, {config.streams} streams, "
            f"{config.routed_experts} routed experts, {memory}"
        )
        rows.append({"name": name, "description": description, "config": config.model_dump(mode="json")})
    return rows
