"""Other people's models, opened as if they were the house's own: same hook names, same record per memory site."""
