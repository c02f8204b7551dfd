"""Words for what holds maps: inputs and areas."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

from rnndyn_fast.ops.activations import Activation
from rnndyn_fast.ops.cells import Cell

ABSENT: Literal["absent"] = "absent"
ZERO: Literal["zero"] = "zero"


class Interaction(enum.Enum):
    """How drive and modulator, each a sum of terms, make the value of an area without a cell.

    By default bottom-up terms drive; lateral and top-down ones do so too in an additive area, else they modulate. ``a`` is the area's
    ``drive_activation``. ADDITIVE: ``a(drive)``. MULTIPLICATIVE: ``a(drive) * (1 + modulator)``. SQUASHED: ``a(drive) * 2 s(modulator)``
    with the logistic sigmoid s; there a missing drive counts as zero as long as the modulator has a term.
    """

    ADDITIVE = "additive"
    MULTIPLICATIVE = "multiplicative"
    SQUASHED = "squashed"


class Norm(enum.Enum):
    """Normalisation of an area's value, before its activation.

    NONE; LAYER: over (C, H, W) with an affine value per element; GROUP: over groups of channels and the map, affine per channel; BATCH: per
    channel over samples and map (in inference: by running statistics), every time step with parameters and statistics of its own.
    """

    NONE = "none"
    LAYER = "layer"
    GROUP = "group"
    BATCH = "batch"


@dataclass(frozen=True)
class Input:
    """An external map. ``frames=False``: one map for all time steps, [N, C, H, W]; True: one per step, [T, N, C, H, W].

    ``off_at``: from that time step on the map is the constant ``off_value`` (an image that is taken away).
    """

    name: str
    channels: int
    height: int
    width: int
    frames: bool = False
    off_at: int | None = None
    off_value: float = 0.0


@dataclass(frozen=True)
class Area:
    """A population with one map per time step (several with a cell of several states); height and width follow from its connections.

    Without a cell: ``interaction``, ``drive_activation``, ``norm`` (LAYER if None), ``activation`` (RELU if None); with a ``cell`` the
    cell is all of it. ``norm_parameter`` is the prefix of the norm's parameters (``<prefix>.weight``, ``<prefix>.bias``; BATCH:
    ``<prefix>.<t>.weight`` ... and the buffers ``<prefix>.<t>.running_mean``, ``running_var`` for t < ``norm_steps``; with
    ``norm_frozen`` they are used in training too, and count as parameters). ``cell_parameter``
    is that of the cell's. ``initial``: what reads the area before its first state finds: "absent" (nothing: the term is left out), "zero",
    or the map of the input of that name; one for all states of a cell, or a tuple. ``like``: the node whose height and width it has, where
    all that enters is resized.
    """

    name: str
    channels: int
    interaction: Interaction = Interaction.ADDITIVE
    norm: Norm | None = None
    activation: Activation | None = None
    norm_parameter: str | None = None
    eps: float = 1e-5
    drive_activation: Activation = Activation.IDENTITY
    norm_groups: int = 1
    norm_steps: int | None = None
    norm_frozen: bool = False
    cell: Cell | None = None
    cell_parameter: str | None = None
    initial: str | tuple[str, ...] = ABSENT
    like: str | None = None

    def __post_init__(self) -> None:
        plain = self.cell is None
        if not plain and (self.norm, self.activation) not in ((None, None), (Norm.NONE, Activation.IDENTITY)):
            raise ValueError(f"area {self.name!r}: an area with a cell takes no norm and no activation")
        if self.norm is None:
            object.__setattr__(self, "norm", Norm.LAYER if plain else Norm.NONE)
        if self.activation is None:
            object.__setattr__(self, "activation", Activation.RELU if plain else Activation.IDENTITY)
        if self.norm is not Norm.NONE and self.norm_parameter is None:
            object.__setattr__(self, "norm_parameter", f"{self.name}_ln")
        if not plain and self.cell_parameter is None:
            object.__setattr__(self, "cell_parameter", f"{self.name}.cell")
        if not isinstance(self.initial, str):
            object.__setattr__(self, "initial", tuple(self.initial))

    @property
    def states(self) -> tuple[str | None, ...]:
        """Names of its maps; (None,) without a cell."""
        return (None,) if self.cell is None else self.cell.states

    def initial_of(self, state: str | None) -> str:
        """What is found before the first state in one of its maps (None: its output)."""
        if isinstance(self.initial, str):
            return self.initial
        return self.initial[0 if state is None else self.states.index(state)]

    @property
    def ports(self) -> dict[str, int]:
        """Channels of its ports."""
        if self.cell is not None:
            return {name: multiple * self.channels for name, multiple in self.cell.ports.items()}
        names = ("drive",) if self.interaction is Interaction.ADDITIVE else ("drive", "modulator")
        return dict.fromkeys(names, self.channels)

    def check(self) -> None:
        """Raise ``ValueError`` naming the field that makes no sense by itself."""
        if self.channels < 1:
            raise ValueError(f"area {self.name!r}: expected channels >= 1, got {self.channels}")
        if self.norm is Norm.GROUP and (self.norm_groups < 1 or self.channels % self.norm_groups):
            raise ValueError(f"area {self.name!r}: expected norm_groups that divide {self.channels} channels, got {self.norm_groups}")
        if self.norm is Norm.BATCH and (self.norm_steps is None or self.norm_steps < 1):
            raise ValueError(f"area {self.name!r}: norm_steps: expected the number of time steps with a batch norm, got {self.norm_steps}")
        if self.cell is not None and self.interaction is not Interaction.ADDITIVE:
            raise ValueError(f"area {self.name!r}: an area with a cell takes no interaction")
        if not isinstance(self.initial, str) and len(self.initial) != len(self.states):
            raise ValueError(f"area {self.name!r}: initial: expected one for each of {list(self.states)}, got {list(self.initial)}")
