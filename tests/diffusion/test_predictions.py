import pytest
import torch

from ditty_di.diffusion import Epsilon, Sample, Velocity, cosine


@pytest.mark.parametrize("prediction", [Epsilon(), Sample(), Velocity()])
def test_the_target_tells_sample_and_noise(prediction):
    x_0, noise = torch.randn(2, 5, 1, 3, 3, dtype=torch.float64)
    signal, scale = cosine(1000).scales(torch.tensor([1, 100, 500, 800, 950]), x_0)
    x_t = signal * x_0 + scale * noise
    target = prediction.target(x_0, noise, signal, scale)
    again = prediction.split(target, x_t, signal, scale)
    # float32 scales whose squares add up to 1 within rounding, divided by small ones.
    torch.testing.assert_close(again, (x_0, noise), rtol=1e-4, atol=1e-4)


def test_targets_are_the_published_ones():
    x_0, noise = torch.tensor([[2.0]]), torch.tensor([[-1.0]])
    signal, scale = torch.tensor([[0.6]]), torch.tensor([[0.8]])
    targets = [p.target(x_0, noise, signal, scale).item() for p in (Epsilon(), Sample())]
    assert targets == [-1.0, 2.0]
    v = Velocity().target(x_0, noise, signal, scale).item()
    assert v == pytest.approx(0.6 * -1.0 - 0.8 * 2.0)
