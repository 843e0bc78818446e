"""Programs that ask one question of one model; the functions they call are in `engram_interp.probes`."""
