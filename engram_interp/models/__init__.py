"""Models that can be looked into: the house transformer, its configuration, checkpoints and registry."""
