"""Pictures are read back by the format's definition, not by what wrote them."""

import struct
import zlib

import pytest
import torch

from ditty_di.callbacks import EMA
from ditty_di.diffusion import DiT, Euler, SampleGrid
from ditty_di.diffusion.grid import tiled, write_png


def read_png(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, []
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        (crc,) = struct.unpack(">I", data[at + 8 + length : at + 12 + length])
        assert crc == zlib.crc32(kind + content)
        chunks.append((kind, content))
        at += 12 + length
    assert [kind for kind, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, colour, *methods = struct.unpack(">IIBBBBB", chunks[0][1])
    assert (depth, methods) == (8, [0, 0, 0])
    channels = {0: 1, 2: 3}[colour]
    rows = torch.frombuffer(bytearray(zlib.decompress(chunks[1][1])), dtype=torch.uint8)
    rows = rows.reshape(height, 1 + width * channels)
    assert not rows[:, 0].any(), "no row is filtered"
    return rows[:, 1:].reshape(height, width, channels)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_has_the_pixels_it_was_given(tmp_path, channels):
    pixels = torch.randint(256, (5, 7, channels), dtype=torch.uint8)
    path = tmp_path / "new" / "picture.png"
    write_png(path, pixels)
    assert torch.equal(read_png(path), pixels)
    write_png(path, 255 - pixels)
    assert torch.equal(read_png(path), 255 - pixels)
    assert [p.name for p in path.parent.iterdir()] == ["picture.png"]


@pytest.mark.parametrize("pixels", [torch.zeros(2, 2, 1), torch.zeros(2, 2, 2).byte()])
def test_other_pixels_are_refused(tmp_path, pixels):
    with pytest.raises(ValueError, match="uint8"):
        write_png(tmp_path / "picture.png", pixels)


def test_images_are_tiled_row_by_row():
    images = torch.tensor([-1.0, 0.0, 1.0, 9.0, -9.0]).reshape(5, 1, 1, 1).expand(5, 1, 2, 2)
    sheet = tiled(images, columns=3, enlarge=2)
    assert sheet.shape == (14, 20, 1)
    centres = sheet[[4, 10]][:, [4, 10, 16], 0]
    assert centres.tolist() == [[0, 128, 255], [255, 0, 0]]
    assert not sheet[:2].any()
    assert not sheet[:, :2].any()


def test_every_class_has_its_row_and_the_judge_sees_what_was_asked_for(tmp_path):
    """A model whose images are as bright as their class."""

    class Bright(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x, timestep, class_labels):
            assert not self.training
            return x - (class_labels * self.weight - 1)[:, None, None, None]

    seen = {}

    def judge(images, labels):
        for label in range(5):
            seen[label] = images[labels == label]
        return {"recognized": 0.25}

    path = tmp_path / "samples.png"
    grid = SampleGrid(
        str(path), Euler(steps=1), shape=(1, 2, 2), classes=5, samples=20, columns=3, judge=judge
    )
    model = Bright().train()
    assert grid([model]) == {"recognized": 0.25}
    assert model.training
    for label, images in seen.items():
        torch.testing.assert_close(images, torch.full((4, 1, 2, 2), label / 2 - 1))
    picture = read_png(path)[8 :: 4 * 3, 8 :: 4 * 3, 0]  # one pixel of each sample
    assert picture.tolist() == [[round(label / 4 * 255)] * 3 for label in range(5)]


def test_samples_are_of_the_averages_where_there_are_some(tmp_path):
    model = DiT(hidden=16, layers=1, heads=2)
    ema = EMA(0.9)
    ema.start([model])  # zeros: a model that says nothing leaves the noise as it is
    with torch.no_grad():
        model.head.bias += 100
    seen = []
    options = {"shape": (1, 8, 8), "classes": 10, "samples": 10}
    for averages in (ema, None):
        SampleGrid(
            str(tmp_path / "samples.png"),
            Euler(steps=1),
            ema=averages,
            judge=lambda images, labels: seen.append(images) or {},
            **options,
        )([model])
    assert seen[0].std() > 0.5
    torch.testing.assert_close(seen[1], torch.full_like(seen[1], -1.0))


def test_samples_have_to_divide_by_classes(tmp_path):
    with pytest.raises(ValueError, match="samples=15 must be a multiple of classes=10"):
        SampleGrid("s.png", Euler(), shape=(1, 8, 8), classes=10, samples=15)
    stages = [torch.nn.Linear(1, 1)] * 2
    grid = SampleGrid(str(tmp_path / "s.png"), Euler(), shape=(1, 8, 8), classes=10, samples=10)
    with pytest.raises(ValueError, match="split into pipeline stages"):
        grid(stages)
