"""scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels, nothing to download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MISSING = "digits: the images come with scikit-learn: pip install 'ditty_di[examples]'"


class Digits(torch.utils.data.Dataset):
    """Rows `({"input": image}, label)`: float32 `[1, 8, 8]` from -1 to 1, and int64 0 to 9.

    Args:
        split: `"train"` or `"validation"`.
        validation_rows: how many of the 1,797 images are held out.
        seed: of the split.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: another split, or more rows than there are.
    """

    contract = "-> input:4:f32 | ctx.target:1:i64"

    def __init__(self, split: str, *, validation_rows: int = 297, seed: int = 0) -> None:
        try:
            import sklearn.datasets
        except ImportError as error:
            raise ImportError(MISSING) from error
        digits = sklearn.datasets.load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
        if not 0 < validation_rows < len(order):
            raise ValueError(
                f"digits: validation_rows={validation_rows} must be from 1 to {len(order) - 1}"
            )
        parts = {"train": order[validation_rows:], "validation": order[:validation_rows]}
        if split not in parts:
            raise ValueError(f"digits: split={split!r} must be one of {', '.join(parts)}")
        rows = parts[split]
        brightest = 16.0
        images = torch.from_numpy(digits.images).float()[:, None] * (2 / brightest) - 1
        self.images, self.labels = images[rows], torch.from_numpy(digits.target).long()[rows]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        return {"input": self.images[index]}, self.labels[index]


class Recognition:
    """Measure how often a classifier of real images recognizes the class of a sample.

    Args:
        train: real images to fit, with `images` `[rows, ...]` and `labels` `[rows]`.
        held_out: real images to score beside the samples.
        classifier: makes one with scikit-learn's `fit` and `score`; None is `sklearn.svm.SVC`.
    """

    def __init__(
        self, train: Digits, held_out: Digits, *, classifier: Callable[[], Any] | None = None
    ) -> None:
        self.train, self.held_out, self.classifier = train, held_out, classifier

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Return `recognized` of samples and `recognized_real` of held-out images, both 0 to 1.

        Args:
            images: samples `[rows, ...]`.
            labels: the classes asked for, int64 `[rows]`.
        """
        import sklearn.svm

        classifier = (self.classifier or sklearn.svm.SVC)()
        classifier.fit(_flat(self.train.images), self.train.labels.numpy())
        real = classifier.score(_flat(self.held_out.images), self.held_out.labels.numpy())
        samples = classifier.score(_flat(images), labels.cpu().numpy())
        return {"recognized": float(samples), "recognized_real": float(real)}


def _flat(images: Tensor) -> Any:
    return images.flatten(1).float().cpu().numpy()
