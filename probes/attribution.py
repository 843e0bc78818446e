# %% [markdown]
"""
# Which part of the memory speaks for a token?

**Definition.** With the final norm's scale held at its own value the logits are linear in the residual, so every
component's contribution sums to the logit. The memory's component splits further, exactly, into the S rows it read
(n-gram order x hash head), a bias and the convolution.

**Units.** Logits. A constant over the vocabulary means nothing in a logit, so the contrast with another token is shown
too.

**How it can mislead.** This is an account of the direct path only: what later layers make of a write is not in it, nor
what a row does to the gate. Parts can cancel, so a large one need not be decisive.
"""

# %%
from engram_interp import load
from engram_interp.probes import direct_logit_attribution, memory_attribution, show_figure, show_table

model = load("mini-engram")
text = "The President of the United States of America"

# %% [markdown]
# ## Components
# The sum is checked: the residue is the largest difference between a logit and the sum of its parts.

# %%
direct = direct_logit_attribution(model, text)
show_figure(direct.figure(), "components-by-token")
print(f"largest residue {direct.residue:.1e} logits, against logits up to {abs(direct.logit).max():.1f}")

# %% [markdown]
# ## Rows of the memory
# The rows that speak most for, and against, the token that follows "United".

# %%
attribution = memory_attribution(model, text)
show_figure(attribution.figure(), "rows-by-token")
at = next(i for i, token in enumerate(attribution.direct.tokens) if "United" in token)
rows = attribution.table().query("position == @at").sort_values("contribution", ascending=False)
show_table(rows[["token", "target", "part", "contribution"]], rows=8)

# %% [markdown]
# ## In contrast with another token
# The same position, the true token against " Nations": what the memory adds to the difference of the two logits.

# %%
targets = attribution.direct.targets.tolist()
rival = model.tokenizer.encode(" Nations", add_special_tokens=False).ids[0]
contrast = memory_attribution(model, text, targets=targets, against=[rival] * len(targets))
for e, layer in enumerate(contrast.layers):
    said = zip(contrast.orders, contrast.order_logits[e, at], strict=True)
    orders = ", ".join(f"{n}-grams {logits:+.2f}" for n, logits in said)
    print(f"block {layer}: {orders}, convolution {contrast.conv_logits[e, at]:+.2f} logits")
