"""Hard colour images for searches of architectures: objects of Fashion-MNIST in natural photographs, under further conditions.

    python benchmarks/hard_images.py runs/hard --train 6000 --val 1500 --test 3000
    rnndyn data make --source runs/hard/images.csv --size 32 --out runs/hard.h5

Every image has one object, tinted, turned by up to 8 degrees, 26 to 32 of 32 px wide, on a darkened patch of a photograph; then one of
CONDITIONS. As in tests of object recognition (Majaj et al. 2015), object and background have nothing to do with each other. Photographs
are those that come with scikit-learn and scikit-image. The left 60% of each serve train, the rest val and test; objects of train and val
are the source's training images, those of test its test images.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images

from rnndyn_fast.data.sources import ImageSource, load_source, stratified_order

SIZE = 32
CONDITIONS = ("plain", "clutter", "clutter", "occlusion", "low contrast", "noise")
PHOTOGRAPHS = ("chelsea", "coffee", "astronaut", "rocket", "motorcycle_left", "grass", "gravel", "brick")  # of scikit-image
FOR_TRAINING = 0.6  # of a photograph's width


def photographs() -> list[np.ndarray]:
    """RGB, uint8 [h, w, 3] each."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    files = [next(folder.glob(f"{name}.*")) for name in PHOTOGRAPHS]
    return [*load_sample_images().images, *(np.asarray(Image.open(file).convert("RGB")) for file in files)]


def patch(photograph: np.ndarray, training: bool, rng: np.random.Generator) -> Image.Image:
    """A random square of the part of a photograph that serves training, or of the other, at SIZE."""
    border = int(FOR_TRAINING * photograph.shape[1])
    part = photograph[:, :border] if training else photograph[:, border:]
    side = int(rng.integers(SIZE, min(part.shape[:2]) // 2 + 1))
    top, left = rng.integers(0, part.shape[0] - side + 1), rng.integers(0, part.shape[1] - side + 1)
    square = Image.fromarray(part[top : top + side, left : left + side]).resize((SIZE, SIZE), Image.Resampling.BOX)
    square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else square
    return ImageEnhance.Brightness(square).enhance(0.6)


def paste(onto: Image.Image, grey: np.ndarray, width: int, centre: tuple[int, int], rng: np.random.Generator) -> None:
    """Lay a tinted, turned object on black over an image."""
    tint = rng.uniform(0.7, 1.0, 3)
    mask = Image.fromarray(np.minimum(255, grey.astype(int) * 8).astype(np.uint8))
    colour = Image.fromarray((grey[:, :, None] * tint).astype(np.uint8))
    angle = float(rng.uniform(-8, 8))
    made = [part.resize((width, width), Image.Resampling.BILINEAR).rotate(angle, Image.Resampling.BILINEAR) for part in (colour, mask)]
    onto.paste(made[0], (centre[0] - width // 2, centre[1] - width // 2), made[1])


def make_image(objects: np.ndarray, number: int, background: Image.Image, condition: str, rng: np.random.Generator) -> Image.Image:
    """One image of the object of that number; others of the same array are clutter."""
    width = int(rng.integers(26, 33))
    margin = (SIZE - width) // 2
    places = [(int(rng.integers(0, SIZE)), int(rng.integers(0, SIZE))) for _ in range(int(rng.integers(2, 5)))]
    if condition == "clutter":
        for place in places:
            paste(background, objects[rng.integers(len(objects))], int(rng.integers(10, 17)), place, rng)
    x, y = (SIZE // 2 + int(rng.integers(-margin, margin + 1)) for _ in range(2))
    paste(background, objects[number], width, (x, y), rng)
    if condition == "clutter":
        for place in places[:2]:
            paste(background, objects[rng.integers(len(objects))], int(rng.integers(8, 13)), (place[1], place[0]), rng)
    pixels = np.array(background, dtype=float)
    if condition == "occlusion":
        first, step = int(rng.integers(0, 8)), int(rng.integers(7, 11))
        for begin in range(first, SIZE, step):
            pixels[begin : begin + 3] = rng.uniform(0, 255, 3)
        if rng.random() < 0.5:
            pixels = pixels.transpose(1, 0, 2)
    if condition == "low contrast":
        pixels = 128 + rng.uniform(0.4, 0.7) * (pixels - 128)
    if condition == "noise":
        pixels = pixels + rng.normal(0, rng.uniform(10, 30), pixels.shape)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def write(out: Path, numbers: dict[str, int], source: ImageSource, seed: int = 0) -> Path:
    """Write images and their table; returns the table's path."""
    pictures = photographs()
    rng = np.random.default_rng(seed)
    order = stratified_order(source.train_labels, rng)
    tested = stratified_order(source.test_labels, rng)
    train, val = numbers["train"], numbers["val"]
    chosen = {"train": order[:train], "val": order[train : train + val], "test": tested[: numbers["test"]]}
    out.mkdir(parents=True, exist_ok=True)
    with (out / "images.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("path", "label", "split"))
        for split, rows in chosen.items():
            (out / split).mkdir(exist_ok=True)
            objects, labels = (source.test_images, source.test_labels) if split == "test" else (source.train_images, source.train_labels)
            for k, row in enumerate(rows):
                background = patch(pictures[rng.integers(len(pictures))], split == "train", rng)
                image = make_image(objects, int(row), background, CONDITIONS[k % len(CONDITIONS)], rng)
                image.save(out / split / f"{k:05d}.png")
                table.writerow((f"{split}/{k:05d}.png", source.categories[labels[row]], split))
    return out / "images.csv"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    for split, number in (("train", 6000), ("val", 1500), ("test", 3000)):
        parser.add_argument(f"--{split}", type=int, default=number)
    given = parser.parse_args()
    print(write(given.out, {name: getattr(given, name) for name in ("train", "val", "test")}, load_source("fashion-mnist")))
