"""O-LoRA, RegLoRA and I-LoRA against their equations, written out over the adapters of every layer."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cl.backbones.gpt import Gpt
from cl.config import TrainerConfig
from cl.core import IGNORED, Batch, Setting, UserError
from cl.hooks import Strategy
from cl.testing import ToyNet, toy_stream
from cl.trainer import Trainer
from strategies import _lora
from strategies._lora import LoraStrategy, pairs
from strategies.i_lora import ILora
from strategies.o_lora import OLora
from strategies.reg_lora import RegLora
from streams.builtin_text import builtin_text

peft = pytest.importorskip("peft")
TEXT = Setting.CONTINUAL_PRETRAINING
RANK, SCALE = 3, 2.0
A = {"first": "first.lora_embedding_A.default", "head": "head.lora_A.default.weight"}
B = {"first": "first.lora_embedding_B.default", "head": "head.lora_B.default.weight"}


class Adapted(ToyNet):
    """Frozen weights, and an adapter beside the embedding and the head."""

    def __init__(self, info):
        super().__init__(info)
        self.requires_grad_(False)
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK * SCALE, target_modules=["first", "head"])
        peft.inject_adapter_in_model(config, self)


def trained(lab, *strategies, **options):
    return lab.run(list(strategies), TEXT, backbone=Adapted, **options)


def of(recorder, experience):
    return [step for step in recorder.steps if step.experience == experience]


def adapters(model, layer):
    values = dict(model.named_parameters()) if isinstance(model, nn.Module) else model
    return (next(value for name, value in values.items() if name.endswith(part[layer])) for part in (A, B))


# adapters


def test_change_is_that_of_peft_and_merging_leaves_the_model_as_it_is(lab):
    recorder, trainer = trained(lab, max_steps=5, epochs=None)
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


def test_a_new_adapter_is_new_for_the_optimizer_too(lab):
    ages = []

    class Ages(Strategy):
        settings = frozenset({TEXT})

        def on_experience_start(self, state):
            ages.append([len(state.optimizer.state.get(p, {})) for p in state.parameters().values()])

    trained(lab, OLora(), Ages(), optimizer=partial(torch.optim.Adam, lr=0.01))
    assert ages == [[0] * 4] * 3


@pytest.mark.parametrize("strategy", [OLora(), RegLora(), ILora()], ids=lambda s: s.name)
def test_a_model_without_adapters_is_refused(lab, strategy):
    with pytest.raises(UserError, match="ToyNet has none; take backbone=hf or gpt with") as error:
        lab.run([strategy], TEXT)
    assert str(error.value).startswith(strategy.name)


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


# O-LoRA


def o_lora_check(lab, measure, decay):
    recorder, trainer = trained(lab, OLora(0.5, decay, measure))
    ends = [of(recorder, k)[-1].after for k in range(2)]
    for step in (*of(recorder, 1)[::5], *of(recorder, 2)[::5]):
        total = 0.0
        for layer in A:
            a, b = adapters(step.before, layer)
            for past in ends[: step.experience]:
                for row in next(adapters(past, layer)):
                    for new in a:
                        inner = (row * new).sum()
                        total += 0.5 * (abs(inner) if measure == "absolute" else inner**2)
            total += decay * (a.square().sum().sqrt() + b.square().sum().sqrt())
        assert total > 0
        lab.close(step.terms.get("o_lora", 0.0), total, rtol=1e-5, atol=1e-7)
    assert [rows.shape[0] for rows in trainer.strategies[0].past.values()] == [2 * RANK] * 2


@pytest.mark.parametrize(("measure", "decay"), [("absolute", 0.0), ("squared", 0.1)])
def test_o_lora_is_the_sum_of_all_inner_products(lab, measure, decay):
    o_lora_check(lab, measure, decay)


def test_the_oracle_needs_the_past(lab, monkeypatch):
    monkeypatch.setattr(OLora, "penalty", lambda *_: None)
    lab.dies(lambda: o_lora_check(lab, "absolute", 0.0))


def test_o_lora_is_the_frozen_sum_of_all_adapters(lab):
    """W_0 and every adapter that was ever finished make the weights of the last experience."""
    recorder, trainer = trained(lab, OLora())
    first, last = recorder.start, trainer.state.model
    for layer in A:
        total = getattr(first, layer).base_layer.weight.clone()
        for k in range(2):
            a, b = adapters(of(recorder, k)[-1].after, layer)
            change = SCALE * b @ a
            total += change.T if layer == "first" else change
        torch.testing.assert_close(getattr(last, layer).base_layer.weight, total)
        assert of(recorder, 2)[0].before[B["head"]].abs().max() == 0


def test_a_stronger_penalty_makes_subspaces_more_orthogonal(lab):
    cosines = []
    for strength in (0.0, 2.0):
        recorder, _ = trained(lab, OLora(strength), epochs=3)
        ends = [next(adapters(of(recorder, k)[-1].after, "head")) for k in range(2)]
        left, right = (F.normalize(each, dim=1) for each in ends)
        cosines.append((left @ right.T).abs().mean().item())
    assert cosines[1] < 0.6 * cosines[0], cosines


# RegLoRA


def reg_lora_check(lab, measure):
    top, strength = 25.0, 0.3 if measure == "absolute" else 0.02
    recorder, trainer = trained(lab, RegLora(strength, top, measure))
    marked = dict.fromkeys(A)
    for experience in (1, 2):
        for layer in A:
            a, b = adapters(of(recorder, experience - 1)[-1].after, layer)
            size = (SCALE * b @ a).abs()
            smallest = size.flatten().sort(descending=True).values[round(size.numel() * top / 100) - 1]
            new = size >= smallest
            marked[layer] = new if marked[layer] is None else new | marked[layer]
        for step in of(recorder, experience)[1::5]:
            total = 0.0
            for layer in A:
                a, b = adapters(step.before, layer)
                change = (SCALE * b @ a)[marked[layer]]
                total += strength * (change.abs() if measure == "absolute" else change**2).sum()
            assert total > 0
            lab.close(step.terms.get("reg_lora", 0.0), total, rtol=1e-5, atol=1e-9)
    for name, mask in trainer.strategies[0].marked.items():
        assert torch.equal(mask, marked[name.rpartition(".")[2]])


@pytest.mark.parametrize("measure", ["absolute", "squared"])
def test_reg_lora_holds_the_largest_entries_of_every_experience(lab, measure):
    reg_lora_check(lab, measure)


def test_the_oracle_needs_the_marks(lab, monkeypatch):
    monkeypatch.setattr(RegLora, "penalty", lambda *_: None)
    lab.dies(lambda: reg_lora_check(lab, "absolute"))


def test_marks_are_kept_as_bits(lab):
    _, trainer = trained(lab, RegLora(0.3, 25.0))
    saved, copy = trainer.strategies[0].state_dict(), RegLora()
    # 12 x 8 entries of the embedding and of the head are 12 bytes each
    assert [(bits.dtype, len(bits)) for bits in saved["bits"].values()] == [(torch.uint8, 12)] * 2
    copy.load_state_dict(saved)
    assert all(torch.equal(mask, trainer.strategies[0].marked[name]) for name, mask in copy.marked.items())


# I-LoRA


def i_lora_check(lab, target="slow", decay=0.9, weight=0.5, gamma=0.8):
    recorder, trainer = trained(lab, ILora(40, 10, weight, gamma, decay, target))
    fast, slow_model = deepcopy(recorder.start), deepcopy(recorder.start)
    slow = {name: p.clone() for name, p in recorder.start.named_parameters() if p.requires_grad}
    for number, step in enumerate(recorder.steps, start=1):
        assert len(step.batch.parts) == (1 if step.experience == 0 else 2)
        if step.experience and number % 4 == 0:
            current, stored = (step.batch[part.rows] for part in step.batch.parts)
            fast.load_state_dict(step.before, strict=False)
            slow_model.load_state_dict(slow, strict=False)

            def ce(rows):
                return F.cross_entropy(fast(rows).logits.flatten(0, 1), rows.targets.flatten())

            was = slow_model(stored).hidden.detach()
            if target == "max":
                was = torch.maximum(was, fast(stored).hidden.detach())
            loss = (ce(current) + weight * ce(stored)) / (1 + weight)
            loss = loss + gamma * ((fast(stored).hidden - was) ** 2).mean()
            trainable = [p for p in fast.parameters() if p.requires_grad]
            names = [name for name, p in fast.named_parameters() if p.requires_grad]
            wanted = dict(zip(names, torch.autograd.grad(loss, trainable), strict=True))
            lab.close(step.gradients, wanted, 1e-4, 1e-6)
            assert gamma * ((fast(stored).hidden - was) ** 2).mean() > 1e-6
        a = min(1 - 1 / (number + 1), decay)
        slow = {name: a * value + (1 - a) * step.after[name] for name, value in slow.items()}
        if number == 1:
            assert a == 0.5
    lab.close(trainer.strategies[0].slow, slow, 1e-9, 1e-12)
    return trainer, slow_model, slow


@pytest.mark.parametrize("target", ["slow", "max"])
def test_i_lora_is_the_plain_loss_and_the_moving_mean(lab, target):
    i_lora_check(lab, target)


@pytest.mark.parametrize("part", ["pull", "mean"])
def test_the_oracle_needs_the_slow_adapter(lab, monkeypatch, part):
    if part == "pull":
        monkeypatch.setattr(ILora, "penalty", lambda *_: None)
    else:
        monkeypatch.setattr(ILora, "on_run_start", lambda self, state: setattr(self, "slow", _lora_copy(state)))
    lab.dies(lambda: i_lora_check(lab))


def _lora_copy(state):
    return {name: torch.zeros_like(p) for name, p in state.parameters().items()}


def test_the_slow_adapter_answers(lab):
    trainer, slow_model, slow = i_lora_check(lab)
    slow_model.load_state_dict(slow, strict=False)
    fast = trained(lab, ILora(40, 10, 0.5, 0.8, 0.9, evaluate="fast"))[1].ledger.result
    data = trainer.state.stream.eval_sets[0].load()
    rows = data.rows(torch.arange(len(data)))
    losses = [
        F.cross_entropy(model(rows).logits.flatten(0, 1), rows.targets.flatten()).item()
        for model in (slow_model, trainer.state.model)
    ]
    assert trainer.ledger.result.R[-1][0] == pytest.approx(losses[0], rel=1e-5)
    assert fast.R[-1][0] == pytest.approx(losses[1], rel=1e-5) and abs(losses[0] - losses[1]) > 1e-3


def test_tokens_that_are_not_learnt_are_not_pulled(lab):
    strategy = ILora(10)
    recorder, trainer = trained(lab, strategy, max_steps=3, epochs=None)
    batch = recorder.steps[0].batch.current()
    rows = Batch(batch.inputs, batch.targets.clone(), batch.experience_id, batch.sample_ids)
    mixed = batch.extended(rows, "replay", "i_lora")
    output = trainer.state.model(mixed)
    whole = strategy.penalty(trainer.state, mixed, output)
    mixed.targets[16:, 2:] = IGNORED
    some = strategy.penalty(trainer.state, mixed, output)
    slow = strategy._answer(trainer.state, rows).hidden
    wanted = (output.hidden[16:] - slow)[:, :2].square().mean()
    lab.close(some.detach(), wanted.detach(), 1e-5, 1e-9)
    assert not torch.allclose(whole, some)
    mixed.targets[16:] = IGNORED
    assert strategy.penalty(trainer.state, mixed, output).item() == 0.0


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
