"""The streaming readout-zone analysis: golden numbers, the published loops, merging, steps, refusals."""

from __future__ import annotations

import importlib.util
import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from test_analysis_cases import assert_same_result, make

from rnndyn_fast.analysis import ReadoutZoneReducer, readout_zones
from rnndyn_fast.analysis.accumulators import classify

INDICES = (
    *("stable_correct", "t_stable_correct", "stable_incorrect", "t_stable_incorrect", "label_stable_incorrect"),
    *("unstable_correct", "t_unstable_correct", "unstable_incorrect", "max_t_analysed"),
)
TABLES = (*("accuracy", "representation_change", "norm_now_vs_later", "cos_current_now_vs_later", "cos_final_vs_other"),)


pytestmark = pytest.mark.filterwarnings("error")


def published() -> Any:
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "published_analysis.py"
    spec = importlib.util.spec_from_file_location("published_analysis", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("with_log_probs", [False, True])
@pytest.mark.parametrize("as_torch", [False, True])
def test_golden(backend: str, dtype: type, with_log_probs: bool, as_torch: bool) -> None:
    data = golden("readout_zones")
    arrays: dict[str, Any] = {
        "trajectories": data["trajectories"].astype(dtype),
        "readout_weight": data["readout_weight"].astype(dtype),
        "labels": data["labels"],
        "log_probs": data["log_probs"] if with_log_probs else None,
    }
    if as_torch:
        arrays = {name: None if a is None else torch.from_numpy(a) for name, a in arrays.items()}
    result = readout_zones(**arrays, backend=backend, samples_per_block=77)
    for name in INDICES:
        np.testing.assert_array_equal(getattr(result, name), data[name], err_msg=name)
    for name in TABLES:
        # float32 (as the golden numbers were computed) and float64 both stay within 8e-7.
        np.testing.assert_allclose(getattr(result, name), data[name], rtol=1e-6, err_msg=name)
    assert {name: len(data[name]) for name in result.counts} == result.counts
    np.testing.assert_array_equal(result.counts_t_stable_correct, np.bincount(data["t_stable_correct"], minlength=10))
    change, t_stable = data["representation_change"], data["t_stable_correct"]
    summary = result.summary("representation_change_by_t_stable")
    for s in range(8):
        rows = change[t_stable == s]
        np.testing.assert_allclose(summary.mean[s], rows.mean(0), rtol=1e-6)
        np.testing.assert_allclose(summary.sd[s], rows.std(0, ddof=1), rtol=1e-5)
        np.testing.assert_array_equal(summary.n[s], len(rows))
    assert np.isnan(summary.mean[8:]).all()


@pytest.mark.parametrize("seed", range(4))
def test_published_loops(seed: int) -> None:
    data = make(seed=seed, n=80)
    logits = data["trajectories"] @ data["readout_weight"].T + data["bias"]
    expected = published().published_analysis(data["trajectories"], data["readout_weight"], data["labels"], logits)
    result = readout_zones(**data)
    assert min(result.counts.values()) > 0  # the case exercises every group
    for name in INDICES:
        np.testing.assert_array_equal(getattr(result, name), expected[name], err_msg=name)
    for name in TABLES:
        np.testing.assert_allclose(getattr(result, name), expected[name], rtol=1e-10, err_msg=name)


def test_pair_table_against_all_pairs() -> None:
    """Mean, spread and number of ordered pairs, and the effective number of samples, from the C x C tables."""
    data = make(n=300)
    result = readout_zones(**data)
    pairs, effective = result.sums.pairs()
    chosen, times = result.stable_correct, result.t_stable_correct
    for t in range(6):
        values, partners = [], []
        later = chosen[times > t]
        for i in later:
            mine = [
                j
                for j in later
                if data["labels"][j] != data["labels"][i] and result.samples["predicted"][j, t] == result.samples["predicted"][i, t]
            ]
            r = data["trajectories"][t, i]
            for j in mine:
                w = data["readout_weight"][data["labels"][j]]
                values.append(r @ w / np.linalg.norm(r) / np.linalg.norm(w))
            partners.append(len(mine))
        assert pairs.n[t] == len(values)
        if len(values) > 1:
            np.testing.assert_allclose(pairs.mean[t], np.mean(values), rtol=1e-10)
            np.testing.assert_allclose(pairs.sd[t], np.std(values, ddof=1), rtol=1e-8)
            np.testing.assert_allclose(effective[t], sum(partners) ** 2 / np.square(partners).sum())
            np.testing.assert_allclose(pairs.ci95[t], 1.959964 * pairs.sd[t] * (2 / effective[t]) ** 0.5, rtol=1e-6)
        if not values:
            assert np.isnan(pairs.mean[t])
    assert pairs.n[0] > 50


def test_now_vs_later_spread_and_interval() -> None:
    data = make(n=200)
    result = readout_zones(**data)
    rows = result.stable_correct
    for measure, table in (
        ("norm_now_vs_later", "norm"),
        ("margin_now_vs_later", "margin"),
        ("boundary_distance_now_vs_later", "boundary_distance"),
        ("cos_current_now_vs_later", "cos_current"),
    ):
        summary = result.summary(measure)
        for t in range(6):
            for column, mask in enumerate((result.t_stable_correct <= t, result.t_stable_correct > t)):
                values = result.samples[table][rows[mask], t]
                assert summary.n[t, column] == len(values)
                if len(values) > 1:
                    sd = values.std(ddof=1)
                    np.testing.assert_allclose(summary.mean[t, column], values.mean())
                    np.testing.assert_allclose(summary.sd[t, column], sd, rtol=1e-7)
                    np.testing.assert_allclose(summary.ci95[t, column], 1.959964 * sd / len(values) ** 0.5, rtol=1e-6)
    kept = [t for t in range(result.max_t_analysed) if np.isfinite(result.norm_now_vs_later[t]).all()]
    np.testing.assert_allclose(result.published_summary("norm_now_vs_later"), result.norm_now_vs_later[kept].mean(0))


def test_change_after_stable() -> None:
    data = make(n=150)
    result = readout_zones(**data)
    change, norm = result.representation_change, result.samples["norm"][result.stable_correct]
    mean = [row[s:].mean() for row, s in zip(change, result.t_stable_correct, strict=True)]
    relative = [(row[s:] / length[s:-1]).mean() for row, length, s in zip(change, norm, result.t_stable_correct, strict=True)]
    for name, values in (("change_after_stable", mean), ("relative_change_after_stable", relative)):
        summary = result.summary(name)
        assert summary.n == len(values)
        np.testing.assert_allclose(summary.mean, np.mean(values))
        np.testing.assert_allclose(summary.sd, np.std(values, ddof=1), rtol=1e-7)


def groups_by_the_letter(p: list[int], label: int) -> tuple[int, int]:
    """The definition of the groups, for one trajectory of predictions."""
    if len(p) > 1 and p[-2] != p[-1]:
        stable = False
    else:
        s = len(p) - 1
        while s > 0 and p[s - 1] == p[-1]:
            s -= 1
        stable = p[-1] not in p[:s]
    if stable:
        return (0 if p[-1] == label else 1), s
    return (2, p.index(label)) if label in p else (3, -1)


@given(st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1, max_size=30), st.integers(0, 2))
def test_classify(trajectories: list[list[int]], label: int) -> None:
    predicted, labels = np.array(trajectories).T, np.full(len(trajectories), label)
    for steps in (1, 2, 4):
        group, time = classify(predicted[:steps], labels)
        assert [(int(g), int(s)) for g, s in zip(group, time, strict=True)] == [
            groups_by_the_letter(p[:steps], label) for p in trajectories
        ]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_merge_of_any_split_is_one_pass(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 40), "n")
    case = make(n=n, seed=data.draw(st.integers(0, 3), "seed"))
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=4), "cuts")})
    whole = readout_zones(**case)
    merged = ReadoutZoneReducer(case["readout_weight"], case["bias"], 6, keep_samples=True)
    for start, stop in pairwise(cuts):
        part = ReadoutZoneReducer(case["readout_weight"], case["bias"], 6, keep_samples=True)
        part.update(case["trajectories"][:, start:stop], case["labels"][start:stop])
        merged.merge(part)
    assert_same_result(merged.result(), whole)
    results = [
        readout_zones(**(case | {"trajectories": case["trajectories"][:, a:b], "labels": case["labels"][a:b]})) for a, b in pairwise(cuts)
    ]
    folded = results[0]
    for other in results[1:]:
        folded = folded.merge(other)
    assert_same_result(folded, whole)


