"""Viewing conditions: balanced, reproducible, and each changes what it says it changes."""

import numpy as np
import pytest

from rnndyn_fast.data import CONDITIONS, ObjectPool, assign_conditions, challenge

NAMES = [settings.name for settings in CONDITIONS]
SIZE = 32


def objects(count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Squares on black whose grey level tells their category: 60, 120, 180, 240."""
    labels = np.arange(count) % 4
    images = np.zeros((count, SIZE, SIZE), dtype=np.uint8)
    images[:, 8:24, 8:24] = (60 * (labels + 1))[:, None, None]
    return images, labels


def run(name: str, seed: int = 0, count: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    images, labels = objects(count)
    codes = np.full(count, NAMES.index(name))
    return images, labels, challenge(images, labels, codes, ObjectPool(images, labels), np.random.default_rng(seed))


@pytest.mark.parametrize("count", [1, 9, 10, 237, 1000])
def test_conditions_are_balanced_overall_and_per_category(count: int) -> None:
    labels = np.random.default_rng(1).integers(0, 7, count)
    codes = assign_conditions(labels, np.random.default_rng(0))
    assert codes.dtype == np.uint8
    counts = np.bincount(codes, minlength=len(CONDITIONS))
    assert counts.max() - counts.min() <= 1
    for label in np.unique(labels):
        within = np.bincount(codes[labels == label], minlength=len(CONDITIONS))
        assert within.max() - within.min() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_every_condition_changes_every_image_reproducibly(name: str) -> None:
    images, _, result = run(name)
    assert result.dtype == np.uint8
    assert result.shape == images.shape
    changed = (result != images).any(axis=(1, 2))
    assert changed.all()
    np.testing.assert_array_equal(run(name)[2], result)
    assert not np.array_equal(run(name, seed=1)[2], result)


def test_mixed_conditions_go_to_the_right_images() -> None:
    images, labels = objects()
    codes = np.where(np.arange(60) % 2, NAMES.index("low_contrast"), NAMES.index("occlusion_bars"))
    kept = images.copy()
    result = challenge(images, labels, codes, ObjectPool(images, labels), np.random.default_rng(0))
    np.testing.assert_array_equal(images, kept)
    assert (result[1::2].min(axis=(1, 2)) > 80).all()  # black has become grey
    assert (result[0::2].min(axis=(1, 2)) == 0).all()


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("clutter", "debris"))])
def test_what_is_added_is_of_other_categories(name: str) -> None:
    images, labels, result = run(name)
    # In the background there is nothing of the target: a pixel of its grey level there would be of its own category.
    background = images == 0
    for image, label, where in zip(result, labels, background, strict=True):
        added = image[where]
        assert (added > 0).any()
        if name.startswith("debris"):
            assert not (added == 60 * (label + 1)).any()
        elif label == 3:  # clutter is resized, and the fading edges of brighter objects pass through the other levels
            assert added.max() in (60, 120, 180)


@pytest.mark.parametrize("kind", ["clutter", "debris"])
def test_levels_grow_and_the_target_stays(kind: str) -> None:
    hidden = []
    for level in ("light", "medium", "heavy"):
        images, _, result = run(f"{kind}_{level}", count=400)
        target = images > 0
        hidden.append((result != images)[target].mean())
    assert hidden[0] < hidden[1] < hidden[2]
    assert hidden[2] < 0.6


def test_clutter_lies_behind_and_on_top() -> None:
    images, _, result = run("clutter_light", count=400)
    hidden = ((result != images) & (images > 0)).any(axis=(1, 2))
    assert 0.3 < hidden.mean() < 0.95  # with two objects behind, the target is whole


@pytest.mark.parametrize(("name", "least", "most"), [("occlusion_bars", 0.3, 0.55), ("occlusion_blobs", 0.1, 0.4)])
def test_occlusion_hides_a_share_in_grey(name: str, least: float, most: float) -> None:
    images, _, result = run(name, count=400)
    changed = result != images
    assert set(np.unique(result[changed])) == {128}
    assert least < changed.mean() < most


def test_low_contrast_and_noise_by_their_parameters() -> None:
    images, _, result = run("low_contrast")
    contrast = (result.max(axis=(1, 2)).astype(int) - result.min(axis=(1, 2))) / images.max(axis=(1, 2))
    assert contrast.min() > 0.1 - 0.02  # rounding of 60 levels
    assert contrast.max() < 0.3 + 0.02
    images, _, result = run("noise")
    middle = result[:, 10:22, 10:22][np.arange(60) % 4 == 1] - 120.0  # little of it is clipped around 120
    assert 0.1 * 255 < middle.std() < 0.35 * 255
    assert abs(middle.mean()) < 8


def test_pool_draws_other_categories_uniformly() -> None:
    images, labels = objects(40)
    pool = ObjectPool(images[3:], labels[3:])
    wanted = np.full(20_000, 2)
    drawn = pool.draw_other(wanted, np.random.default_rng(0))
    assert not (pool.labels[drawn] == 2).any()
    counts = np.bincount(drawn, minlength=len(pool.labels))[pool.labels != 2]
    expected = 20_000 / len(counts)
    assert np.abs(counts - expected).max() < 5 * expected**0.5
    absent = pool.draw_other(np.full(1000, 9), np.random.default_rng(0))  # a category that the pool has not
    assert set(pool.labels[absent]) == {0, 1, 2, 3}


def test_pool_bounding_boxes() -> None:
    images, labels = objects(4)
    images[1] = 0
    images[1, 3:5, 30:32] = 200
    pool = ObjectPool(images, labels)
    np.testing.assert_array_equal(pool.top, [8, 3, 8, 8])
    np.testing.assert_array_equal(pool.left, [8, 30, 8, 8])
    np.testing.assert_array_equal(pool.height, [16, 2, 16, 16])
    np.testing.assert_array_equal(pool.width, [16, 2, 16, 16])


@pytest.mark.parametrize("size", [8, 9, 33])
def test_small_and_odd_sizes(size: int) -> None:
    images = np.zeros((40, size, size), dtype=np.uint8)
    images[:, 1:-1, 2:-1] = 200
    labels = np.arange(40) % 2
    codes = np.arange(40) % len(CONDITIONS)
    result = challenge(images, labels, codes, ObjectPool(images, labels), np.random.default_rng(0))
    assert result.shape == images.shape


def test_refuses() -> None:
    images, labels = objects(8)
    pool, rng, codes = ObjectPool(images, labels), np.random.default_rng(0), np.zeros(8, dtype=int)
    with pytest.raises(TypeError, match="images: expected dtype uint8"):
        challenge(images.astype(float), labels, codes, pool, rng)
    with pytest.raises(ValueError, match="with S = 32, got"):
        challenge(images[:, :16, :16], labels, codes, pool, rng)
    with pytest.raises(ValueError, match="labels, condition"):
        challenge(images, labels[:3], codes, pool, rng)
    with pytest.raises(ValueError, match=r"condition: expected 0\.\.9"):
        challenge(images, labels, codes + 10, pool, rng)
    with pytest.raises(ValueError, match="at least 2 categories, got 1"):
        ObjectPool(images, np.zeros(8, dtype=int))
    with pytest.raises(ValueError, match="at least 2 categories, got 0"):
        ObjectPool(np.zeros_like(images), labels)
