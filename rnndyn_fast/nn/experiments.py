"""``net.intervene`` and ``net.lesion``: context managers of networks, for experiments on them (:mod:`rnndyn_fast.nn.interventions`)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ContextDecorator, ExitStack, contextmanager
from types import MappingProxyType, SimpleNamespace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from rnndyn_fast.graph.spec.network import Network
from rnndyn_fast.nn.interventions import (
    Lesion,
    Rewritten,
    StateChange,
    Steps,
    check_driven,
    lesion_of,
    parse_lesion,
    rewrite,
    state_change,
    try_functions,
)
from rnndyn_fast.nn.parameters import Current, stored
from rnndyn_fast.reference.interventions import StateFunction
from rnndyn_fast.torch_internals import constant_when_compiled

Self = TypeVar("Self", bound="Experiments")
Owner = TypeVar("Owner", bound="Experiments")


class Block(ContextDecorator, Generic[Owner]):
    """A change that is in force within ``with``, which gives the network."""

    def __init__(self, net: Owner, change: StateChange | Lesion) -> None:
        self._net, self._change, self._used = net, change, False

    def __enter__(self) -> Owner:
        self._used = True
        if torch.compiler.is_compiling():
            raise TypeError(
                f"{type(self._net).__name__}: expected intervene and lesion around a compiled call, got them inside of it; enter the "
                "block first"
            )
        self._net._set_changes((*self._net.interventions, self._change))  # (raises now what would be raised in the block)
        return self._net

    def __exit__(self, *_: object) -> None:
        held = list(self._net.interventions)
        del held[max(k for k, one in enumerate(held) if one is self._change)]
        self._net._set_changes(tuple(held))

    def __del__(self) -> None:
        if not getattr(self, "_used", True):
            what = "lesion" if isinstance(self._change, Lesion) else "intervene"
            warnings.warn(f"net.{what}(...) does nothing by itself; it lasts as long as the block of: with net.{what}(...):", stacklevel=2)


class Experiments:
    """Mixed into a network with these attributes (``_traced`` holds what compiled calls run)."""

    network: Network
    timesteps: int
    backend: str | None
    _traced: SimpleNamespace
    _changes: tuple[StateChange | Lesion, ...] = ()
    _in_force = ""  # what they are, in words that are equal where one plan serves both
    _given: Mapping[str, Tensor] = MappingProxyType({})
    _rewritten: tuple[Any, Rewritten] | None = None
    _tried: tuple[StateChange | Lesion, ...] | None = None

    @property
    def interventions(self) -> tuple[StateChange | Lesion, ...]:
        """Those that are in force, in their order."""
        return self._changes

    def intervene(
        self: Self,
        area: str,
        steps: Steps,
        action: str | StateFunction = "zero",
        value: float | Tensor | None = None,
        *,
        std: float | Tensor | None = None,
        seed: int = 0,
        units: Tensor | None = None,  # [C, H, W] bool
    ) -> Block[Self]:
        r"""Change the states of an area while the ``with`` block lasts, for everything that reads them and for the caller.

        .. math:: h_t \leftarrow 0 \;\text{("zero")}, \quad v \;\text{("clamp")}, \quad v\,h_t \;\text{("scale")}, \quad
            h_{t-1} \;\text{("freeze")}, \quad h_t + \sigma \xi \;\text{("noise")}, \quad f(h_t, t)

        Args:
            area: its name, or "area:state" of a cell with several states.
            steps: the time steps: an int, a range, a slice, ints, or None for all.
            action: one of those names, or a function of a state [N, C, H, W] and the time step that gives one of the same shape; it is
                called again in the backward pass, so it must give the same for the same state.
            value: of "clamp" and "scale": a number, or a tensor that expands to [C, H, W] (which may require a gradient).
            std: of "noise": its standard deviation, as ``value``.
            seed: of "noise". Sample n of a batch draws the same numbers in every call, at every step others.
            units: which units; None: all.

        Several are in force at once where blocks are nested; those of one area are applied in their order. "freeze" needs a step before.

        Raises: ``ValueError``, ``TypeError`` naming the argument, what was expected, what came.

        Differentiable: states and values, by both backends. ``torch.compile``: around compiled calls, not inside of them.

        >>> from rnndyn_fast.models import blt_net_64
        >>> net = blt_net_64(timesteps=4, widths=(2, 4, 8, 16, 32))
        >>> with net.intervene("v4", range(2, 4), "scale", 0.5), net.lesion("v2:lateral", slice(1, None)):
        ...     net(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([4, 1, 100])
        """
        options = {"value": value, "std": std, "seed": seed}
        return Block(self, state_change(self.network, area, steps, action, options, units, self.timesteps))

    def lesion(self: Self, connection: str, steps: Steps = None) -> Block[Self]:
        """Turn connections off at some time steps while the ``with`` block lasts. A term that is off is left out, its bias too.

        Args:
            connection: "v4:lateral", "v4:top_down" or "v4:bottom_up", all of that kind into an area; or source and target, "it>v4".
            steps: the time steps: an int, a range, a slice, ints, or None for all.

        Raises: ``ValueError``, ``TypeError`` naming the argument, what was expected, what came.
        """
        return Block(self, lesion_of(self.network, connection, steps, self.timesteps))

    @contextmanager
    def lesions_named(self: Self, texts: Iterable[str]) -> Iterator[Self]:
        """Lesions as the command line names them: of connections, "v4:lateral@3-" (from step 3 on), "it>v4@2-5", or of all units of an
        area, "it@4".

        Raises: ``ValueError`` naming ``lesion``, what was expected, what came.
        """
        with ExitStack() as stack:
            for text in texts:
                try:
                    what, steps = parse_lesion(text)
                    stack.enter_context(self.lesion(what, steps) if ":" in what or ">" in what else self.intervene(what, steps, "zero"))
                except ValueError as error:
                    raise ValueError(f"lesion: {text!r}: {error}") from None
            yield self

    def _set_changes(self, changes: tuple[StateChange | Lesion, ...]) -> None:
        """Raises what :meth:`intervene` and :meth:`lesion` raise, where there are more of them than before."""
        added = len(changes) > len(self._changes)
        try:
            found = rewrite(self.network, self.timesteps, changes)
            if added:
                check_driven(self.network, self.timesteps, found)
            self._given, words = found.given, found.network.to_json()
        except ValueError:
            if added:
                raise
            self._given, words = {}, ""  # (the time steps are others than when they began; the next call says so)
        self._in_force = f"{words} {[one.steps for one in changes]}" if changes else ""
        self._changes = changes

    def _with_interventions(self, now: Current) -> Current:
        """The network, with those that are in force."""
        if torch.compiler.is_compiling():
            found: Rewritten = getattr(self._traced, _rewrite_while_tracing(self))
            given = self._given
        else:
            key = (now.network, self.timesteps, self.interventions)
            if self._rewritten is None or self._rewritten[0] != key:
                self._rewritten = key, rewrite(*key)
            found = self._rewritten[1]
            given = found.given
        example = next(iter(now.parameters.values()))
        cast = {name: t.to(device=example.device, dtype=example.dtype) for name, t in given.items()}
        return Current(found.network, {**now.parameters, **cast}, now.snapshot, found.names)

    def _check_functions(self, inputs: Sequence[Tensor]) -> None:
        if self.backend == "reference" or not torch.is_grad_enabled():
            return
        if torch.compiler.is_compiling():
            _try_functions(self)
        elif len(inputs) and isinstance(inputs[0], Tensor):
            try_functions(self._changes, self.network, inputs[0], self.timesteps, twice=self._tried is not self._changes)
            self._tried = self._changes

    def __getstate__(self) -> dict[str, Any]:
        """Copies are of the network without what a ``with`` block changes."""
        return {
            **self.__dict__,
            "_changes": (),
            "_in_force": "",
            "_given": {},
            "_rewritten": None,
            "_tried": None,
            "_traced": SimpleNamespace(),
        }


@constant_when_compiled
def _rewrite_while_tracing(net: Any) -> str:
    """A compiler traces calls with the interventions that are in force; it looks at ``_in_force`` and ``_given`` again in later ones."""
    network = net._reader.derived(net, net.network).network
    key = f"{network.to_json()} {net.timesteps} {net._in_force}"

    def made() -> Rewritten:
        found = rewrite(network, net.timesteps, net.interventions)
        found.network.parameter_shapes, found.network.buffer_shapes  # noqa: B018 (a compiler cannot trace that they are computed once)
        return found

    return stored(net._traced, key, made)


@constant_when_compiled
def _try_functions(net: Any) -> bool:
    like = next(net.parameters())
    with torch.enable_grad():
        try_functions(net.interventions, net.network, like.new_zeros((1, 1, 1, 1)), net.timesteps, twice=True)
    return True
