"""What the LoRA strategies share: adapters, merging them, and what is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from cl.backbones.gpt import Gpt
from cl.config import TrainerConfig
from cl.core import Setting, UserError
from cl.hooks import Strategy
from cl.testing import ToyNet, toy_stream
from cl.trainer import Trainer
from strategies import _lora
from strategies._lora import LoraStrategy, pairs
from strategies.ewc import Ewc
from strategies.i_lora import ILora
from strategies.lwf import Lwf
from strategies.mas import Mas
from strategies.o_lora import OLora
from strategies.reg_lora import RegLora
from strategies.si import Si
from streams.builtin_text import builtin_text

TEXT = Setting.CONTINUAL_PRETRAINING


def test_change_is_that_of_peft_and_merging_leaves_the_model_as_it_is(lora):
    recorder, trainer = lora.trained(max_steps=5, epochs=None)
    model, rows = trainer.state.model, recorder.steps[0].batch
    before = model(rows).logits
    found = pairs(model)
    assert {name.rpartition(".")[2] for name in found} == {"first", "head"}
    for pair in found.values():
        wanted = pair.layer.get_delta_weight("default")
        assert wanted.abs().max() > 1e-4
        torch.testing.assert_close(
            pair.change(), wanted.T if isinstance(pair.layer.base_layer, nn.Embedding) else wanted
        )
        pair.merge()
        pair.restart(torch.Generator().manual_seed(0))
        assert pair.change().abs().max() == 0
    torch.testing.assert_close(model(rows).logits, before)
    (F.cross_entropy(model(rows).logits.flatten(0, 1), rows.targets.flatten())).backward()
    assert all((pair.a if pair._is_embedding is False else pair.b).abs().max() > 0 for pair in found.values())


@pytest.mark.parametrize("strategy", [OLora, RegLora])
def test_an_adapter_of_a_weight_that_another_layer_reads_is_not_merged_into_it(strategy):
    """Merged into the head's, it would change the embedding that is tied to it."""
    stream = builtin_text(context=16, train_tokens=160, eval_tokens=160, general=False)
    for is_tied, target in ((True, "head"), (False, "head"), (True, "gate")):
        backbone = partial(Gpt, width=32, is_tied=is_tied, lora={"rank": 2, "target_modules": [target]})
        make = partial(Trainer, stream, backbone, [strategy()], optimizer=partial(torch.optim.SGD, lr=0.1))
        if (is_tied, target) != (True, "head"):
            make()
            continue
        with pytest.raises(UserError, match="head shares its weight with another layer; leave it out of"):
            make()


def test_a_new_adapter_is_new_for_the_optimizer_too(lora):
    ages = []

    class Ages(Strategy):
        settings = frozenset({TEXT})

        def on_experience_start(self, state):
            ages.append([len(state.optimizer.state.get(p, {})) for p in state.parameters().values()])

    lora.trained(OLora(), Ages(), optimizer=partial(torch.optim.Adam, lr=0.01))
    assert ages == [[0] * 4] * 3


@pytest.mark.parametrize("strategy", [OLora(), RegLora(), ILora()], ids=lambda s: s.name)
def test_a_model_without_adapters_is_refused(lab, strategy):
    with pytest.raises(UserError, match="ToyNet has none; take backbone=hf or gpt with") as error:
        lab.run([strategy], TEXT)
    assert str(error.value).startswith(strategy.name)


@pytest.mark.parametrize("other", [RegLora(), ILora(20, 4), Ewc(), Si(), Mas()], ids=lambda s: s.name)
def test_what_goes_by_old_adapters_is_refused_beside_new_ones(lora, other):
    for pair in ([OLora(), other], [other, OLora()]):
        with pytest.raises(UserError, match=r"begins new ones, and \w+ goes by the old ones; leave one of the two out"):
            lora.trained(*pair)


