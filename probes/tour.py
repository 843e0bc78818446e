# %% [markdown]
"""
# A tour: from installation to a first finding of your own

You need Python 3.11 or newer and this checkout. `make install` puts everything into `.venv`; afterwards

- `.venv/bin/python probes/tour.py` runs this page as a program, tables in the terminal and figures in `runs/figures`;
- `make notebooks` writes it, and the other programs beside it, as notebooks into `runs/notebooks`.

The tour takes one sentence apart, forms a guess, and then tests the guess on sentences it was not formed on. Change
the sentence and the guess: from the third section on everything is computed from them.
"""

# %%
import numpy as np

import engram_interp
from engram_interp.gallery import load_gallery
from engram_interp.measure.statistics import mean_interval, paired_difference
from engram_interp.probes import lookup, read_gates, show_figure, show_table
from engram_interp.probes.token_effects import token_effects

# %% [markdown]
# ## 1. Open the models
# `engram` carries a memory; `moe` has as many parameters and the same work per token, but experts in place of the
# memory; `moe_control` is `moe` from another seed. `engram_interp.load("path/to/checkpoint")` opens one of your own.

# %%
pair = engram_interp.load_pair("mini")
model = pair.engram
for each in (pair.engram, pair.moe, pair.moe_control):
    millions = sum(weight.numel() for weight in each.parameters()) / 1e6
    print(f"{each.identity.name}: {millions:.1f} M parameters, memory in blocks {each.engram_layers}")

# %% [markdown]
# ## 2. Look
# What does the memory look up, does the gate let it in, and what changes when nothing is let in? Three calls on one
# sentence. A positive `change` means that the memory made the true next token more probable.

# %%
sentence = "The President of the United States lives in the White House."
show_table(lookup(model, sentence).table().query("head == 0 and complete")[["block", "token", "ngram", "slot", "norm"]])
show_figure(read_gates(model, sentence).figure(), "tour-gates")

# %%
effects = token_effects(model, sentence)
show_table(effects.table()[["token", "next_token", "top_with", "top_without", "change"]])
show_figure(effects.figure(), "tour-effects")

# %% [markdown]
# ## 3. Guess
# The guess of this tour: the memory helps most *inside* a name, where the words so far already say which name it is.
# So compare the tokens that continue a marked name with all other tokens, on sentences that played no part so far. The
# sentence is the unit: tokens of one sentence are not independent.


# %%
def inside_and_outside(text: str, spans: list[tuple[int, int]], ablation: str) -> tuple[float, float]:
    """Mean change of log p (nats), over tokens that continue a name after its first word, and over all others."""
    change = token_effects(model, text, kind=ablation).change
    offsets = model.tokenizer.encode(text, add_special_tokens=False).offsets
    continues = [any(text.find(" ", a, b) <= start < b and start > a for a, b in spans) for start, _ in offsets]
    predicted = change[-len(offsets) - 1 : -1]  # position t predicts token t + 1
    return predicted[np.array(continues)].mean(), predicted[~np.array(continues)].mean()


marked = [(s.text, [(p.start, p.end) for p in s.spans if p.kind == "entity"]) for s in load_gallery()]
marked = [(text, spans) for text, spans in marked if spans and text != sentence][::5]
inside, outside = np.array([inside_and_outside(text, spans, "output_zero") for text, spans in marked]).T

# %% [markdown]
# ## 4. Test
# With an interval, and with a control. A zero is something that later layers never met in training; so the same is asked
# of a memory that reads the rows of *other* addresses. Only what both ablations show can be laid to what the rows hold.

# %%
rng = np.random.default_rng(0)
inside_control, outside_control = np.array([inside_and_outside(*item, "hash_permute") for item in marked]).T
for name, a, b in (("write at zero", inside, outside), ("rows of other addresses", inside_control, outside_control)):
    print(f"{name}: inside names {mean_interval(a)}, elsewhere {mean_interval(b)}, nats per token")
    print(f"  inside minus elsewhere, paired by sentence: {paired_difference(a, b, rng=rng)}")

# %% [markdown]
# ## 5. Say what was found, and no more

# %%
differences = [paired_difference(a, b, rng=rng) for a, b in ((inside, outside), (inside_control, outside_control))]
if all(d.low > 0 for d in differences):
    finding = "the memory helps more inside names than elsewhere, and it is the content of its rows that helps"
elif differences[0].low > 0:
    finding = "names suffer most from a write at zero; that this is the content of the rows was not shown"
else:
    finding = "that the memory helps more inside names than elsewhere was not shown"
print(f"{model.identity.name}, {len(marked)} sentences: {finding}.")
print("This speaks of one checkpoint of one seed; another seed of the same architecture may differ.")

# %% [markdown]
# ## Where next
# `probes/gates.py` asks when the gates open, `lens.py` how early predictions form, `similarity.py` which layers
# resemble which, `ablation.py` what breaks, `attribution.py` and `patching.py` by which way, `memory.py` what a row
# holds, `editing.py` whether it can be rewritten. `experiments/README.md` lists the studies, and `make app` opens the
# dashboard.
