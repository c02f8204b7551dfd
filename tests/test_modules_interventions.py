"""Interventions and lesions: native equals reference equals a loop that calls layers and changes states by hand, gradients included."""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from published import PublishedNet
from test_program_random import random_network
from torch import Tensor, nn
from torch.nn import functional

from rnndyn_fast.graph import Network, compile_schedule
from rnndyn_fast.models import blt_net_64, blt_vs, convrnn
from rnndyn_fast.nn import ConvCell
from rnndyn_fast.nn.interventions import Lesion, StateChange, lesion_of, rewrite, state_change
from rnndyn_fast.program import rollout
from rnndyn_fast.reference.philox import unit_normals

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 5
AREAS = {"retina": (2, 16, 16), "v1": (4, 16, 16), "v2": (8, 8, 8), "v4": (16, 4, 4), "it": (32, 2, 2), "gap": (32, 1, 1)}
SMALL: dict[str, Any] = {"widths": (2, 4, 8, 16, 32), "num_classes": 5, "timesteps": STEPS, "image_size": 16}


def pair(**options: Any) -> tuple[Any, Any, Tensor]:
    torch.manual_seed(3)
    published = PublishedNet(**SMALL, **options).double()
    ours = blt_net_64(backend="native", **SMALL, **options).double()
    ours.load_state_dict(published.state_dict())
    return published, ours, torch.randn(3, 3, 16, 16, dtype=torch.float64)


class Change:
    """An intervention or a lesion, for a network and by hand."""

    def __init__(self, area: str, steps: set[int], action: Any, value: Any = None, units: Tensor | None = None, seed: int = 0) -> None:
        self.area, self.steps, self.action, self.value, self.units, self.seed = area, steps, action, value, units, seed

    def on(self, net: Any) -> Any:
        if self.action == "lesion":
            return net.lesion(self.area, sorted(self.steps))
        option = {"std": self.value} if self.action == "noise" else {"value": self.value}
        return net.intervene(self.area, sorted(self.steps), self.action, units=self.units, seed=self.seed, **option)

    def by_hand(self, x: Tensor, before: Tensor | None, t: int) -> Tensor:
        changed: Tensor
        if callable(self.action):
            changed = self.action(x, t)
        elif self.action == "noise":
            drawn = unit_normals(torch.tensor([self.seed]), len(x), 1, x[0].numel(), stream=t, dtype=x.dtype).reshape(x.shape)
            changed = x + self.value * drawn
        elif self.action == "freeze":
            assert before is not None
            changed = before
        else:
            changed = x * self.value if self.action == "scale" else torch.zeros_like(x) + (self.value if self.action == "clamp" else 0)
        return changed if self.units is None else torch.where(self.units, changed, x)


def loop(net: Any, x: Tensor, changes: list[Change]) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """The published loop with states that are changed before anybody reads them."""
    states: dict[str, Tensor] = {}
    found: dict[str, list[Tensor]] = {name: [] for name in AREAS}
    outputs = []
    for t in range(STEPS):
        before = dict(states)

        def keep(area: str, value: Tensor, t: int = t, before: dict[str, Tensor] = before) -> Tensor:
            value = value if value.dim() == 4 else value[:, :, None, None]
            for one in changes:
                if one.area == area and t in one.steps and one.action != "lesion":
                    value = one.by_hand(value, before.get(area), t)
            states[area] = value
            found[area].append(value)
            return value

        def there(connection: str, value: Tensor | None, t: int = t) -> Tensor | None:
            off = any(one.action == "lesion" and one.area == connection and t in one.steps for one in changes)
            return None if off else value

        retina = keep("retina", torch.relu(net.retina(x)))
        below = keep("v1", torch.relu(net.v1_ln(net.v1(retina))))
        for area, above in (("v2", "v4"), ("v4", "it"), ("it", None)):
            lateral = there(f"{area}:lateral", before.get(area))
            down = there(f"{area}:top_down", before.get(above)) if above else None
            below = keep(area, torch.relu(getattr(net, f"{area}_ln")(getattr(net, area)(below, lateral, down))))
        lateral = there("gap:lateral", before["gap"].flatten(1) if t else None)
        gap = keep("gap", torch.relu(net.gap_ln(net.gap(below, lateral)))).flatten(1)
        outputs.append(torch.log(torch.clamp(functional.softmax(net.readout(gap), dim=1), 1e-10, 1.0)))
    return torch.stack(outputs), found


