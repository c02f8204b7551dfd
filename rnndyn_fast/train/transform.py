"""What becomes of a training batch before the network sees it: augmentation, and mixing with others (mixup, cutmix)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rnndyn_fast.data import Request, augmentation
from rnndyn_fast.data.augmentation import Augment
from rnndyn_fast.optional import require


class TrainingTransform:
    """Augmentation by name, then mixup or cutmix. Random numbers follow from (seed, epoch, batch), so they do not depend on what was
    drawn before, on the number of workers, or (but for mixing, whose partners are in the same process) on the number of processes.

    Args:
        augment: a name of :func:`rnndyn_fast.data.augmentation`.
        seed: of all draws.
        num_classes: of the shares of classes that mixing makes of labels.
        mixup: images are ``s x_i + (1 - s) x_j`` with s from Beta(mixup, mixup), per image; 0: not.
        cutmix: a rectangle of x_i comes from x_j, of an area from Beta(cutmix, cutmix); 0: not. With both, each batch gets one by chance.

    Source: Zhang et al., ICLR 2018 (mixup); Yun et al., ICCV 2019 (CutMix).
    """

    def __init__(self, augment: str, seed: int, num_classes: int, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        self.name, self.seed, self.num_classes, self.mixup, self.cutmix = augment, seed, num_classes, mixup, cutmix
        self._augment: Augment | None = augmentation(augment)

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_augment": None}  # (made anew in each worker)

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._augment = augmentation(self.name)

    def __call__(
        self,
        request: Request,
        images: Tensor,  # uint8 [N, 3, H, W]
        labels: Tensor,  # [N]
    ) -> tuple[Tensor, Tensor]:
        """Images, uint8 or float 0-1, and labels [N] or, mixed, shares of classes [N, classes]."""
        if self._augment is not None:
            images = self._augment(images, torch.Generator().manual_seed(self._seed(request, 0)), request.part)
        if not (self.mixup or self.cutmix):
            return images, labels
        images = images if images.is_floating_point() else images.float() / 255
        with torch.random.fork_rng(devices=[]):  # (kornia and distributions draw from torch's own generator)
            torch.manual_seed(self._seed(request, 1 + request.part.rows.start))
            cut = self.cutmix > 0 and (self.mixup == 0 or bool(torch.rand(()) < 0.5))
            return self._cut(images, labels) if cut else self._mix(images, labels)

    def _seed(self, request: Request, purpose: int) -> int:
        entropy = np.random.SeedSequence([self.seed, request.epoch, request.number, purpose])
        return int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))

    def _mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        share = torch.distributions.Beta(self.mixup, self.mixup).sample((len(images),))
        other = torch.randperm(len(images))
        mixed = torch.lerp(images[other], images, share[:, None, None, None])
        return mixed, self._shares(labels, labels[other], share)

    def _cut(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        require("kornia")
        from kornia.augmentation import RandomCutMixV2

        if len(images) == 1:  # no other image
            return images, self._shares(labels, labels, torch.ones(1))
        cut = RandomCutMixV2(beta=self.cutmix, use_correct_lambda=True, data_keys=["input", "class"])
        mixed, told = cut(images, labels)
        own, other, share = told[0].unbind(1)  # (the share of the image's own area)
        return mixed, self._shares(own.long(), other.long(), share)

    def _shares(self, own: Tensor, other: Tensor, share: Tensor) -> Tensor:
        one, two = (functional.one_hot(labels, self.num_classes).float() for labels in (own, other))
        return torch.lerp(two, one, share[:, None])
