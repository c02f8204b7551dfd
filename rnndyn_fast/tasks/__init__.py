"""Tasks that networks are trained on, as sets of trials."""

from rnndyn_fast.tasks.modulo_arithmetic import ModuloArithmetic
from rnndyn_fast.tasks.set_game import SetGame, draw_colours
from rnndyn_fast.tasks.trials import Trials

__all__ = ["ModuloArithmetic", "SetGame", "Trials", "draw_colours"]