def drawn_changes(rng: random.Random) -> list[Change]:
    changes = []
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        area = rng.choice(list(AREAS))
        steps = set(rng.sample(range(STEPS), rng.randrange(1, STEPS)))
        action: Any = rng.choice(("zero", "clamp", "scale", "freeze", "noise", "function", "lesion"))
        generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
        units = torch.rand(AREAS[area], generator=generator) > 0.4 if rng.random() < 0.5 else None
        value: Any = None
        if action in ("clamp", "scale", "noise"):
            value = rng.choice((0.5, 1.5, torch.rand(AREAS[area], generator=generator, dtype=torch.float64)))
        if action == "freeze":
            steps = {t for t in steps if t} or {1}
        if action == "function":
            action = rng.choice((lambda h, t: torch.tanh(h) * (t + 1), lambda h, t: h.flip(1) + 0.1 * h.mean(0, keepdim=True)))
        if action == "lesion":
            area, units = rng.choice(("v2:lateral", "v4:top_down", "v4:lateral", "it:lateral", "gap:lateral")), None
        changes.append(Change(area, steps, action, value, units, rng.randrange(100)))
    return changes


def gradients(net: Any) -> dict[str, Tensor]:
    """Of parameters; one that nothing reaches has a gradient of zeros."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("seed", range(24))
def test_three_ways(seed: int) -> None:
    """Random interventions, several at once."""
    rng = random.Random(seed)
    published, ours, x = pair(LT_interaction=rng.choice(("additive", "multiplicative")))
    changes = drawn_changes(rng)
    expected, states = loop(published, x, changes)
    weights = torch.randn_like(expected)
    ((expected * weights).sum() + states["v4"][-1].square().sum()).backward()
    unchanged = ours(x).detach()
    for backend in ("native", "reference"):
        ours.backend = backend
        ours.zero_grad()
        with contextlib.ExitStack() as stack:
            for one in changes:
                stack.enter_context(one.on(ours))
            with torch.no_grad():
                inferred, _ = ours(x, record=tuple(AREAS))
            found, recorded = ours(x, record=tuple(AREAS))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(inferred, expected)
        for name, values in states.items():
            torch.testing.assert_close(recorded[name], torch.stack(values), msg=lambda text, name=name: f"{name}: {text}")
        # (The pass back may run after the block.)
        ((found * weights).sum() + recorded["v4"][-1].square().sum()).backward()
        mine = gradients(ours)
        for name, grad in gradients(published).items():
            torch.testing.assert_close(mine[name], grad, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    ours.backend = "native"
    assert torch.equal(ours(x), unchanged)


@pytest.mark.parametrize("seed", range(40))
def test_random_networks(seed: int) -> None:
    """Any spec, by both backends: cells, norms, biological unrolls."""
    rng = random.Random(1000 + seed)
    steps = rng.choice((2, 3, 4))
    network = random_network(rng, steps)
    changes: list[StateChange | Lesion] = []
    for _ in range(rng.choice((1, 2, 3))):
        area = rng.choice(network.areas)
        state = rng.choice(area.states)
        name = area.name if state is None else f"{area.name}:{state}"
        when = rng.sample(range(steps), rng.randrange(1, steps + 1))
        rule: Any = rng.choice(("zero", "clamp", "scale", "freeze", "noise", "function", "lesion"))
        if rule == "lesion":
            c = rng.choice(network.connections)
            changes.append(lesion_of(network, f"{c.source}>{c.target}", when, steps))
            continue
        options = {"value": 0.5 if rule in ("clamp", "scale") else None, "std": 0.5 if rule == "noise" else None, "seed": seed}
        units = torch.rand(network.shapes[area.name]) > 0.5 if rng.random() < 0.5 else None
        changes.append(state_change(network, name, when, halved if rule == "function" else rule, options, units, steps))
    impossible = ""
    try:
        found = rewrite(network, steps, changes)
        record = [found.names.get(a.name, a.name) for a in network.areas]
        compile_schedule(found.network, steps, record)
    except ValueError as error:
        impossible = str(error)
    if impossible:  # (nothing to hold yet, or nothing left)
        assert "freeze" in impossible or "no state" in impossible
        return
    results = [run(found.network, steps, record, backend, found.given) for backend in ("native", "reference")]
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-7, atol=1e-9)


def halved(h: Tensor, t: int) -> Tensor:
    return h / (2 + t)


def run(network: Network, steps: int, record: list[str], backend: str, given: dict[str, Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    inputs = [
        torch.randn(*([steps] if n.frames else []), 2, n.channels, n.height, n.width, generator=generator, dtype=torch.float64)
        for n in network.inputs
    ]
    parameters = {n: 0.5 * torch.randn(s, generator=generator, dtype=torch.float64) for n, s in network.parameter_shapes.items()}
    parameters |= {n: t.to(torch.float64) for n, t in given.items()}
    parameters |= {n: torch.rand(s, generator=generator, dtype=torch.float64) + 0.5 for n, s in network.buffer_shapes.items()}
    leaves = [t.requires_grad_() for t in (*inputs, *(p for n, p in parameters.items() if n in network.parameter_shapes))]
    states = rollout(network, steps, inputs, parameters, record, backend=backend)
    sum((s * s).sum() for s in states).backward()  # type: ignore[union-attr]
    return [*states, *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)]


# ---------------------------------------------------------------- what else holds


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_values_are_learned(backend: str) -> None:
    """A value may require a gradient: of some units, per channel."""
    _, ours, x = pair()
    ours.backend = backend
    value = torch.full((16, 1, 1), 0.5, dtype=torch.float64, requires_grad=True)
    with ours.intervene("v4", range(2, 4), "scale", value):
        ours(x).square().sum().backward()
    assert value.grad is not None
    step = 1e-6
    totals = []
    for sign in (1, -1):
        moved = value.detach().clone()
        moved[3] += sign * step
        with ours.intervene("v4", range(2, 4), "scale", moved):
            totals.append(float(ours(x).detach().square().sum()))
    assert float(value.grad[3]) == pytest.approx((totals[0] - totals[1]) / (2 * step), rel=1e-4, abs=1e-7)


def test_blocks_end_and_nest() -> None:
    _, ours, x = pair()
    plain = ours(x)
    with ours.intervene("v4", 2, "zero") as same:
        assert same is ours
        one = ours(x)
        with ours.lesion("v2:lateral"):
            assert len(ours.interventions) == 2
            two = ours(x)
            twin = pickle.loads(pickle.dumps(ours))
            torch.testing.assert_close(twin(x), plain)
            torch.testing.assert_close(copy.deepcopy(ours)(x), plain)
        assert torch.equal(ours(x), one)
        with pytest.raises(RuntimeError, match="stop"), ours.intervene("it", 1):
            raise RuntimeError("stop")
        assert torch.equal(ours(x), one)
    assert torch.equal(ours(x), plain)
    assert not torch.allclose(one, plain)
    assert not torch.allclose(one, two)
    assert torch.equal(one[:2], plain[:2])


def test_with_changed_layers() -> None:
    """Interventions are of the network as its modules are now."""
    published, ours, x = pair()
    for net in (published, ours):
        net.v4.LT_interaction, net.it_ln = "multiplicative", nn.Identity()
    changes = [Change("v4", {1, 3}, "scale", 0.3), Change("it:lateral", {2}, "lesion")]
    with contextlib.ExitStack() as stack:
        for one in changes:
            stack.enter_context(one.on(ours))
        torch.testing.assert_close(ours(x), loop(published, x, changes)[0])
        ours.timesteps = 4
        torch.testing.assert_close(ours(x), loop(published, x, changes)[0][:4])
        ours.timesteps = 3
        with pytest.raises(ValueError, match=r"steps: expected some of 0 .. 2, got 3"):
            ours(x)


def test_noise() -> None:
    """The same in every call and for every size of the batch, another at every step."""
    _, ours, x = pair()
    with ours.intervene("it", [1, 2], "noise", std=1.0, seed=4), torch.no_grad():
        first = ours(x, record=("it",))[1]["it"]
        assert torch.equal(ours(x, record=("it",))[1]["it"], first)
        torch.testing.assert_close(ours(x[:2], record=("it",))[1]["it"], first[:, :2])
        large = ours(x.repeat(40, 1, 1, 1), record=("it",))[1]["it"]
        torch.testing.assert_close(large[:, :3], first)
    with ours.intervene("it", [1], "noise", std=1.0, seed=5):
        assert not torch.allclose(ours(x, record=("it",))[1]["it"][1], first[1])


def test_large_maps_run_as_a_whole() -> None:
    """Samples of large maps run some at a time, but not where a function or noise sees them."""
    torch.manual_seed(0)
    net: Any = blt_net_64(timesteps=2, backend="native").eval()
    x = torch.rand(6, 3, 64, 64)
    sizes: list[int] = []

    def seen(h: Tensor, t: int) -> Tensor:
        sizes.append(len(h))
        return h * 0.5

    with net.intervene("v1", None, seen), torch.no_grad():
        found = net(x)
        assert set(sizes) == {6}
        net.backend = "reference"
        torch.testing.assert_close(found, net(x), rtol=1e-4, atol=1e-4)


def test_other_networks() -> None:
    """Streams, gated cells and their second states, layers that start from zeros."""
    torch.manual_seed(0)
    streams: Any = blt_vs(7, 3, 2, image_size=128).eval()  # (fewer digits: it is large)
    rgc: Any = (
        convrnn("lstm_shallow", image_size=96, num_classes=4, widths=dict(conv1=2, conv2=2, conv3=3, conv4=3, conv5=3)).eval().double()
    )
    cases: list[tuple[Any, Tensor, Callable[[Any], Any]]] = [
        (streams, torch.rand(1, 3, 128, 128), lambda net: net.intervene("V4.bu", slice(4, None), "zero")),
        (streams, torch.rand(1, 3, 128, 128), lambda net: net.lesion("V4.bu:lateral", slice(4, None))),
        (rgc, torch.rand(1, 3, 96, 96, dtype=torch.float64), lambda net: net.intervene("conv4.cell:c", range(6, 9), "freeze")),
        (rgc, torch.rand(1, 3, 96, 96, dtype=torch.float64), lambda net: net.intervene("conv4.cell", range(2, 9), "scale", 0.1)),
        (rgc, torch.rand(1, 3, 96, 96, dtype=torch.float64), lambda net: net.lesion("conv4.cell:lateral", slice(7, None))),
    ]
    for net, x, change in cases:
        results = []
        for backend in ("native", "reference"):
            net.backend = backend
            with change(net), torch.no_grad():
                found = net(x)
                results.append(torch.stack(found) if isinstance(found, list) else found)
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            plain = net(x)
        assert not torch.allclose(torch.stack(plain) if isinstance(plain, list) else plain, results[1], atol=1e-5)
    cell = ConvCell("lstm", 3, 4, (6, 6), backend="native").double()
    x = torch.randn(1, 2, 3, 6, 6, dtype=torch.float64)
    with cell.intervene("cell:c", 0, "zero"):
        y, state = cell.sequence(x)
    assert not state[:, :, :4].any()
    assert y.any()  # (h was made before)
