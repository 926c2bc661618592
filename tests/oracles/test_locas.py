"""Side memories against a network written out with a wider layer; what begins, what moves, what stands still."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import strategies.locas as module
from cl.backbones.gpt import Gpt
from cl.core import Setting, UserError
from cl.hooks import Strategy
from cl.testing import ToyNet, toy_stream
from strategies.agem import Agem
from strategies.fpf import Fpf
from strategies.gdumb import Gdumb
from strategies.gem import Gem
from strategies.hypernet import Hypernet
from strategies.locas import Locas, Seen, Side, places, sides
from strategies.prd import Prd
from strategies.refresh import Refresh
from strategies.update_periods import UpdatePeriods
from strategies.weight_factorization import WeightFactorization
from streams.probes.word_problem import word_problem

RANK, ROWS, STEP = 3, 20, 0.3


class Starts(Strategy):
    """Notes the model at the start of every experience, behind the strategy."""

    settings = frozenset(Setting)

    def __init__(self):
        self.models = []

    def on_experience_start(self, state):
        self.models.append(copy.deepcopy(state.model))


def trained(lab, setting=Setting.DOMAIN_INCREMENTAL, **options):
    starts, strategy = Starts(), Locas(**({"rank": RANK, "rows": ROWS, "step": STEP} | options))
    recorder, trainer = lab.run([strategy, starts], setting, max_steps=4, epochs=None)
    return recorder, trainer, starts


def wide(weights, x, started):
    """The toy network as one wider layer: x W^T + b + relu(x A^T) B^T, then relu, then the head."""
    z = F.linear(x, weights["first.weight"], weights["first.bias"])
    for k in range(started):
        z = z + F.linear(F.linear(x, weights[f"first.side.up.{k}"]).relu(), weights[f"first.side.down.{k}"])
    return F.linear(z.relu(), weights["head.weight"], weights["head.bias"])


def test_a_side_memory_is_rows_of_a_wider_layer(lab):
    recorder, *_ = trained(lab)
    for step in recorder.steps:
        logits = wide(step.before, step.batch.inputs.flatten(1), step.experience)
        lab.close(step.terms["cross_entropy"], F.cross_entropy(logits, step.batch.targets), rtol=1e-5)


HEADS = {
    Setting.DOMAIN_INCREMENTAL: set(),
    Setting.CLASS_INCREMENTAL: {"head.weight", "head.bias"},
    Setting.TASK_INCREMENTAL: {"head.heads.{k}.weight", "head.heads.{k}.bias"},
}


@pytest.mark.parametrize("setting", HEADS)
def test_only_the_newest_moves_and_the_head_where_it_grows(lab, setting):
    recorder, *_ = trained(lab, setting)
    # rank times what the layer reads and writes, for every experience after the first
    held = [p.numel() for name, p in recorder.start.named_parameters() if ".side." in name]
    assert sum(held) == 2 * RANK * (recorder.start.first.in_features + recorder.start.first.out_features)
    for step in recorder.steps:
        moved = {name for name in step.before if not torch.equal(step.before[name], step.after[name])}
        k = step.experience - 1
        base = {"first.weight", "first.bias"} if k < 0 else {f"first.side.up.{k}", f"first.side.down.{k}"}
        head = HEADS[setting] or ({"head.weight", "head.bias"} if k < 0 else set())
        assert moved == base | {name.format(k=step.experience) for name in head}


@pytest.mark.parametrize("at_a_time", [256, 7, 1])
def test_begins_from_main_directions_and_a_gradient_step(lab, monkeypatch, at_a_time):
    """The rows are those that the strategy's own generator draws; the gradient is that of B in the wider layer."""
    monkeypatch.setattr(module, "ROWS_AT_A_TIME", at_a_time)
    _, trainer, starts = trained(lab)
    stream, seeds = trainer.state.stream, type(trainer.state.seeds)(trainer.state.seeds.root)
    for experience, model in list(zip(stream.experiences, starts.models, strict=True))[1:]:
        k = experience.id - 1
        data = experience.load()
        batch = stream.prepare(data.rows(torch.randperm(len(data), generator=seeds.named("locas"))[:ROWS]))
        x = batch.inputs.flatten(1)
        found = {name: p.detach() for name, p in model.named_parameters()}
        a = found[f"first.side.up.{k}"]
        # main directions: eigenvectors of x^T x, the largest first, firing on average
        largest = torch.linalg.eigh(x.T @ x).eigenvectors.flip(1)[:, :RANK].T
        torch.testing.assert_close((a @ largest.T).abs(), torch.eye(RANK, dtype=a.dtype), atol=1e-6, rtol=0)
        assert ((x @ a.T).sum(0) >= 0).all()
        b = torch.zeros_like(found[f"first.side.down.{k}"]).requires_grad_()
        loss = F.cross_entropy(wide(found | {f"first.side.down.{k}": b}, x, k + 1), batch.targets)
        (gradient,) = torch.autograd.grad(loss, b)
        torch.testing.assert_close(found[f"first.side.down.{k}"], -STEP * gradient, atol=1e-6, rtol=1e-4)
        assert gradient.abs().max() > 0
        after = wide(found, x, k + 1)
        assert F.cross_entropy(after, batch.targets) < F.cross_entropy(wide(found, x, k), batch.targets)


