"""Which files that are not modules does the wheel carry?

`app/` (Streamlit runs files, it does not import them) and `checkpoints/` (the bundled models) become data inside the
package. An editable install reads both from the checkout, so nothing is copied there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

CARRIED = {"app": "engram_interp/_app", "checkpoints": "engram_interp/_checkpoints"}


class CarryData(BuildHookInterface):
    """Adds the folders of `CARRIED` that hold any file to a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a build; `version` is "standard" or "editable"."""
        if version == "editable":
            return
        for folder, target in CARRIED.items():
            if any(path.is_file() for path in Path(self.root, folder).rglob("*")):
                build_data["force_include"][folder] = target
