"""Everything that is found by listing a folder, on a card against the processor; without one, on a pretended card.

Kernels have files of their own (tests/kernels/test_gpu.py, test_pretended_card.py).
"""

from contextlib import nullcontext

import card_cases as cases
import pytest
import torch

from cl.core import Setting
from cl.testing import CARD, ToyNet, pretended_card
from strategies.derpp import Derpp

NEEDS_CARD = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"))
FAST = 2
"""Cases of a test that CI tries on a pretended card; all of them take minutes."""


def each(*found, pretended=None):
    """A parameter for every case and kind of card; `pretended` is how many of them are tried on that one."""
    every = [case for some in found for case in some]
    real = [pytest.param(*case[1:], "real", id=f"{case[0]}-real", marks=NEEDS_CARD) for case in every]
    others = [
        pytest.param(*case[1:], "pretended", id=f"{case[0]}-pretended", marks=() if number < FAST else pytest.mark.slow)
        for number, case in enumerate(every[:pretended])
    ]
    return pytest.mark.parametrize(("build", "inputs", "device"), real + others, indirect=["device"])


@pytest.fixture
def device(request):
    with nullcontext() if request.param == "real" else pretended_card():
        yield str(CARD)


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Convolutions of a card round to ten bits unless they are told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def same(build, inputs, read, device, tolerance=1e-8, **how):
    """What is read on the device is what is read on the processor, wherever torch's own generator stands."""
    found = []
    for seed, where in enumerate((device, "cpu")):
        torch.manual_seed(seed)
        found.append(read(build(), inputs(), where, **how))
    there, here = found
    assert there.keys() == here.keys()
    for name, value in here.items():
        other = there[name].detach().cpu()
        if value.is_floating_point():
            bound = tolerance * max(1.0, value.abs().max().item()) if value.numel() else 0.0
            torch.testing.assert_close(other, value.detach(), atol=bound, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert torch.equal(other, value), name


@each(cases.mixer_cases())
def test_mixers_in_double_precision(build, inputs, device):
    """In torch: outputs, states and gradients."""
    same(build, inputs, cases.read_mixer, device)


@each(cases.mixer_cases(), pretended=FAST)
def test_mixers_in_single_precision(build, inputs, device):
    """By kernels."""
    same(build, inputs, cases.read_mixer, device, 2e-3, dtype=torch.float32)


MEMORIES = list(cases.memory_cases())


@each(MEMORIES, cases.backbone_cases(), pretended=len(MEMORIES))
def test_backbones(build, inputs, device):
    """On a pretended card all backbones run in their contract; those with a memory, which is handed on, here too."""
    same(build, inputs, cases.read_backbone, device)


@each(cases.buffer_cases())
def test_buffers(build, inputs, device):
    same(build, inputs, cases.fill, device)


@each(cases.run_cases(), pretended=FAST)
def test_runs(build, inputs, device):
    """In any precision a run begins where the processor's does; in the full one it goes where that goes.

    On a pretended card all strategies run in their contract.
    """
    network, stream, precision = inputs()
    losses, trainer = cases.short_run(build(), network, stream, precision, device)
    expected, _ = cases.short_run(build(), network, stream, "fp32", "cpu")
    assert trainer.ledger.result.status == "done"
    assert losses[0] == pytest.approx(expected[0], rel=5e-2)
    if precision == "fp32":
        assert losses == pytest.approx(expected, rel=2e-2, abs=1e-2)
    weights = trainer.state.model.state_dict()
    assert all(value.isfinite().all() for value in weights.values())
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("device", [pytest.param("real", marks=NEEDS_CARD), "pretended"], indirect=True)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_goes_on_where_it_stopped(precision, device, tmp_path):
    """With a buffer, and in fp16 with the scale of the losses."""

    def run(**how):
        given = cases.toy_run(ToyNet, Setting.DOMAIN_INCREMENTAL, precision)
        return cases.short_run(Derpp(**Derpp.contract.toy), *given, device, **how)

    whole, _ = run()
    begun, trainer = run(run_dir=tmp_path, stop_at=5)
    assert trainer.ledger.result.status == "interrupted"
    rest, again = run(run_dir=tmp_path, resume=True)
    assert begun + rest == pytest.approx(whole, rel=1e-3)
    if precision == "fp16":
        assert again.state.scaler.get_scale() > 0
