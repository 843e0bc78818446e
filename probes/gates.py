# %% [markdown]
"""
# Where does the memory speak?

**Definition.** A gate is sigmoid(signed root of the score), the score being the product of the normalised hidden state
and the normalised key that the memory looked up. One gate per token, Engram layer and residual branch.

**Units.** Gates lie in (0, 1); 0.5 is a score of zero, "no evidence". `write_norm` and `hidden_norm` are in the units
of the residual. Intervals are over sentences, not over tokens.

**How it can mislead.** The convolution is not scaled by the gate, so a closed gate is not a silent layer. Gates of
different layers and branches are not on one scale: all are shown, and none is picked. An open gate shows that the memory
is let in, not that it helps; `probes/ablation.py` asks that.
"""

# %%
from engram_interp import load
from engram_interp.gallery import load_gallery
from engram_interp.probes import read_gates, record_gates, show_figure, show_table

model = load("mini-engram")

# %% [markdown]
# ## One sentence
# A row per token, layer and branch. The heat map shows them all at once.

# %%
gates = read_gates(model, "Only Alexander the Great could tame the horse Bucephalus.")
show_table(gates.table())
show_figure(gates.figure(), "gates-of-a-sentence")

# %% [markdown]
# ## Many sentences
# The mean gate at the last token of a name, at the last token of a set phrase, and at all other tokens. `difference` is
# paired within sentences; its interval excludes 0 where the gate can tell the tokens apart. Every third bundled
# sentence keeps this quick: take them all for a number to report.

# %%
statistics = record_gates(model, load_gallery()[::3])
table = statistics.table()
show_table(table[table["stratum"].isin(["entity-final", "phrase-final", "rest"])])
show_figure(statistics.figure(), "gates-by-kind-of-token")

# %% [markdown]
# ## What the gate does not scale
# How the squared write divides into the gated value and the convolution, and how they point to each other.

# %%
for split in statistics.splits:
    part = split.conv_norm2 / (split.gated_norm2 + split.conv_norm2)
    print(f"block {split.layer}: convolution {part:.0%} of the squared norms, cosine with the value {split.cosine:.2f}")