def test_order_of_samples_does_not_matter() -> None:
    data = make(n=50)
    order = np.random.default_rng(1).permutation(50)
    shuffled = readout_zones(**(data | {"trajectories": data["trajectories"][:, order], "labels": data["labels"][order]}))
    result = readout_zones(**data)
    np.testing.assert_array_equal(np.sort(order[shuffled.stable_correct]), result.stable_correct)
    shuffled.samples = None
    assert_same_result(shuffled, result)


@pytest.mark.parametrize("with_log_probs", [False, True])
def test_steps_are_an_update(with_log_probs: bool) -> None:
    data = make(n=30)
    logits = data["trajectories"] @ data["readout_weight"].T
    stepped = ReadoutZoneReducer(data["readout_weight"], data["bias"], 6, keep_samples=True)
    buffer = torch.empty(15, 8, dtype=torch.float64)  # reused for every step, as in a rollout
    for half in (slice(0, 15), slice(15, 30)):
        for t in range(6):
            buffer.copy_(torch.from_numpy(data["trajectories"][t, half]))
            stepped.step(t, buffer, data["labels"][half], logits[t, half] if with_log_probs else None)
            buffer.fill_(float("nan"))
    assert_same_result(stepped.result(), readout_zones(**data, log_probs=logits if with_log_probs else None))


