"""The verdicts on the two claims: what must come out of trajectories of which is known what is true of them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from simulated_dynamics import COSINE_SD, NORM_SD, Truth, simulate

from rnndyn_fast.analysis import ReadoutZoneReducer, ReadoutZoneResult, bootstrap, check_claims, pool, readout_zones
from rnndyn_fast.analysis.bootstrap import Bootstrap
from rnndyn_fast.analysis.claim_measures import pairwise
from rnndyn_fast.analysis.claims import INCONCLUSIVE, KEPT_CHANGE, MIN_EFFECT, NOT_SUPPORTED, SUPPORTED, claims_of
from rnndyn_fast.analysis.intervals import Estimate, holm
from rnndyn_fast.models import blt_net_64

STILL = Truth(motion="still")
BOTH = {"state_norm": 0.6, "state_cosine": 0.08}


def verdicts(truth: Truth, control: Truth | None, n: int = 600, seed: int = 0) -> tuple[list[str], list[str]]:
    untrained = None if control is None else simulate(control, n, seed=seed)
    claims = check_claims(simulate(truth, n, seed=seed), untrained, replicates=200)
    return [claim.verdict for claim in claims], [claim.reason for claim in claims]


# ---------------------------------------------------------------- verdicts


def test_true_claims_are_supported() -> None:
    found, reasons = verdicts(Truth(**BOTH), STILL)
    assert found == [SUPPORTED, SUPPORTED]
    assert reasons[0] == "every part lies above its bound"


@pytest.mark.parametrize(
    ("truth", "control", "reason"),
    [
        (Truth(motion="noise"), STILL, "as independent noise would"),
        (Truth(motion="converges", kept=0.6), STILL, "converge"),
        (Truth(motion="stops"), STILL, "stand still in the last step"),
        (Truth(), Truth(), "untrained network changes as much"),
        (Truth(speed=0.2), Truth(speed=0.4), "untrained network changes as much"),
    ],
    ids=["noise", "converges", "stops", "untrained itself", "untrained more"],
)
def test_what_would_make_the_first_claim_trivial_is_told(truth: Truth, control: Truth, reason: str) -> None:
    found, reasons = verdicts(truth, control)
    assert found[0] == NOT_SUPPORTED
    assert reason in reasons[0]


def test_without_the_untrained_network_change_cannot_be_supported() -> None:
    found, reasons = verdicts(Truth(), None)
    assert found[0] == INCONCLUSIVE
    assert "untrained network was not given" in reasons[0]
    found, _ = verdicts(Truth(motion="stops"), None)  # but it can fail
    assert found[0] == NOT_SUPPORTED


def test_few_samples_decide_nothing() -> None:
    """Gaussian noise of three images once passed for both claims."""
    rng = np.random.default_rng(0)
    for n in (3, 29):
        result, other = (readout_zones(rng.normal(size=(6, n, 4)) + 9 * np.eye(4)[0], np.eye(4), np.zeros(n, int)) for _ in range(2))
        for claim in check_claims(result, other, replicates=50):
            assert claim.verdict == INCONCLUSIVE
            assert f"{n} stable-correct images, at least 30 are needed" in claim.reason
    for claim in check_claims(ReadoutZoneReducer(np.eye(3), timesteps=4, keep_samples=True).result(), replicates=50):
        assert (claim.verdict, claim.n) == (INCONCLUSIVE, 0)


def test_no_recurrence_stands_still() -> None:
    r = np.repeat(np.random.default_rng(1).normal(size=(1, 400, 6)), 5, axis=0)
    result = readout_zones(r, np.eye(6), r[0].argmax(1))
    change, edge = check_claims(result, result, replicates=50)
    assert change.verdict == NOT_SUPPORTED
    assert "stand still" in change.reason
    assert edge.verdict == INCONCLUSIVE  # nobody is late


def network_trajectories(lateral: bool, seed: int = 0) -> np.ndarray:
    """Representations [T, N, D] of a network with random weights."""
    torch.manual_seed(seed)
    net = blt_net_64(image_size=16, widths=(2, 4, 8, 16, 32), timesteps=6, topdown_connections=False, num_classes=4)
    images = torch.rand(100, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        if not lateral:
            for name, parameter in net.named_parameters():
                if "lateral" in name:
                    parameter.zero_()
        return net(images, return_representations=True)[1].numpy()


def test_networks_that_do_not_keep_changing() -> None:
    """Untrained, without recurrence, and with lateral weights that are zero from a step on."""
    recurrent, plain = network_trajectories(lateral=True), network_trajectories(lateral=False)
    stopped = np.concatenate([recurrent[:3], plain[3:]])  # what a network does without lateral input does not change in time
    readout = np.array([1.0, -1.0])[:, None] * np.ones(recurrent.shape[2])  # behind a relu the first class always wins: all are stable

    def analysed(r: np.ndarray) -> ReadoutZoneResult:
        return readout_zones(r, readout, np.zeros(r.shape[1], int))

    untrained = analysed(recurrent)
    assert untrained.counts["stable_correct"] == 100
    for r, reason in ((recurrent, "untrained network changes as much"), (plain, "stand still"), (stopped, "stand still")):
        change, edge = check_claims(analysed(r), untrained, replicates=50)
        assert change.verdict == NOT_SUPPORTED
        assert reason in change.reason
        assert edge.verdict == INCONCLUSIVE  # nobody is late


def test_noise_in_every_dimension_has_no_claim() -> None:
    """Independent noise about a class mean, in a readout whose zones differ in size: literal differences come from their geometry."""
    rng = np.random.default_rng(2)
    weight, label = rng.normal(size=(5, 12)), rng.integers(0, 5, 6000)
    draws = [weight[label] * 0.35 + rng.normal(size=(6, 6000, 12)) for _ in range(2)]
    change, edge = check_claims(*(readout_zones(r, weight, label) for r in draws), replicates=100)
    assert change.verdict == NOT_SUPPORTED
    assert edge.verdict != SUPPORTED


def test_between_but_not_within_samples_is_told() -> None:
    """Late images are lower at all steps: the published comparison sees that, and it is not what the claim says."""
    found, reasons = verdicts(Truth(trait_norm=0.8, trait_cosine=0.08), STILL, n=3000)
    assert found[1] == NOT_SUPPORTED
    assert reasons[1] == (
        "it holds between images, between images of the same class, between images in the same zone; it does not hold within images"
    )
    claim = check_claims(simulate(Truth(trait_norm=0.8), 3000), replicates=50)[1]
    last = next(part for part in claim.other if part.name == "norm.last_step").estimate
    assert last.low < 0.8 < last.high  # what remains when all are stable


def test_conditions_are_matched() -> None:
    """A condition that makes images late and lowers their norm."""
    rng = np.random.default_rng(3)
    n = 1500
    condition, label = rng.integers(0, 2, n), rng.integers(0, 3, n)
    s = np.where(rng.random(n) < np.where(condition == 1, 0.6, 0.1), 3, 0)
    zone = np.where(np.arange(6)[:, None] < s, (label + 1) % 3, label)
    r = (6.0 - 2.0 * condition + rng.normal(0, 0.3, n))[None, :, None] * np.eye(3)[zone]
    result = readout_zones(r, np.eye(3), label)
    plain, matched = (bootstrap(result, 100, condition=c, pairs=False) for c in (None, condition))
    assert plain.estimate("norm.matched_label").low > 0.8
    assert abs(matched.estimate("norm.matched_label").value) < 0.1
    with pytest.raises(ValueError, match=r"condition: expected one value per image \[1500\]"):
        bootstrap(result, 10, condition=condition[:5])


# ---------------------------------------------------------------- measures by hand


def test_measures_by_hand() -> None:
    result = simulate(Truth(**BOTH), 60, seed=5)
    samples, steps = result.samples, result.timesteps
    assert samples is not None
    boot = bootstrap(result, 20, untrained=simulate(STILL, 60, seed=5))
    change = samples["change"] / samples["norm"][:, :-1]
    first = np.maximum(samples["time"], 1)
    assert boot.values["change_last"] == pytest.approx(change[:, -1].mean())
    slopes = [np.polyfit(np.arange(f, steps - 1), np.log(change[i, f:]), 1)[0] for i, f in enumerate(first) if f < steps - 2]
    assert boot.values["change_slope"] == pytest.approx(np.mean(slopes))
    distance = pairwise(samples, np.arange(60), steps)
    order = []
    for i, f in enumerate(first):
        block = distance[i, f:, f:]
        if len(block) > 2:
            order.append(np.diagonal(block, 1).mean() / block[np.triu_indices(len(block), 1)].mean() - 1)
    assert boot.values["change_order"] == pytest.approx(np.mean(order))
    lags = [[change[i, f + k] for i, f in enumerate(first) if f + k < steps - 1] for k in range(steps - 2)]
    np.testing.assert_allclose(boot.values["change_by_lag"], [np.mean(values) for values in lags])
    assert boot.lag_counts.tolist() == [len(values) for values in lags]


def test_within_is_after_minus_before_against_the_residents() -> None:
    result = simulate(Truth(**BOTH), 400, seed=6)
    samples = result.samples
    assert samples is not None
    time, norm, predicted, label = (samples[name] for name in ("time", "norm", "predicted", "label"))
    residual = norm.copy()
    for t in range(result.timesteps):
        for c in range(6):
            residual[predicted[:, t] == c, t] -= norm[(time == 0) & (label == c), t].mean()
    late = [residual[i, s:].mean() - residual[i, :s].mean() for i, s in enumerate(time) if s > 0]
    raw = [norm[i, s:].mean() - norm[i, :s].mean() for i, s in enumerate(time) if s > 0]
    boot = bootstrap(result, 200, pairs=False)
    assert boot.values["norm.within"] == pytest.approx(np.mean(late))
    assert boot.values["norm.within_raw"] == pytest.approx(np.mean(raw))
    assert boot.values["norm.last_step"] == pytest.approx(norm[time == 0, -1].mean() - norm[time > 0, -1].mean())
    found = boot.estimate("norm.within")
    assert found.low < 0.6 < found.high
    assert found.n == (time > 0).sum()


def test_one_difference_has_one_interval_and_n() -> None:
    result = simulate(Truth(**BOTH), 300)
    claim = check_claims(result, replicates=100)[1]
    part = next(part for part in claim.parts if part.name == "norm_now_vs_later.difference")
    assert part.estimate == bootstrap(result, 100).estimate("norm_now_vs_later.difference")


def test_distances_step_by_step_are_those_of_whole_trajectories() -> None:
    r = np.random.default_rng(7).normal(size=(5, 30, 4))
    label = np.zeros(30, int)
    whole = readout_zones(r, np.eye(4), label)
    reducer = ReadoutZoneReducer(np.eye(4), timesteps=5, keep_samples=True)
    for t in range(5):
        reducer.step(t, r[t], label)
    assert whole.samples is not None
    stepwise = reducer.result().samples
    assert stepwise is not None
    np.testing.assert_array_equal(stepwise["distance"], whole.samples["distance"])
    t, s = np.tril_indices(5, -1)
    np.testing.assert_allclose(whole.samples["distance"], np.linalg.norm(r[t] - r[s], axis=-1).T)


# ---------------------------------------------------------------- error rates

DATA_SETS = 200
# Already stable minus not yet, and share of late images, of the first network of the published table.
PAPER = {"state_norm": 8.035 - 7.449, "state_cosine": 0.2020 - 0.1209, "late": 2809 / 12418}


@pytest.fixture(scope="module")
def rates() -> dict[str, list[Counter[str]]]:
    """Verdicts on 200 data sets of each kind. In `edge` all parts but one of each claim are true, which is the hardest null."""
    kinds = {
        "null": (Truth(motion="noise"), Truth(motion="noise", draw=1)),
        "edge": (Truth(motion="noise", trait_norm=1.2, state_cosine=0.08), STILL),
        "true": (Truth(**PAPER), STILL),
    }
    found = {}
    for kind, (truth, control) in kinds.items():
        counts: list[Counter[str]] = [Counter(), Counter()]
        for seed in range(DATA_SETS):
            n, steps = 300 if kind == "true" else 150, 6
            claims = check_claims(simulate(truth, n, steps, seed), simulate(control, n, steps, seed), replicates=50, seed=seed)
            for count, claim in zip(counts, claims, strict=True):
                count[claim.verdict] += 1
        found[kind] = counts
    return found


@pytest.mark.parametrize("kind", ["null", "edge"])
def test_false_support_is_rarer_than_one_in_twenty(rates: dict[str, list[Counter[str]]], kind: str) -> None:
    for counts in rates[kind]:
        assert counts[SUPPORTED] <= 0.05 * DATA_SETS, (kind, counts)


def test_false_refusal_is_rarer_than_one_in_twenty_and_power_is_as_stated(rates: dict[str, list[Counter[str]]]) -> None:
    for counts in rates["true"]:
        assert counts[NOT_SUPPORTED] <= 0.05 * DATA_SETS, counts
        assert counts[SUPPORTED] >= 0.6 * DATA_SETS, counts  # docs/analysis.md


def test_bounds_are_those_of_the_simulation() -> None:
    """The `edge` null fails in one part alone: the order of steps, and the norm within images."""
    claims = check_claims(simulate(Truth(motion="noise", trait_norm=1.2, state_cosine=0.08), 5000), simulate(STILL, 5000), replicates=50)
    speaks = [{part.name: part.status(len(claim.parts)) for part in claim.parts} for claim in claims]
    assert [name for name, status in speaks[0].items() if status != "for"] == ["change_order"]
    assert [name for name, status in speaks[1].items() if status != "for"] == ["norm.within"]


# ---------------------------------------------------------------- networks


def networks(effects: list[float], n: int = 300) -> list[Bootstrap]:
    """Networks that saw the same images, and differ in how much lower the norm is before they are stable."""
    return [bootstrap(simulate(Truth(state_norm=e), n, seed=1), 60, pairs=False) for e in effects]


def test_networks_are_the_units_where_there_are_several() -> None:
    alike, different = (pool(networks(effects)) for effects in ([0.6, 0.6, 0.6, 0.6], [-0.6, 0.2, 1.0, 1.8]))
    alone = networks([0.6])[0]
    name = "norm.within"
    assert alike.estimate(name).networks == 4
    # Equal networks on equal images add nothing: the images' error remains.
    assert alike.estimate(name).error == pytest.approx(alone.estimate(name).error)
    spread = np.std([-0.6, 0.2, 1.0, 1.8], ddof=1) / 2
    assert different.estimate(name).error == pytest.approx(spread, rel=0.1)
    assert different.estimate(name).df == pytest.approx(3, abs=0.5)
    assert different.estimate(name).low < 0 < different.estimate(name).high
    claims = claims_of({"alike": alike, "different": different})
    assert {claim.family for both in claims.values() for claim in both} == {4}
    assert claims["different"][1].networks == 4
    with pytest.raises(ValueError, match="boots: expected the same images"):
        pool([alone, networks([0.6], n=100)[0]])


def test_intervals_over_networks_and_images_cover() -> None:
    """Crossed: every network has an effect of its own, all have the images' error in common."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        image, noise = rng.normal(0, 0.5), rng.normal(0, 1, 4)
        boots = []
        draws = rng.normal(0, 0.5, 400)  # of the images, the same for all networks
        for own in noise:
            values = {"x": np.asarray(image + own), "accuracy": np.asarray(0.0)}
            boots.append(Bootstrap({"x": image + own + draws, "accuracy": draws}, values, counts={"images": 500}))
        estimate = pool(boots).estimate("x")
        covered += estimate.low <= 0 <= estimate.high
    assert 0.93 <= covered / 400 <= 0.99


