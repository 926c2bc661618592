"""Every image backbone: shapes, sizes, gradients, and that rows do not touch each other."""

import doctest
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from cl.backbones.convnet import Convnet
from cl.backbones.mlp import Mlp
from cl.backbones.recurrent import Recurrent
from cl.backbones.resnet18 import Resnet18
from cl.core import Batch, Setting, StreamInfo, UserError

BUILDERS = {
    "mlp": Mlp,
    "mlp_linear": partial(Mlp, hidden=[]),
    "mlp_xavier": partial(Mlp, hidden=[100, 100], init="xavier"),
    "convnet": Convnet,
    "convnet_weight_norm": partial(Convnet, head="weight_norm"),
    "resnet18": partial(Resnet18, width=4),
    "lstm": Recurrent,
    "gru": partial(Recurrent, kind="gru", hidden=32, num_layers=2),
}
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (1, 32, 32)]
SETTINGS = {Setting.CLASS_INCREMENTAL: (10, 1), Setting.DOMAIN_INCREMENTAL: (10, 1), Setting.TASK_INCREMENTAL: (2, 5)}


def info(shape, setting=Setting.CLASS_INCREMENTAL):
    num_outputs, num_heads = SETTINGS[setting]
    return StreamInfo("rows", setting, shape, num_outputs, 5, num_heads=num_heads)


def batch(shape, setting=Setting.CLASS_INCREMENTAL, count=6):
    rows = torch.arange(count)
    inputs = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))
    return Batch(inputs, rows % 2, rows, rows, rows % 5 if setting == Setting.TASK_INCREMENTAL else None)


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BUILDERS)
def test_output_shapes_and_gradients(name, shape, setting):
    backbone = BUILDERS[name](info(shape, setting))
    output = backbone(batch(shape, setting))
    assert output.logits.shape == (6, SETTINGS[setting][0])
    assert output.hidden.shape == (6, backbone.num_features)
    output.logits.square().sum().backward()
    for parameter_name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", BUILDERS)
def test_seed_decides_the_weights_and_forward_draws_nothing(name):
    built = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        built.append(BUILDERS[name](info((1, 8, 8))))
    weights = [nn.utils.parameters_to_vector(b.parameters()) for b in built]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    before = torch.get_rng_state()
    outputs = [b(batch((1, 8, 8))).logits for b in built[:2]]
    assert torch.equal(*outputs)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("name", BUILDERS)
