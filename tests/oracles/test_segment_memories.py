"""Segment memories against their equations, written out row by row around a decoder that is taken as it is."""

import math
from functools import partial

import pytest
import torch

from cl.backbones._engrams import LONG, empty
from cl.backbones.armt import Armt, dpfp
from cl.backbones.block_recurrent import BlockRecurrent
from cl.backbones.gated_fifo import GatedFifo
from cl.backbones.hmt import Hmt
from cl.backbones.memformer import Memformer
from cl.backbones.memoria import Memoria
from cl.backbones.rmt import Rmt
from cl.config import TrainerConfig
from cl.core import Batch, Output, Setting, StreamInfo
from cl.seeding import Seeds
from cl.trainer import Trainer
from strategies.naive import Naive
from streams.probes.word_problem import word_problem

CONTEXT, T = 12, 4


def model(kind, **options):
    info = StreamInfo("text", Setting.CONTINUAL_PRETRAINING, (CONTEXT,), 11, 1, measure="loss")
    options = {"width": 8, "num_heads": 2, "num_layers": 2, "segment": T} | options
    with Seeds(0).as_global("init"):
        made = kind(info, **options).double()
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(8 if p.dim() > 1 else 1)
    return made.eval()


@pytest.fixture
def tokens():
    return torch.randint(11, (2, CONTEXT), generator=torch.Generator().manual_seed(0))


def logits(net, tokens):
    ids = torch.arange(len(tokens))
    return net(Batch(tokens, tokens, ids, ids)).logits


def rows(net, tokens, plain):
    """`plain(embedded segments of one row)` -> what the head reads, put together for all rows."""
    read = [torch.cat(plain([net.embedding(part)[None] for part in row.split(T)]), 1) for row in tokens]
    return net.head(torch.cat(read))


def test_rmt(tokens):
    net = model(Rmt, num_memory=3)

    def plain(segments):
        memory, out = net.slots.weight[None], []
        for x in segments:
            read = net.read(torch.cat((memory, x, memory), 1))[0]
            out.append(read[:, 3:-3])
            memory = read[:, -3:]
        return out

    torch.testing.assert_close(logits(net, tokens), rows(net, tokens, plain), atol=1e-12, rtol=0)


# the borders of what hmt reads again are resets as well
@pytest.mark.parametrize("kind", [Armt, BlockRecurrent, GatedFifo, Memformer, Memoria, Rmt])
def test_rows_without_separators_have_no_resets(kind, tokens):
    """So that attention takes its fast road and recurrences are not packed; what is read, the other tests say."""
    net, seen = model(kind), []
    for block in net.blocks:
        block.mixer.register_forward_pre_hook(lambda _, __, given: seen.append(given["reset"]), with_kwargs=True)
    logits(net, tokens)
    assert len(seen) == 6
    assert all(reset is None for reset in seen)


def phi(x, degree=3):
    """DPFP feature by feature."""
    r = [v.clamp(min=0) for v in x] + [(-v).clamp(min=0) for v in x]
    return torch.stack([r[i] * r[(i - shift) % len(r)] for shift in range(1, degree + 1) for i in range(len(r))])


def test_dpfp_is_a_product_with_what_is_rolled():
    x = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dpfp(x, 3), phi(x))
    assert dpfp(torch.ones(4), 3).shape == (24,), "2 nu M"