def test_texts_are_read_a_few_at_a_time(lab, monkeypatch):
    """As a language model can hold them, and as if all were read at once."""
    begun, sizes, forward = {}, [], ToyNet.forward

    def counted(self, batch):
        sizes.append(len(batch))
        return forward(self, batch)

    monkeypatch.setattr(ToyNet, "forward", counted)
    for at_a_time in (16, 1000):
        monkeypatch.setattr(module, "TEXTS_AT_A_TIME", at_a_time)
        sizes.clear()
        _, trainer, starts = trained(lab, Setting.CONTINUAL_PRETRAINING, rows=40)
        begun[at_a_time] = {name: p.detach() for name, p in starts.models[1].named_parameters()}
        assert sizes.count(40) == (4 if at_a_time == 1000 else 0) and sizes.count(8) == (0 if at_a_time == 1000 else 4)
        assert trainer.state.spent.forwards == 12 * lab.batch_size + 2 * 2 * 40
    lab.close(begun[16], begun[1000])
    assert begun[16]["head.side.down.0"].any()


def test_the_first_experience_is_naive(lab):
    recorder, *_ = trained(lab)
    plain, _ = lab.run([], max_steps=4, epochs=None)
    for ours, theirs in zip(recorder.steps[:4], plain.steps[:4], strict=True):
        for name, value in theirs.after.items():
            assert torch.equal(ours.after[name], value)


class Normed(ToyNet):
    def __init__(self, info):
        super().__init__(info)
        self.norm = torch.nn.BatchNorm1d(12)

    def features(self, inputs):
        return self.norm(super().features(inputs))


def test_running_statistics_stand_still_after_the_first_experience(lab):
    seen = []

    class Keeper(Strategy):
        settings = frozenset(Setting)

        def on_experience_end(self, state):
            assert state.model.norm.training, "modes are as found"
            seen.append({name: value.clone() for name, value in state.model.named_buffers()})

    recorder, _ = lab.run([Locas(rank=RANK, rows=ROWS), Keeper()], backbone=Normed, max_steps=4, epochs=None)
    first, *others = seen
    assert first["norm.num_batches_tracked"] == 4
    assert all(torch.equal(value, later[name]) for later in others for name, value in first.items())
    # and they are what training reads
    step = recorder.steps[-1]
    model = copy.deepcopy(recorder.ends[-1]).eval()
    model.load_state_dict(step.before, strict=False)
    lab.close(step.terms["cross_entropy"], lab.label_loss(model, step.batch).detach(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_directions_that_are_missing_are_drawn(dtype):
    side = Side(read=6, written=2, rank=5, count=1).to(dtype)
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    side.seen = Seen()
    side.seen.add(x)
    side.turn(0, torch.Generator().manual_seed(0))
    a = side.up[0].detach().float()
    torch.testing.assert_close(a.norm(dim=1), torch.ones(5), atol=0.01, rtol=0)
    assert (x.float() @ a.T).sum(0).min() >= -0.05
    assert not side.down[0].any() and side.seen is None


class Twice(ToyNet):
    """Reads its first layer a second time, on inputs of another kind, and has a layer that takes no part."""

    def __init__(self, info):
        super().__init__(info)
        self.unused = torch.nn.Linear(3, 3)

    def features(self, inputs):
        return super().features(inputs) + super().features(inputs.flatten(1).flip(1) ** 2)


def test_a_layer_that_is_read_twice_is_begun_from_both_readings(lab):
    starts, strategy = Starts(), Locas(rank=RANK, rows=ROWS, step=STEP)
    _, trainer = lab.run([strategy, starts], backbone=Twice, max_steps=2, epochs=None)
    stream, seeds = trainer.state.stream, type(trainer.state.seeds)(trainer.state.seeds.root)
    data, model = stream.experiences[1].load(), starts.models[1]
    batch = stream.prepare(data.rows(torch.randperm(len(data), generator=seeds.named("locas"))[:ROWS]))
    x = batch.inputs.flatten(1)
    both = torch.cat((x, x.flip(1) ** 2))
    found = {name: p.detach() for name, p in model.named_parameters()}
    a, b = found["first.side.up.0"], torch.zeros_like(found["first.side.down.0"]).requires_grad_()
    largest = torch.linalg.eigh(both.T @ both).eigenvectors.flip(1)[:, :RANK].T
    torch.testing.assert_close((a @ largest.T).abs(), torch.eye(RANK, dtype=a.dtype), atol=1e-6, rtol=0)
    z = F.linear(both, found["first.weight"], found["first.bias"]) + F.linear(F.linear(both, a).relu(), b)
    once, again = z.relu().chunk(2)
    logits = F.linear(once + again, found["head.weight"], found["head.bias"])
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, batch.targets), b)
    torch.testing.assert_close(found["first.side.down.0"], -STEP * gradient, atol=1e-6, rtol=1e-4)
    assert not found["unused.side.down.0"].any()


