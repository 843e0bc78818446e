# %% [markdown]
"""
# What breaks without the memory?

**Definition.** Every item of a task is scored with the memory and again under an ablation. "Removing" is a family: the
write at zero, the rows of other addresses (`hash_permute`), a random write of the same norm, and as a control without
memory the experts of the same block. The retained fraction is the score that is left, corrected for chance.

**Units.** Fractions for scores, nats for log-probabilities and KL. Intervals are over items, or over sentences where
items share one.

**How it can mislead.** Effects are totals: later layers may repair what was taken, or suffer from what they never met in
training, and a zero is such a thing. So a write at zero alone does not show that the memory held the answer: compare it
with other addresses and with a random write. Where the full score cannot be told from chance, no fraction is given.
"""

# %%
from engram_interp import load
from engram_interp.probes import Condition, ablation_effects, show_figure, show_table
from engram_interp.probes.tasks import load_tasks
from engram_interp.probes.token_effects import token_effects

model = load("mini-engram")

# %% [markdown]
# ## Names and set phrases against copying
# A memory can hold the first two; the last can only be read off the prompt.

# %%
tasks = load_tasks(["gallery_entity", "gallery_phrase", "induction"], model.tokenizer, limit=60)
kinds = ["output_zero", "hash_permute", "equal_norm_random"]
conditions = [Condition(kind=kind) for kind in kinds]
conditions.append(Condition(kind="mlp_zero", blocks=model.engram_layers, name="experts of the same blocks"))
effects = ablation_effects(model, tasks, conditions)
columns = ["task", "condition", "score_full", "score", "retained_above_chance", "change_logprob", "change_logprob_low"]
show_table(effects.table()[[*columns, "change_logprob_high", "reason"]])
show_figure(effects.figure(), "retained-without-memory")

# %% [markdown]
# ## The same, token by token
# `change` is the log-probability of the true next token with the memory minus without it.

# %%
tokens = token_effects(model, "Diana, Princess of Wales, lived in the United Kingdom.", top=3)
show_table(tokens.table()[["token", "next_token", "top_with", "top_without", "change", "kl"]])
show_figure(tokens.figure(), "memory-by-token")
