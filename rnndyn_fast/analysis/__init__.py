"""Streaming analysis of representation dynamics: reducers, results, tables, claims and figures."""

from rnndyn_fast.analysis.claims import Claim, check_claims
from rnndyn_fast.analysis.outputs import analyse, tables, write_tables
from rnndyn_fast.analysis.protocol import Batch, Reducer, ReducerResult, SumReducer, Table
from rnndyn_fast.analysis.reducer import ReadoutZoneReducer, readout_zones
from rnndyn_fast.analysis.results import ReadoutZoneResult

__all__ = [
    "Batch",
    "Claim",
    "ReadoutZoneReducer",
    "ReadoutZoneResult",
    "Reducer",
    "ReducerResult",
    "SumReducer",
    "Table",
    "analyse",
    "check_claims",
    "readout_zones",
    "tables",
    "write_tables",
]
