"""The additive reducers: against NumPy on whole arrays, any split and order, and the smallest cases."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rnndyn_fast.analysis import (
    Batch,
    DecodabilityReducer,
    MomentReducer,
    NormReducer,
    RdmReducer,
    ReadoutZoneReducer,
    Reducer,
    RepresentationChangeReducer,
    SumReducer,
    Table,
)

pytestmark = pytest.mark.filterwarnings("error")

AREAS = ("map", "gap")
CLASSES = 4
READOUT = np.random.default_rng(9).standard_normal((CLASSES, 6))

MAKE: dict[str, Callable[[], Reducer]] = {
    "norms": lambda: NormReducer(AREAS),
    "change": lambda: RepresentationChangeReducer(AREAS),
    "moments": lambda: MomentReducer(AREAS, units=5, exact=6),
    "rdm_classes": lambda: RdmReducer(AREAS, classes=range(CLASSES)),
    "rdm_images": lambda: RdmReducer(AREAS, images=[0, 2, 3], distance="euclidean"),
    "decodability": lambda: DecodabilityReducer(AREAS, num_classes=CLASSES, held_out=7, folds=3),
}


def make(n: int, steps: int = 3, seed: int = 0, classes: int = CLASSES) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    centre = rng.standard_normal((CLASSES, 6))
    gap = centre[labels] + rng.standard_normal((steps, n, 6))
    maps = rng.standard_normal((steps, n, 3, 2, 4)).astype(np.float32)
    return {"index": np.arange(n), "labels": labels, "areas": {"map": maps, "gap": gap}}


def part(data: dict[str, Any], rows: Any) -> Batch:
    areas = {name: values[:, rows] for name, values in data["areas"].items()}
    return Batch(data["index"][rows], data["labels"][rows], areas)


def assert_same(a: Reducer, b: Reducer, rtol: float = 1e-9) -> None:
    one, two = a.result(), b.result()
    assert one.n == two.n
    assert one.tables.keys() == two.tables.keys()
    for name, table in one.tables.items():
        assert table.axes == two.tables[name].axes
        assert table.values.ndim == len(table.axes)
        np.testing.assert_allclose(table.values, two[name], rtol=rtol, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("name", MAKE)
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_split_and_order_is_one_pass(name: str, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 24), "n")
    case = make(n, steps=data.draw(st.integers(1, 3), "steps"), seed=data.draw(st.integers(0, 3), "seed"))
    order = np.array(data.draw(st.permutations(range(n)), "order"))
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=4), "cuts")})
    whole, merged = MAKE[name](), MAKE[name]()
    whole.add(part(case, slice(None)))
    for start, stop in pairwise(cuts):
        one = MAKE[name]()
        one.add(part(case, order[start:stop]))
        merged.merge(one)
    merged.merge(MAKE[name]())  # one that has seen nothing changes nothing
    assert len(merged) == n
    assert_same(merged, whole)


@pytest.mark.parametrize("name", MAKE)
def test_same_batches_give_the_same_bits_and_states_resume(name: str) -> None:
    case = make(20)
    straight, first = MAKE[name](), MAKE[name]()
    for rows in (slice(0, 8), slice(8, 20)):
        straight.add(part(case, rows))
    first.add(part(case, slice(0, 8)))
    resumed = MAKE[name]()
    resumed.load_state_dict(first.state_dict())
    resumed.add(part(case, slice(8, 20)))
    assert len(first) == 8  # the state is a copy
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.parametrize("name", MAKE)
def test_reducers_that_do_not_fit_change_nothing(name: str) -> None:
    case = make(6)
    reducer = MAKE[name]()
    reducer.add(part(case, slice(None)))
    before = reducer.state_dict()
    with pytest.raises(TypeError, match="other: expected a"):
        reducer.merge(object())
    other = type(reducer)(("map",), **{k: v for k, v in reducer.options.items() if k != "areas"})
    with pytest.raises(ValueError, match="other: expected one made with"):
        reducer.merge(other)
    with pytest.raises(ValueError, match="batch: expected sums"):
        reducer.add(part(make(6, steps=2), slice(None)))
    with pytest.raises(ValueError, match=r"areas: a reducer needs 'map', the batch has gap"):
        reducer.add(Batch(case["index"], case["labels"], {"gap": case["areas"]["gap"]}))
    assert before.keys() == reducer.state_dict().keys()
    assert all(torch.equal(value, reducer.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize(("n", "steps", "classes"), [(1, 1, 1), (1, 3, 1), (5, 1, 1), (9, 1, CLASSES)])
def test_smallest_cases_have_nan_and_no_warning(name: str, n: int, steps: int, classes: int) -> None:
    case = make(n, steps, classes=classes)
    for constant in (False, True):
        if constant:
            case["areas"] = {key: np.full_like(values, 0.1) for key, values in case["areas"].items()}
        reducer = MAKE[name]()
        reducer.add(part(case, slice(None)))
        result = reducer.result()
        assert result.n == n
        for table, (axes, values) in result.tables.items():
            if "t" in axes:
                assert values.shape[axes.index("t")] == steps, table
            if "transition" in axes:
                assert values.shape == (2, steps - 1), table
    with pytest.raises(ValueError, match="result: expected at least one batch"):
        MAKE[name]().result()


def test_norms_and_changes() -> None:
    case = make(30)
    norms, change = NormReducer(AREAS), RepresentationChangeReducer(AREAS)
    for rows in (slice(0, 11), slice(11, 30)):
        norms.add(part(case, rows))
        change.add(part(case, rows))
    for row, area in enumerate(AREAS):
        flat = case["areas"][area].reshape(3, 30, -1).astype(np.float64)
        length, moved = np.linalg.norm(flat, axis=2), np.linalg.norm(np.diff(flat, axis=0), axis=2)
        np.testing.assert_allclose(norms.result()["norm"][row], length.mean(1))
        np.testing.assert_allclose(norms.result()["norm_sd"][row], length.std(1, ddof=1))
        np.testing.assert_allclose(change.result()["change"][row], moved.mean(1))
        np.testing.assert_allclose(change.result()["change_sd"][row], moved.std(1, ddof=1))
        np.testing.assert_allclose(change.result()["relative_change"][row], (moved / length[:-1]).mean(1))


def test_areas_that_start_later_have_gaps() -> None:
    reducer = NormReducer(("low", "high"))
    reducer.add(Batch([0], [0], {"low": np.ones((3, 1, 4)), "high": np.ones((2, 1, 9))}))
    np.testing.assert_array_equal(reducer.result()["norm"], [[2, 2, 2], [np.nan, 3, 3]])


def test_relative_change_leaves_out_samples_at_zero() -> None:
    values = np.zeros((2, 2, 3))
    values[:, 1] = [[1, 0, 0], [3, 0, 0]]
    reducer = RepresentationChangeReducer(("a",))
    reducer.add(Batch([0, 1], [0, 0], {"a": values}))
    assert reducer.result()["relative_change"].tolist() == [[2.0]]
    assert reducer.result()["relative_change_n"].tolist() == [[1.0]]


def test_participation_ratio_is_exact_where_narrow_and_unbiased_where_wide() -> None:
    rng = np.random.default_rng(3)
    mixing = rng.standard_normal((8, 60))
    values = (rng.standard_normal((2, 400, 8)) @ mixing + 5).reshape(2, 400, 3, 4, 5)
    batch = Batch(np.arange(400), np.zeros(400, int), {"a": values})
    exact = MomentReducer(("a",))
    exact.add(batch)
    flat = values.reshape(2, 400, 60)
    for t in range(2):
        covariance = np.cov(flat[t].T)
        ratio = np.trace(covariance) ** 2 / np.square(covariance).sum()
        np.testing.assert_allclose(exact.result()["participation_ratio"][0, t], ratio)
        np.testing.assert_allclose(exact.result()["variance"][0, t], np.trace(covariance))
        np.testing.assert_allclose(exact.result()["mean_norm"][0, t], np.linalg.norm(flat[t].mean(0)))
    traces, squares = [], []
    for seed in range(300):
        drawn = MomentReducer(("a",), units=20, exact=30, seed=seed)
        drawn.add(batch)
        result = drawn.result()
        assert drawn.covariance("a").shape == (2, 20, 20)
        traces.append(result["variance"][0])
        squares.append(result["variance"][0] ** 2 / result["participation_ratio"][0])
    whole = exact.result()
    for found, expected in ((traces, whole["variance"][0]), (squares, whole["variance"][0] ** 2 / whole["participation_ratio"][0])):
        error = np.std(found, axis=0) / np.sqrt(len(found))
        assert (np.abs(np.mean(found, axis=0) - expected) < 4 * error).all()
        assert (error < 0.05 * expected).all()


@pytest.mark.parametrize("distance", ["correlation", "euclidean"])
def test_rdm_of_class_means(distance: str) -> None:
    case = make(40)
    reducer = RdmReducer(AREAS, classes=[1, 3, 0], distance=distance)  # type: ignore[arg-type]
    reducer.add(part(case, slice(None)))
    result = reducer.result()
    assert result["conditions"].tolist() == [0, 1, 3]
    for area, values in (("gap", case["areas"]["gap"]), ("map", case["areas"]["map"].mean((3, 4), dtype=np.float64))):
        means = np.stack([values[:, case["labels"] == c].mean(1) for c in (0, 1, 3)], axis=1)
        for t in range(3):
            euclidean = np.linalg.norm(means[t][:, None] - means[t][None], axis=2)
            expected = 1 - np.corrcoef(means[t]) if distance == "correlation" else euclidean
            np.testing.assert_allclose(result[f"rdm.{area}"][t], expected, atol=1e-6)


def test_rdm_of_images_and_conditions_that_do_not_occur() -> None:
    case = make(10)
    reducer = RdmReducer(("gap",), images=[7, 2, 99], distance="euclidean")
    reducer.add(part(case, slice(None)))
    result = reducer.result()
    assert result["n"].tolist() == [1, 1, 0]
    found = result["rdm.gap"][0]
    assert np.isnan(found[2]).all()
    assert np.isnan(found[:, 2]).all()
    np.testing.assert_allclose(found[0, 1], np.linalg.norm(case["areas"]["gap"][0, 2] - case["areas"]["gap"][0, 7]))


def test_decodability_is_that_of_the_classifier_made_without_the_fold() -> None:
    """Against the same discriminant computed from all the samples at hand."""
    case = make(60, steps=2)
    reducer = DecodabilityReducer(("gap",), num_classes=CLASSES, held_out=25, folds=4)
    for rows in (slice(0, 20), slice(20, 60)):
        reducer.add(part(case, rows))
    held = reducer.sums["held.index"]
    assert len(set(held.tolist())) == 25
    from rnndyn_fast.analysis.decodability import random_numbers

    assert set(held) == set(np.argsort(random_numbers(np.arange(60)))[:25])
    fold, y = random_numbers(held, stream=1) % np.uint64(4), case["labels"]
    for t in range(2):
        x, right = case["areas"]["gap"][t], 0
        for f in range(4):
            test = held[fold == f]
            train = np.setdiff1d(np.arange(60), test)
            means = np.stack([x[train][y[train] == c].mean(0) for c in range(CLASSES)])
            rest = x[train] - means[y[train]]
            within = rest.T @ rest / len(train)
            inverse = np.linalg.inv(0.9 * within + 0.1 * np.trace(within) / 6 * np.eye(6))
            prior = np.bincount(y[train], minlength=CLASSES) / len(train)
            score = x[test] @ inverse @ means.T - 0.5 * np.einsum("cd,de,ce->c", means, inverse, means) + np.log(prior)
            right += (score.argmax(1) == y[test]).sum()
        assert reducer.result()["accuracy"][0, t] == pytest.approx(right / 25)
    assert reducer.result()["accuracy"].min() > reducer.result()["chance"][0]


def test_decodability_does_not_read_noise() -> None:
    """Labels that have nothing to do with the representations are not decoded: nothing leaks from test to training."""
    rng = np.random.default_rng(0)
    reducer = DecodabilityReducer(("a",), num_classes=2, held_out=600)
    reducer.add(Batch(np.arange(600), rng.integers(0, 2, 600), {"a": rng.standard_normal((1, 600, 100))}))
    assert abs(reducer.result()["accuracy"][0, 0] - 0.5) < 0.09


def test_random_numbers_are_those_of_splitmix64() -> None:
    from rnndyn_fast.analysis.decodability import random_numbers

    # The generator's published first outputs from state 0.
    assert [hex(v) for v in random_numbers(np.array([0]))] == ["0xe220a8397b1dcdaf"]
    assert [hex(v) for v in random_numbers(np.array([0]), stream=1)] == ["0x6e789e6aa1b965f4"]


def test_readout_zones_follow_the_protocol() -> None:
    case = make(12)
    one, two = (ReadoutZoneReducer(READOUT, timesteps=3) for _ in range(2))
    assert one.requires == ("gap",)
    one.add(part(case, slice(None)))
    two.update(case["areas"]["gap"], case["labels"])
    assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())


def test_batches_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"index: expected shape \[N\]"):
        Batch([], [], {})
    with pytest.raises(ValueError, match=r"areas\['a'\]: expected shape \[T, N, ...\]"):
        Batch([0], [0], {"a": np.zeros((2, 3, 4))})
    with pytest.raises(ValueError, match="classes: expected either classes or images, got both"):
        RdmReducer(classes=[0], images=[0])
    reducer = DecodabilityReducer(("a",), num_classes=2)
    with pytest.raises(ValueError, match="labels: expected"):
        reducer.add(Batch([0], [2], {"a": np.zeros((1, 1, 2))}))


def test_sums_of_a_reducer_of_ones_own_may_be_any_arrays() -> None:
    """Scalars of NumPy, read-only and reversed arrays; the batch's own are left as they are."""

    class Own(SumReducer):
        name = "own"
        requires = ("gap",)

        def measure(self, batch: Batch) -> dict[str, Any]:
            values = batch.area("gap").numpy().astype(np.float64)
            return {"total": values.sum(), "steps": np.broadcast_to(values.sum(), (3,)), "reversed": values.sum((1, 2))[::-1]}

        def tables(self) -> dict[str, Table]:
            return {"total": Table((), self.sums["total"])}

    reducer, maps = Own(), np.arange(24.0).reshape(2, 4, 3)
    for first in (0, 2):
        reducer.add(Batch([first, first + 1], [0, 0], {"gap": maps[:, first : first + 2]}))
    assert float(reducer.result()["total"]) == maps.sum()
    assert reducer.sums["steps"].tolist() == [maps.sum()] * 3
    assert reducer.sums["reversed"].tolist() == maps.sum((1, 2))[::-1].tolist()


def test_held_out_samples_take_the_places_of_those_that_leave() -> None:
    rng = np.random.default_rng(0)
    values, labels = rng.normal(size=(2, 90, 4)), rng.integers(0, 2, 90)
    whole = DecodabilityReducer(("gap",), num_classes=2, held_out=11)
    whole.add(Batch(np.arange(90), labels, {"gap": values}))
    parts = DecodabilityReducer(("gap",), num_classes=2, held_out=11)
    for rows in np.array_split(np.arange(90), 12):
        parts.add(Batch(rows, labels[rows], {"gap": values[:, rows]}))
    index, label, held = (parts.sums[f"held.{name}"] for name in ("index", "label", "gap"))
    assert sorted(index) == sorted(whole.sums["held.index"])
    np.testing.assert_array_equal(label, labels[index])
    np.testing.assert_array_equal(held, values[:, index].transpose(1, 0, 2).astype(np.float32))
    np.testing.assert_array_equal(parts.result()["accuracy"], whole.result()["accuracy"])
