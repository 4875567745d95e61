import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ditty_di.data.loader import Loader
from ditty_di.diffusion import Digits, Recognition
from ditty_di.diffusion.digits import digit_pictures

pytest.importorskip("sklearn")


def test_images_are_from_minus_one_to_one_and_every_class_is_there():
    train, validation = Digits("train"), Digits("validation")
    assert (len(train), len(validation)) == (1500, 297)
    for part in (train, validation):
        assert part.images.shape[1:] == (1, 8, 8)
        assert (part.images.min(), part.images.max()) == (-1, 1)
        assert part.labels.unique().tolist() == list(range(10))


def test_the_split_depends_on_the_seed_and_loses_nothing():
    def flat(split, seed):
        return {tuple(image) for image in Digits(split, seed=seed).images.flatten(1).tolist()}

    train, validation = flat("train", 0), flat("validation", 0)
    assert not train & validation
    assert len(train | validation) == 1797, "no two images of the set are the same"
    assert flat("train", 0) == train
    assert flat("train", 1) != train


def test_rows_go_through_the_loader():
    loader = Loader(Digits("validation"), micro_batch_size=100, epochs=1, shuffle=False)
    batches = list(loader)
    inputs, labels = batches[0]
    assert inputs["input"].shape == (100, 1, 8, 8)
    assert labels.shape == (100,)
    assert (batches[-1][1] == -100).sum() == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split='test' must be one of train, validation"),
        ({"split": "train", "validation_rows": 1797}, "must be from 1 to 1796"),
    ],
)
def test_impossible_splits_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Digits(**arguments)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install 'ditty_di\[examples\]'"):
        Digits("train")


def test_recognition_knows_digits_from_other_digits_and_from_noise():
    judge = Recognition(Digits("train"), Digits("validation"))
    real = Digits("validation")
    right = judge(real.images, real.labels)
    assert right["recognized"] == right["recognized_real"] > 0.97
    assert judge(real.images, (real.labels + 1) % 10)["recognized"] < 0.03
    noise = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert judge(noise, torch.arange(200) % 10)["recognized"] < 0.3


def test_pictures_are_the_digits_with_their_names(tmp_path):
    folder = digit_pictures(tmp_path)
    for split, name in (("train", "train"), ("validation", "val")):
        digits = Digits(split)
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        assert len(lines) == len(digits)
        for row in (0, len(lines) - 1):
            record = json.loads(lines[row])
            pixels = torch.from_numpy(np.array(Image.open(folder / record["image"])))
            assert torch.allclose(pixels / 127.5 - 1, digits.images[row, 0], atol=0.01)
            names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
            assert record["output"] == names[digits.labels[row]]
