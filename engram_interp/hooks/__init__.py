"""Interventions on a running model: what to change, where, and always back again."""

from engram_interp.hooks.ablation import KINDS as KINDS
from engram_interp.hooks.ablation import ablate as ablate
from engram_interp.hooks.optimal import fit_optimal_constants as fit_optimal_constants
from engram_interp.hooks.site import AblationError as AblationError
from engram_interp.hooks.statistics import MemoryStatistics as MemoryStatistics
from engram_interp.hooks.statistics import collect_memory_statistics as collect_memory_statistics
