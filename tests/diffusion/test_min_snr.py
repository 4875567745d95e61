"""The weight of a time in a squared error, by what the model predicts."""

import pytest
import torch

from ditty_di.diffusion import DDPM, Epsilon, MinSNR, Sample, Velocity, cosine
from tests.diffusion.contexts import context

SCHEDULE = cosine(1000)
WEIGHTS = {
    Epsilon: lambda snr, least: least / snr,
    Velocity: lambda snr, least: least / (snr + 1),
    Sample: lambda snr, least: least,
}


@pytest.mark.parametrize("prediction", WEIGHTS)
@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_a_squared_error_has_the_weight_of_the_paper(prediction, gamma):
    images = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    batch, ctx = DDPM(SCHEDULE, prediction()).process(images, context(images, torch.zeros(64)))
    target, output = ctx["target"], batch.flip(0)
    scaled, ctx = MinSNR(SCHEDULE, prediction(), gamma=gamma).process(output, ctx)
    kept = SCHEDULE.alphas_cumprod[ctx["forward_kwargs"]["timestep"]]
    snr = kept / (1 - kept)
    assert snr.min() < gamma < snr.max()
    weights = WEIGHTS[prediction](snr, snr.clamp(max=gamma))
    expected = weights * (output - target).square().mean((1, 2, 3))
    torch.testing.assert_close((scaled - ctx["target"]).square().mean((1, 2, 3)), expected)


def test_a_weight_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"min_snr: gamma=0 must be above 0"):
        MinSNR(SCHEDULE, Epsilon(), gamma=0)
