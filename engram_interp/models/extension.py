"""How is a model read at contexts longer than it was trained on?

NTK-aware scaling of the rotary base: theta' = theta f^(h / (h - 2)) for heads of width h, so that the slowest frequency is stretched by
the factor f and the fastest stays as it was (the base change that YaRN starts from, Peng et al. 2023, section 3.1). No weight changes.
Misleads: without the training that the paper adds (5 k steps, section 4.3), what fails at length may be the extension, not the model;
compare models under the same extension only.
"""

from __future__ import annotations

from dataclasses import replace

from engram_interp.models.house import HouseModel


def extend_context(model: HouseModel, factor: int) -> HouseModel:
    """The same weights with a context `factor` times as long; factor 1 gives the same logits bit for bit.

    Raises: ValueError for a factor below 1 or heads of width 2, whose only frequency cannot be stretched.
    """
    width = model.cfg.head_width
    if factor < 1 or width <= 2:
        raise ValueError(f"expected a factor of at least 1 and heads wider than 2, found {factor} and {width}")
    theta = model.cfg.rope_theta * factor ** (width / (width - 2))
    config = model.cfg.model_copy(update={"context": factor * model.cfg.context, "rope_theta": theta})
    name = model.identity.name if factor == 1 else f"{model.identity.name} x{factor}"
    longer = HouseModel(config, model.vocabulary, model.tokenizer, replace(model.identity, name=name))
    longer.load_state_dict(model.state_dict(), strict=True, assign=True)
    return longer.eval().requires_grad_(False)
