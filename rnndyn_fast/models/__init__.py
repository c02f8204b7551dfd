"""Published networks, with their published parameter names."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from rnndyn_fast.models.accelerate import accelerate
from rnndyn_fast.models.blt_net import BLTNet, blt_net_64, blt_net_128
from rnndyn_fast.models.blt_vs_net import BLTVS, blt_vs
from rnndyn_fast.models.convrnn_checkpoint import load_tf_checkpoint
from rnndyn_fast.models.convrnn_nets import ConvRNN, convrnn
from rnndyn_fast.models.rcnn_sat_nets import RCNNSAT, load_keras_checkpoint, rcnn_sat
from rnndyn_fast.models.spec_network import NETWORK, SpecNetwork, named
from rnndyn_fast.nn import RecurrentNetwork

MODELS: dict[str, Callable[..., RecurrentNetwork]] = {
    "blt_net_64": blt_net_64,
    "blt_net_128": blt_net_128,
    "blt_vs": blt_vs,
    "convrnn": convrnn,
    "rcnn_sat": rcnn_sat,
    NETWORK: SpecNetwork,
}


def build(config: Mapping[str, Any]) -> RecurrentNetwork:
    """Build a model from its ``config``: the name under "model", and the factory's options. (The name "network": the spec under "network".)

    Raises ``ValueError`` for an unknown model (with the nearest names) or option.
    """
    options = dict(config)
    name = options.pop("model", None)
    if name not in MODELS:
        near = difflib.get_close_matches(str(name), MODELS, n=3, cutoff=0.3)
        raise ValueError(f"model: unknown model {name!r}; {f'did you mean {near}? ' if near else ''}there are {sorted(MODELS)}")
    known = inspect.signature(MODELS[name]).parameters
    for option in options:
        if option not in known:
            raise ValueError(f"model {name}: unknown option {option!r}; options are {list(known)}")
    return MODELS[name](**options)


__all__ = [
    "BLTVS", "MODELS", "RCNNSAT", "BLTNet", "ConvRNN", "SpecNetwork", "accelerate", "blt_net_64", "blt_net_128", "blt_vs", "build",
    "convrnn", "load_keras_checkpoint", "load_tf_checkpoint", "named", "rcnn_sat",
]  # fmt: skip
