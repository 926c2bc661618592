"""What a document that begins inside a segment leaves behind: each memory written out from its tokens alone.

Rotary attention sees differences of positions only, so that the tokens before it may be left out of the row.
"""

import pytest
import torch

from cl.backbones.armt import Armt, dpfp
from cl.backbones.block_recurrent import BlockRecurrent
from cl.backbones.gated_fifo import GatedFifo
from cl.backbones.hmt import Hmt
from cl.backbones.memformer import Memformer
from cl.backbones.rmt import Rmt
from cl.core import Batch, Setting, StreamInfo

SEPARATOR = 10


def attend(layer, x, memory):
    """softmax(q k / sqrt(K)) v of one row, head by head; without the norm of what asks."""
    q, k, v = layer.query(x), layer.key(memory), layer.value(memory)
    heads = [(q[:, h] @ k[:, h].T / 2).softmax(1) @ v[:, h] for h in (slice(0, 4), slice(4, 8))]
    return layer.out(torch.cat(heads, 1))


def rmt(net, x):
    slots = net.slots.weight
    return {"tokens": net.read(torch.cat((x, slots))[None])[0][:, -len(slots) :]}


def armt(net, x):
    """From nothing: what is known is 0, and every key is new."""
    h, left = torch.cat((x, net.slots.weight))[None], {}
    for number, (block, own) in enumerate(zip(net.blocks, net.memories, strict=True)):
        h = block(h)[0]
        u = h[0, -3:]
        k = dpfp(own.key(u), own.degree)
        left[str(number)] = {"A": (k.T @ (own.strength(u).sigmoid() * own.value(u)))[None], "z": k.sum(0)[None]}
    return left


def hmt(net, x):
    summary = net.read(torch.cat((x, net.blank.weight))[None])[0][:, -1:]
    return {"long": torch.cat((summary * 0, summary), 1), "count": torch.tensor([1])}


def block_recurrent(net, x):
    states = net.states.weight
    placed, tokens = net.state_norm(states) + net.places.weight, net.to_tokens.norm(net.blocks[0](x[None])[0][0])
    z = net.mix(torch.cat((attend(net.among_states, placed, placed), attend(net.to_states, placed, tokens)), 1))
    keep = net.keep.bias.sigmoid()
    return {"states": (keep * states + (1 - keep) * z)[None]}


def memformer(net, x):
    slots = net.slots.weight / net.slots.weight.norm(dim=1, keepdim=True)
    for block in net.blocks:
        x = block(x[None])[0][0]
    asking = net.write.norm(slots)
    found = [attend(net.write, asking[i : i + 1], torch.cat((slots[i : i + 1], net.norm(x)))) for i in range(3)]
    left = slots + torch.cat(found)
    return {"slots": (left / left.norm(dim=1, keepdim=True))[None]}


def gated_fifo(net, x):
    for block, local in zip(net.blocks, net.local, strict=True):
        n = local.norm(x)
        x = x + torch.cat([attend(local, n[t : t + 1], n[: t + 1]) for t in range(len(x))])
        x = block(x[None])[0][0]
    last = net.norm(x)[-1]
    gate = net.gate(torch.cat((last * 0, last))).sigmoid()
    pushed = (1 - gate) * net.candidate(last).tanh()
    return {"queue": torch.stack((pushed * 0, pushed))[None], "count": torch.tensor([1])}


@pytest.mark.parametrize(
    ("kind", "options", "plain"),
    [
        (Rmt, {"num_memory": 3}, rmt),
        (Armt, {"num_memory": 3, "memory_width": 3, "degree": 2}, armt),
        (Hmt, {"num_sensory": 2, "num_long": 2}, hmt),
        (BlockRecurrent, {"num_states": 3, "layer": 1, "gate": 0.3}, block_recurrent),
        (Memformer, {"num_memory": 3}, memformer),
        (GatedFifo, {"num_memory": 2}, gated_fifo),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_only_the_new_document_is_written(kind, options, plain):
    info = StreamInfo("text", Setting.CONTINUAL_PRETRAINING, (10,), 11, 1, measure="loss", separator=SEPARATOR)
    torch.manual_seed(0)
    net, ids = kind(info, width=8, num_heads=2, num_layers=2, segment=5, **options).double(), torch.arange(1)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(8 if p.dim() > 1 else 1)
        tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, SEPARATOR, 6, 5]])
        memory = net.step(Batch(tokens, tokens, ids, ids)).state["memory"]
        wanted = plain(net, net.embedding(tokens[0, 7:]))
    # a queue begins where `count` says: what stands before that is never read
    for name in {"long", "queue"} & set(memory):
        memory = memory | {name: memory[name] * torch.tensor([[0], [1]])}
    torch.testing.assert_close({name: memory[name] for name in wanted}, wanted, atol=1e-11, rtol=0)
