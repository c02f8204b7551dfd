"""The task-driven convolutional recurrent networks of ventral visual cortex: all published names, as specs.

Source: Nayebi et al., "Recurrent connections in the primate ventral visual stream mediate a trade-off between task performance and network
size during core object recognition", Neural Computation 34 (2022). Every layer takes one time step (biological unroll) and starts from
zero maps; cells as in :mod:`rnndyn_fast.ops.cells`, layers as in :mod:`rnndyn_fast.nn.cell_graphs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rnndyn_fast.graph.spec.network import (
    SAME,
    ZERO,
    Activation,
    Area,
    Connection,
    Input,
    Network,
    Norm,
    Operator,
    Pool,
    Readout,
    Role,
    Unroll,
)
from rnndyn_fast.models.convrnn_init import initialise
from rnndyn_fast.nn.cell_graphs import add_cell, cell_states, sequence, state_source
from rnndyn_fast.nn.decoders import DECODERS, Decoder
from rnndyn_fast.nn.graph_builder import CellSpec, Graph, Source, bypass
from rnndyn_fast.nn.recurrent_network import RecurrentNetwork
from rnndyn_fast.suggestions import nearest

CELL_NAMES = ("timedecay", "simplernn", "gru", "lstm", "intersectionrnn", "ugrnn", "rgc")
BASES = (
    *(f"{c}_shallow" for c in CELL_NAMES),
    *(f"{c}_intermediate" for c in CELL_NAMES),
    "ugrnn_intermediate_t30",
    "rgc_intermediate_t22",
)
SUFFIXES = {"": "last", "_dthresh": "threshold", "_tmaxconf": "max_confidence"}
PUBLISHED = (
    *(b for b in BASES if b != "rgc_intermediate_t22"), "ugrnn_intermediate_t30_dthresh", "ugrnn_intermediate_t30_tmaxconf",
    "rgc_intermediate_dthresh", "rgc_intermediate_tmaxconf", "rgc_intermediate_t22_tmaxconf",
)  # fmt: skip
NAMES = tuple(base + suffix for base in BASES for suffix in SUFFIXES)
OFF_VALUE = 0.5  # of a frame without image, after normalisation

_SHALLOW = {"conv1": 64, "conv2": 128, "conv3": 256, "conv4": 256, "conv5": 512}
_INTERMEDIATE = dict(zip((f"conv{i}" for i in range(1, 11)), (64, 64, 64, 128, 128, 256, 256, 512, 512, 512), strict=True))
_RGC = dict(zip((f"conv{i}" for i in range(1, 11)), (64, 128, 128, 128, 128, 256, 256, 256, 512, 512), strict=True))
_POOLED = {"conv1", "conv4", "conv6", "conv7", "conv10"}  # of the intermediate networks
FEEDBACK = {"conv5": ("conv8",), "conv6": ("conv7", "conv9"), "conv7": ("conv10",), "conv9": ("conv10",)}
# Found by search, and not in the published configuration files.
LSTM_SHALLOW: dict[str, dict[str, Any]] = {
    "conv3": {"kernel_size": 2, "forget_bias": 1.3561755203084322, "layer_norm": True},
    "conv4": {"kernel_size": 3, "forget_bias": 0.977962918535079, "layer_norm": True, "peepholes": True},
    "conv5": {"kernel_size": 4, "forget_bias": 0.9249280259963113, "layer_norm": True},
}


@dataclass(frozen=True)
class Layers:
    """What distinguishes the networks: channels by layer, of the cells where they differ, and the kind of cell."""

    kind: str
    channels: Mapping[str, int]
    depths: Mapping[str, int]  # channels of the cells
    shallow: bool
    cell_channels: int = 64  # of the other half of a reciprocal gated cell

    @property
    def recurrent(self) -> tuple[str, ...]:
        """Layers with a cell."""
        return tuple(name for name in self.channels if int(name[4:]) >= (3 if self.shallow else 4))


def _layers(base: str, widths: Mapping[str, int], depths: Mapping[str, int], cell_channels: int) -> Layers:
    cell, size = base.split("_")[:2]
    shallow = size == "shallow"
    published = _SHALLOW if shallow else _RGC if cell == "rgc" else _INTERMEDIATE
    for name, given in (("widths", widths), ("cell_widths", depths)):
        if unknown := given.keys() - published.keys():
            raise ValueError(f"{name}: unknown layers {sorted(unknown)}; there are {list(published)}")
        if bad := [k for k, n in given.items() if isinstance(n, bool) or not isinstance(n, int) or n < 1]:
            raise ValueError(f"{name}: expected positive ints, got { ({k: given[k] for k in bad}) }")
    channels = {**published, **widths}
    published_depths = dict(channels)
    if shallow and cell in ("simplernn", "lstm") and not widths:
        published_depths.update(conv3=128, conv4=256, conv5=256)
    kind = f"rgc_{'shallow' if shallow else 'median'}" if cell == "rgc" else cell
    return Layers(kind, channels, {**published_depths, **depths}, shallow, cell_channels)


def _cell_options(layers: Layers, layer: str) -> dict[str, Any]:
    if layers.kind == "lstm" and layers.shallow:
        return LSTM_SHALLOW[layer]
    if layers.kind == "simplernn":
        return {"layer_norm": layers.shallow}
    # (The activation of the input is that of the area before.)
    return {"cell_channels": layers.cell_channels, "input_activation": "identity"} if layers.kind == "rgc_median" else {}


def _layer(graph: Graph, layers: Layers, layer: str, below: Source) -> Source:
    """One layer: its output is the area of its name."""
    width, recurrent = layers.channels[layer], layer in layers.recurrent
    kernel: dict[str, Any] = {"kernel_size": 7, "stride": 2} if layer == "conv1" else {"kernel_size": 3}
    rgc, residual_block = layers.kind.startswith("rgc"), not layers.shallow and layers.kind != "rgc_median" and layer != "conv1"
    pooled = layers.shallow or layer in _POOLED
    # In the intermediate networks the activation comes after a layer's last convolution; only these cells are without one.
    elu = layer in ("conv1", "conv2") or not layers.shallow or rgc
    stages: list[str] = ["pre", *(["cell"] if recurrent else []), *(["post"] if residual_block else []), *(["pool"] if pooled else [])]
    name = {stage: layer if stage == stages[-1] else f"{layer}.{stage}" for stage in stages}

    def area(stage: str, activation: Activation) -> None:
        graph.areas.append(Area(name[stage], width if stage == "pre" else depth, norm=Norm.NONE, activation=activation, initial=ZERO))

    depth = width
    area("pre", Activation.ELU if elu else Activation.IDENTITY)
    graph.connections.append(
        Connection(below.name, name["pre"], Role.BOTTOM_UP, Operator.CONV, padding=SAME, bias=True, parameter=f"{layer}.pre_0",
                   delay=below.delay, **kernel)
    )  # fmt: skip
    now = Source(name["pre"], width)
    if recurrent:
        depth = layers.depths[layer]
        feedback = sequence(
            [Source(s, _output_channels(layers, s), 1) for s in FEEDBACK.get(layer, ())] if layers.kind == "rgc_median" else []
        )
        spec = CellSpec(name["cell"], now, depth, layer, residual=below, feedback=tuple(feedback))
        add_cell(graph, layers.kind, spec, **_cell_options(layers, layer))
        now = Source(name["cell"], depth)
    if residual_block:
        area("post", Activation.ELU)
        graph.conv(now, name["post"], Role.BOTTOM_UP, 3, f"{layer}.post_0", bias=True)
        bypass(graph, below, name["post"], depth, f"{layer}.post_1.residual_add")
        now = Source(name["post"], depth)
    if pooled:
        area("pool", Activation.IDENTITY)
        graph.identity(now, layer, Role.BOTTOM_UP, pool=Pool.MAX_SAME)
    return Source(layer, depth, 1)


def _output_channels(layers: Layers, layer: str) -> int:
    return layers.depths[layer] if layer in layers.recurrent else layers.channels[layer]


def convrnn_network(name: str, layers: Layers, image_size: tuple[int, int], num_classes: int, image_off: int | None) -> Network:
    """The spec of a network."""
    graph = Graph()
    below = Source("image", 3, None)
    for layer in layers.channels:
        below = _layer(graph, layers, layer, below)
    if layers.shallow:
        # 2 x 2 scores, averaged over the map.
        graph.areas += [Area("imnetds.scores", num_classes, norm=Norm.NONE, activation=Activation.IDENTITY, initial=ZERO)]
        graph.conv(below, "imnetds.scores", Role.BOTTOM_UP, 2, "imnetds.pre_1", bias=True, padding=0)
        below = Source("imnetds.scores", num_classes)
    graph.areas.append(Area("imnetds", num_classes, norm=Norm.NONE, activation=Activation.IDENTITY, initial=ZERO))
    if layers.shallow:
        graph.identity(below, "imnetds", Role.BOTTOM_UP, pool=Pool.MEAN)
    else:
        graph.connections.append(
            Connection(below.name, "imnetds", Role.BOTTOM_UP, Operator.LINEAR, pool=Pool.MEAN, bias=True, parameter="imnetds.pre_3",
                       delay=below.delay)
        )  # fmt: skip
    image = Input("image", 3, *image_size, off_at=image_off, off_value=OFF_VALUE)
    # The image of step 0 arrives at imnetds at step L - 1; before it there are only biases.
    readout = Readout("imnetds", num_classes, parameter=None, clamp=None, first_step=len(layers.channels))
    return Network(name, (image,), tuple(graph.areas), tuple(graph.connections), Unroll.BIOLOGICAL, readout)


class ConvRNN(RecurrentNetwork):
    """A published network; see :func:`convrnn`."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        base = next(base for base in sorted(BASES, key=len, reverse=True) if name.startswith(base))
        layers = _layers(base, options["widths"] or {}, options["cell_widths"] or {}, options["cell_channels"])
        size = options["image_size"]
        height, width = (size, size) if isinstance(size, int) else size
        timesteps, image_off = presentation(base, options["presentation"], options["timesteps"], options["image_off"])
        network = convrnn_network(name, layers, (height, width), options["num_classes"], image_off)
        super().__init__(network, timesteps, backend=options["backend"], engine=options["engine"])
        self.layers = layers
        self.decoder: Decoder = DECODERS[SUFFIXES[name.removeprefix(base)]]()
        initialise(self)
        self.config = {"model": "convrnn", "name": name, **options}

    @property
    def first_driven_step(self) -> int:
        """The first time step at which the logits depend on the image: L - 1."""
        return len(self.layers.channels)

    def scores(
        self,
        images: Tensor,  # [N, 3, H, W]
    ) -> Tensor:
        """Logits of all time steps from t = 0, [T, N, classes]; before ``first_driven_step`` biases alone make them."""
        return self.states((images,), ("imnetds",))[0].flatten(2)

    def decode(
        self,
        images: Tensor,  # [N, 3, H, W]
    ) -> Tensor:
        """What the network answers: logits [N, classes] chosen by its decoder among the steps t = L .. T-1."""
        scores = self.scores(images)
        if not self.decoder.windowed:
            return self.decoder(scores)
        first = self.first_driven_step + 1
        if first >= len(scores):
            raise ValueError(f"timesteps: this decoder reads steps {first} .. T-1, got T = {len(scores)}")
        return self.decoder(scores[first:])

    def state_sources(self, layer: str) -> list[tuple[str, str | None]]:
        """Areas (and maps of them) that hold the states of a layer's cell, in the published order."""
        if layer not in self.layers.recurrent:
            raise ValueError(f"layer: {layer!r} has no cell; those with one are {list(self.layers.recurrent)}")
        names = [area.name for area in self.network.areas]
        cell = f"{layer}.cell" if f"{layer}.cell" in names else layer
        return [state_source(self.layers.kind, cell, state) for state in cell_states(self.layers.kind)]


