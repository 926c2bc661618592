"""What backbones around a decoder add to it: their weights, and TRC2's multiply-adds, against written-out formulas."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import cl.backbones
from cl.backbones.gpt import Gpt
from cl.backbones.trc2 import Trc2
from cl.core import Batch, Setting, StreamInfo

CONTEXT, VOCABULARY, GROUPS = 24, 11, 8
INFO = StreamInfo("text", Setting.CONTINUAL_PRETRAINING, (CONTEXT,), VOCABULARY, 1)


def rank(d):
    """Of TRC2's side inputs: about an eighth of the width, in whole groups."""
    return GROUPS * -(-d // (8 * GROUPS))


def trc2(d, n):
    """Routers behind all columns but the last, those of the late half with a weight of surprise; shifts; the store."""
    r = rank(d)
    router = d + d * r + 4 * r + 2 * (r * GROUPS + GROUPS)
    store = 2 * d * d // 4 + d * d + (2 * d + 1) * d + d * r + 2
    return (n - 1) * (router + r * d) + (n - n // 2) * 2 * GROUPS + store


# width d, n layers; two memory tokens and the other sizes of the toys
ADDED = {
    "Armt": lambda d, n: 2 * d + n * (2 * d * 4 + d**2 + d + 1),
    "BlockRecurrent": lambda d, n: 14 * d**2 + 2 * 3 * d + 3 * d,
    "GatedFifo": lambda d, n: n * 2 * (4 * d**2 + d) + 3 * d**2 + 2 * d,
    "Hmt": lambda d, n: 2 * d**2 + 2 * d,
    "Landmark": lambda d, n: d,
    "Memformer": lambda d, n: 2 * d + (n + 1) * (4 * d**2 + d),
    "Memoria": lambda d, n: n * (4 * d**2 + 2 * d) + 2 * d + 10 * d**2 + 7 * d,
    "Rmt": lambda d, n: 2 * d,
    "Trc2": trc2,
}
sizes = pytest.mark.parametrize(("width", "num_layers"), [(8, 2), (72, 3)])


def stateful():
    """Classes of backbones with a state, by listing the folder."""
    names = [path.stem for path in sorted(Path(cl.backbones.__file__).parent.glob("[!_]*.py"))]
    modules = [import_module(f"cl.backbones.{name}") for name in names]
    kinds = [(module, kind) for module in modules for kind in vars(module).values() if isinstance(kind, type)]
    found = {kind for module, kind in kinds if kind.__module__ == module.__name__ and hasattr(kind, "init_state")}
    return sorted(found - {Gpt}, key=lambda kind: kind.__name__)


def with_decoder(kind, **options):
    """The toy of a backbone, and the decoder that it is built around."""
    options = kind.toy | {"num_heads": 2} | options
    shared = {name: options[name] for name in ("width", "num_heads", "num_layers", "mlp") if name in options}
    return kind(INFO, **options).eval(), Gpt(INFO, **shared).eval()


@sizes
@pytest.mark.parametrize("kind", stateful(), ids=lambda kind: kind.__name__)
def test_weights_are_the_formula(kind, width, num_layers):
    parts = with_decoder(kind, width=width, num_layers=num_layers)
    net, decoder = (sum(p.numel() for p in part.parameters()) for part in parts)
    assert net - decoder == ADDED[kind.__name__](width, num_layers)


@sizes
def test_multiply_adds_of_trc2(width, num_layers):
    """A router and a shift behind each column but the last; of the store query, values, gate, feedback, and all keys.

    Values of the slots that are read are summed without a product, and both experts read every token.
    """
    found, d, r, slots = [], width, rank(width), Trc2.toy["num_slots"]
    tokens, ids = torch.zeros(3, CONTEXT, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    for part in with_decoder(Trc2, width=width, num_layers=num_layers):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            part(Batch(tokens, tokens, ids, ids))
        found.append(counter.get_total_flops() / 2)
    column, store = 2 * d * r + 2 * GROUPS * r, d * d // 4 + 3 * d * d + d * r + slots * d // 4
    assert found[0] - found[1] == 3 * CONTEXT * ((num_layers - 1) * column + store) + slots * d * d // 4
