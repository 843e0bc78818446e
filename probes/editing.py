# %% [markdown]
"""
# Can a fact be changed by rewriting the rows its trigger reads?

**Definition.** The rows that one position reads are rewritten so that another word follows the prompt: in closed form
(the direction that raises the target at the exit, pulled back through W_V) or by gradient steps on the rows. The edit
is an overlay; the checkpoint is never written.

**Units.** Log-probabilities and KL in nats; the size of an edit as a fraction of the norm of the rows.

**How it can mislead.** Success at the trigger says little: the rows are shared. Every n-gram that hashes to them reads
the edit, the convolution carries it a few tokens on, attention carries it to the end of the text. So an edit is only
reported with what else it changed, and a corpus that is small holds few of the n-grams that share the rows.
"""

# %%
from engram_interp import load
from engram_interp.gallery import load_gallery
from engram_interp.hooks.overlay import apply_overlay
from engram_interp.probes import edit_slots, show_table
from engram_interp.probes.continuation import continuations
from engram_interp.probes.specificity import edit_specificity

model = load("mini-engram")
prompt, target = "He was born in the United", " Nations"

# %% [markdown]
# ## The edit, both ways
# The closed form moves along one direction only, and may not get there; gradient steps go through the whole model.

# %%
for method in ("closed_form", "gradient"):
    edit = edit_slots(model, prompt, target, method=method)
    print(
        f"{method}: log p({target!r}) {edit.logprob_before:.2f} before, {edit.logprob_after:.2f} after, "
        f"{'now' if edit.success else 'still not'} the first choice; "
        f"{edit.overlay.rows} rows changed by {edit.relative_size:.2f} of their norm"
    )

# %% [markdown]
# ## What the model writes with the second edit

# %%
before = continuations(model, prompt, steps=8).with_memory
with apply_overlay(model, edit.overlay):
    after = continuations(model, prompt, steps=8).with_memory
print("before:", prompt + "".join(before))
print("after: ", prompt + "".join(after))

# %% [markdown]
# ## What else changed
# Positions of the bundled sentences by how the edit reaches them. Where it does not reach, logits are bit-equal.

# %%
reach = edit_specificity(model, edit.overlay, [prompt, *(sentence.text for sentence in load_gallery()[::4])])
show_table(reach.table())
show_table(reach.ngrams(), rows=10)