def presentation(base: str, kind: str, timesteps: int | None, image_off: int | None) -> tuple[int, int | None]:
    """Time steps, and the one at which the image goes (None: it stays)."""
    default = {"t22": 22, "t30": 30}.get(base.rsplit("_", 1)[1], 16 if "shallow" in base else 17)
    kinds = {"default": (default, None if default > 17 else 12), "neural": (26, 10), "constant": (None, None), "custom": (None, image_off)}
    if kind not in kinds:
        raise ValueError(f"presentation: expected one of {list(kinds)}, got {kind!r}")
    steps, off = kinds[kind]
    if kind in ("default", "neural"):
        if image_off is not None:
            raise ValueError(f'image_off: give it with presentation="custom", not {kind!r}')
        steps = steps if timesteps is None else timesteps
    elif timesteps is None or (kind == "custom") != (image_off is not None):
        wanted = "timesteps and image_off" if kind == "custom" else "timesteps and no image_off"
        raise ValueError(f"presentation={kind!r}: expected {wanted}, got {timesteps} and {image_off}")
    else:
        steps = timesteps
    assert steps is not None
    return steps, off if off is not None and off < steps else None


def convrnn(
    name: str,
    *,
    timesteps: int | None = None,
    presentation: str = "default",
    image_off: int | None = None,
    num_classes: int = 1000,
    image_size: int | tuple[int, int] = 224,
    widths: Mapping[str, int] | None = None,
    cell_widths: Mapping[str, int] | None = None,
    cell_channels: int = 64,
    backend: str | None = None,
    engine: str = "auto",
) -> ConvRNN:
    """A published ConvRNN.

    Args:
        name: "<cell>_shallow" or "<cell>_intermediate" (cells: timedecay, simplernn, gru, lstm, ugrnn, intersectionrnn, rgc),
            "ugrnn_intermediate_t30", "rgc_intermediate_t22"; with "_dthresh" or "_tmaxconf" for another decoder.
        presentation: "default" (16 steps, intermediate 17, image off at 12; t22, t30: 22, 30 steps, image on), "neural" (26 steps, off
            at 10), "constant" (the image stays), "custom" (off at ``image_off``).
        timesteps: T; needed for "constant" and "custom".
        image_off: the step from which on the input is 0.5 in normalised space.
        num_classes, image_size, widths, cell_widths, cell_channels: for other data and smaller networks: channels of layers, of the cells
            in them (SimpleRNN and LSTM shallow: 128, 256, 256), and of the other half of intermediate reciprocal gated cells.
        backend, engine: see :func:`rnndyn_fast.rollout`.

    Returns: a module; ``net(x)`` with x [N, 3, H, W], normalised (:func:`rnndyn_fast.models.preprocess.imagenet`), gives log-probabilities
        [T - (L - 1), N, classes] from the first image-driven step on (L layers); ``net.decode(x)`` the answer, [N, classes].

    Raises: ``ValueError`` naming the argument; for an unknown name with the nearest ones.

    >>> import torch
    >>> net = convrnn("gru_shallow", image_size=96, num_classes=10, widths=dict(conv1=2, conv2=2, conv3=3, conv4=3, conv5=3))
    >>> net(torch.zeros(1, 3, 96, 96)).shape
    torch.Size([11, 1, 10])
    """
    if name not in NAMES:
        raise ValueError(f"name: unknown network {name!r}{nearest(name, NAMES)}; there are {list(PUBLISHED)}")
    options = dict(
        timesteps=timesteps, presentation=presentation, image_off=image_off, num_classes=num_classes, image_size=image_size,
        widths=dict(widths or {}), cell_widths=dict(cell_widths or {}), cell_channels=cell_channels, backend=backend, engine=engine,
    )  # fmt: skip
    return ConvRNN(name, options)
