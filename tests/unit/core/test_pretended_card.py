"""The pretended card: it computes what the processor computes, and refuses what a real card refuses."""

import io

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from cl.testing import CARD, pretended_card


@pytest.fixture
def card():
    with pretended_card():
        yield


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


FUNCTIONS = {
    "column list": lambda x, t: x[:, [0, 2]] * t[:, [0, 2]],
    "written list": lambda x, t: x.clone().index_put((torch.tensor([1, 2], device=x.device),), t[:2]),
    "cpu index": lambda x, t: x[torch.tensor([0, 2])],
    "mask": lambda x, t: x[t > 0].cumsum(0),
    "attention": lambda x, t: F.scaled_dot_product_attention(x[None], t[None], x[None]),
    "distillation": lambda x, t: F.kl_div(x.log_softmax(1), t.log_softmax(1), reduction="sum", log_target=True),
    "conjugate": lambda x, t: (torch.complex(x, t) * torch.complex(t, x).conj()).real,
    "complex": lambda x, t: torch.exp(torch.complex(-x.abs(), t)).cumprod(0).imag,
    "in place": lambda x, t: (x * 2).t_().mul_(t.T).relu_(),
    "new tensor": lambda x, t: x * x.new_tensor([1.0, 2.0, 3.0, 4.0]) + torch.tensor(t.tolist(), device=x.device),
    "scalar": lambda x, t: x * torch.tensor(2.0) + t.sum().item(),
    "vmap": lambda x, t: vmap(grad(lambda row, other: (row * other).sin().sum()))(x, t),
    "zero gradient": lambda x, t: (
        torch.autograd.grad((x * t).sum() + 0 * x.detach().sum(), x, create_graph=True)[0] + x
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_numbers_and_gradients_are_those_of_the_processor(name, card):
    results = []
    for device in (torch.device("cpu"), CARD):
        x, t = drawn(3, 4).to(device).requires_grad_(), drawn(3, 4, seed=1).to(device)
        y = FUNCTIONS[name](x, t)
        y.square().sum().backward()
        assert y.device == x.grad.device == device
        results.append((y.detach().cpu(), x.grad.cpu()))
    for there, here in zip(*results, strict=True):
        # attention may take another path: the sums in another order
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6 if name == "attention" else 0.0)


def test_an_operation_with_a_kernel_of_its_own_rounds_there_as_here():
    """The operations that the gradient of silu could be made of round otherwise; the processor's is taken outside."""

    def gradient(device):
        x = drawn(64, 64).to(device).requires_grad_()
        F.silu(x).square().sum().backward()
        return x.grad.cpu()

    here = gradient(torch.device("cpu"))
    with pretended_card():
        assert torch.equal(gradient(CARD), here)


def test_a_network_trains_there_as_here(card):
    def trained(device):
        torch.manual_seed(0)
        layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)
        model = nn.Sequential(*layers).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        for step in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(drawn(6, 4, seed=step).to(device)), torch.arange(6, device=device) % 3).backward()
            optimizer.step()
        with torch.inference_mode():
            return [p.cpu() for p in model.state_dict().values()], model.eval()(drawn(6, 4).to(device)).tolist()

    (ours, answers), (theirs, expected) = trained(CARD), trained(torch.device("cpu"))
    assert answers == expected
    assert all(map(torch.equal, ours, theirs))


def test_weights_are_given_to_a_function_and_saved(card):
    layer, x = nn.Linear(4, 2).to(CARD), drawn(3, 4).to(CARD)
    doubled = {name: 2 * p for name, p in layer.named_parameters()}
    assert torch.equal(functional_call(layer, doubled, x).cpu(), 2 * layer(x).cpu())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert torch.equal(saved["weight"], layer.weight.cpu())


@torch.library.custom_op("cl_tests::plus_ones", mutates_args=())
def plus_ones(x: torch.Tensor, is_right: bool) -> torch.Tensor:
    return x + torch.ones(x.shape, device=x.device if is_right else "cpu")


def test_operations_written_in_python_are_looked_into(card):
    x = drawn(3, 4).to(CARD)
    assert torch.equal(plus_ones(x, True).cpu(), drawn(3, 4) + 1)
    with pytest.raises(RuntimeError, match="same device"):
        plus_ones(x, False)


REFUSED = {
    "sum": lambda x: x + torch.ones(4),
    "product": lambda x: x @ torch.ones(4, 2),
    "mask": lambda x: x.masked_fill(torch.zeros(3, 4, dtype=torch.bool), 0.0),
    "joined": lambda x: torch.cat([x, torch.ones(1, 4)]),
    "written into": lambda x: torch.ones(3, 4).add_(x),
    "written number": lambda x: torch.tensor(1.0).mul_(x.sum()),
    "indexed": lambda x: torch.ones(3)[x[0].long()],
    "values": lambda x: x.index_put_((torch.tensor([0]),), torch.ones(1, 4)),
    "generator": lambda x: torch.randn(3, 4, device=x.device, generator=torch.Generator()),
    "drawn in place": lambda x: x.normal_(generator=torch.Generator()),
    "layer": lambda x: nn.Linear(4, 2)(x),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_lies_on_two_sides_is_refused(name, card):
    with pytest.raises(RuntimeError, match=r"same device|device type for generator"):
        REFUSED[name](drawn(3, 4).to(CARD))


def test_numpy_is_refused(card):
    with pytest.raises(TypeError, match=r"Tensor.cpu\(\)"):
        drawn(3).to(CARD).numpy()


def test_it_is_gone_afterwards():
    there = torch.cuda.is_available()
    with pretended_card():
        assert torch.cuda.is_available()
    assert torch.cuda.is_available() == there
    assert torch.ones(2).device.type == "cpu"
