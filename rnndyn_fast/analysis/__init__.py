"""Streaming analysis of representation dynamics: reducers, results, tables, claims and figures."""

from rnndyn_fast.analysis.claims import Claim, check_claims
from rnndyn_fast.analysis.human_times import ReactionTimeComparison, compare_reaction_times, load_reaction_times
from rnndyn_fast.analysis.outputs import analyse, tables, write_tables
from rnndyn_fast.analysis.reaction_times import ReactionTimeReducer, entropies, reaction_times
from rnndyn_fast.analysis.reducer import ReadoutZoneReducer, readout_zones
from rnndyn_fast.analysis.results import ReadoutZoneResult
from rnndyn_fast.analysis.speed_accuracy import ReactionTimeResult

__all__ = [
    "Claim",
    "ReactionTimeComparison",
    "ReactionTimeReducer",
    "ReactionTimeResult",
    "ReadoutZoneReducer",
    "ReadoutZoneResult",
    "analyse",
    "check_claims",
    "compare_reaction_times",
    "entropies",
    "load_reaction_times",
    "reaction_times",
    "readout_zones",
    "tables",
    "write_tables",
]
