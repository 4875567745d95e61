import math

import pytest
import torch

from ditty_di.diffusion import NoiseSchedule, cosine, linear, scaled_linear

#: (steps, time) -> (beta, alphas_cumprod) of diffusers 0.42.1:
#: DDPMScheduler(num_train_timesteps=steps, beta_schedule=...), scaled_linear with
#: beta_start=0.00085 and beta_end=0.012 as latent diffusion has them.
DIFFUSERS = {
    linear: {
        (1000, 0): (9.999999747378752e-05, 0.9998999834060669),
        (1000, 500): (0.010059959255158901, 0.07779665291309357),
        (1000, 999): (0.019999999552965164, 4.035830352222547e-05),
        (50, 25): (0.01025306060910225, 0.8736623525619507),
    },
    cosine: {  # squaredcos_cap_v2
        (1000, 0): (4.128422369831242e-05, 0.9999586939811707),
        (1000, 500): (0.003155691549181938, 0.4922850430011749),
        (1000, 999): (0.9990000128746033, 2.4287349909002387e-09),
        (50, 25): (0.06304977834224701, 0.46270686388015747),
    },
    scaled_linear: {
        (1000, 0): (0.0008499999530613422, 0.9991499781608582),
        (1000, 500): (0.004814953543245792, 0.27633246779441833),
        (1000, 999): (0.011999999172985554, 0.00466009508818388),
        (50, 25): (0.004923819564282894, 0.9341012239456177),
    },
}


@pytest.mark.parametrize("make", DIFFUSERS)
def test_schedules_have_the_values_of_diffusers(make):
    for (steps, t), (beta, kept) in DIFFUSERS[make].items():
        schedule = make(steps)
        # Products of a thousand factors may be rounded in another order elsewhere.
        assert schedule.betas[t].item() == pytest.approx(beta, rel=1e-6)
        assert schedule.alphas_cumprod[t].item() == pytest.approx(kept, rel=1e-4)


def test_the_cosine_is_the_one_of_the_paper():
    kept = cosine(1000).alphas_cumprod

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 300, 900):
        assert kept[t].item() == pytest.approx(f(t + 1) / f(0), rel=1e-4)


def test_scales_belong_to_their_rows_and_conserve_variance():
    schedule, like = linear(100), torch.zeros(4, 3, 2, dtype=torch.float64)
    signal, noise = schedule.scales(torch.tensor([0, 50, 99, -1]), like)
    assert signal.shape == noise.shape == (4, 1, 1)
    assert signal.dtype == torch.float64
    torch.testing.assert_close(signal**2 + noise**2, torch.ones_like(signal))
    kept = schedule.alphas_cumprod[[0, 50, 99]].double()
    torch.testing.assert_close(signal.flatten()[:3], kept.sqrt())
    assert (signal[3].item(), noise[3].item()) == (1.0, 0.0)


@pytest.mark.parametrize("betas", [[], [0.1, 1.0], [0.0, 0.1], [[0.1]]])
def test_what_is_no_schedule_is_refused(betas):
    with pytest.raises(ValueError, match="betas"):
        NoiseSchedule(torch.tensor(betas))
