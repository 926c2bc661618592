"""Banks beside FFNs against a walk by hand, what of them is trained, and the models that they are put into."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cl.backbones.gpt import Gpt
from cl.backbones.mlps.swiglu import Swiglu
from cl.backbones.rmt import Rmt
from cl.core import Batch, Setting, UserError
from cl.testing import ToyNet, toy_stream
from strategies.hierarchical_ffn_memory import HierarchicalFfnMemory, banks

TEXT = Setting.CONTINUAL_PRETRAINING
LEVELS, BRANCHES, BLOCK, SEPARATOR = 3, 4, 2, 7
OPTIONS = {"hidden": 4, "levels": LEVELS, "branches": BRANCHES, "block": BLOCK}


class FfnToy(ToyNet):
    def __init__(self, info):
        super().__init__(info)
        self.mlp = Swiglu(self.num_features, hidden=8)

    def features(self, inputs):
        hidden = super().features(inputs)
        return hidden + self.mlp(hidden)[0]


def stream():
    """Toy texts of several documents a row."""
    made = toy_stream(TEXT)
    return replace(made, info=replace(made.info, separator=SEPARATOR))


def trained(lab, optimizer=None, **options):
    given = {} if optimizer is None else {"optimizer": optimizer}
    strategy = HierarchicalFfnMemory(**OPTIONS | options)
    return lab.run([strategy], stream(), FfnToy, max_steps=4, epochs=None, **given)


def swiglu(weights, name, x):
    gate, up, out = (weights[f"{name}.{part}.weight"] for part in ("gate", "up", "out"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ out.T


def path(context, centroids):
    """Nodes below the root, as (level, number within it, number among all centroids, weight)."""
    found, node, first = [], 0, 0
    for level in range(1, LEVELS):
        near = {b: F.cosine_similarity(context, centroids[first + node * BRANCHES + b], dim=0) for b in range(BRANCHES)}
        best = max(near, key=near.get)
        weight = torch.exp(4 * near[best]) / sum(torch.exp(4 * each) for each in near.values())
        node = node * BRANCHES + best
        found.append((level, node, first + node, weight))
        first += BRANCHES**level
    return found


def walk(weights, centroids, tokens):
    """Logits of rows token by token, the nodes that were fetched, and the context that each row ends with."""
    hidden = weights["first.weight"][tokens].relu()
    said, fetched, ends = swiglu(weights, "mlp", hidden), set(), []
    for row, row_tokens in enumerate(tokens.tolist()):
        start, context = 0, None
        for t, token in enumerate([*row_tokens, None]):
            start, context = (t, None) if token == SEPARATOR else (start, context)
            if t > start and (t - start) % BLOCK == 0:
                context = hidden[row, start:t].mean(0)
            if token is None:
                ends.append(context)
            elif context is not None:
                for level, node, _, weight in path(context, centroids):
                    fetched.add((level, node))
                    added = swiglu(weights, f"mlp.bank.nodes.{level}.{node}", hidden[row, t])
                    said = said.index_put((torch.tensor(row), torch.tensor(t)), weight * added, accumulate=True)
    return (hidden + said) @ weights["head.weight"].T + weights["head.bias"], fetched, ends


def test_a_row_is_its_ffn_and_what_its_context_fetched(lab):
    net = HierarchicalFfnMemory(**OPTIONS).wrap(FfnToy(stream().info), stream().info).double()
    (bank,) = banks(net)
    for p in bank.parameters():
        torch.nn.init.normal_(p)
    tokens = stream().experiences[0].load().rows(torch.arange(12)).inputs
    zero = torch.zeros(12, dtype=torch.int64)
    weights = dict(net.named_parameters())
    wanted, fetched, _ = walk(weights, bank.centroids, tokens)
    lab.close(net(Batch(tokens, tokens, zero, zero)).logits, wanted, rtol=1e-12, atol=1e-12)
    plain = net.head(net.first(tokens).relu() + swiglu(weights, "mlp", net.first(tokens).relu()))
    assert len(fetched) > 2 and (wanted - plain).abs().max() > 1
    # a copy hears of its own tokens, not of those of the original
    twin = copy.deepcopy(net)
    net(Batch(tokens[:3], tokens[:3], zero[:3], zero[:3]))
    lab.close(twin.head(twin.features(tokens)), wanted, rtol=1e-12, atol=1e-12)


def test_every_step_is_that_of_the_walk_and_moves_its_centroids(lab):
    recorder, trainer = trained(lab, rate=0.25)
    (start,), centroids = banks(recorder.start), []
    kept = start.centroids
    for step in recorder.steps:
        logits, _, ends = walk(step.before, kept, step.batch.inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), step.batch.targets.flatten())
        lab.close(step.terms["cross_entropy"], loss, rtol=1e-5)
        moved, chosen = kept.clone(), {}
        for context in ends:
            for *_, number, _ in [] if context is None else path(context, kept):
                chosen.setdefault(number, []).append(F.normalize(context, dim=0))
        for number, contexts in chosen.items():
            moved[number] = 0.75 * kept[number] + 0.25 * torch.stack(contexts).mean(0)
        kept = moved.detach()
        centroids.append(kept)
    lab.close(banks(trainer.state.model)[0].centroids, centroids[-1], rtol=1e-6)
    assert len(recorder.steps) == 12 and not torch.equal(start.centroids, centroids[0])


@pytest.mark.parametrize("is_frozen", [False, True])
def test_only_what_was_fetched_is_trained(lab, is_frozen):
    """Though decay and momentum would move the rest."""
    optimizer = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5)
    recorder, _ = trained(lab, optimizer, is_frozen=is_frozen, rate=0.0)
    centroids, unfetched = banks(recorder.start)[0].centroids, 0
    for step in recorder.steps:
        moved = {name for name in step.before if not torch.equal(step.before[name], step.after[name])}
        nodes = {name for name in step.before if ".bank." in name}
        _, fetched, _ = walk(step.before, centroids, step.batch.inputs)
        wanted = {name for name in nodes if tuple(map(int, name.split(".")[3:5])) in fetched}
        # while a node says nothing, its other weights have no slope
        assert {name for name in wanted if ".out." in name} <= moved & nodes <= wanted
        assert moved - nodes == (set() if is_frozen else step.before.keys() - nodes)
        unfetched += len(nodes - wanted)
    assert unfetched


STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS = {
    "gpt": lambda info: Gpt(info, width=16, num_heads=2, num_layers=2),
    "experts": lambda info: Gpt(info, width=16, num_heads=2, num_layers=2, mlp="moe(experts=2, top=1)"),
    "checkpointed": lambda info: Gpt(info, width=16, num_heads=2, num_layers=2, is_checkpointed=True),
    "llama": lambda info: of_transformers(info, {"model_type": "llama"}),
    "gpt_neox": lambda info: of_transformers(info, {"model_type": "gpt_neox"}),
    "gpt2": lambda info: of_transformers(info, {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2} | STILL),
}


def of_transformers(info, config):
    pytest.importorskip("transformers")
    from cl.backbones.hf import Hf

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Hf(info, config=config if "n_embd" in config else {**config, **sizes})


@pytest.mark.parametrize("name", MODELS)
def test_a_model_answers_as_before_until_its_banks_have_learnt(name):
    torch.manual_seed(0)
    net, info = MODELS[name](stream().info), stream().info
    tokens = stream().experiences[0].load().rows(torch.arange(4)).inputs
    zero = torch.zeros(4, dtype=torch.int64)
    before = net(Batch(tokens, tokens, zero, zero)).logits
    assert HierarchicalFfnMemory(**OPTIONS).wrap(net, info) is net
    assert len(banks(net)) == 2 and net.training
    after = net(Batch(tokens, tokens, zero, zero)).logits
    assert torch.equal(after, before)
    after.square().mean().backward()
    for bank in banks(net):
        assert any(node.out.weight.grad.any() for level in list(bank.nodes)[1:] for node in level)
        # layers that are computed again leave the same once more, which moves no mean
        assert len(bank.left) in (1, 2)
        bank.settle()
        assert not bank.left
    net.eval()(Batch(tokens, tokens, zero, zero))
    assert not any(bank.left for bank in banks(net)), "evaluation leaves nothing"


def test_a_path_hears_nothing_of_the_document_before():
    torch.manual_seed(0)
    net = HierarchicalFfnMemory(**OPTIONS).wrap(MODELS["llama"](stream().info), stream().info).eval()
    for bank in banks(net):
        for node in (node for level in bank.nodes for node in level):
            torch.nn.init.normal_(node.out.weight)
    rows = torch.tensor([[0, 1, 2, SEPARATOR, 3, 4, 5, 6], [5, 5, 6, SEPARATOR, 3, 4, 5, 6]])
    zero = torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        first, second = net(Batch(rows, rows, zero, zero)).logits
    torch.testing.assert_close(first[3:], second[3:], rtol=1e-4, atol=1e-4)
    assert (first[:3] - second[:3]).abs().max() > 0.01


@pytest.mark.parametrize("model", [ToyNet, lambda info: Rmt(info, width=16, num_heads=2, num_layers=1)])
def test_models_without_ffns_that_read_whole_rows_are_refused(model):
    net = model(stream().info)
    with pytest.raises(UserError, match=f"modules called mlp, ffn, feed_forward .*, and {type(net).__name__} has none"):
        HierarchicalFfnMemory().wrap(net, stream().info)


def test_wrong_options_are_one_sentence():
    wrong = {"hidden": 0, "levels": 0, "branches": 1.5, "block": True, "sharpness": 0, "rate": 2, "is_frozen": 1}
    for name, value in wrong.items():
        with pytest.raises(UserError, match=f"hierarchical_ffn_memory.{name} is {value!r}; it must be"):
            HierarchicalFfnMemory(**{name: value})
