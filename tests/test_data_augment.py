"""TrivialAugmentWide: reproducible, in range, and each operation does what its name says."""

import pytest
import torch

from rnndyn_fast.data import TrivialAugmentWide
from rnndyn_fast.data.augment import NUM_BINS, OPERATIONS


def pictures(count: int = 6, size: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def run(name: str, strength: float, sign: float, images: torch.Tensor) -> torch.Tensor:
    count = len(images)
    operation = torch.full((count,), OPERATIONS.index(name))
    return TrivialAugmentWide().apply(images, operation, torch.full((count,), strength), torch.full((count,), sign))


def as_bytes(images: torch.Tensor) -> torch.Tensor:
    return (images * 255).round().to(torch.uint8)


def test_reproducible_shape_range_dtype() -> None:
    images = pictures(64)
    kept = images.clone()
    first = TrivialAugmentWide(torch.Generator().manual_seed(3))
    second = TrivialAugmentWide(torch.Generator().manual_seed(3))
    results = [first(images), first(images)]
    assert torch.equal(results[0], second(images))
    assert torch.equal(results[1], second(images))
    assert not torch.equal(*results)
    assert torch.equal(images, kept)
    for result in results:
        assert result.dtype == torch.float32
        assert result.shape == images.shape
        assert result.min() >= 0
        assert result.max() <= 1


def test_the_default_generator_is_torchs() -> None:
    torch.manual_seed(5)
    first = TrivialAugmentWide()(pictures())
    torch.manual_seed(5)
    assert torch.equal(TrivialAugmentWide()(pictures()), first)


def test_every_operation_and_bin_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    augment = TrivialAugmentWide(torch.Generator().manual_seed(0))
    monkeypatch.setattr(augment, "apply", lambda images, *draws: drawn.update(zip("osn", draws, strict=True)))
    augment(torch.zeros(20_000, 3, 1, 1, dtype=torch.uint8))
    for values, choices in ((drawn["o"], len(OPERATIONS)), ((drawn["s"] * 30).round(), NUM_BINS), (drawn["n"], 2)):
        counts = values.unique(return_counts=True)[1]
        assert len(counts) == choices
        expected = 20_000 / choices
        assert (counts - expected).abs().max() < 5 * expected**0.5  # five standard deviations


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"auto_contrast", "equalize"}))  # these have no strength
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_strength_zero_is_identity(name: str, sign: float) -> None:
    images = pictures().clamp(max=254)  # solarize at its weakest inverts white alone
    assert torch.equal(as_bytes(run(name, 0.0, sign, images)), images)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_full_strength_stays_in_range(name: str, sign: float) -> None:
    for images in (pictures(), torch.zeros_like(pictures()), torch.full_like(pictures(), 255)):
        result = run(name, 1.0, sign, images)
        assert torch.isfinite(result).all()
        assert result.min() >= 0
        assert result.max() <= 1


def test_pixel_operations() -> None:
    images = pictures()
    values = images.double() / 255
    assert torch.equal(as_bytes(run("posterize", 1.0, 1.0, images)), images & 0b1100_0000)
    assert torch.equal(as_bytes(run("posterize", 0.5, 1.0, images)), images & 0b1111_1000)
    assert torch.equal(as_bytes(run("solarize", 1.0, 1.0, images)), 255 - images)
    half = torch.where(images >= 128, 255 - images, images)
    assert torch.equal(as_bytes(run("solarize", 0.5, 1.0, images)), half)
    expected = (values * (1 + 0.99 * 0.5)).clamp(0, 1)
    torch.testing.assert_close(run("brightness", 0.5, 1.0, images).double(), expected, rtol=0, atol=1e-6)
    grey = (values * torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(1, 3, 1, 1)).sum(1, keepdim=True)
    expected = (grey + 0.505 * (values - grey)).clamp(0, 1)
    torch.testing.assert_close(run("color", 0.5, -1.0, images).double(), expected, rtol=0, atol=1e-6)
    mean = grey.mean((2, 3), keepdim=True)
    expected = (mean + 1.495 * (values - mean)).clamp(0, 1)
    torch.testing.assert_close(run("contrast", 0.5, 1.0, images).double(), expected, rtol=0, atol=1e-6)


