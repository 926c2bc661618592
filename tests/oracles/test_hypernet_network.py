"""Any backbone on generated weights: outputs and gradients of a plain network, scales, statistics, sizes, heads."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cl.backbones.convnet import Convnet
from cl.backbones.mlp import Mlp
from cl.backbones.recurrent import Recurrent
from cl.backbones.resnet18 import Resnet18
from cl.core import Batch, Setting, StreamInfo, UserError
from cl.testing import ToyNet, toy_stream
from cl.testing.probe import train
from strategies._hypernet import Hypernetwork
from strategies._hypernet_distances import Distances
from strategies.center_loss import CenterLoss
from strategies.hypernet import Hypernet
from strategies.joint import Joint
from strategies.lwf import Lwf
from strategies.prd import Prd
from strategies.recall_merge import RecallMerge
from strategies.remind import Remind
from strategies.replay import Replay
from strategies.rnn_hypernet import RnnHypernet

TASK, CLASS, DOMAIN = Setting.TASK_INCREMENTAL, Setting.CLASS_INCREMENTAL, Setting.DOMAIN_INCREMENTAL

BACKBONES = [
    Mlp,
    partial(Convnet, channels=(3, 4), hidden=9),
    partial(Resnet18, width=2),
    partial(Recurrent, hidden=7),
    partial(Recurrent, kind="gru", hidden=7, num_layers=2),
]


def image_rows(num=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    zeros = torch.zeros(num, dtype=torch.int64)
    return Batch(torch.rand(num, 1, 8, 8, generator=generator), zeros, zeros, zeros, zeros % 3)


def wrapped(backbone, heads="one", **options):
    strategy = Hypernet(**({"chunk_size": 500, "heads": heads} | options))
    stream = toy_stream(TASK)
    strategy.plan(stream)
    torch.manual_seed(1)
    plain = backbone(stream.info)
    return strategy, deepcopy(plain), strategy.wrap(plain, stream.info)


@pytest.mark.parametrize("heads", ["one", "every"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_any_backbone_runs_on_generated_weights(backbone, heads):
    """Output and gradient are those of a plain network that holds the same weights."""
    _, plain, net = wrapped(backbone, heads)
    rows = image_rows()
    rows.task_id = torch.full_like(rows.targets, 2)
    weights = net.layout.weights(net.generated([2])[0])
    assert weights.keys() == {name for name, _ in plain.named_parameters()}
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(weights[name])
    torch.testing.assert_close(net(rows).logits, plain(rows).logits)
    output = net(rows).logits.square().sum()
    output.backward()
    plain.zero_grad()
    plain(rows).logits.square().sum().backward()
    gradients = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    numbers_TN = net.generated([2])
    found = torch.autograd.grad(net.call(numbers_TN[0], rows, 2).logits.square().sum(), numbers_TN)[0][0]
    for place in net.layout.places:
        wanted = sum(gradients[name] for name in place.names if name in gradients)
        if isinstance(wanted, torch.Tensor):
            piece = found[place.start : place.stop].view(place.shape)
            torch.testing.assert_close(piece, place.scale * wanted, rtol=1e-3, atol=1e-5)
    assert all(p.grad is not None for p in net.generator.parameters())
    assert net.embeddings[2].grad.abs().sum() > 0
    assert net.embeddings[0].grad is None
    copied = deepcopy(net)
    torch.testing.assert_close(copied.eval()(rows).logits, net.eval()(rows).logits)
    torch.testing.assert_close(net.materialised(2).eval()(rows).logits, net(rows).logits)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_generated_weights_start_at_the_scale_of_the_backbone(backbone):
    _, plain, net = wrapped(backbone, chunk_size=None, hidden=(64,))
    weights = net.layout.weights(net.generated([0])[0])
    for name, p in plain.named_parameters():
        if p.numel() < 100 or name.startswith("head.heads"):
            continue
        ratio = (weights[name].std() / p.std()).item()
        assert 0.7 < ratio < 1.4, name
    norms = [name for name, module in plain.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for name in norms:
        assert weights[f"{name}.weight"].mean().item() == pytest.approx(1, abs=0.5)


def test_every_task_has_its_own_running_statistics():
    _, _, net = wrapped(partial(Resnet18, width=2))
    net.train()
    for task in (0, 2, 2):
        rows = image_rows(seed=task)
        rows.task_id = torch.full_like(rows.targets, task)
        net(rows)
    counts = net.state_dict()[net.statistics["bn.num_batches_tracked"]]
    assert counts.tolist() == [1, 0, 2]
    means = net.state_dict()[net.statistics["bn.running_mean"]]
    assert not means[1].any()
    weights = net.layout.weights(net.generated([0])[0])
    rows = image_rows(seed=0)
    convolved = F.conv2d(rows.inputs, weights["conv.weight"], padding=1)
    torch.testing.assert_close(means[0], 0.1 * convolved.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)


class Normed(ToyNet):
    """Batch norm over rows, of which there must be two."""

    def __init__(self, info):
        super().__init__(info)
        self.norm = torch.nn.BatchNorm1d(self.num_features)

    def features(self, inputs):
        return self.norm(self.first(inputs.flatten(1))).relu()


def test_replayed_rows_are_normalised_by_running_statistics():
    """A single row of a task, for which torch has no statistics of a batch; they are those of the task, and stay."""
    _, _, net = wrapped(Normed)
    net.train()
    current, replayed = image_rows(6), image_rows(1, seed=5)
    current.task_id = torch.full_like(current.targets, 2)
    getattr(net, net.statistics["norm.running_mean"])[0] = torch.linspace(-1, 1, 12)
    wanted = [net.materialised(2).train()(current).logits, net.materialised(0).eval()(replayed).logits]
    net.mark(current.extended(replayed, "replay", "replay"))
    found = net(Batch.cat((current, replayed))).logits
    torch.testing.assert_close(found, torch.cat(wanted))
    assert net.state_dict()[net.statistics["norm.num_batches_tracked"]].tolist() == [0, 0, 1]
    assert all(module.training for module in net.modules())


def test_batch_norm_goes_with_few_replayed_rows():
    """Three rows of several experiences ended the run: "Expected more than 1 value per channel"."""
    record = train(DOMAIN, [Hypernet(), Replay(60, 3)], backbone=Normed, epochs=1)
    assert record.result.status == "done"


# sizes and heads


def test_published_sizes_of_split_mnist():
    """465,192 numbers learnt in 12 chunks for 478,410 weights: counted in the published code."""
    info = StreamInfo("split", TASK, (1, 28, 28), num_outputs=2, num_experiences=5, num_heads=5)
    strategy = Hypernet(
        chunk_size=42000, hidden=(10, 10), embedding=96, chunk_embedding=96, heads="every", start="xavier"
    )
    strategy.table, strategy.num_conditions = list(range(5)), 5
    net = strategy.wrap(Mlp(info, hidden=(400, 400)), info)
    assert isinstance(net, Hypernetwork)
    assert len(net.layout) == 478_410
    assert net.generator.num_chunks == 12
    assert sum(p.numel() for p in net.generator.parameters()) == 465_192
    assert net.num_generator == 465_192 + 5 * 96
    assert net.compression == pytest.approx(465_672 / 478_410)


def test_the_penalty_leaves_out_the_heads_of_other_tasks():
    strategy, _, net = wrapped(ToyNet, heads="every")
    strategy.old, strategy.picked = [1], [0]
    now, wanted = net.generated([1]).detach().requires_grad_(), [torch.zeros(len(net.layout))]
    strategy.apart(net, now, wanted).backward()
    held = {name for place in net.layout.places for name in place.names if now.grad[0, place.start : place.stop].any()}
    assert held == {"head.heads.1.weight", "head.heads.1.bias", "first.weight", "first.bias"}
    one, _, with_one = wrapped(ToyNet)
    one.old, one.picked = [1], [0]
    now = with_one.generated([1]).detach().requires_grad_()
    one.apart(with_one, now, [torch.zeros(len(with_one.layout))]).backward()
    assert now.grad.all()
    assert len(with_one.layout) == len(net.layout) - 2 * 13 * 4


@pytest.mark.parametrize("start", ["backbone", "xavier"])
def test_distances_and_their_gradients_by_autograd(start):
    _, _, net = wrapped(ToyNet, start=start)
    left, right = torch.randn(2, 2, len(net.layout), generator=torch.Generator().manual_seed(0)).double()
    importance = torch.rand(2, len(net.layout), generator=torch.Generator().manual_seed(1)).double()
    for given in (None, importance):
        mine, plain = left.clone().requires_grad_(), left.clone().requires_grad_()
        found = net.layout.distances(mine, list(right), given, [[(3, 9)], []])
        wanted = []
        for k in range(2):
            total = 0
            for place in net.layout.places:
                inside = torch.arange(place.start, place.stop)
                counts = ((inside < 3) | (inside >= 9)) if k == 0 else torch.ones(len(inside))
                factor = 1 if given is None else given[k, inside]
                total = total + (place.scale**2 * counts * factor * (plain[k] - right[k])[inside].square()).sum()
            wanted.append(total)
        torch.testing.assert_close(found, torch.stack(wanted))
        (found * torch.tensor([1.0, 3.0])).sum().backward()
        (torch.stack(wanted) * torch.tensor([1.0, 3.0])).sum().backward()
        torch.testing.assert_close(mine.grad, plain.grad)


@pytest.mark.parametrize("start", ["backbone", "xavier"])
def test_distances_from_the_last_layer_by_autograd(start):
    """Twice, so that the buffer is used again; the chunks have a surplus."""
    _, _, net = wrapped(ToyNet, start=start)
    generator = torch.Generator().manual_seed(0)
    num, width = len(net.layout), len(net.layout) // 3 + 1
    distances = Distances(net.layout)
    for given in (None, torch.rand(2, num, generator=generator).double()):
        shapes = ((2, 3, 4), (width, 4), (width,))
        mine = [torch.randn(shape, generator=generator).double().requires_grad_() for shape in shapes]
        plain = [each.detach().clone().requires_grad_() for each in mine]
        wanted, factor = torch.randn(2, num, generator=generator).double(), torch.tensor([1.0, 3.0])
        found = distances(*mine, list(wanted), given, [[(3, 9)], []])
        numbers = (plain[0] @ plain[1].T + plain[2]).flatten(1)[:, :num]
        expected = net.layout.distances(numbers, list(wanted), given, [[(3, 9)], []])
        torch.testing.assert_close(found, expected)
        (found * factor).sum().backward()
        (expected * factor).sum().backward()
        for one, other in zip(mine, plain, strict=True):
            torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize(
    ("other", "setting", "message"),
    [
        (Remind(), CLASS, "remind works on the network's own weights, and a strategy beside it generates them"),
        (RecallMerge(), CLASS, "recall_merge works on the network's own weights"),
        (Lwf(), TASK, "lwf works on the network's own weights"),
        (CenterLoss(), DOMAIN, "center_loss works on the network's own weights"),
        (RnnHypernet(), CLASS, "hypernet both generate the network's weights; leave one out"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_who_needs_the_networks_own_weights_is_refused_beside_it(lab, other, setting, message):
    for pair in ([Hypernet(), other], [other, Hypernet()]):
        with pytest.raises(UserError, match=message):
            lab.run(pair, setting)


@pytest.mark.parametrize(
    ("first", "message"),
    [(Joint(), r"name it first, as in strategy=\[hypernet,joint\]"), (Prd(), "prd works on the network's own weights")],
    ids=lambda value: getattr(value, "name", ""),
)
def test_some_work_behind_it_only(lab, first, message):
    with pytest.raises(UserError, match=message):
        lab.run([first, Hypernet()], CLASS)
    recorder, _ = lab.run([Hypernet(), first], CLASS)
    assert all(p.isfinite().all() for p in recorder.steps[-1].after.values())