def test_armt(tokens):
    """Values, and gradients: none through gamma."""
    net = model(Armt, num_memory=2, memory_width=3)

    def plain(segments):
        memory = [[torch.zeros(18, 8).double(), torch.zeros(18).double()] for _ in net.blocks]
        out = []
        for x in segments:
            h = torch.cat((x, net.slots.weight[None]), 1)
            for number, (block, own) in enumerate(zip(net.blocks, net.memories, strict=True)):
                A, z = memory[number]
                found = []
                for token in h[0]:
                    q = phi(own.query(token))
                    found.append(q @ A / (z @ q + 1e-5))
                h = block(h + torch.stack(found)[None])[0]
                new_A, new_z = A, z
                for u in h[0, -2:]:
                    k = phi(own.key(u))
                    old = k @ A / (z @ k + 1e-5)
                    new_A = new_A + torch.sigmoid(own.strength(u)) * torch.outer(k, own.value(u) - old)
                    new_z = new_z + (1 - z @ k / (k @ k + 1e-5)).clamp(0, 1).detach() * k
                memory[number] = [new_A, new_z]
            out.append(net.norm(h[:, :-2]))
        return out

    both, parts = (logits(net, tokens), rows(net, tokens, plain)), [own.key.weight for own in net.memories]
    torch.testing.assert_close(*both, atol=1e-10, rtol=0)
    grads = [torch.autograd.grad(each.square().sum(), parts) for each in both]
    torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-9)


