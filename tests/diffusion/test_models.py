import pytest
import torch

from ditty_di.diffusion import DiT
from ditty_di.diffusion.models import _image, _patches
from ditty_di.models.weights import initialize, materialize, uninitialized
from ditty_di.parallelize.data_parallel import repeated_blocks


def small(**options):
    return DiT(**{"hidden": 16, "layers": 2, "heads": 2, **options})


def inputs(rows=3, channels=1, size=8):
    torch.manual_seed(0)
    return torch.randn(rows, channels, size, size), torch.tensor([0.0, 500.0, 999.0])[:rows]


def trained(model):
    """Away from the zeros that it begins with."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def test_patches_are_put_back_in_their_places():
    x = torch.randn(2, 3, 8, 8)
    tokens = _patches(x, 2)
    assert tokens.shape == (2, 16, 12)
    torch.testing.assert_close(_image(tokens, 2), x)
    # The first token is the upper left corner, not every fourth pixel.
    torch.testing.assert_close(tokens[0, 0].reshape(3, 2, 2), x[0, :, :2, :2])


@pytest.mark.parametrize("options", [{}, {"channels": 3, "patch": 4}, {"size": 16, "layers": 1}])
def test_the_output_has_the_shape_of_the_input_and_begins_as_zero(options):
    model = small(**options)
    x, t = inputs(channels=model.channels, size=model.size)
    out = model(x, timestep=t, class_labels=torch.tensor([0, 5, 9]))
    assert out.shape == x.shape
    assert not out.any()
    assert trained(model)(x, timestep=t, class_labels=torch.tensor([0, 5, 9])).any()


def test_time_and_class_matter_and_rows_do_not_mix():
    model = trained(small())
    x, t = inputs()
    labels = torch.tensor([0, 5, 9])
    out = model(x, t, labels)
    for other in (model(x, t + 1, labels), model(x, t, (labels + 1) % 10)):
        assert (other - out).abs().amax((1, 2, 3)).min() > 1e-5
    changed = x.clone()
    changed[0] += 1
    torch.testing.assert_close(model(changed, t, labels)[1:], out[1:])


def test_any_negative_label_is_no_class():
    model = trained(small())
    x, t = inputs()
    outputs = [model(x, t, torch.full((3,), label)) for label in (-1, -100, 10)]
    for output in [*outputs, model(x, t)]:
        torch.testing.assert_close(output, outputs[0])


def test_on_meta_it_is_filled_completely_and_repeatably():
    models = []
    for _ in range(2):
        model = small(device="meta")
        assert all(p.is_meta for p in model.parameters())
        materialize(model, torch.device("cpu"))
        initialize(model, device=torch.device("cpu"), seed=3)
        assert not uninitialized(model)
        models.append(model)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)
    built = small()
    for (name, a), b in zip(models[0].named_parameters(), built.parameters(), strict=True):
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.5), name


def test_its_blocks_are_found_to_be_sharded():
    model = small()
    assert repeated_blocks(model, None) is model.blocks


def test_the_contract_asks_for_classes_only_where_there_are_some():
    assert small().contract == "0:4:f timestep:1 class_labels:1:i64 -> prediction:4:f"
    assert small(classes=0).contract == "0:4:f timestep:1 -> prediction:4:f"
    x, t = inputs()
    assert small(classes=0)(x, t).shape == x.shape


@pytest.mark.parametrize("wrong", [{"patch": 3}, {"heads": 3}, {"heads": 16}])
def test_sizes_that_do_not_divide_are_refused(wrong):
    with pytest.raises(ValueError, match="must divide"):
        small(**wrong)
