"""Models of transformers whose own weights are in half precision, under adapters in float32."""

import copy
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from cl.backbones.hf import Hf
from cl.config import TrainerConfig
from cl.core import Setting, UserError
from cl.seeding import Seeds
from cl.testing import equal, toy_stream
from cl.trainer import Trainer
from strategies.replay import Replay
from streams._tokenizer_folder import write_tokenizer
from streams._tokenizers import Bytes, read_tokenizer

pytest.importorskip("peft")
beside = runpy.run_path(str(Path(__file__).with_name("test_hf.py")))
info, batch, packed, GPT2, MISTRAL, MAMBA, BART = (
    beside[name] for name in ("info", "batch", "packed", "GPT2", "MISTRAL", "MAMBA", "BART")
)
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LORA = {"rank": 2}


def model(about=None, **options):
    with Seeds(0).as_global("init"):
        return Hf(about or info(), **({"lora": LORA} | options)).eval()


def own(network):
    return {name: p for name, p in network.named_parameters() if not p.requires_grad}


def adapters(network):
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def moved(network):
    """Adapters that say something: B is 0 in new ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapters(network).values():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return network


@pytest.mark.parametrize("dtype", HALVES)
def test_a_folder_is_read_in_the_form_that_is_asked_for(tmp_path, dtype):
    write_tokenizer(tmp_path, Bytes())
    codec = read_tokenizer(str(tmp_path), download=False)
    about = info(codec.separator, codec.vocabulary, codec.digest)
    model(about, lora=None).write(tmp_path)
    network = model(about, pretrained=str(tmp_path), dtype=dtype)
    assert {p.dtype for p in adapters(network).values()} == {torch.float32}
    found = {
        name.removeprefix("model.base_model.model.").replace(".base_layer", ""): p for name, p in own(network).items()
    }
    expected = {name: value.to(HALVES[dtype]) for name, value in load_file(tmp_path / "model.safetensors").items()}
    assert equal({name: p.detach() for name, p in found.items()}, expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("config", [None, GPT2, MISTRAL], ids=["llama", "gpt2", "window"])
def test_losses_and_gradients_are_those_of_the_same_weights_in_float64(dtype, config):
    network, rows = moved(model(config=config, dtype=dtype)), batch(packed())
    whole = copy.deepcopy(network).double()
    found, expected = (
        torch.autograd.grad(
            F.cross_entropy(each(rows).logits.double().flatten(0, 1), rows.targets.flatten()), adapters(each).values()
        )
        for each in (network, whole)
    )
    assert {gradient.dtype for gradient in found} == {torch.float32}
    apart = sum((x - y).square().sum() for x, y in zip(found, expected, strict=True)).sqrt()
    assert apart <= 4 * torch.finfo(HALVES[dtype]).eps * sum(y.square().sum() for y in expected).sqrt()


@pytest.mark.parametrize("dtype", HALVES)
def test_whether_documents_stay_apart_is_found_out_in_half_precision(dtype):
    with pytest.raises(UserError, match=r"backbone\.is_separated=false"):
        model(config=MAMBA, dtype=dtype, lora={"target_modules": ["in_proj"]})
    with pytest.raises(UserError, match="or counts on there"):
        model(config=BART, dtype=dtype)
    network, tokens = moved(model(dtype=dtype)), packed()
    other = tokens.clone()
    other[:, :5] = (other[:, :5] + 1) % 10
    assert torch.equal(network(batch(tokens)).logits[:, 5:], network(batch(other)).logits[:, 5:])


@pytest.mark.parametrize("dtype", ["bf16", "float64", None, 16])
def test_other_forms_are_refused(dtype):
    with pytest.raises(UserError, match=f"backbone.dtype is {dtype!r}; it must be one of float32, bfloat16, float16"):
        model(dtype=dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_all_weights_are_not_trained_in_half_precision(dtype):
    with pytest.raises(UserError, match=f"backbone.dtype is '{dtype}' and every weight is trained"):
        model(dtype=dtype, lora=None)


class Stopping(Replay):
    """Asks for a stop after step 5."""

    def on_step_end(self, state, batch, output):
        super().on_step_end(state, batch, output)
        if self.trainer and state.step == 5:
            self.trainer.request_stop()


def trained(run_dir, precision, dtype, stops=False, resume=False):
    strategy = Stopping(20)
    strategy.name, strategy.trainer = "replay", None
    trainer = Trainer(
        toy_stream(Setting.CONTINUAL_PRETRAINING),
        partial(Hf, lora=LORA, dtype=dtype),
        [strategy],
        optimizer=partial(torch.optim.AdamW, lr=0.03, weight_decay=0.1),
        config=TrainerConfig(
            max_steps=3, batch_size=8, eval_rows=16, precision=precision, device="cpu", checkpoint_every=2
        ),
        run_dir=run_dir,
    )
    strategy.trainer = trainer if stops else None
    before = copy.deepcopy(own(trainer.state.model))
    return trainer, before, trainer.run(resume=resume)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_adapters_learn_under_every_precision_and_the_base_stays(precision, dtype):
    trainer, before, result = trained(None, precision, dtype)
    assert result.R[0][0] < result.R_init[0]
    assert equal(own(trainer.state.model), before) and {p.dtype for p in before.values()} == {HALVES[dtype]}
    assert {p.dtype for p in adapters(trainer.state.model).values()} == {torch.float32}
    assert trainer.state.scaler.is_enabled() == ("float16" in (dtype, {"fp16": "float16"}.get(precision)))


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "bfloat16"), ("fp16", "float16")])
def test_a_stopped_run_goes_on(tmp_path, precision, dtype):
    trainer, _, result = trained(tmp_path / "whole", precision, dtype)
    assert trained(tmp_path / "run", precision, dtype, stops=True)[2].status == "interrupted"
    resumed, _, again = trained(tmp_path / "run", precision, dtype, resume=True)
    assert again.R == result.R
    assert equal(resumed.state.model.state_dict(), trainer.state.model.state_dict())