def test_a_memory_beside_frozen_weights_begins_too(lab):
    def frozen(info):
        net = ToyNet(info)
        net.first.requires_grad_(False)
        return net

    recorder, _ = lab.run([Locas(rank=RANK, rows=ROWS)], backbone=frozen, max_steps=2, epochs=None)
    last = recorder.steps[-1]
    assert last.before["first.side.down.1"].any()
    assert not torch.equal(last.before["first.side.up.1"], last.after["first.side.up.1"])


class HeadOnly(ToyNet):
    """Without a linear layer but the head."""

    def __init__(self, info):
        super().__init__(info)
        self.first, self.head = torch.nn.Conv2d(1, 1, 1), torch.nn.Linear(64, info.num_outputs)

    def features(self, inputs):
        return self.first(inputs).flatten(1)


def test_where_nothing_else_is_linear_the_head_has_the_side_memories(lab):
    recorder, _ = lab.run([Locas(rank=2, rows=ROWS)], Setting.CLASS_INCREMENTAL, HeadOnly, max_steps=2, epochs=None)
    for step in recorder.steps:
        moved = {name for name in step.before if not torch.equal(step.before[name], step.after[name])}
        k = step.experience - 1
        others = {"first.weight", "first.bias"} if k < 0 else {f"head.side.up.{k}", f"head.side.down.{k}"}
        assert moved == {"head.weight", "head.bias"} | others


def test_gated_mlps_are_the_places_of_a_decoder():
    stream = word_problem("z2", [8], [], train_rows=16, eval_rows=8)
    net = Gpt(stream.info, width=8, num_heads=2, num_layers=2)
    assert places(net) == [block.mlp for block in net.blocks]
    tokens = stream.transform(stream.experiences[0].load().rows(torch.arange(16)).inputs)
    plain = net.features(tokens)
    wrapped = Locas(rank=2).wrap(net, replace(stream.info, num_experiences=3))
    assert len(sides(wrapped)) == 2
    assert torch.equal(wrapped.features(tokens), plain), "nothing has begun"


GATED = {f"layers.{number}.mlp" for number in (0, 1)}
LINEAR = {"attention.dense", "attention.query_key_value", "dense_4h_to_h", "dense_h_to_4h"}


@pytest.mark.parametrize(
    ("config", "lora", "wanted"),
    [
        ({"model_type": "llama"}, None, GATED),
        ({"model_type": "llama"}, {"rank": 2, "target_modules": ["gate_proj", "up_proj", "down_proj"]}, GATED),
        ({"model_type": "gpt_neox"}, None, LINEAR),
    ],
    ids=["gated", "gated with adapters", "linear"],
)
def test_so_they_are_of_models_of_transformers_and_never_the_head(config, lora, wanted):
    pytest.importorskip("transformers")
    from cl.backbones.hf import Hf

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    info = toy_stream(Setting.CONTINUAL_PRETRAINING).info
    model = Hf(info, config={**config, **sizes}, lora=lora)
    names = {id(module): name for name, module in model.named_modules()}
    found = [names[id(layer)] for layer in places(model)]
    assert all(any(name.endswith(each) for each in wanted) for name in found)
    assert len(found) == (2 if "llama" in config.values() else 8)
    Locas(rank=2).wrap(model, info)
    assert {(len(side.up[0][0]), len(side.down[0])) for side in sides(model).values()} >= {(16, 16)}


def test_wrong_options_are_one_sentence():
    for options, says in (({"rank": 0}, "locas.rank is 0"), ({"step": -1}, "locas.step is -1"), ({"rows": 0}, "rows")):
        with pytest.raises(UserError, match=says):
            Locas(**options)
    with pytest.raises(UserError, match="locas needs linear layers, and Flatten has none"):
        places(torch.nn.Flatten())


BESIDE = [Agem(), Gem(), UpdatePeriods({"*": 2}), Refresh(), Fpf(), Gdumb(), Hypernet(), WeightFactorization()]


@pytest.mark.parametrize("other", BESIDE, ids=lambda other: other.name)
def test_what_would_move_the_frozen_network_or_stand_still_in_it_is_refused(lab, other):
    for pair in ([Locas(), other], [other, Locas()]):
        with pytest.raises(UserError, match=f"(locas|weight_factorization) .*, and ({other.name}|locas) .*; leave one"):
            lab.run(pair)


def test_classes_need_their_own_weights_too(lab):
    with pytest.raises(UserError, match=r"locas lets nothing but its side memories learn .*, and prd needs other we"):
        lab.run([Prd(), Locas()], Setting.CLASS_INCREMENTAL)