def test_a_teacher_says_what_the_model_said_before_its_adapter_was_added(lora):
    """Behind the strategy that adds it; in front it would have the adapter twice."""
    said = []

    class Asking(Strategy):
        settings = frozenset({TEXT})

        def __init__(self, name, teacher=None):
            self.name, self.teacher = name, teacher

        def on_experience_end(self, state):
            rows = state.prepare(state.data.rows(torch.arange(9)))
            with torch.no_grad():
                said.append(functional_call(state.model, self.teacher.teacher if self.teacher else {}, (rows,)).logits)

    lwf = Lwf()
    lora.trained(Asking("before"), OLora(), lwf, Asking("after", lwf), optimizer=partial(torch.optim.Adam, lr=0.02))
    for model, teacher in zip(said[::2], said[1::2], strict=True):
        torch.testing.assert_close(teacher, model)
    with pytest.raises(UserError, match=r"put o_lora first, as in strategy=\[o_lora,lwf\]"):
        lora.trained(lwf, OLora())


@pytest.mark.parametrize("strategy", [OLora(), RegLora(), ILora(20, 4)], ids=lambda s: s.name)
def test_our_own_decoder_learns_through_adapters_alone(strategy, tmp_path, monkeypatch):
    monkeypatch.setenv("CL_CACHE", str(tmp_path))
    stream = builtin_text(order=["docs", "arithmetic"], context=16, train_tokens=2000, eval_tokens=160, general=False)
    trainer = Trainer(
        stream,
        partial(Gpt, width=16, num_layers=1, num_heads=2, lora={"rank": 2}),
        [strategy],
        optimizer=partial(torch.optim.Adam, lr=0.01),
        config=TrainerConfig(max_steps=4, batch_size=4, device="cpu"),
    )
    before = {name: p.detach().clone() for name, p in trainer.state.model.named_parameters()}
    found = pairs(trainer.state.model)
    assert len(found) == 7 and all(name.startswith("blocks.0.") for name in found)
    assert trainer.run().status == "done"
    after = dict(trainer.state.model.named_parameters())
    moved = {name for name, p in before.items() if not torch.equal(p, after[name])}
    # a strategy may merge its adapters into the weights that they adapt, and nothing else
    allowed = ("lora_", "base_layer") if isinstance(strategy, OLora | RegLora) else ("lora_",)
    assert moved and all(any(part in name for part in allowed) for name in moved)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(OLora, strength=-1), "o_lora.strength is -1"),
        (partial(OLora, measure="cosine"), "o_lora.measure is 'cosine'"),
        (partial(RegLora, top=0), "reg_lora.top is 0"),
        (partial(RegLora, top=101.0), "reg_lora.top is 101.0"),
        (partial(ILora, ema_decay=1.0), "i_lora.ema_decay is 1.0"),
        (partial(ILora, target="mean"), "i_lora.target is 'mean'"),
        (partial(ILora, evaluate="both"), "i_lora.evaluate is 'both'"),
    ],
)
def test_bad_values_are_one_sentence(make, words):
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}])
@pytest.mark.parametrize("strategy", [OLora, RegLora, ILora])
def test_models_of_transformers(strategy, config):
    """Linear layers and GPT-2's transposed ones: the end of an experience changes no answer."""
    pytest.importorskip("transformers")
    from cl.backbones.hf import Hf
    from streams.builtin_text import builtin_text

    answers = []

    class Around(Strategy):
        settings = frozenset({TEXT})

        def on_experience_end(self, state):
            with torch.no_grad():
                rows = state.prepare(state.data.rows(torch.arange(4)))
                answers.append(state.model.eval()(rows).logits)
            state.model.train()

    first, last = Around(), type("Last", (Around,), {})()
    last.name = "last"
    Trainer(
        builtin_text(context=16, train_tokens=640, eval_tokens=320),
        partial(Hf, config=config, lora={"rank": 2}),
        [first, strategy(), last],
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        config=TrainerConfig(batch_size=8, device="cpu"),
    ).run()
    for before, after in zip(answers[::2], answers[1::2], strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_they_share_one_base():
    assert all(issubclass(each, LoraStrategy) for each in (OLora, RegLora, ILora))
    assert _lora.pairs(ToyNet(toy_stream(TEXT).info)) == {}