def test_armt_writes_the_value_and_overwrites_it():
    """One memory token, strength 1: what was written is read back; a second write to the same key replaces it."""
    net = model(Armt, num_memory=1, memory_width=3)
    own = net.memories[0]
    torch.nn.init.constant_(own.strength.bias, 50.0)
    fresh = {"A": torch.zeros(1, 18, 8).double(), "z": torch.zeros(1, 18).double()}
    first, second = 20 * torch.randn(2, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own.query.weight.data.copy_(own.key.weight.data)
    once = own.written(first, fresh)
    torch.testing.assert_close(own.read(first, once), own.value(first), atol=1e-3, rtol=1e-3)
    own.value.weight.data.mul_(-2)
    again = own.written(first, once)
    torch.testing.assert_close(own.read(first, again), own.value(first), atol=1e-3, rtol=1e-3)
    # the normaliser counts a key once: gamma is 0 for one that is known
    torch.testing.assert_close(again["z"], once["z"], atol=1e-4, rtol=0)
    assert not torch.allclose(own.written(second, once)["z"], once["z"], atol=1e-3)


def test_hmt(tokens):
    net = model(Hmt, num_sensory=2, num_long=2)

    def plain(segments):
        queue, sensory, out = [], None, []
        for x in segments:
            recalled = net.blank.weight[None]
            if queue:
                topic = net.topic.weight[None]
                q = net.query(net.read(torch.cat((topic, x[:, :2], topic), 1))[0][0, -1])
                score = torch.tensor([float(q @ net.key(each)) / math.sqrt(8) for each in queue])
                recalled = sum(w * each for w, each in zip(score.double().softmax(0), queue, strict=True))[None, None]
            front = [] if sensory is None else [sensory]
            read = net.read(torch.cat((*front, x[:, :2], recalled, x[:, 2:], recalled), 1))[0]
            start = 2 * len(front)
            out.append(torch.cat((read[:, start : start + 2], read[:, start + 3 : -1]), 1))
            queue = [*queue, read[0, -1]][-2:]
            sensory = x[:, -2:]
        return out

    with torch.no_grad():
        torch.testing.assert_close(logits(net, tokens), rows(net, tokens, plain), atol=1e-6, rtol=0)


def attend(layer, x, memory, may=None):
    """softmax(q k / sqrt(K)) v, one query and head at a time; without the norm of what asks."""
    out = torch.zeros(len(x), 8, dtype=x.dtype)
    q, k, v = layer.query(x), layer.key(memory), layer.value(memory)
    for t in range(len(x)):
        seen = [j for j in range(len(memory)) if may is None or may(t, j)]
        if not seen:
            continue
        for h in (slice(0, 4), slice(4, 8)):
            weight = torch.stack([q[t, h] @ k[j, h] / 2 for j in seen]).softmax(0)
            out[t, h] = sum(w * v[j, h] for w, j in zip(weight, seen, strict=True))
    return layer.out(out)


def test_block_recurrent(tokens):
    net = model(BlockRecurrent, num_states=3, layer=1, gate=0.3, blocks="attention(window=4)")

    def plain(segments):
        states, carried, out = net.states.weight, [None, None], []
        for x in segments:
            x, carried[0], _ = net.blocks[0](x, carried[0])
            placed = net.state_norm(states) + net.places.weight
            asking = net.to_tokens.norm(x[0])
            z = net.mix(torch.cat((attend(net.among_states, placed, placed), attend(net.to_states, placed, asking)), 1))
            x = x + attend(net.to_tokens, asking, placed)[None]
            x, carried[1], _ = net.blocks[1](x, carried[1])
            g = 1 / (1 + torch.exp(torch.tensor(-0.3).double()))
            states = g * states + (1 - g) * z
            out.append(net.norm(x))
        return out

    with torch.no_grad():
        torch.testing.assert_close(logits(net, tokens), rows(net, tokens, plain), atol=1e-6, rtol=0)


def test_memformer(tokens):
    net = model(Memformer, num_memory=3)

    def plain(segments):
        slots, out = net.slots.weight / net.slots.weight.norm(dim=1, keepdim=True), []
        for x in segments:
            for reader, block in zip(net.reads, net.blocks, strict=True):
                x = block(x + attend(reader, reader.norm(x[0]), slots)[None])[0]
            read = net.norm(x)
            memory = torch.cat((slots, read[0]))
            change = attend(net.write, net.write.norm(slots), memory, lambda i, j: j >= 3 or j == i)
            slots = (slots + change) / (slots + change).norm(dim=1, keepdim=True)
            out.append(read)
        return out

    with torch.no_grad():
        torch.testing.assert_close(logits(net, tokens), rows(net, tokens, plain), atol=1e-12, rtol=0)


def test_gated_fifo(tokens):
    net = model(GatedFifo, num_memory=2)

    def plain(segments):
        queue, carried, out = [], [None, None], []
        for x in segments:
            for number, (local, bank) in enumerate(zip(net.local, net.queue, strict=True)):
                own = attend(local, local.norm(x[0]), local.norm(x[0]), lambda t, j: j <= t)
                past = attend(bank, bank.norm(x[0]), torch.stack(queue)) if queue else 0
                x, carried[number], _ = net.blocks[number](x + own + past, carried[number])
            read = net.norm(x)
            newest, last = queue[-1] if queue else torch.zeros(8).double(), read[0, -1]
            gate = torch.sigmoid(net.gate(torch.cat((newest, last))))
            queue = [*queue, gate * newest + (1 - gate) * torch.tanh(net.candidate(last))][-2:]
            out.append(read)
        return out

    with torch.no_grad():
        torch.testing.assert_close(logits(net, tokens), rows(net, tokens, plain), atol=1e-12, rtol=0)


def test_memoria(tokens):
    options = {"num_working": 2, "num_short": 3, "num_long": 3, "remind_short": 2, "remind_long": 2, "depth": 1}
    net = model(Memoria, **options, segment=2)
    rules, both = net.rules, {}

    def plain(row):
        segments = [net.embedding(part)[None] for part in row.split(2)]
        engrams, before, out = empty(1, 6, 8, net.norm.weight), None, []
        for step, x in enumerate(segments):
            looks, reminded = torch.zeros(8).double(), torch.zeros(1, 8, dtype=torch.bool)
            joined = rules.joined(engrams, torch.zeros(1, 2, 8).double(), torch.tensor([False]))
            working = None
            if before is not None:
                score = net.abstractor.slots.weight @ net.abstractor.key(before).T
                working = net.abstractor.out(net.abstractor.up(score.softmax(1) @ net.abstractor.value(before)))
                joined = rules.joined(engrams, working[None], torch.tensor([True]))
                reminded = rules.reminded(joined, torch.tensor([step]))
            for reader, norms, block in zip(net.reads, net.norms, net.blocks, strict=True):
                if working is not None:
                    x = x + attend(reader, norms[0](x[0]), working)[None]
                    seen = reminded[0].nonzero().flatten().tolist()
                    if seen:
                        asking = norms[1](x[0])
                        x = x + attend(reader, asking, joined["data"][0, seen])[None]
                        for h in (slice(0, 4), slice(4, 8)):
                            q, k = reader.query(asking)[:, h], reader.key(joined["data"][0, seen])[:, h]
                            looks[seen] += (q @ k.T / 2).softmax(1).mean(0) / 2 / len(net.blocks)
                x = block(x)[0]
            read = net.norm(x)
            engrams, before = rules.aged(joined, reminded, looks[None], 6), read[0]
            out.append(read)
        both["life"] = engrams["life"]
        return torch.cat(out, 1)

    with torch.no_grad():
        wanted = net.head(torch.cat([plain(row) for row in tokens]))
        torch.testing.assert_close(logits(net, tokens), wanted, atol=1e-10, rtol=0)
        state = net.step(Batch(tokens, tokens, torch.arange(2), torch.arange(2))).state["memory"]["engrams"]
        torch.testing.assert_close(state["life"][1:], both["life"], atol=1e-6, rtol=0)
    assert (state["kind"] == LONG).any(), "short-term memory ran over"


def test_memoria_keeps_what_lives_longest_by_commit_alone(tokens):
    net = model(Memoria, num_working=2, num_short=3, num_long=4, persist=3, segment=2)
    assert net.commits
    assert not model(Memoria).commits
    ids = torch.arange(2)
    output = net(Batch(tokens, tokens, ids, ids))
    assert isinstance(output, Output)
    assert output.state is not None
    assert net.kept_kind.tolist() == [0, 0, 0], "a forward writes nothing"
    first = output.logits
    net.commit(Batch(tokens, tokens, ids, ids), output)
    assert net.kept_kind.tolist() == [LONG] * 3
    lives = output.state["memory"]["engrams"]["life"].flatten().sort(descending=True).values[:3]
    assert sorted(net.kept_life.tolist()) == sorted(lives.clamp(max=9.0).tolist())
    kept = {name: value.clone() for name, value in net.state_dict().items() if "kept" in name}
    again = net(Batch(tokens, tokens, ids, ids)).logits
    assert (again - first).abs().max() > 1e-9, "a new batch begins with what was kept"
    copy = model(Memoria, num_working=2, num_short=3, num_long=4, persist=3, segment=2)
    copy.load_state_dict(net.state_dict())
    assert torch.equal(copy(Batch(tokens, tokens, ids, ids)).logits, again)
    assert all(torch.equal(kept[name], value) for name, value in net.state_dict().items() if name in kept)


def test_what_every_row_began_with_is_kept_once_and_makes_place(tokens):
    net = model(Memoria, num_working=2, num_short=3, num_long=4, persist=3, segment=2)
    seen = []
    for batch in range(6):
        rows = (tokens + batch) % 11
        batch = Batch(rows, rows, torch.arange(2), torch.arange(2))
        net.commit(batch, net(batch))
        assert len(net.kept_data.unique(dim=0)) == 3
        assert net.kept_life.max() <= 9.0
        seen.append({tuple(row) for row in net.kept_data.tolist()})
    assert len(set.union(*seen)) > 3, "new ones take places"


def test_training_keeps_engrams():
    """The trainer commits after its steps, and what is kept goes through the run."""
    options = {"width": 8, "num_heads": 2, "num_layers": 1, "segment": 4, "num_long": 4, "persist": 2}
    trainer = Trainer(
        word_problem("z2", [8], [], train_rows=32, eval_rows=8),
        partial(Memoria, **options),
        [Naive()],
        optimizer=partial(torch.optim.SGD, lr=0.1),
        config=TrainerConfig(max_steps=2, batch_size=8, device="cpu"),
    )
    trainer.run()
    assert trainer.state.model.kept_kind.tolist() == [LONG] * 2
