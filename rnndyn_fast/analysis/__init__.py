"""Streaming analysis of representation dynamics: reducers, results, tables, claims and figures."""

from rnndyn_fast.analysis.bootstrap import Bootstrap, bootstrap, pool
from rnndyn_fast.analysis.claims import Claim, check_claims, claims_of
from rnndyn_fast.analysis.decodability import DecodabilityReducer
from rnndyn_fast.analysis.geometry import RdmComparison, cka_over_time, compare_rdms, procrustes_over_time
from rnndyn_fast.analysis.human_times import ReactionTimeComparison, compare_reaction_times, load_reaction_times
from rnndyn_fast.analysis.intervals import Estimate, holm
from rnndyn_fast.analysis.lesions import LesionEffects, lesion_effects
from rnndyn_fast.analysis.moments import MomentReducer
from rnndyn_fast.analysis.motion import Motion, motion, settle, speed_against_margin, straightness
from rnndyn_fast.analysis.norms import NormReducer, RepresentationChangeReducer
from rnndyn_fast.analysis.outputs import tables, write_tables
from rnndyn_fast.analysis.protocol import Batch, Reducer, ReducerResult, SumReducer, Table
from rnndyn_fast.analysis.rdm import RdmReducer
from rnndyn_fast.analysis.reaction_times import ReactionTimeReducer, entropies, reaction_times
from rnndyn_fast.analysis.reducer import ReadoutZoneReducer, readout_zones
from rnndyn_fast.analysis.results import ReadoutZoneResult
from rnndyn_fast.analysis.speed_accuracy import ReactionTimeResult
from rnndyn_fast.analysis.tangent import StateStep, largest_gain, local_lyapunov, spectral_radius
from rnndyn_fast.analysis.trajectory_files import load_result

__all__ = [
    "Batch",
    "Bootstrap",
    "Claim",
    "DecodabilityReducer",
    "Estimate",
    "LesionEffects",
    "MomentReducer",
    "Motion",
    "NormReducer",
    "RdmComparison",
    "RdmReducer",
    "ReactionTimeComparison",
    "ReactionTimeReducer",
    "ReactionTimeResult",
    "ReadoutZoneReducer",
    "ReadoutZoneResult",
    "Reducer",
    "ReducerResult",
    "RepresentationChangeReducer",
    "StateStep",
    "SumReducer",
    "Table",
    "bootstrap",
    "check_claims",
    "cka_over_time",
    "claims_of",
    "compare_rdms",
    "compare_reaction_times",
    "entropies",
    "holm",
    "largest_gain",
    "lesion_effects",
    "load_reaction_times",
    "load_result",
    "local_lyapunov",
    "motion",
    "pool",
    "procrustes_over_time",
    "reaction_times",
    "readout_zones",
    "settle",
    "spectral_radius",
    "speed_against_margin",
    "straightness",
    "tables",
    "write_tables",
]
