"""Published networks, with their published parameter names."""

from __future__ import annotations

from rnndyn_fast.models.accelerate import accelerate
from rnndyn_fast.models.blt_net import BLTNet, blt_net_64, blt_net_128
from rnndyn_fast.models.blt_vs_net import BLTVS, blt_vs
from rnndyn_fast.models.convrnn_checkpoint import load_tf_checkpoint
from rnndyn_fast.models.convrnn_nets import ConvRNN, convrnn
from rnndyn_fast.models.rcnn_sat_nets import RCNNSAT, load_keras_checkpoint, rcnn_sat
from rnndyn_fast.models.registry import MODELS, build, build_for, image_size_of, named, options_of
from rnndyn_fast.models.spec_network import SpecNetwork

__all__ = [
    "BLTVS", "MODELS", "RCNNSAT", "BLTNet", "ConvRNN", "SpecNetwork", "accelerate", "blt_net_64", "blt_net_128", "blt_vs", "build",
    "build_for", "convrnn", "image_size_of", "load_keras_checkpoint", "load_tf_checkpoint", "named", "options_of", "rcnn_sat",
]  # fmt: skip
