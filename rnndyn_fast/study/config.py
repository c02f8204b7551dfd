"""What a study does, as one dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from rnndyn_fast.train import TrainConfig

# The networks that can be compared, with the options that make them.
NETWORKS: dict[str, dict[str, Any]] = {
    "lateral_additive": {"topdown_connections": False, "LT_interaction": "additive"},
    "topdown_additive": {"topdown_connections": True, "LT_interaction": "additive"},
    "lateral_multiplicative": {"topdown_connections": False, "LT_interaction": "multiplicative"},
    "topdown_multiplicative": {"topdown_connections": True, "LT_interaction": "multiplicative"},
}
TITLES = {
    "lateral_additive": "lateral, additive",
    "topdown_additive": "lateral + top-down, additive",
    "lateral_multiplicative": "lateral, multiplicative",
    "topdown_multiplicative": "lateral + top-down, multiplicative",
}
QUICK: dict[str, Any] = {
    "source": "digits",
    "size": 16,
    "max_images": 100,
    "widths": (2, 4, 8, 16, 32),
    "timesteps": 4,
    "epochs": 2,
    "batch_size": 20,
    "keep": (1,),
    "bootstrap": 50,
}
# What the published analysis looks at is decided by samples that change their mind, a few in a hundred of `testplus`.
DEMO: dict[str, Any] = {
    "out": "demo",
    "networks": ("lateral_additive", "lateral_multiplicative"),
    "train_images": 8000,
    "val_images": 1000,
    "testplus_images": 6000,
    "epochs": 4,
    "keep": (1,),
    "bootstrap": 500,
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class StudyConfig:
    """A study; the fields' help is what ``rnndyn study --help`` prints.

    Raises ValueError where a field is out of range.
    """

    out: str = _option("study", "folder for data, runs, results, figures and report.html")
    data: str | None = _option(None, "HDF5 image file with train, val and testplus; default: made from `source`")
    checkpoints: tuple[str, ...] = _option((), "checkpoints to compare instead of training, one of each kind: a.pt,b.pt")
    networks: tuple[str, ...] = _option(tuple(NETWORKS), "networks to compare, of " + ", ".join(NETWORKS))
    source: str = _option("auto", "fashion-mnist, digits, or auto: the first of them that is installed")
    size: int = _option(32, "image height and width in pixels")
    train_images: int = _option(12_000, "training images to make, at most")
    val_images: int = _option(2000, "validation images to make, at most")
    testplus_images: int = _option(9000, "test images under challenging conditions to make, at most")
    max_images: int | None = _option(None, "at most that many images per split")
    widths: tuple[int, ...] = _option((8, 16, 32, 64, 128), "channels of retina, V1, V2, V4, IT; top-down needs each twice the one below")
    timesteps: int = _option(8, "time steps T")
    epochs: int = _option(20, "epochs at most")
    patience: int = _option(3, "training ends after that many epochs without a better validation accuracy")
    lr: float = _option(2e-3, "learning rate of Adam")
    lr_patience: int = _option(1, "divide it by 4 after that many epochs without a better validation accuracy")
    batch_size: int = _option(64, "images per training step")
    keep: tuple[int, ...] = _option((1, 2, 4, 8), "epochs at which the dynamics are looked at along training")
    bootstrap: int = _option(1000, "replicates of the bootstrap over images")
    seed: int = _option(0, "of data, weights, order and bootstrap")
    threads: int | None = _option(None, "CPU threads in training; default: PyTorch's")
    device: str | None = _option(None, "cpu, cuda, cuda:1, ...; default: a GPU where there is one")
    backend: str | None = _option(None, "native, reference; default: whichever can run")
    quick: bool = _option(False, "tiny data and networks, to see that it runs; overrides sizes")
    overwrite: bool = _option(False, "start from nothing; otherwise an interrupted study continues where it stopped")

    def __post_init__(self) -> None:
        for name in ("widths", "keep", "checkpoints", "networks"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value.split(",")) if isinstance(value, str) else tuple(value))
        for name, value in QUICK.items() if self.quick else ():
            object.__setattr__(self, name, value)
        for name in ("max_images", "train_images", "val_images", "testplus_images", "bootstrap"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.size < 8 or self.size % 8:
            raise ValueError(f"size: expected a multiple of 8, got {self.size}")
        unknown = [name for name in self.networks if name not in NETWORKS]
        if unknown or not self.networks or len(set(self.networks)) < len(self.networks):
            raise ValueError(f"networks: expected different ones of {', '.join(NETWORKS)}, got {', '.join(self.networks) or 'none'}")
        if self.checkpoints and self.data is None:
            raise ValueError("data: expected the image file that goes with the checkpoints, got none")
        for name in self.networks:  # what training would refuse is refused now, not after the data are made
            config = self.training(name, data="")
            if config.topdown_connections and any(2 * a != b for a, b in zip(config.widths[1:], config.widths[2:], strict=False)):
                raise ValueError(f"widths: with top-down connections each area from V1 on needs twice the one below, got {self.widths}")

    def training(self, network: str, data: str, **options: Any) -> TrainConfig:
        """The training run of one of the networks."""
        config = TrainConfig(
            data=data,
            out=f"{self.out}/{network}",
            timesteps=self.timesteps,
            widths=self.widths,
            epochs=self.epochs,
            patience=self.patience,
            lr=self.lr,
            lr_patience=self.lr_patience,
            keep=self.keep,
            batch_size=self.batch_size,
            augment="none",
            seed=self.seed,
            threads=self.threads,
            device=self.device,
            backend=self.backend,  # type: ignore[arg-type]
            **NETWORKS[network],
        )
        return replace(config, **options)
