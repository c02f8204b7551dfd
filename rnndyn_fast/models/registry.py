"""Networks by name: what the command line, configurations and checkpoints build."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from rnndyn_fast.graph.spec.yaml_files import is_network_file, network_to_plain, read_network
from rnndyn_fast.models.blt_net import blt_net_64, blt_net_128
from rnndyn_fast.models.blt_vs_net import blt_vs
from rnndyn_fast.models.convrnn_nets import NAMES, PUBLISHED, convrnn
from rnndyn_fast.models.rcnn_sat_nets import rcnn_sat
from rnndyn_fast.models.spec_network import NETWORK, SpecNetwork
from rnndyn_fast.nn import RecurrentNetwork
from rnndyn_fast.nn.changed_layers import change_layers
from rnndyn_fast.suggestions import nearest

MODELS: dict[str, Callable[..., RecurrentNetwork]] = {
    "blt_net_64": blt_net_64,
    "blt_net_128": blt_net_128,
    "blt_vs": blt_vs,
    "convrnn": convrnn,
    "rcnn_sat": rcnn_sat,
    NETWORK: SpecNetwork,
}
OF_DATA = ("num_classes", "image_size", "in_channels")  # options that the images decide


def named(model: str) -> dict[str, Any]:
    """The options that a model's name stands for: the name itself, that of a ConvRNN ("rgc_shallow"), or a file with a spec."""
    if is_network_file(model):
        return {"model": NETWORK, "network": network_to_plain(read_network(model))}
    if model in NAMES:
        return {"model": "convrnn", "name": model}
    return {"model": model}


def options_of(model: str) -> list[str]:
    """Names of a model's options. Raises ``ValueError`` for an unknown model, with the nearest names."""
    if model not in MODELS:
        known = [*(name for name in MODELS if name != NETWORK), *PUBLISHED]
        near = nearest(model, known)
        raise ValueError(f"model: unknown model {model!r}{near}; there are {known}, and files (.yaml) with a spec")
    return list(inspect.signature(MODELS[model]).parameters)


def build(config: Mapping[str, Any]) -> RecurrentNetwork:
    """Build a model from its ``config``: the name under "model", and the factory's options. (The name "network": the spec under "network".)
    Under "layers": what was changed in its layers (:mod:`rnndyn_fast.nn.changed_layers`).

    Raises ``ValueError`` for an unknown model or option, with the nearest names, and for layers that do not fit.
    """
    options = dict(config)
    name, layers = options.pop("model", None), options.pop("layers", {})
    known = options_of(str(name))
    for option in options:
        if option not in known:
            raise ValueError(f"model {name}: unknown option {option!r}{nearest(option, known)}; options are {known}")
    factory = MODELS[str(name)]
    missing = [p.name for p in inspect.signature(factory).parameters.values() if p.default is p.empty and p.name not in options]
    if missing:
        example = " (as in model_options: {name: rgc_shallow})" if missing == ["name"] else ""
        raise ValueError(f"model {name}: missing option {missing[0]!r}{example}; options are {known}")
    net = factory(**options)
    if layers:
        change_layers(net, layers)
        try:
            net.current()
        except TypeError as error:
            raise ValueError(f"layers: {error}") from error
    return net


def build_for(config: Mapping[str, Any], *, num_classes: int, image_size: int) -> RecurrentNetwork:
    """Build a model for colour images of a size and a number of classes.

    Raises ``ValueError`` as :func:`build`, and where the model does not take such images.
    """
    known = options_of(str(config.get("model")))
    of_data = {"num_classes": num_classes, "image_size": image_size, "in_channels": 3}
    return build({**config, **{name: value for name, value in of_data.items() if name in known}})


def image_size_of(config: Mapping[str, Any]) -> int:
    """Height and width in pixels that a model takes unless it is told another size."""
    spec = config.get("network")
    if isinstance(spec, Mapping):
        return int(spec["inputs"][0]["height"])
    parameters = inspect.signature(MODELS[str(config["model"])]).parameters
    return int(config.get("image_size", parameters["image_size"].default))
