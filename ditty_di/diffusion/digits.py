"""scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels, nothing to download."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ditty_di.data.cache import build_once, cache_folder

MISSING = "digits: the images come with scikit-learn: pip install 'ditty_di[examples]'"

_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


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


def digit_pictures(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return a folder of examples: pictures of digits, and their names as answers.

    `train.jsonl` and `val.jsonl` have the rows of `Digits`, each `{"image": "images/0.png",
    "input": "Which digit is this?", "output": "seven"}`; the images are gray, of 8x8 pixels.

    Args:
        cache_dir: cache folder; None: `$DITTY_DI_CACHE`, or `~/.cache/ditty_di`.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    return build_once(cache_folder(cache_dir) / "examples" / "digit-pictures-v1", _write_pictures)


def _write_pictures(folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    number = 0
    for split, name in (("train", "train"), ("validation", "val")):
        digits, lines = Digits(split), []
        for image, label in zip(digits.images, digits.labels.tolist(), strict=True):
            path = f"images/{number}.png"
            pixels = ((image[0] + 1) * 127.5).round().to(torch.uint8)  # [8, 8]
            Image.fromarray(pixels.numpy()).save(folder / path)
            record = {"image": path, "input": "Which digit is this?", "output": _NAMES[label]}
            lines.append(json.dumps(record) + "\n")
            number += 1
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


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
