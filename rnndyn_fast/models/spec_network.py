"""Networks from specs in files: what ``rnndyn train --model network.yaml`` builds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rnndyn_fast.graph.spec.yaml_files import network_from_plain, network_to_plain
from rnndyn_fast.nn.recurrent_network import RecurrentNetwork

NETWORK = "network"  # the name under "model" of a network whose spec is given instead


class SpecNetwork(RecurrentNetwork):
    """A network from its spec as plain values (see :func:`rnndyn_fast.graph.spec.yaml_files.network_from_plain`).

    Args:
        network: the spec.
        timesteps, backend, engine: see :class:`RecurrentNetwork`.
        num_classes, image_size, in_channels: what the data needs; None: not checked.

    Raises: ``ValueError`` where the spec makes no sense, has no readout or not one input, or does not fit the data.
    """

    def __init__(
        self,
        network: Mapping[str, Any],
        timesteps: int = 10,
        *,
        num_classes: int | None = None,
        image_size: int | None = None,
        in_channels: int | None = None,
        backend: str | None = None,
        engine: str = "auto",
    ) -> None:
        spec = network_from_plain(network)
        if len(spec.inputs) != 1 or spec.readout is None:
            raise ValueError(f"network: expected one input (images) and a readout, got {len(spec.inputs)} inputs, readout {spec.readout}")
        image = spec.inputs[0]
        for name, wanted, own in (
            ("num_classes", num_classes, spec.readout.num_classes),
            ("image_size", image_size, image.height if image.height == image.width else f"{image.height} x {image.width}"),
            ("in_channels", in_channels, image.channels),
        ):
            if wanted is not None and wanted != own:
                raise ValueError(f"network: expected {name} = {wanted}, as in the data, the spec {spec.name!r} has {own}")
        super().__init__(spec, timesteps, backend=backend, engine=engine)
        plain = network_to_plain(spec)
        self.config = {"model": NETWORK, "network": plain, "timesteps": timesteps, "backend": backend, "engine": engine}
