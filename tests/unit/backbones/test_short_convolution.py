"""The depthwise convolution with a backward of its own, against torch's in double precision."""

import pytest
import torch
import torch.nn.functional as F

from cl.backbones.mixers import _convolution
from cl.backbones.mixers._convolution import ShortConvolution, _Depthwise, _depthwise


@pytest.mark.parametrize(("tokens", "size", "piece"), [(9, 4, 512), (9, 4, 4), (7, 1, 3), (4, 4, 2)])
def test_gradients_of_every_order(tokens, size, piece, monkeypatch):
    monkeypatch.setattr(_convolution, "PIECE", piece)
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, tokens, 3), (3, size))
    )
    wanted = F.conv1d(x.mT, weight.unsqueeze(1), groups=3).mT
    torch.testing.assert_close(_Depthwise.apply(x, weight), wanted, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(_Depthwise.apply, (x, weight))
    assert torch.autograd.gradgradcheck(_Depthwise.apply, (x, weight))


def test_single_precision_takes_it_and_only_what_is_asked():
    x, weight = torch.randn(2, 40, 8), torch.randn(8, 4, requires_grad=True)
    y = _depthwise(x, weight)
    assert type(y.grad_fn).__name__ == "_DepthwiseBackward"
    (found,) = torch.autograd.grad(y.square().sum(), weight)
    double = weight.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(_depthwise(x.double(), double).square().sum(), double)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-6


def test_rows_one_by_one_under_vmap():
    x, layer = torch.randn(3, 12, 4), ShortConvolution(4, 4)
    tail, parameters = torch.zeros(1, 3, 4), {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, row):
        y, _ = torch.func.functional_call(layer, parameters, (row[None], tail, None))
        return y.square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for k, row in enumerate(x):
        for name, wanted in torch.func.grad(loss)(parameters, row).items():
            assert float((found[name][k] - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("has_resets", [False, True])
def test_parts_are_what_the_joined_channels_give(tokens, has_resets):
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, tokens, channels, generator=draw, dtype=torch.float64) for channels in (3, 1, 2)]
    layer, tail = ShortConvolution(6, 4).double(), torch.randn(2, 3, 6, generator=draw, dtype=torch.float64)
    reset = torch.rand(2, tokens, generator=draw) < 0.4 if has_resets else None
    wanted, left = layer(torch.cat(parts, -1), tail, reset)
    found, end = layer.parts(parts, tail, reset)
    torch.testing.assert_close(torch.cat(found, -1), wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(end, left)
    # what is left are the last inputs of the open document, zeros before them
    inputs = torch.cat((tail, torch.cat(parts, -1)), 1)
    for row in range(2):
        starts = reset[row].nonzero().flatten().tolist() if has_resets else []
        own = inputs[row, 3 + starts[-1] :][-3:] if starts else inputs[row, -3:]
        assert torch.equal(end[row, 3 - len(own) :], own)
        assert not end[row, : 3 - len(own)].any()
