"""How recurrent networks add up symbols: oscillations, phases, fixed points, the automaton inside, and handcrafted systems."""

from rnndyn_fast.phase.analysis import PhaseAnalysis, analyse_system, matched_oscillator
from rnndyn_fast.phase.automaton import Automaton, agreement, extract_automaton, modulo_automaton
from rnndyn_fast.phase.classify import Solution, classify
from rnndyn_fast.phase.fixed_points import find_end_states, find_fixed_points
from rnndyn_fast.phase.handcrafted import LineAttractor, PlanarOscillator, published_oscillation
from rnndyn_fast.phase.limit_cycle import InvariantCycle, find_closed_orbit, find_cycle, floquet, lyapunov_exponents, poincare_returns
from rnndyn_fast.phase.oscillation import detect_oscillation, published_period
from rnndyn_fast.phase.phase_response import asymptotic_phase_response, predict_multisets, published_phase_response
from rnndyn_fast.phase.run import analyse_networks, load_analyses, load_systems
from rnndyn_fast.phase.similarity import linear_dynamics, procrustes_distance, similarity
from rnndyn_fast.phase.systems import CTRNNSystem, DynamicalSystem, load_npz
from rnndyn_fast.phase.trajectories import PCA, fit_pca, pca_phase, run_trials

__all__ = [
    "PCA",
    "Automaton",
    "CTRNNSystem",
    "DynamicalSystem",
    "InvariantCycle",
    "LineAttractor",
    "PhaseAnalysis",
    "PlanarOscillator",
    "Solution",
    "agreement",
    "analyse_networks",
    "analyse_system",
    "asymptotic_phase_response",
    "classify",
    "detect_oscillation",
    "extract_automaton",
    "find_closed_orbit",
    "find_cycle",
    "find_end_states",
    "find_fixed_points",
    "fit_pca",
    "floquet",
    "linear_dynamics",
    "load_analyses",
    "load_npz",
    "load_systems",
    "lyapunov_exponents",
    "matched_oscillator",
    "modulo_automaton",
    "pca_phase",
    "poincare_returns",
    "predict_multisets",
    "procrustes_distance",
    "published_oscillation",
    "published_period",
    "published_phase_response",
    "run_trials",
    "similarity",
]
