"""The mixture of experts against every expert computed, and what a backbone may add to the loss or keep for later."""

from functools import partial

import pytest
import torch
from torch import nn

from cl.backbones import Backbone
from cl.backbones.gpt import Gpt
from cl.backbones.mlps.moe import Moe
from cl.config import TrainerConfig
from cl.core import Output, Setting
from cl.observe import Observer
from cl.trainer import Trainer
from strategies.ewc import Ewc
from strategies.mas import Mas
from streams.builtin_text import builtin_text
from streams.split import split

WIDTH = 12


def moe(**options):
    torch.manual_seed(0)
    made = Moe(WIDTH, **{"hidden": 8, "experts": 4, "top": 2} | options).double()
    with torch.no_grad():
        made.router.weight.mul_(5)
    return made


def rows(seed=0):
    return torch.randn(3, 7, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shared", [0, 2])
def test_each_token_reads_its_best_experts(shared):
    """Every expert on every token, weighted by the probabilities of the best two, which sum to 1."""
    mlp, x = moe(shared=shared), rows()
    y, _ = mlp(x)
    p = torch.softmax(x @ mlp.router.weight.T, -1)
    best = p >= p.sort(-1, descending=True).values[..., 1:2]
    weight = (p * best) / (p * best).sum(-1, keepdim=True)
    expected = sum(weight[..., e : e + 1] * mlp.experts[e](x)[0] for e in range(4))
    expected = expected + sum(expert(x)[0] for expert in mlp.shared)
    torch.testing.assert_close(y, expected)


def test_gradients_are_those_of_the_sum():
    mlp, x = moe(), rows().requires_grad_()
    gradient = torch.autograd.grad(mlp(x)[0].square().sum(), [x, *mlp.parameters()])
    p = torch.softmax(x @ mlp.router.weight.T, -1)
    best = (p >= p.sort(-1, descending=True).values[..., 1:2]).double()
    weight = (p * best) / (p * best).sum(-1, keepdim=True)
    dense = sum(weight[..., e : e + 1] * mlp.experts[e](x)[0] for e in range(4))
    for left, right in zip(gradient, torch.autograd.grad(dense.square().sum(), [x, *mlp.parameters()]), strict=True):
        torch.testing.assert_close(left, right)


def test_an_expert_that_nobody_chose_gets_a_gradient_of_zero():
    mlp = moe(experts=3, top=1)
    with torch.no_grad():
        mlp.router.weight.zero_()
        mlp.router.weight[0] = 10.0
    mlp(rows().abs())[0].sum().backward()
    assert mlp.experts[0].out.weight.grad.abs().sum() > 0
    assert mlp.experts[2].out.weight.grad.abs().sum() == 0


def test_balance_of_experts():
    """balance E sum_e f_e P_e, by hand: three tokens, two experts, logits of log 3 and 0."""
    mlp = Moe(1, hidden=2, experts=2, top=1, balance=0.5)
    with torch.no_grad():
        mlp.router.weight.copy_(torch.tensor([[3.0], [1.0]]).log())
    # two tokens prefer expert 0 by 3 to 1, one the other by the same
    _, terms = mlp(torch.tensor([[[1.0], [1.0], [-1.0]]]))
    used, mean = (2 / 3, 1 / 3), ((0.75 + 0.75 + 0.25) / 3, (0.25 + 0.25 + 0.75) / 3)
    assert terms["balance"].item() == pytest.approx(0.5 * 2 * (used[0] * mean[0] + used[1] * mean[1]))
    assert mlp.eval()(torch.ones(1, 1, 1))[1] == {}
    assert Moe(1, hidden=2, experts=2, top=1, balance=0.0)(torch.ones(1, 1, 1))[1] == {}


def test_equal_use_is_the_least():
    """All experts alike give `balance` itself; one expert for everything gives more."""
    mlp = moe(balance=1.0, top=1)
    with torch.no_grad():
        mlp.router.weight.zero_()
    even = mlp(rows())[1]["balance"].item()
    with torch.no_grad():
        mlp.router.weight[1] = 10.0
    assert even == pytest.approx(1.0)
    assert mlp(rows().abs())[1]["balance"].item() == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize("strategy", [Ewc, Mas])
def test_importances_of_a_memory_are_measured_row_by_row(strategy):
    """Kernels have no rule for `torch.func.vmap`; what is measured goes through each row alone."""
    stream = split(num_experiences=5, setting=str(Setting.DOMAIN_INCREMENTAL), train_rows=40, eval_rows=20).first(2)
    backbone = partial(Gpt, width=16, num_heads=2, blocks="linear_memory")
    config = TrainerConfig(max_steps=2, batch_size=8, eval_rows=8, device="cpu")
    trainer = Trainer(stream, backbone, [strategy()], optimizer=partial(torch.optim.SGD, lr=0.1), config=config)
    assert trainer.run().status == "done"


class Losses(Observer):
    """Terms of the loss, as they are logged."""

    def __init__(self):
        self.seen = []

    def on_step(self, state, losses, lr):
        self.seen.append(dict(losses))


def test_the_trainer_adds_the_term_by_name():
    stream = builtin_text(context=16).first(1)
    runs = {}
    for balance in (0.0, 0.01, 10.0):
        backbone = partial(Gpt, width=16, num_layers=1, num_heads=2, mlp=f"moe(experts=4, balance={balance})")
        config = TrainerConfig(max_steps=3, batch_size=4, eval_rows=4, device="cpu")
        log = Losses()
        optimizer = partial(torch.optim.SGD, lr=0.1)
        trainer = Trainer(stream, backbone, [], optimizer=optimizer, config=config, observers=[log])
        batch = stream.prepare(stream.experiences[0].load().rows(torch.arange(4)))
        output, terms = trainer.state.loss(batch)
        assert list(terms) == (["cross_entropy", "balance"] if balance else ["cross_entropy"])
        if balance:
            assert torch.equal(terms["balance"], output.auxiliary["balance"])
        trainer.run()
        assert len(log.seen) == 3
        for step in log.seen:
            assert step.get("balance", 0.0) >= 0.99 * balance, "equal use is the least"
            assert step["loss"] == pytest.approx(step["cross_entropy"] + step.get("balance", 0.0), rel=1e-5)
        runs[balance] = trainer.state.model.blocks[0].mlp.router.weight.detach().clone()
    assert not torch.equal(runs[0.0], runs[10.0]), "the term must have moved the router"


class Diary(Backbone):
    """Writes down what it is told to commit, and the weights at that time."""

    def __init__(self, info):
        super().__init__(info, 64)
        self.layer = nn.Linear(64, 64)
        self.notes = []

    def features(self, inputs):
        return self.layer(inputs.flatten(1))

    def forward(self, batch, start=0):
        return Output(self.head(hidden := self.features(batch.inputs)), hidden, state=len(batch))

    def commit(self, batch, output):
        assert len(batch) == output.state
        self.notes.append((output.state, self.layer.weight.detach().clone()))


class Silent(Diary):
    commit = Backbone.commit


@pytest.mark.parametrize("accumulation", [1, 2])
def test_commit_follows_the_optimizer_step(accumulation):
    """Once for each micro-batch of training, after the step; never at evaluation."""
    stream = split(num_experiences=5, setting=str(Setting.DOMAIN_INCREMENTAL), train_rows=400, eval_rows=20).first(1)
    config = TrainerConfig(max_steps=3, batch_size=8, accumulation=accumulation, eval_rows=8, device="cpu")
    trainer = Trainer(stream, Diary, [], optimizer=partial(torch.optim.SGD, lr=0.1), config=config)
    before = trainer.state.model.layer.weight.detach().clone()
    trainer.run()
    notes = trainer.state.model.notes
    assert len(notes) == 3 * accumulation
    assert not torch.equal(notes[0][1], before), "the first commit sees the first step's weights"
    assert torch.equal(notes[-1][1], trainer.state.model.layer.weight)


def test_a_backbone_without_commit_costs_nothing():
    stream = split(num_experiences=5, setting=str(Setting.DOMAIN_INCREMENTAL), train_rows=400, eval_rows=20).first(1)
    for backbone, commits in ((Silent, False), (Diary, True)):
        trainer = Trainer(stream, backbone, [], optimizer=partial(torch.optim.SGD, lr=0.1), config=TrainerConfig())
        assert trainer.state.model.commits == commits
        assert bool(trainer._committing) == commits
