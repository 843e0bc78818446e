# %% [markdown]
"""
# Do layers with a memory resemble deeper layers of the baseline?

**Definition.** Linear CKA (unbiased) of every residual site of the Engram model with every site of the baseline, at the
last token of each name. The soft alignment index (Engram paper, eq. 9) is the mean of the k most similar baseline
sites, weighted by their CKA.

**Units.** CKA has no unit and is at most 1; depths are residual sites of the baseline, 0 being the embedding output.
Intervals are over documents, by a jackknife.

**How it can mislead.** The index is a centroid of k sites, so it cannot reach the first or the last ones: a model
aligned with itself already looks shifted. Its null is the same index between two seeds of the baseline, and only what
goes beyond the null is a shift. CKA is blind to directions of little variance.
"""

# %%
from engram_interp import load_pair
from engram_interp.gallery import load_gallery
from engram_interp.probes import cka_heatmap, show_figure, show_table

pair, sentences = load_pair("mini"), load_gallery()[::8]

# %% [markdown]
# ## The heat map, with the null drawn over it

# %%
heat = cka_heatmap(pair.engram, pair.moe, sentences, control=pair.moe_control)
show_figure(heat.figure(), "cka")
show_table(heat.table()[["baseline", "engram", "cka", "low", "high", "best_match"]].query("best_match > 0.2"))

# %% [markdown]
# ## Depths beside their null
# `beyond_null` is the shift in layers after the null is taken away, with an interval that holds for all sites at once.

# %%
columns = ["engram", "soft_alignment", "soft_alignment_null", "beyond_null", "beyond_null_low", "beyond_null_high"]
depths = heat.depths()
for seeds, rows in depths.groupby("seed_pair", sort=False):
    print(seeds)
    show_table(rows[columns])

# %% [markdown]
# ## What may be said
# A sentence per site, strict on purpose: methods, documents and seeds must agree.

# %%
for claim in heat.claims:
    print(claim.sentence)
for warning in heat.warnings:
    print("note:", warning)
