"""The tree of MLPs against a walk by hand, token by token, and its centroids, which only `commit` moves."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cl.backbones.gpt import Gpt
from cl.backbones.mixers.hierarchical_ffn_memory import HierarchicalFfnMemory
from cl.config import TrainerConfig
from cl.core import UserError
from cl.trainer import Trainer
from strategies.naive import Naive
from streams.probes.word_problem import word_problem

LEVELS, BRANCHES, BLOCK = 3, 2, 3


def made(**options):
    torch.manual_seed(0)
    return HierarchicalFfnMemory(
        8, **({"hidden": 4, "levels": LEVELS, "branches": BRANCHES, "block": BLOCK} | options)
    ).double()


def walked(mixer, context):
    """Nodes below the root, as (level, number within it, number among all centroids, weight)."""
    path, node, first = [], 0, 0
    for level in range(1, LEVELS):
        children = [node * BRANCHES + b for b in range(BRANCHES)]
        near = {j: F.cosine_similarity(context, mixer.centroids[first + j], dim=0) for j in children}
        node = max(children, key=near.get)
        weight = torch.exp(4 * near[node]) / sum(torch.exp(4 * each) for each in near.values())
        path.append((level, node, first + node, weight))
        first += BRANCHES**level
    return path


def by_hand(mixer, x, documents):
    """Rows of outputs; `documents` are the places where one starts."""
    y, start = torch.zeros_like(x), 0
    for t in range(len(x)):
        start = t if t in documents else start
        y[t] = mixer.nodes[0][0](x[t])[0]
        whole = (t - start) // BLOCK * BLOCK
        if whole:
            for level, node, _, weight in walked(mixer, x[start : start + whole].mean(0)):
                y[t] += weight * mixer.nodes[level][node](x[t])[0]
    return y


def test_fetches_the_nodes_of_the_context():
    mixer, x = made(), torch.randn(2, 17, 8, dtype=torch.float64)
    reset = torch.zeros(2, 17, dtype=torch.bool)
    reset[0, 5] = reset[0, 6] = reset[1, 0] = True
    with torch.no_grad():
        y, state = mixer(x, reset=reset)
        wanted = torch.stack([by_hand(mixer, x[0], {5, 6}), by_hand(mixer, x[1], {0})])
    torch.testing.assert_close(y, wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(state["sum"][0], x[0, 6:].sum(0))
    paths = {
        tuple(node for _, node, *_ in walked(mixer, x[row, :n].mean(0))) for row in range(2) for n in (3, 6, 9, 12)
    }
    assert len(paths) > 1, "different contexts, different paths"


def test_only_fetched_nodes_are_trained():
    mixer, x = made(), torch.randn(1, 7, 8, dtype=torch.float64)
    mixer(x)[0].sum().backward()
    fetched = {(level, node) for n in (3, 6) for level, node, *_ in walked(mixer, x[0, :n].mean(0))}
    for level in range(1, LEVELS):
        for node, mlp in enumerate(mixer.nodes[level]):
            grad = mlp.out.weight.grad
            assert ((level, node) in fetched) == (grad is not None and bool(grad.abs().sum() > 0))


def test_commit_moves_the_centroids_of_the_path_alone():
    mixer, x = made(rate=0.25), torch.randn(1, 7, 8, dtype=torch.float64)
    before = mixer.centroids.clone()
    _, state = mixer(x)
    assert torch.equal(mixer.centroids, before), "a forward writes nothing"
    mixer.commit(state)
    context = x[0, :6].mean(0)
    wanted = before.clone()
    for _, _, number, _ in walked(made(), context):
        wanted[number] = 0.75 * before[number] + 0.25 * context / context.norm()
    torch.testing.assert_close(mixer.centroids, wanted)
    frozen = made(rate=0.0)
    frozen.commit(state)
    assert torch.equal(frozen.centroids, before)


def test_training_commits():
    words = "hierarchical_ffn_memory(hidden=4, levels=2, branches=2, block=2)"
    trainer = Trainer(
        word_problem("z2", [8], [], train_rows=32, eval_rows=8),
        partial(Gpt, width=8, num_heads=2, num_layers=1, blocks=words),
        [Naive()],
        optimizer=partial(torch.optim.SGD, lr=0.1),
        config=TrainerConfig(max_steps=2, batch_size=8, device="cpu"),
    )
    before = trainer.state.model.blocks[0].mixer.centroids.clone()
    trainer.run()
    assert not torch.equal(trainer.state.model.blocks[0].mixer.centroids, before)


def test_wrong_options_are_one_sentence():
    with pytest.raises(UserError, match="rate of hierarchical_ffn_memory is 2; it must be a number from 0 to 1"):
        made(rate=2)
    with pytest.raises(UserError, match="sharpness of hierarchical_ffn_memory is 0; it must be a number above 0"):
        made(sharpness=0)
    with pytest.raises(UserError, match="branches is 0"):
        made(branches=0)
