"""scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels, nothing to download."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable


def require_sklearn() -> Any:
    """The module; ImportError says how to install it."""
    try:
        import sklearn
    except ImportError as error:
        raise ImportError(
            "digits: the images come with scikit-learn: pip install 'ditty_di[examples]'"
        ) from error
    return sklearn


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
        require_sklearn()
        from sklearn.datasets import load_digits

        digits = load_digits()
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
    """How often a classifier of real images sees in samples what was asked for.

    Args:
        train, held_out: real images with `images` `[rows, ...]` and `labels` `[rows]`.
        classifier: makes one with scikit-learn's `fit` and `score`; None is `sklearn.svm.SVC`.
    """

    def __init__(
        self, train: Digits, held_out: Digits, *, classifier: Callable[[], Any] | None = None
    ) -> None:
        self.train, self.held_out, self.classifier = train, held_out, classifier

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """`recognised` of the samples, and `recognised_real` of held-out images; both 0 to 1."""
        if self.classifier is None:
            require_sklearn()
            from sklearn.svm import SVC

            classifier = SVC()
        else:
            classifier = self.classifier()
        classifier.fit(_flat(self.train.images), self.train.labels.numpy())
        real = classifier.score(_flat(self.held_out.images), self.held_out.labels.numpy())
        samples = classifier.score(_flat(images), labels.cpu().numpy())
        return {"recognised": float(samples), "recognised_real": float(real)}


def _flat(images: Tensor) -> Any:
    return images.flatten(1).float().cpu().numpy()
