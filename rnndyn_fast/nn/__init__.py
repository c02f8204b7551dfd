"""Layers and networks that own parameters."""

from rnndyn_fast.nn.blt_conv import BLTConv
from rnndyn_fast.nn.conv_cell import ConvCell
from rnndyn_fast.nn.ctrnn import CTRNN
from rnndyn_fast.nn.cuda_graphs import GraphedNetwork, GraphedTrainingStep
from rnndyn_fast.nn.recurrent_network import RecurrentNetwork

__all__ = ["CTRNN", "BLTConv", "ConvCell", "GraphedNetwork", "GraphedTrainingStep", "RecurrentNetwork"]
