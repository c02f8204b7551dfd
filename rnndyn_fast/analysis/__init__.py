"""Streaming analysis of representation dynamics: reducers, results, tables, claims and figures."""

from rnndyn_fast.analysis.bootstrap import Bootstrap, bootstrap
from rnndyn_fast.analysis.claims import Claim, check_claims
from rnndyn_fast.analysis.decodability import DecodabilityReducer
from rnndyn_fast.analysis.moments import MomentReducer
from rnndyn_fast.analysis.norms import NormReducer, RepresentationChangeReducer
from rnndyn_fast.analysis.outputs import tables, write_tables
from rnndyn_fast.analysis.protocol import Batch, Reducer, ReducerResult, SumReducer, Table
from rnndyn_fast.analysis.rdm import RdmReducer
from rnndyn_fast.analysis.reducer import ReadoutZoneReducer, readout_zones
from rnndyn_fast.analysis.results import ReadoutZoneResult
from rnndyn_fast.analysis.trajectory_files import load_result

__all__ = [
    "Batch",
    "Bootstrap",
    "Claim",
    "DecodabilityReducer",
    "MomentReducer",
    "NormReducer",
    "RdmReducer",
    "ReadoutZoneReducer",
    "ReadoutZoneResult",
    "Reducer",
    "ReducerResult",
    "RepresentationChangeReducer",
    "SumReducer",
    "Table",
    "bootstrap",
    "check_claims",
    "load_result",
    "readout_zones",
    "tables",
    "write_tables",
]