def test_permuted_rows_give_permuted_outputs(name, is_training):
    backbone, rows = BUILDERS[name](info((1, 28, 28))).train(is_training), batch((1, 28, 28))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(backbone(rows[order]).logits, backbone(rows).logits[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BUILDERS)
def test_rows_are_independent_at_evaluation(name):
    backbone, rows = BUILDERS[name](info((1, 8, 8))).eval(), batch((1, 8, 8))
    alone = torch.cat([backbone(rows[i : i + 1]).logits for i in range(6)])
    torch.testing.assert_close(backbone(rows).logits, alone, rtol=1e-4, atol=1e-5)


def convolution(width_in, width, kernel):
    return width * width_in * kernel**2


def resnet_count(channels, width, num_outputs):
    """Convolutions without bias, two numbers per channel of batch norm."""
    total = convolution(channels, width, 3) + 2 * width
    width_in = width
    for stage in range(4):
        wide = width * 2**stage
        total += convolution(width_in, wide, 3) + 3 * convolution(wide, wide, 3) + 8 * wide
        if width_in != wide:
            total += convolution(width_in, wide, 1) + 2 * wide
        width_in = wide
    return total + (width_in + 1) * num_outputs


def test_parameter_counts_equal_formulas_and_published_numbers():
    assert count(Mlp(info((1, 28, 28)))) == 785 * 256 + 257 * 256 + 257 * 10
    assert count(Mlp(info((1, 28, 28)), hidden=[])) == 7850
    assert count(Convnet(info((1, 28, 28)))) == 26 * 10 + 251 * 20 + 321 * 50 + 51 * 10 == 21840
    assert count(Convnet(info((3, 32, 32)))) == 76 * 10 + 251 * 20 + 501 * 50 + 51 * 10
    assert count(Convnet(info((1, 8, 8)))) == 26 * 10 + 251 * 20 + 81 * 50 + 51 * 10
    assert count(Resnet18(info((3, 32, 32)), width=64)) == resnet_count(3, 64, 10) == 11_173_962
    assert count(Resnet18(info((1, 28, 28)))) == resnet_count(1, 20, 10)
    assert count(Recurrent(info((3, 32, 32)))) == 4 * 128 * (96 + 128 + 2) + 129 * 10
    gru = Recurrent(info((1, 28, 28)), kind="gru", hidden=32, num_layers=2)
    assert count(gru) == 3 * 32 * (28 + 32 + 2) + 3 * 32 * (32 + 32 + 2) + 33 * 10
    multi = Mlp(info((1, 8, 8), Setting.TASK_INCREMENTAL), hidden=[20])
    assert count(multi) == 65 * 20 + 5 * 21 * 2


def test_resnet_reaches_the_last_block_as_4x4():
    seen = []
    backbone = Resnet18(info((3, 32, 32)), width=4)
    backbone.blocks[-1].register_forward_hook(lambda *args: seen.append(args[2].shape[2:]))
    backbone(batch((3, 32, 32)))
    assert seen == [(4, 4)]


def test_xavier_has_zero_biases_and_bounded_weights():
    backbone = Mlp(info((1, 8, 8)), hidden=[100], init="xavier")
    for layer in (backbone.body[1], backbone.head):
        assert not layer.bias.any()
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert 0.95 * bound < layer.weight.abs().max() <= bound


@pytest.mark.parametrize(("kind", "cell"), [("lstm", nn.LSTMCell), ("gru", nn.GRUCell)])
def test_recurrent_reads_rows_of_pixels_from_top_to_bottom(kind, cell):
    """A plain loop over image rows, channels side by side."""
    backbone, rows = Recurrent(info((3, 5, 4)), kind=kind, hidden=7), batch((3, 5, 4))
    step = cell(12, 7)
    step.load_state_dict({name.removesuffix("_l0"): p for name, p in backbone.layers.named_parameters()})
    state = None
    for y in range(5):
        pixels = torch.cat([rows.inputs[:, c, y] for c in range(3)], dim=1)
        state = step(pixels, state)
    hidden = state[0] if kind == "lstm" else state
    torch.testing.assert_close(backbone(rows).hidden, hidden)


def test_recurrent_reads_sequences_of_vectors():
    assert Recurrent(info((9, 4)))(batch((9, 4))).logits.shape == (6, 10)


@pytest.mark.parametrize(
    ("build", "shape", "says"),
    [
        (partial(Mlp, hidden=100), (1, 8, 8), "backbone.hidden is 100; it must be a list of widths"),
        (partial(Mlp, hidden="big"), (1, 8, 8), "backbone.hidden is 'big'"),
        (partial(Mlp, hidden=[10, 0]), (1, 8, 8), "backbone.hidden is 0; it must be an integer of at least 1"),
        (partial(Mlp, init="he"), (1, 8, 8), "backbone.init is 'he'; it must be torch or xavier"),
        (Convnet, (1, 3, 8), "backbone convnet reads images (channels, height, width) of at least 4x4 pixels"),
        (Convnet, (16,), "the rows of rows have the shape (16,)"),
        (partial(Convnet, channels=[10]), (1, 8, 8), "backbone.channels is [10]; it must be a list of two integers"),
        (partial(Convnet, channels=[10, 2.5]), (1, 8, 8), "backbone.channels is 2.5"),
        (partial(Convnet, hidden=-1), (1, 8, 8), "backbone.hidden is -1"),
        (
            partial(Convnet, head="cosine"),
            (1, 8, 8),
            "backbone.head is 'cosine'; it must be one of linear, weight_norm",
        ),
        (Resnet18, (9, 4), "backbone resnet18 reads images"),
        (partial(Resnet18, width=0), (3, 32, 32), "backbone.width is 0"),
        (partial(Recurrent, kind="rnn"), (1, 8, 8), "backbone.kind is 'rnn'; it must be one of lstm, gru"),
        (partial(Recurrent, num_layers=0), (1, 8, 8), "backbone.num_layers is 0"),
        (Recurrent, (16,), "backbone recurrent reads images (channels, height, width) or sequences (steps, width)"),
    ],
)
def test_wrong_options_are_one_sentence(build, shape, says):
    with pytest.raises(UserError) as caught:
        build(info(shape))
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["convnet", "mlp", "recurrent", "resnet18"])
def test_config_names_the_class_of_the_file(name):
    from omegaconf import OmegaConf

    node = OmegaConf.load(Path(__file__).parents[3] / "configs" / "backbone" / f"{name}.yaml")
    assert node == {"_target_": f"cl.backbones.{name}.{name.capitalize()}"}
    assert issubclass(getattr(import_module(f"cl.backbones.{name}"), name.capitalize()), nn.Module)


def test_examples_in_docstrings():
    assert doctest.testmod(import_module("cl.backbones._heads")).failed == 0
