# %% [markdown]
"""
# What breaks without the memory?

**Definition.** Every item of a task is scored with the memory and again under an ablation. "Removing" is a family: the
write at zero, the rows of other addresses (`hash_permute`), a random write of the same norm, and as a control that
leaves the memory alone, experts of the same blocks made smaller by the size of the write. The retained fraction is the
score that is left, corrected for chance.

**Units.** Fractions for scores, nats for log-probabilities and KL. Intervals are over items, or over sentences where
items share one.

**How it can mislead.** Effects are totals: later layers may repair what was taken, or suffer from what they never met in
training, and a zero is such a thing. So a write at zero alone does not show that the memory held the answer: compare it
with other addresses and with a random write. Where the full score cannot be told from chance, no fraction is given.
"""

# %%
from engram_interp import load
from engram_interp.gallery import load_gallery
from engram_interp.hooks import collect_memory_statistics
from engram_interp.probes import Condition, ablation_effects, show_figure, show_table
from engram_interp.probes.tasks import load_tasks
from engram_interp.probes.token_effects import token_effects

model = load("mini-engram")

# %% [markdown]
# ## Names and set phrases against copying
# A memory can hold the first two; the last can only be read off the prompt. The size of the write, for the control, is
# measured on sentences that no item comes from.

# %%
tasks = load_tasks(["gallery_entity", "gallery_phrase", "induction"], model.tokenizer, limit=60)
kinds = ["output_zero", "hash_permute", "equal_norm_random"]
conditions = [Condition(kind=kind) for kind in kinds]
conditions.append(Condition(kind="mlp_zero", name="experts, matched"))
asked = {item.group for task in tasks for item in task.items}
statistics = collect_memory_statistics(model, [s.text for s in load_gallery() if s.id not in asked][::8])
effects = ablation_effects(model, tasks, conditions, statistics=statistics)
columns = ["task", "condition", "score_full", "score", "retained_above_chance", "change_logprob"]
show_table(effects.table()[[*columns, "change_logprob_low", "change_logprob_high"]])
show_figure(effects.figure(), "retained-without-memory")

# %% [markdown]
# ## The same, token by token
# `change` is the log-probability of the true next token with the memory minus without it.

# %%
tokens = token_effects(model, "Diana, Princess of Wales, lived in the United Kingdom.", top=3)
show_table(tokens.table()[["token", "next_token", "top_with", "top_without", "change", "kl"]])
show_figure(tokens.figure(), "memory-by-token")
