"""Pointwise functions."""

from __future__ import annotations

import enum


class Activation(enum.Enum):
    """A pointwise function; ELU has alpha = 1."""

    IDENTITY = "identity"
    RELU = "relu"
    ELU = "elu"
    TANH = "tanh"
    SIGMOID = "sigmoid"
