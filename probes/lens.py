# %% [markdown]
"""
# When does the prediction form?

**Definition.** Every residual site is decoded by the model's own exit path, and KL(final || site) says how much of the
final prediction is missing there. Site 0 is the embedding output; at the last site the KL is exactly 0.

**Units.** Nats per token; the area under the curve is in nats x layers; the settling depth is in layers. Sentences are
the units of the bands.

**How it can mislead.** A site need not speak the final basis, so a lower KL can be a matter of dialect. The better model
has further to go, so an area is also given in units of the distance to word frequencies. Two seeds of *one*
architecture differ by this measure too: read every difference beside that of the two baselines.
"""

# %%
from engram_interp import load_pair
from engram_interp.gallery import load_gallery
from engram_interp.probes import compare_lens, logit_lens_kl, show_figure, show_table

pair, sentences = load_pair("mini"), load_gallery()[::8]

# %% [markdown]
# ## Three curves on the same tokens

# %%
engram, moe, control = (
    logit_lens_kl(model, sentences, quantities="kl") for model in (pair.engram, pair.moe, pair.moe_control)
)
for result in (engram, moe, control):
    table = result.table()
    show_table(table[(table["quantity"] == "kl") & (table["stratum"] == "all")])

# %% [markdown]
# ## The difference, and the difference that means nothing
# Negative: the first model's prediction forms earlier. The second comparison is between two seeds of the baseline: what
# does not go beyond it cannot be said to come from the memory.

# %%
with_memory, null = compare_lens(engram, moe), compare_lens(moe, control)
for comparison in (with_memory, null):
    print(" minus ".join(comparison.models))
    table = comparison.table()
    show_table(table[(table["arm"] == "difference") & (table["stratum"] == "all")])
show_figure(with_memory.figure(), "lens-curves")
show_figure(with_memory.difference_figure(), "lens-difference")
print(with_memory.statement)
