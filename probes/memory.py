# %% [markdown]
"""
# What is in the table, and which n-grams share a row?

**Definition.** An n-gram of compressed tokens is hashed, once per head, to a row of the table. A row read through its
part of W_V and the unembedding says which tokens it promotes. Two n-grams collide in a head when they read one row; the
memory cannot tell them apart when they collide in all heads of their order.

**Units.** Counts of distinct n-grams; norms in the units of the table; promotions in logits, with the mean over the
vocabulary taken away.

**How it can mislead.** Collisions grow with the corpus, so only corpora of one size compare; sharing a row is
interference only if both n-grams trained it. A row is read here before any later layer acts, and alone, while the model
adds S of them and may close the gate.
"""

# %%
from engram_interp import load
from engram_interp.gallery import load_gallery
from engram_interp.probes import lookup, neighbours, read_slot, show_figure, show_table, slot_collisions
from engram_interp.probes.memory_rows import row_statistics
from engram_interp.probes.memory_site import site_of

model, texts = load("mini-engram"), [sentence.text for sentence in load_gallery()]

# %% [markdown]
# ## What a phrase reads

# %%
found = lookup(model, "the United States")
show_table(found.table()[["block", "token", "order", "ngram", "head", "slot", "norm"]].tail(8))
show_figure(found.figure(), "rows-of-a-phrase")

# %% [markdown]
# ## What one row says
# The row that head 0 of the longest n-gram reads at the last token. `excess` is what the mean row of that head does not
# promote as well.

# %%
last = max(found.ngrams, key=lambda ngram: (ngram.position, ngram.order))
row, block = last.addresses[0].row, last.block
reading = read_slot(model, row, block=block)
show_table(reading.table(), rows=10)
show_figure(reading.figure(), "one-row")
show_table(neighbours(site_of(model, block), row).table(), rows=5)

# %% [markdown]
# ## How the rows are used
# Norms by head: a head with many rows at the norm they were born with was hardly trained.

# %%
norms = row_statistics(site_of(model, block))
show_table(norms.table()[["order", "head", "rows", "zero", "mean", "q0.01", "q0.5", "q0.99"]])

# %% [markdown]
# ## Collisions, beside a uniform hash
# `head` "all" counts the n-grams that share the rows of all heads with another.

# %%
collisions = slot_collisions(model, texts)
show_table(collisions.table())
show_figure(collisions.figure(), "collisions")
