"""How well do the three models of a pair predict the bundled sentences? Nats per token, sentences as the units.

Differences are paired by sentence. Misleads: the sentences are short and full of names, which is where a memory of
n-grams helps most; held-out articles are the other half of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from engram_interp.gallery import GallerySentence
from engram_interp.measure.statistics import Estimate, mean_interval, paired_difference
from engram_interp.models.protocol import Decoder
from engram_interp.models.registry import Pair
from engram_interp.studies.evaluation import article_losses

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class GalleryLosses:
    """Mean next-token loss on the gallery, nats per token, sentences as the units; differences are paired by sentence."""

    losses: dict[str, Estimate]
    engram_minus_moe: Estimate
    moe_minus_control: Estimate

    def table(self) -> pd.DataFrame:
        """A row per model, and one per paired difference."""
        import pandas as pd

        engram, moe, control = self.losses
        rows = {
            **self.losses,
            f"{engram} minus {moe}": self.engram_minus_moe,
            f"{moe} minus {control}": self.moe_minus_control,
        }
        return pd.DataFrame([{"model": k, "loss": e.value, "low": e.low, "high": e.high} for k, e in rows.items()])


def sentence_losses(model: Decoder, texts: Sequence[str]) -> Float[np.ndarray, " B"]:
    """Mean next-token loss of each text in nats, first token of the text included (predicted from the start token)."""
    loss, tokens, _ = article_losses(model, texts)
    return loss / tokens


def gallery_losses(pair: Pair, sentences: Sequence[GallerySentence], seed: int = 0) -> GalleryLosses:
    """Losses of the three bundled models on the gallery."""
    texts, rng = [s.text for s in sentences], np.random.default_rng(seed)
    models = (pair.engram, pair.moe, pair.moe_control)
    engram, moe, control = (sentence_losses(model, texts) for model in models)
    return GalleryLosses(
        {m.identity.name: mean_interval(x) for m, x in zip(models, (engram, moe, control), strict=True)},
        paired_difference(engram, moe, rng=rng),
        paired_difference(moe, control, rng=rng),
    )
