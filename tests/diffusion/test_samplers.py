"""Samplers against Gaussian data, of which the perfect model is known."""

import pytest
import torch

from ditty_di.diffusion import (
    DDIM,
    Epsilon,
    Euler,
    Sample,
    Velocity,
    cosine,
    generate,
    guided,
    linear,
)

MEAN, STD = torch.tensor([1.5, -0.5]), 0.4
LABELS = torch.zeros(4000, dtype=torch.int64)


def ideal(schedule, prediction):
    """What a model that knows the data's distribution would predict."""

    def model(x, timestep, class_labels):
        signal, scale = schedule.scales(timestep, x)
        # Of two normal variables with a given sum, the expected value of the first.
        x_0 = MEAN + signal * STD**2 / (signal**2 * STD**2 + scale**2) * (x - signal * MEAN)
        return prediction.target(x_0, (x - signal * x_0) / scale, signal, scale)

    return model


def ideal_velocity(x, timestep, class_labels):
    t = (timestep / 1000)[:, None]
    variance = (1 - t) ** 2 * STD**2 + t**2
    x_0 = MEAN + (1 - t) * STD**2 / variance * (x - (1 - t) * MEAN)
    noise = t / variance * (x - (1 - t) * MEAN)
    return noise - x_0


def drawn(sampler, model):
    """Samples as `generate` makes them, with noise from one generator: faster for many rows."""
    generator = torch.Generator().manual_seed(0)

    def noise(step):
        return torch.randn(len(LABELS), 2, generator=generator)

    return sampler(guided(model, LABELS), noise(-1), noise)


def assert_gaussian(samples):
    torch.testing.assert_close(samples.mean(0), MEAN, atol=0.03, rtol=0)
    torch.testing.assert_close(samples.std(0), torch.full((2,), STD), atol=0.02, rtol=0)
    assert torch.corrcoef(samples.T)[0, 1].abs() < 0.05


@pytest.mark.parametrize("prediction", [Epsilon(), Sample(), Velocity()])
@pytest.mark.parametrize(("eta", "steps"), [(0.0, 100), (1.0, 400)])  # the second converges slower
def test_ddim_samples_the_data(prediction, eta, steps):
    schedule = linear(1000)
    sampler = DDIM(schedule, prediction, steps=steps, eta=eta)
    assert_gaussian(drawn(sampler, ideal(schedule, prediction)))


def test_ddim_samples_the_data_from_a_cosine_schedule():
    schedule = cosine(1000)
    sampler = DDIM(schedule, Velocity(), steps=100)
    assert_gaussian(drawn(sampler, ideal(schedule, Velocity())))


def test_ddpm_as_ddim_adds_the_posteriors_noise():
    """With eta 1 and every step, the variance of a step is that of q(x_{t-1} | x_t, x_0) in Ho et
    al. 2020, equation 7."""
    schedule = linear(10)
    x = torch.ones(20_000, 1)
    zero = torch.zeros_like(x)
    seen = []

    def predict(x, t):
        seen.append(x)
        return zero  # epsilon: x_0 = x / signal

    DDIM(schedule, Epsilon(), steps=10, eta=1.0)(
        predict, x, lambda i: torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
    )
    kept = schedule.alphas_cumprod
    variance = (1 - kept[8]) / (1 - kept[9]) * schedule.betas[9]
    assert seen[1].var().item() == pytest.approx(variance.item(), rel=0.05)
    mean = (kept[8] / kept[9]).sqrt()
    assert seen[1].mean().item() == pytest.approx(mean.item(), rel=1e-2)


def test_euler_samples_the_data():
    assert_gaussian(drawn(Euler(steps=100), ideal_velocity))


def test_one_euler_step_along_a_straight_line_is_exact():
    end = torch.tensor([3.0, 4.0])

    def model(x, timestep, class_labels):
        return x - end  # at time 1, x is the noise

    torch.testing.assert_close(
        generate(model, Euler(steps=1), LABELS[:3], shape=(2,)), end.expand(3, 2)
    )


def test_ddim_visits_the_last_time_first_and_ends_without_noise():
    assert DDIM(cosine(1000), Velocity(), steps=4).times() == [999, 749, 499, 249, -1]
    assert len(set(DDIM(cosine(10), Velocity(), steps=10).times())) == 11


def test_clipping_bounds_every_estimate():
    schedule = cosine(1000)

    def model(x, timestep, class_labels):
        return 5 * torch.ones_like(x)

    sampler = DDIM(schedule, Sample(), steps=10, clip=1.0)
    samples = generate(model, sampler, LABELS[:4], shape=(2,))
    torch.testing.assert_close(samples, torch.ones(4, 2))


def test_guidance_is_linear_in_its_strength():
    def model(x, timestep, class_labels):
        return x * (class_labels[:, None] + 2.0)

    x, t, labels = torch.ones(2, 1), torch.zeros(2), torch.tensor([4, 9])
    for guidance in (0.0, 0.5, 1.0, 3.0):
        out = guided(model, labels, guidance=guidance)(x, t)
        # -1 stands for no class: 1 without, 6 and 11 with it.
        torch.testing.assert_close(out.flatten(), 1 + guidance * torch.tensor([5.0, 10.0]))


def test_unneeded_passes_are_not_run():
    rows = []

    def model(x, timestep, class_labels):
        rows.append(len(x))
        return x

    for guidance in (0.0, 1.0, 2.0):
        guided(model, LABELS[:3], guidance=guidance)(torch.zeros(3, 1), torch.zeros(3))
    assert rows == [3, 3, 6]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_depend_on_seed_and_row_alone(eta):
    schedule = cosine(100)
    model, sampler = ideal(schedule, Velocity()), DDIM(schedule, Velocity(), steps=5, eta=eta)

    def samples(rows=7, **options):
        torch.rand(1)  # the global generator has no part in it
        return generate(model, sampler, LABELS[:rows], shape=(2,), **options)

    whole = samples()
    torch.testing.assert_close(samples(batch_size=3), whole)
    torch.testing.assert_close(samples(rows=4), whole[:4])
    assert not torch.allclose(samples(seed=1), whole)
    assert len(whole.unique(dim=0)) == 7
    assert samples(rows=0).shape == (0, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDIM(cosine(10), Epsilon(), steps=11), "max_steps=11 must be from 1 to 10"),
        (lambda: DDIM(cosine(10), Epsilon(), steps=5, eta=-1), "eta=-1"),
        (lambda: Euler(steps=0), "max_steps=0"),
    ],
)
def test_impossible_samplers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
