"""Studies: many conditions, seeds and texts, a run folder each, and a result to defend."""
