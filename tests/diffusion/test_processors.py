"""Noise belongs to rows, and the loss's target to the noise."""

from functools import partial

import pytest
import torch

from ditty_di.diffusion import (
    DDPM,
    ClassLabels,
    Epsilon,
    FlowMatching,
    Velocity,
    cosine,
    logit_normal,
)
from ditty_di.diffusion.draws import fingerprints
from tests.diffusion.contexts import context

IMAGES = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8)
SCHEDULE = cosine(1000)


def ddpm(**options):
    return DDPM(SCHEDULE, Epsilon(), **options)


def processed(processor, images=IMAGES, labels=LABELS, **place):
    return processor.process(images, context(images, labels, **place))


@pytest.mark.parametrize("processor", [ddpm(), FlowMatching(), ClassLabels(0.5)])
def test_rows_have_the_same_noise_in_any_micro_batch_and_on_any_rank(processor):
    def flat(batch, ctx):
        return [batch, ctx["target"], *ctx["forward_kwargs"].values()]

    whole = flat(*processed(processor))
    parts = [
        flat(*processed(processor, IMAGES[i : i + 2], LABELS[i : i + 2])) for i in range(0, 8, 2)
    ]
    for one, many in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(one, torch.cat(many), rtol=0, atol=0)


@pytest.mark.parametrize("processor", [ddpm, FlowMatching])
def test_other_rows_steps_and_seeds_have_other_noise(processor):
    def noisy(images=IMAGES, seed=0, **place):
        return processed(processor(seed=seed), images, **place)[0]

    torch.testing.assert_close(noisy(), noisy(), rtol=0, atol=0)
    for other in (noisy(step=2), noisy(seed=1), noisy(IMAGES + 1)):
        assert (noisy() - other).abs().amax((1, 2, 3)).min() > 1e-3
    # The same image again and again, as one overfits on: each time another noise.
    alike = noisy(IMAGES[:1].expand(8, -1, -1, -1))
    assert len(torch.unique(alike.flatten(1), dim=0)) == 8


def test_noise_does_not_touch_the_global_generator():
    torch.manual_seed(1)
    processed(ddpm())
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))


def test_every_validation_has_the_same_noise():
    def noisy(step):
        return processed(ddpm(), step=step, training=False)[0]

    assert torch.equal(noisy(10), noisy(20))


def test_ddpm_mixes_as_its_schedule_says_and_uses_all_times():
    images = IMAGES[:1].expand(4000, 1, 4, 4)
    for prediction in (Epsilon(), Velocity()):
        x_t, ctx = processed(DDPM(SCHEDULE, prediction), images, torch.zeros(4000))
        t = ctx["forward_kwargs"]["timestep"]
        signal, scale = SCHEDULE.scales(t, images)
        _, noise = prediction.split(ctx["target"], x_t, signal, scale)
        torch.testing.assert_close(signal * images + scale * noise, x_t, rtol=0, atol=1e-4)
    assert t.dtype == torch.int64
    assert (t.min() < 5, t.max() > 994) == (True, True)
    assert (t.float() / 1000).mean().item() == pytest.approx(0.5, abs=0.02)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.02)
    assert noise.std().item() == pytest.approx(1.0, abs=0.02)


def test_flow_matching_follows_the_straight_line():
    x_t, ctx = processed(FlowMatching())
    t = (ctx["forward_kwargs"]["timestep"] / 1000).reshape(-1, 1, 1, 1)
    velocity = ctx["target"]
    torch.testing.assert_close(x_t - t * velocity, IMAGES)  # back at time 0
    noise = x_t + (1 - t) * velocity
    torch.testing.assert_close(noise - IMAGES, velocity)
    assert ((t >= 0) & (t < 1)).all()


def test_logit_normal_times_are_what_they_are_called():
    u = torch.linspace(0, 1, 100_001)[1:-1]
    logits = torch.logit(logit_normal(u.double(), mean=0.5, std=2.0))
    assert logits.mean().item() == pytest.approx(0.5, abs=1e-3)
    assert logits.std().item() == pytest.approx(2.0, abs=1e-2)
    _, ctx = processed(FlowMatching(partial(logit_normal, mean=8.0)))
    assert (ctx["forward_kwargs"]["timestep"] > 900).all()


def test_labels_become_the_models_condition_and_some_are_dropped():
    labels = torch.arange(4000) % 10
    images = torch.zeros(4000, 1, 1, 1)
    _, ctx = processed(ClassLabels(0.25), images, labels)
    given = ctx["forward_kwargs"]["class_labels"]
    dropped = given == -1
    assert torch.equal(given[~dropped], labels[~dropped])
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert ctx["mask"].shape == (4000, 1, 1, 1)
    assert ctx["mask"].all(), "a row without its class is trained on as any other"
    _, ctx = processed(ClassLabels(0.25), images, labels, training=False)
    assert torch.equal(ctx["forward_kwargs"]["class_labels"], labels)


def test_dropping_is_independent_of_the_noise():
    """One stream for both would drop the classes of certain times only."""
    images = torch.arange(4000.0).reshape(4000, 1, 1, 1)
    _, ctx = processed(ClassLabels(0.5), images, torch.zeros(4000, dtype=torch.int64))
    _, ctx = ddpm().process(images, ctx)
    dropped = ctx["forward_kwargs"]["class_labels"] == -1
    times = ctx["forward_kwargs"]["timestep"].float() / 1000
    assert times[dropped].mean().item() == pytest.approx(0.5, abs=0.03)


def test_rows_that_fill_up_do_not_count():
    labels = torch.tensor([3, -100])
    _, ctx = processed(ClassLabels(0.0), IMAGES[:2], labels)
    assert ctx["mask"].flatten().tolist() == [True, False]
    assert ctx["forward_kwargs"]["class_labels"].tolist() == [3, -1]


def test_a_dtype_is_kept():
    for processor in (ddpm(), FlowMatching()):
        x_t, ctx = processed(processor, IMAGES.bfloat16())
        assert x_t.dtype == ctx["target"].dtype == torch.bfloat16


def test_an_impossible_share_is_refused():
    with pytest.raises(ValueError, match="class_labels: dropout=10 must be"):
        ClassLabels(10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
def test_fingerprints_tell_rows_apart_by_any_bit_and_its_place(dtype):
    for width in (5, 8):
        ones = torch.eye(width, dtype=dtype)
        pairs = ones[1:] + ones[:-1]
        rows = torch.cat([0 * ones[:1], ones, 2 * ones, pairs, 2 * pairs])
        assert len(set(fingerprints(rows))) == len(rows)
        assert fingerprints(rows[2:3]) == fingerprints(rows)[2:3]


def test_fingerprints_tell_images_of_two_values_apart():
    signs = torch.randint(2, (2000, 16), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    assert len(set(fingerprints(signs))) == len(torch.unique(signs, dim=0))
    assert fingerprints(signs.reshape(2000, 4, 4)) == fingerprints(signs)
