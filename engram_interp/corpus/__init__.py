"""Probes over corpora: more text than fits in memory, read by one process or by many, in pieces that survive a stop."""
