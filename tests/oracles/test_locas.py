"""Side memories against a network written out with a wider layer; what begins, what moves, what stands still."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cl.backbones.gpt import Gpt
from cl.core import Setting, UserError
from cl.hooks import Strategy
from cl.testing import ToyNet, toy_stream
from strategies.locas import Locas, Side, places, sides
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


@pytest.mark.parametrize("setting", [Setting.DOMAIN_INCREMENTAL, Setting.CLASS_INCREMENTAL])
def test_only_the_newest_moves_and_the_head_where_it_grows(lab, setting):
    recorder, *_ = trained(lab, setting)
    for step in recorder.steps:
        moved = {name for name in step.before if not torch.equal(step.before[name], step.after[name])}
        k = step.experience - 1
        base = {"first.weight", "first.bias"} if k < 0 else {f"first.side.up.{k}", f"first.side.down.{k}"}
        has_head = k < 0 or setting == Setting.CLASS_INCREMENTAL
        assert moved == base | ({"head.weight", "head.bias"} if has_head else set())


def test_begins_from_main_directions_and_a_gradient_step(lab):
    """The rows are those that the strategy's own generator draws; the gradient is that of B in the wider layer."""
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


def test_directions_that_are_missing_are_drawn():
    side = Side(read=6, written=2, rank=5, count=1)
    x, gradient = torch.randn(2, 6), torch.randn(2, 2)
    side.begin(0, x, gradient, 0.1, torch.Generator().manual_seed(0))
    torch.testing.assert_close(side.up[0].norm(dim=1), torch.ones(5))
    assert (x @ side.up[0].T).sum(0).min() >= 0


def test_gated_mlps_are_the_places_of_a_decoder():
    stream = word_problem("z2", [8], [], train_rows=16, eval_rows=8)
    net = Gpt(stream.info, width=8, num_heads=2, num_layers=2)
    assert places(net) == [block.mlp for block in net.blocks]
    tokens = stream.transform(stream.experiences[0].load().rows(torch.arange(16)).inputs)
    plain = net.features(tokens)
    wrapped = Locas(rank=2).wrap(net, replace(stream.info, num_experiences=3))
    assert len(sides(wrapped)) == 2
    assert torch.equal(wrapped.features(tokens), plain), "nothing has begun"


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"model_type": "llama"}, {f"layers.{number}.mlp" for number in (0, 1)}),
        (
            {"model_type": "gpt_neox"},
            {"attention.dense", "attention.query_key_value", "dense_4h_to_h", "dense_h_to_4h"},
        ),
    ],
    ids=["gated", "linear"],
)
def test_so_they_are_of_models_of_transformers_and_never_the_head(config, wanted):
    pytest.importorskip("transformers")
    from cl.backbones.hf import Hf

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    info = toy_stream(Setting.CONTINUAL_PRETRAINING).info
    model = Hf(info, config={**config, **sizes})
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