def test_sets_of_several_results_go_in_as_they_are() -> None:
    results = [simulate(Truth(**BOTH, draw=k), 300, seed=2) for k in range(3)]
    controls = [simulate(STILL, 300, seed=2)] * 3
    claims = check_claims(results, controls, replicates=60)
    assert [claim.verdict for claim in claims] == [SUPPORTED, SUPPORTED]
    assert claims[0].networks == 3
    with pytest.raises(ValueError, match="untrained: expected one for each of 3 networks, got 1"):
        check_claims(results, controls[:1])
    with pytest.raises(ValueError, match="untrained: expected the same 300 images"):
        check_claims(results[0], simulate(STILL, 200))


# ---------------------------------------------------------------- p values and corrections


def test_p_agrees_with_the_interval() -> None:
    result = bootstrap(simulate(Truth(**BOTH), 200), 100, pairs=False).estimate("norm.within")
    assert result.p_above(result.low) == pytest.approx(0.025)
    assert result.p_below(result.high) == pytest.approx(0.025)
    exact = Estimate(1.0, 1.0, 1.0, 0.0, 9.0, 10)
    assert (exact.p_above(0.5), exact.p_above(1.0), exact.p_below(2.0)) == (0.0, 1.0, 0.0)


def test_correction_by_holm() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    found = Counter(min(holm(list(p))) <= 0.05 for p in np.random.default_rng(0).random((4000, 6)))
    assert found[True] / 4000 < 0.06  # one false finding or more in a family of six


def test_a_family_of_many_needs_more() -> None:
    boot = bootstrap(
        simulate(Truth(state_norm=0.6, state_cosine=0.08), 150, seed=3), 200, untrained=simulate(STILL, 150, seed=3), pairs=False
    )
    alone = claims_of({"a": boot})["a"][1]
    many = claims_of({str(k): boot for k in range(20)})["0"][1]
    assert many.p_for == pytest.approx(min(1.0, 20 * alone.raw[0]))
    assert MIN_EFFECT * boot.scales["norm"] == pytest.approx(0.1 * NORM_SD, rel=0.2)
    assert MIN_EFFECT * boot.scales["cos_current"] == pytest.approx(0.1 * COSINE_SD, rel=0.2)
    assert KEPT_CHANGE < 1