def test_auto_contrast_stretches_and_leaves_flat_channels() -> None:
    images = pictures() // 4 + 50
    images[0, 1] = 77
    result = as_bytes(run("auto_contrast", 1.0, 1.0, images))
    assert (result[1:].amin((2, 3)) == 0).all()
    assert (result[1:].amax((2, 3)) == 255).all()
    assert (result[0, 1] == 77).all()


def test_equalize_flattens_the_histogram() -> None:
    ramp = (torch.arange(256, dtype=torch.float64) / 255).pow(3).mul(255).round().to(torch.uint8)
    images = ramp.view(1, 1, 16, 16).expand(2, 3, 16, 16)
    result = run("equalize", 1.0, 1.0, images)
    assert abs(result.mean() - 0.5) < 0.1
    assert images.double().mean() / 255 < 0.3


def test_sharpness_lowers_and_raises_differences() -> None:
    images = pictures() // 2 + 64

    def roughness(values: torch.Tensor) -> float:
        inner = values[:, :, 1:-1, 1:-1]
        return float((inner[..., 1:] - inner[..., :-1]).abs().mean())

    plain = roughness(images / 255)
    assert roughness(run("sharpness", 1.0, -1.0, images)) < 0.5 * plain
    assert roughness(run("sharpness", 1.0, 1.0, images)) > 1.1 * plain


def test_moves() -> None:
    images = pictures(size=40)
    right = as_bytes(run("translate_x", 0.25, 1.0, images))
    assert torch.equal(right[..., 8:], images[..., :-8])
    assert (right[..., :8] == 0).all()
    up = as_bytes(run("translate_y", 1.0, -1.0, images))
    assert torch.equal(up[..., :8, :], images[..., 32:, :])
    assert (up[..., 8:, :] == 0).all()
    quarter = 90 / 135
    assert torch.equal(as_bytes(run("rotate", quarter, 1.0, images)), torch.rot90(images, 1, (2, 3)))
    assert torch.equal(as_bytes(run("rotate", quarter, -1.0, images)), torch.rot90(images, -1, (2, 3)))
    sheared = as_bytes(run("shear_x", 1.0, 1.0, images))
    for row in range(40):
        shift = round(0.99 * row)
        assert torch.equal(sheared[:, :, row, shift:], images[:, :, row, : 40 - shift]), row
    assert torch.equal(
        as_bytes(run("shear_y", 1.0, -1.0, images)),
        as_bytes(run("shear_x", 1.0, -1.0, images.transpose(2, 3))).transpose(2, 3),
    )


def test_images_do_not_influence_each_other() -> None:
    images = pictures(28)
    operation = torch.arange(28) % 14
    strength = torch.linspace(0, 1, 28)
    sign = torch.ones(28)
    augment = TrivialAugmentWide()
    together = augment.apply(images, operation, strength, sign)
    for row in range(28):
        one = slice(row, row + 1)
        alone = augment.apply(images[one], operation[one], strength[one], sign[one])
        torch.testing.assert_close(alone, together[one], rtol=0, atol=1e-6)


def test_empty_and_channels_last_batches() -> None:
    augment = TrivialAugmentWide(torch.Generator().manual_seed(0))
    assert augment(pictures()[:0]).shape == (0, 3, 16, 16)
    again = TrivialAugmentWide(torch.Generator().manual_seed(0))
    assert augment(pictures()[:0]).shape == (0, 3, 16, 16)
    images = pictures(30)
    assert torch.equal(augment(images), again(images.contiguous(memory_format=torch.channels_last)))


def test_refuses() -> None:
    augment = TrivialAugmentWide()
    with pytest.raises(TypeError, match=r"images: expected a uint8 tensor.*float32"):
        augment(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"images: expected shape \[N, 3, H, W\], got \[1, 1, 8, 8\]"):
        augment(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(TypeError, match="generator"):
        TrivialAugmentWide(0)  # type: ignore[arg-type]


def test_absent_kornia_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(ImportError, match=r'pip install "rnndyn-fast\[cli\]"'):
        TrivialAugmentWide()