def test_steps_out_of_order() -> None:
    data = make(n=4)
    reducer = ReadoutZoneReducer(data["readout_weight"], timesteps=6)
    step = lambda t, labels=data["labels"]: reducer.step(t, data["trajectories"][t], labels)  # noqa: E731
    with pytest.raises(ValueError, match=r"t: expected time step 0 of 6, got 1"):
        step(1)
    step(0)
    for wrong in (0, 2):
        with pytest.raises(ValueError, match=rf"t: expected time step 1 of 6, got {wrong}"):
            step(wrong)
    with pytest.raises(ValueError, match=r"labels: expected the labels .* given at t = 0"):
        step(1, (data["labels"] + 1) % 5)
    with pytest.raises(ValueError, match=r"representations_t: expected finite values, got nan at \[0, 0\]"):
        reducer.step(1, np.full((4, 8), np.nan), data["labels"])
    for call in (
        reducer.result,
        reducer.state_dict,
        lambda: reducer.merge(ReadoutZoneReducer(data["readout_weight"], None, 6)),
    ):
        with pytest.raises(ValueError, match=r"complete up to t = 0 of 6; complete it or call discard_batch"):
            call()
    for t in range(1, 6):  # the refusals changed nothing
        step(t)
    assert_same_result(reducer.result(), readout_zones(data["trajectories"], data["readout_weight"], data["labels"]))
    step(0)
    reducer.discard_batch()
    assert len(reducer) == 4
    assert reducer.result().n == 4


def test_state_is_saved_and_resumed() -> None:
    data = make(n=40)
    for keep in (False, True):
        first = ReadoutZoneReducer(data["readout_weight"], data["bias"], 6, keep_samples=keep)
        first.update(data["trajectories"][:, :17], data["labels"][:17])
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        resumed = ReadoutZoneReducer(data["readout_weight"], data["bias"], 6, keep_samples=keep)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        resumed.update(data["trajectories"][:, 17:], data["labels"][17:])
        assert first.result().n == 17  # the state is a copy
        assert_same_result(resumed.result(), readout_zones(**data))
        assert (resumed.result().samples is not None) == keep


def test_states_that_do_not_fit() -> None:
    data = make(n=5)
    reducer = ReadoutZoneReducer(data["readout_weight"], None, 6)
    reducer.update(data["trajectories"], data["labels"])
    before = reducer.result()
    others = {
        "timesteps T": ReadoutZoneReducer(data["readout_weight"], None, 5),
        "readout_weight": ReadoutZoneReducer(data["readout_weight"][:4], None, 6),
        "same readout_weight": ReadoutZoneReducer(data["readout_weight"] + 1, None, 6),
        "bias": ReadoutZoneReducer(data["readout_weight"], data["bias"], 6),
        "kept samples": ReadoutZoneReducer(data["readout_weight"], None, 6, keep_samples=True),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=f"other: expected.*{message}"):
            reducer.merge(other)
        with pytest.raises(ValueError, match=f"state: expected.*{message}"):
            reducer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"state: expected an accumulator 'norm\.total'"):
        reducer.load_state_dict({k: v for k, v in reducer.state_dict().items() if k != "accumulators/norm.total"})
    with pytest.raises(TypeError, match="other: expected a ReadoutZoneReducer, got dict"):
        reducer.merge({})
    assert_same_result(reducer.result(), before)
    zeros = ReadoutZoneReducer(data["readout_weight"], np.zeros(5), 6)  # no bias and a bias of zero are the same readout
    reducer.merge(zeros)


def test_memory_does_not_grow_with_samples() -> None:
    data = make(n=64)
    reducer = ReadoutZoneReducer(data["readout_weight"], data["bias"], 6)
    sizes = []
    for _ in range(6):
        reducer.update(data["trajectories"], data["labels"])
        sizes.append(sum(value.nbytes for value in reducer.state_dict().values()))
    assert len(set(sizes)) == 1
    assert sizes[0] < 48 * 6 * 5 * 5 + 8000
    assert reducer.result().stable_correct is None
    assert reducer.result().representation_change is None
    assert reducer.result().n == 6 * 64


def test_result_is_independent_of_later_updates() -> None:
    data = make(n=10)
    reducer = ReadoutZoneReducer(data["readout_weight"], None, 6, keep_samples=True)
    reducer.update(data["trajectories"], data["labels"])
    early = reducer.result({"from": "test"})
    accuracy, n = early.accuracy, early.n
    reducer.update(data["trajectories"] * -1, data["labels"])
    assert early.n == n == len(early.samples["label"])
    np.testing.assert_array_equal(early.accuracy, accuracy)
    assert early.descriptors == {"from": "test"}
