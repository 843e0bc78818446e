"""Studies: many conditions, a strict configuration, a run folder and a result to defend."""

from engram_interp.studies.commands import main as main
from engram_interp.studies.config import StudyConfig as StudyConfig
from engram_interp.studies.pieces import Shard as Shard
from engram_interp.studies.program import Context as Context
from engram_interp.studies.program import Plan as Plan
from engram_interp.studies.program import Report as Report
from engram_interp.studies.program import Study as Study
