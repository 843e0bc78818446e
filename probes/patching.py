# %% [markdown]
"""
# Does the memory's content carry the answer from one prompt to another?

**Definition.** Two prompts differ in one name. The corrupted prompt is run with what the memory computed on the clean
one, stage by stage (slots, embedding, value, gate, convolution, write), position by position. The metric is the
difference of the logits of the two answers at the last token.

**Units.** Logits; `closed` is the fraction of the gap between the prompts that the patch closes.

**How it can mislead.** Putting clean into corrupted asks whether a stage is enough, the reverse whether it is needed:
they need not agree. A fraction of a small gap explodes, so look at the gap first. Prompts should have equally many
tokens, or attention sees other distances.
"""

# %%
from engram_interp import load
from engram_interp.probes import patch_memory, show_figure, show_table
from engram_interp.probes.patching import path_patch_gate

model = load("mini-engram")
clean, corrupted = "He was the leader of the Soviet", "He was the leader of the United"
answers = (" Union", " States")

# %% [markdown]
# ## Enough, and needed
# All positions of a stage together. A negative gap of the corrupted prompt and a positive one of the clean prompt mean
# that the model tells them apart in the first place.

# %%
for direction in ("denoise", "noise"):
    effects = patch_memory(model, clean, corrupted, answers, direction=direction)
    print(f"{direction}: gap {effects.base_gap:+.2f} before, {effects.source_gap:+.2f} on the other prompt, logits")
    show_table(effects.table().query("position == -1")[["stage", "block", "gap", "effect", "closed"]])
    show_figure(effects.figure(), f"patching-{direction}")

# %% [markdown]
# ## Is it the gate, and does its effect reach the logits directly?
# `key` moves the gate through what was looked up, `query` through the hidden state; `through_later` is what attention
# and experts of later blocks add to the direct path.

# %%
show_table(path_patch_gate(model, clean, corrupted, answers).table())
