"""Gradients of maps while the backward pass is written, by key (:func:`rnndyn_fast.program.maps.map_key`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rnndyn_fast.program.builder import Builder
from rnndyn_fast.program.ir import Shape, View
from rnndyn_fast.program.lower import Lowering
from rnndyn_fast.program.maps import Key, Remade
from rnndyn_fast.program.parameter_grads import ParameterGrads
from rnndyn_fast.program.terms import Reading


class Gradients:
    """Sums of gradients by key: of each a summand that others may read too, and the sum of those that are the key's own, in the first one's
    place. They are added up when the sum is taken, or by the kernel that reads them."""

    def __init__(self, b: Builder) -> None:
        self.b = b
        self._found: dict[Key, tuple[View | None, View | None]] = {}

    def add(self, key: Key, grad: View, *, own: bool) -> None:
        """One summand; of the key None, which is nothing's, it is dropped. ``own``: it is contiguous, and nobody else reads it."""
        if key is None:
            return
        shared, ours = self._found.get(key, (None, None))
        if ours is not None:
            self.b.emit("add", a=ours, b=grad, out=ours)
        elif own:
            ours = grad
        elif shared is None:
            shared = grad
        else:
            ours = self.b.sum_of(shared, grad, "sum of gradients")
            shared = None
        self._found[key] = shared, ours

    def own(self, key: Key) -> View | None:
        """The sum of the summands that are the key's own, to be added to; None: there is none yet."""
        return self._found.get(key, (None, None))[1]

    def parts(self, key: Key) -> list[View]:
        """What adds up to the sum: nothing, one map or two, contiguous. Gone afterwards."""
        return [self.b.maps_last(part, "gradient") for part in self._found.pop(key, (None, None)) if part is not None]

    def take(self, key: Key) -> tuple[View | None, bool]:
        """The sum, contiguous, and whether it is the taker's own; None: nothing came. Gone afterwards."""
        shared, ours = self._found.pop(key, (None, None))
        if ours is not None:
            if shared is not None:
                self.b.emit("add", a=ours, b=shared, out=ours)
            return ours, True
        return (None, False) if shared is None else (self.b.maps_last(shared, "gradient"), not shared.is_contiguous)


class BackwardPass:
    """Of one rollout; instructions go to the rollout's builder.

    ``grads``: of the recorded states, [T', N, C, H, W] each, or None.
    """

    def __init__(self, forward: Lowering, grads: Sequence[View | None], *, preserve: bool) -> None:
        self.forward, self.b, self.preserve = forward, forward.b, preserve
        self.schedule, self.network, self.wanted, self.reaches = forward.schedule, forward.network, forward.wanted, forward.reaches
        self.grads = Gradients(self.b)
        self.given = grads
        self.parameter_grads = ParameterGrads(forward)
        self.collected: defaultdict[int, list[tuple[Sequence[Reading], list[View]]]] = defaultdict(list)
        self._made: dict[Key, View] = {}  # states that were made again
        self._latest: tuple[tuple[Key, ...], View] | None = None
        self._sums: dict[Key, View] = {}  # of gradients of terms that several steps read

    # ---------------------------------------------------------------- gradients

    def _parts(self, keys: Sequence[Key], shape: Shape) -> list[View]:
        """What adds up to the gradient of a state over some slots: nothing, one map or two."""
        if len(keys) == 1:
            return self.grads.parts(keys[0])
        grad = self._take(keys, shape)
        return [] if grad is None else [grad]

    def _take(self, keys: Sequence[Key], shape: Shape) -> View | None:
        """The gradient of a state over some slots; None: none of it."""
        found = [self.grads.take(key)[0] for key in keys]
        if all(grad is None for grad in found):
            return None
        zero = None
        if any(grad is None for grad in found):
            zero = self.b.zeros((shape[0] // len(keys), *shape[1:]), self.forward.dtype)
        return self.b.stacked([grad if grad is not None else zero for grad in found], "gradients")  # type: ignore[misc]

    def _take_term(self, key: Key) -> View | None:
        """The gradient of a term."""
        total = self._sums.pop(key, None)
        if total is None or total.dtype == self.forward.dtype:
            return self.grads.take(key)[0]
        return self.b.converted(total, self.forward.dtype, "gradient of several steps")

    def _sum_of(self, keys: Sequence[Key]) -> View | None:
        """Where the gradient of a term that several steps read gathers; None: only one does."""
        if len(keys) != 1 or keys[0] is None or keys[0][0] != "term" or self.forward.uses[keys[0][1:]] < 2:
            return None
        key = keys[0]
        if key not in self._sums:
            channels, height, width = self.schedule.drives[key[1]].shape
            total = self.b.zeros((self.forward.samples, height, width, channels), self.forward.sums_dtype, "gradient of several steps")
            self._sums[key] = total
            if self.forward.sums_dtype == self.forward.dtype:
                self.grads.add(key, total, own=True)
        return self._sums[key]

    # ---------------------------------------------------------------- states that are made again

    def read(self, reading: View | Remade) -> View:
        """The map of a reading."""
        if isinstance(reading, View):
            return reading
        remakers = self.forward.remakers
        if reading.key in remakers.forms:
            return remakers.forms[reading.key]()
        if reading.key not in self._made:
            self._made[reading.key] = remakers.states[reading.key](None)
        return self._made[reading.key]

    def _is_late(self, x: Reading) -> bool:
        return isinstance(x, Remade) and x.key in self.forward.remakers.late

    def _made_late(self, keys: tuple[Key, ...]) -> View:
        """Maps that can be made at any time, one after another; those of the latest call are there for the next reader."""
        if self._latest is None or self._latest[0] != keys:
            make = self.forward.remakers.late
            if len(keys) == 1:
                made = make[keys[0]](None)
            else:
                first = make[keys[0]]
                shape = self._late_shape(keys[0])
                made = self.b.new((len(keys) * shape[0], *shape[1:]), self.forward.dtype, "made again")
                for key, part in zip(keys, made.parts(len(keys)), strict=True):
                    make[key](part)
                del first
            self._latest = keys, made
        return self._latest[1]

    def _late_shape(self, key: Key) -> Shape:
        assert key is not None
        pooled = key[0] == "pooled"
        channels, height, width = self.network.shapes[key[2][1] if pooled else key[1]]
        return (self.forward.samples, height // 2 if pooled else height, width // 2 if pooled else width, channels)

    def forget(self, keys: Sequence[Key]) -> None:
        """States that nothing reads for a while: they are made once more then."""
        for key in keys:
            self._made.pop(key, None)
