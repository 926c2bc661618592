"""Every backbone with a memory around its blocks: cut anywhere, causal, documents apart, rows apart, truncated."""

import inspect
from importlib import import_module
from pathlib import Path

import pytest
import torch

import cl.backbones
from cl.backbones._mixer import Lifetime
from cl.backbones._state import detached, mapped, rows_of
from cl.backbones.armt import Armt
from cl.backbones.block_recurrent import BlockRecurrent
from cl.backbones.gated_fifo import GatedFifo
from cl.backbones.gpt import Gpt
from cl.backbones.hmt import Hmt
from cl.backbones.landmark import Landmark
from cl.backbones.memformer import Memformer
from cl.backbones.memoria import Memoria
from cl.backbones.rmt import Rmt
from cl.backbones.trc2 import Trc2
from cl.core import Batch, Setting, StreamInfo, UserError
from cl.seeding import Seeds

SEPARATOR, VOCABULARY, CONTEXT = 10, 11, 24
SEGMENTED = [Armt, BlockRecurrent, GatedFifo, Hmt, Memformer, Memoria, Rmt]
EVERY = [*SEGMENTED, Landmark, Trc2]
each = pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
each_segmented = pytest.mark.parametrize("kind", SEGMENTED, ids=lambda kind: kind.__name__)


def model(kind, separator=SEPARATOR, **options):
    info = StreamInfo(
        "text", Setting.CONTINUAL_PRETRAINING, (CONTEXT,), VOCABULARY, 1, measure="loss", separator=separator
    )
    with Seeds(0).as_global("init"):
        made = kind(info, **({"width": 8, "num_heads": 2, "num_layers": 2} | kind.toy | options)).double()
    # weights of 0.02 hardly let one token feel another
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(8 if p.dim() > 1 else 1)
    # a store that is empty would answer nothing
    for seed in (11, 12) if kind is Trc2 and info.measure == "loss" else ():
        rows = batch(tokens(seed=seed))
        made.commit(rows, made.train()(rows))
    return made.eval()


def tokens(num_rows=3, seed=0):
    """Random tokens; documents start inside a segment, at a border, at the first token, and next to each other."""
    drawn = torch.randint(SEPARATOR, (num_rows, CONTEXT), generator=torch.Generator().manual_seed(seed))
    drawn[0, 8] = drawn[0, 13] = drawn[1, 6] = drawn[1, 7] = drawn[2, 0] = SEPARATOR
    return drawn


def batch(inputs):
    ids = torch.arange(len(inputs))
    return Batch(inputs, inputs.roll(-1, 1), torch.zeros_like(ids), ids)


def changed(inputs, places):
    """Other tokens at some places, documents as they are."""
    other = inputs.clone()
    other[places] = torch.where(inputs[places] == SEPARATOR, SEPARATOR, (inputs[places] + 3) % SEPARATOR)
    return other


@each
def test_any_split_gives_the_whole(kind):
    net, inputs = model(kind), tokens()
    whole = net.step(batch(inputs))
    for cuts in ([1, 3, 7, 8, 13, 22], [4, 16]):
        state, logits = None, []
        for piece in inputs.tensor_split(cuts, 1):
            out = net.step(batch(piece), state)
            state = out.state
            logits.append(out.logits)
        torch.testing.assert_close(torch.cat(logits, 1), whole.logits, atol=1e-11, rtol=0)
        mapped(lambda a, b: torch.testing.assert_close(a, b, atol=1e-11, rtol=0) or a, state, whole.state)


@each
def test_token_by_token_is_the_whole(kind):
    net, inputs = model(kind), tokens()
    slow = net.step(batch(inputs), mode="recurrent").logits
    torch.testing.assert_close(slow, net(batch(inputs)).logits, atol=1e-11, rtol=0)


@each
@pytest.mark.parametrize("is_training", [False, True])
def test_no_token_sees_a_later_one(kind, is_training):
    """With a memory that is not empty: a row has been read before."""
    net, inputs, places = model(kind).train(is_training), tokens(), (1, 6, 7, 8, 15, 23)
    # every place in rows of its own of one batch
    rows = torch.arange(len(inputs)).repeat(len(places))
    state = rows_of(net.step(batch(tokens(seed=1)[:, :9])).state, rows)
    others = torch.cat([changed(inputs, (slice(None), t)) for t in places])
    plain, other = (net.step(batch(each), state).logits.split(len(inputs)) for each in (inputs[rows], others))
    for t, before, after in zip(places, plain, other, strict=True):
        assert torch.equal(after[:, :t], before[:, :t]), f"token {t} is seen before it is read"


@each
def test_the_past_is_remembered_over_many_segments(kind):
    """The second token of a row changes the last one, further away than a segment."""
    net, inputs = model(kind), tokens()
    other = net(batch(changed(inputs, (2, 1)))).logits
    assert (other - net(batch(inputs)).logits)[2, -1].abs().max() > 1e-12


@each
def test_documents_do_not_see_each_other(kind):
    net, inputs = model(kind), tokens()
    plain = net(batch(inputs)).logits
    for row, start in ((0, 8), (0, 13), (1, 6), (1, 7)):
        other = net(batch(changed(inputs, (row, slice(0, start))))).logits
        # sums over documents are differences of sums over the row in trc2: of what was before, rounding remains
        rounding = 1e-14 if kind is Trc2 else 0.0
        assert (other - plain)[row, start:].abs().max() <= rounding, f"document at {start} sees what is before"


@each
def test_a_document_at_a_border_is_read_as_if_alone(kind):
    net, inputs = model(kind), tokens()
    alone = net(batch(inputs[:1, 8:])).logits
    torch.testing.assert_close(alone[0], net(batch(inputs)).logits[0, 8:], atol=1e-11, rtol=0)


@each
def test_rows_and_their_states_are_independent(kind):
    net, inputs = model(kind), tokens()
    first = net.step(batch(inputs[:, :11]))
    plain = net.step(batch(inputs[:, 11:]), first.state).logits
    order = torch.tensor([2, 0])
    some = net.step(batch(inputs[order, 11:]), rows_of(first.state, order)).logits
    torch.testing.assert_close(some, plain[order], atol=1e-11, rtol=0)


@each
def test_state_survives_a_file(kind, tmp_path):
    net, inputs = model(kind), tokens()
    state = net.step(batch(inputs[:, :11])).state
    torch.save(mapped(torch.Tensor.detach, state), tmp_path / "state.pt")
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    assert torch.equal(net.step(batch(inputs[:, 11:]), again).logits, net.step(batch(inputs[:, 11:]), state).logits)


@each
def test_a_forward_changes_nothing_in_the_module(kind):
    net = model(kind).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net(batch(tokens())).logits.sum().backward()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def gradient_at_input(net, inputs, loss_from):
    """Gradient of the loss from token `loss_from` on, at the embedding of each token."""
    seen = []
    inner = net.embed
    net.embed = lambda raw: seen.append(inner(raw).detach().requires_grad_()) or seen[-1]
    net.step(batch(inputs)).logits[:, loss_from:].square().sum().backward()
    # the sensory tokens of hmt are embedded a second time
    return [0.0 if x.grad is None else x.grad.abs().max().item() for x in seen if x.shape[1] > 1]


@pytest.mark.parametrize("kind", [Armt, BlockRecurrent, GatedFifo, Memformer, Rmt], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("truncate", [None, 1, 2])
def test_truncation_is_exactly_zero_gradient(kind, truncate):
    """Loss in the last of six segments: it reaches back to the last border that is a multiple of k, and no further."""
    options = {"segment": 4, "is_replayed": False, "truncate": truncate, "separator": None}
    net = model(kind, **options)
    found = gradient_at_input(net, tokens()[2:], loss_from=20)
    assert len(found) == 6
    reached = 0 if truncate is None else (5 // truncate) * truncate
    assert all(value == 0 for value in found[:reached])
    assert all(value > 0 for value in found[reached:])


def test_truncation_of_hmt_cuts_its_queue():
    inputs = tokens()[2:]
    weights = {}
    for truncate in (None, 1):
        net = model(Hmt, segment=4, num_sensory=1, truncate=truncate, separator=None)
        net.step(batch(inputs)).logits[:, 20:].square().sum().backward()
        weights[truncate] = net.embedding.weight.grad[inputs[0, :16].unique()].abs().sum()
        own = set(inputs[0, 19:].tolist())
        early = [token for token in inputs[0, :19].tolist() if token not in own]
        grad = net.embedding.weight.grad[early].abs().max()
        assert (grad == 0) == (truncate == 1), "only the last segment and its sensory token are reached"
        assert early


@pytest.mark.parametrize("kind", [Landmark, Trc2])
@pytest.mark.parametrize("is_cut", [False, True])
def test_gradient_flows_from_piece_to_piece_until_it_is_cut(kind, is_cut):
    """Without an option of their own these two are truncated by `detached`."""
    net, inputs = model(kind, separator=None), tokens()[2:] % 5
    inputs[:, :12] += 5
    state = net.step(batch(inputs[:, :12])).state
    net.step(batch(inputs[:, 12:]), detached(state) if is_cut else state).logits.square().sum().backward()
    early, late = (net.embedding.weight.grad[part.unique()].abs() for part in (inputs[:, :12], inputs[:, 12:]))
    assert late.min() > 0
    assert early.max() == 0 if is_cut else early.min() > 0


def test_memoria_is_outside_of_back_propagation():
    """Only the abstractor's reading of the last segment is trained; engrams carry no gradient."""
    net = model(Memoria, segment=4, separator=None)
    found = gradient_at_input(net, tokens()[2:], loss_from=20)
    assert all(value == 0 for value in found[:5])
    state = net.step(batch(tokens())).state
    assert not any(value.requires_grad for value in state["memory"]["engrams"].values())


# no gradient passes through the engrams of Memoria, so it has nothing to replay
@pytest.mark.parametrize("kind", [kind for kind in SEGMENTED if kind is not Memoria], ids=lambda kind: kind.__name__)
def test_replayed_gradients_are_those_without_replay(kind):
    """Memory-replay back-propagation: the same gradients, from memories at the borders alone."""
    grads, kept_bytes = [], []
    for is_replayed in (False, True):
        net = model(kind, segment=4, is_replayed=is_replayed).train()
        count = 0

        def pack(x):
            nonlocal count
            count += x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = net(batch(tokens())).logits.square().sum()
        loss.backward()
        grads.append({name: p.grad for name, p in net.named_parameters()})
        kept_bytes.append(count)
    assert all(torch.allclose(grads[0][name], grads[1][name], atol=1e-12) for name in grads[0])
    assert kept_bytes[1] < kept_bytes[0] / 5, "activations inside segments are not kept"


@each
@pytest.mark.parametrize("is_narrow", [False, True], ids=["autocast", "weights"])
def test_states_stay_float32_in_bfloat16(kind, is_narrow):
    """Of memories around blocks and of the blocks themselves, under autocast and in a model in bfloat16."""
    net = model(kind)
    exact = net(batch(tokens())).logits
    net = net.bfloat16() if is_narrow else net.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=not is_narrow):
        first = net.step(batch(tokens()))
        assert net.step(batch(tokens()), first.state).logits.dtype == torch.bfloat16
    assert (first.logits - exact).norm() < 0.2 * exact.norm()
    dtypes = set()
    mapped(lambda value: dtypes.add(value.dtype) or value, first.state)
    assert {dtype for dtype in dtypes if dtype.is_floating_point} == {torch.float32}


@each_segmented
def test_lifetimes_are_what_is_declared(kind):
    """Fast is what the memory holds; a document that starts clears what it is said to; only `commit` writes buffers."""
    net, declared, size = model(kind), kind.lifetime, kind.toy["segment"]
    inputs = torch.randint(SEPARATOR, (2, 3 * size), generator=torch.Generator().manual_seed(0))
    inputs[:, 2 * size] = SEPARATOR
    left, alone = (net.step(batch(part)).state["memory"] for part in (inputs, inputs[:, 2 * size :]))
    # one memory in every block, or one of all
    parts = [(left[n], alone[n]) for n in left] if kind is Armt else [(left, alone)]
    for own, fresh in parts:
        assert set(own) == set(declared.fast)
        for name in declared.cleared:
            mapped(torch.testing.assert_close, {name: own[name]}, {name: fresh[name]})
    buffers = [name for name, _ in (model(kind, persist=2) if declared.kept else net).named_buffers()]
    assert sorted(declared.kept) == sorted(buffers), "what outlives a batch is in every checkpoint"


@pytest.mark.parametrize(("kind", "num_before"), [(Landmark, 12), (Trc2, 8)])
def test_lifetimes_around_blocks_are_what_is_declared(kind, num_before):
    """The state is that of the blocks, by number, and what is declared beside it.

    Blocks clear keys and values by not looking at them: noise in place of those before the document (eight tokens, and
    a landmark after every second one) changes nothing that is read later, and in place of the document's own it does.
    """
    net, declared = model(kind), kind.lifetime
    inputs = torch.randint(SEPARATOR, (2, 12), generator=torch.Generator().manual_seed(0))
    inputs[:, 8] = SEPARATOR
    left, alone = (net.step(batch(part)).state for part in (inputs, inputs[:, 8:]))
    beside = {name: value for name, value in left.items() if not name.isdigit()}
    assert {"decoder", *beside} == set(declared.fast)
    for name in declared.cleared:
        mapped(lambda a, b: torch.testing.assert_close(a, b, atol=1e-12, rtol=0) or a, left[name], alone[name])
    if kind is Landmark:
        assert int(left["tokens"]) == 12, "landmarks are counted in the row, whatever starts in it"
    later = batch(changed(inputs, (slice(None), 0)))
    plain = net.step(later, left).logits[:, :8]
    for number, block in enumerate(net.blocks):
        state, clears = left[str(number)], block.mixer.lifetime.cleared
        assert set(state) == set(block.mixer.lifetime.fast)
        for low, high, is_seen in ((0, num_before, False), (num_before, None, True)):
            other = {name: value.clone() for name, value in state.items()}
            for name in clears:
                other[name][:, :, low:high] += 1.0
            read = net.step(later, left | {str(number): other}).logits[:, :8]
            assert torch.equal(read, plain) != is_seen
    buffers = [name for name, _ in net.named_buffers()]
    assert all(name.startswith(declared.kept) for name in buffers), "what outlives a batch is in every checkpoint"
    assert all(any(name.startswith(part) for name in buffers) for part in declared.kept)
    assert net.commits == bool(declared.kept)


def test_every_backbone_with_a_state_is_tested_here():
    """Found by listing the folder. `Gpt` itself is tested with every mixer, in test_mixers."""
    found = set()
    for path in Path(cl.backbones.__file__).parent.glob("[!_]*.py"):
        module = import_module(f"cl.backbones.{path.stem}")
        kinds = [each for each in vars(module).values() if isinstance(each, type)]
        found |= {each for each in kinds if each.__module__ == module.__name__ and hasattr(each, "init_state")}
    assert found == {Gpt, *EVERY}
    assert all(isinstance(kind.lifetime, Lifetime) for kind in EVERY), "what is fast and what is kept is declared"


@each
def test_lora_attaches_to_every_map(kind):
    peft = pytest.importorskip("peft")
    net = model(kind)
    plain = net(batch(tokens())).logits
    names = [name for name, part in net.named_modules() if isinstance(part, torch.nn.Linear)]
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    adapted = peft.inject_adapter_in_model(config, net).double()
    logits = adapted(batch(tokens())).logits
    assert not torch.allclose(logits, plain)
    logits.square().sum().backward()
    still = [
        name for name, p in adapted.named_parameters() if p.requires_grad and not (p.grad is not None and p.grad.any())
    ]
    assert not still, f"no gradient reaches {still}"
    assert not any(p.requires_grad for name, p in adapted.named_parameters() if "lora_" not in name)


def test_images_are_read_in_segments():
    info = StreamInfo("image", Setting.CLASS_INCREMENTAL, (1, 8, 8), 5, 1)
    inputs = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    ids = torch.zeros(2, dtype=torch.int64)
    for kind in EVERY:
        net = kind(info, **({"width": 8, "num_heads": 2} | kind.toy)).double().eval()
        whole = net(Batch(inputs, ids, ids, ids)).logits
        first = net.step(Batch(inputs[:, :, :3], ids, ids, ids))
        assert torch.allclose(net.step(Batch(inputs[:, :, 3:], ids, ids, ids), first.state).logits, whole, atol=1e-11)


def test_options_of_the_decoder_are_listed_and_checked():
    parameters = inspect.signature(Rmt).parameters
    assert list(parameters)[:3] == ["info", "segment", "num_memory"]
    assert parameters["width"].default == 96
    assert "decoder" not in parameters
    with pytest.raises(UserError, match="the decoder has no option 'depth'; its options are width"):
        model(Rmt, depth=3)


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (Rmt, {"segment": 0}, "backbone.segment is 0"),
        (Rmt, {"num_memory": 0}, "backbone.num_memory is 0"),
        (Rmt, {"truncate": 0}, "backbone.truncate is 0"),
        (Rmt, {"is_replayed": 1}, "backbone.is_replayed is 1"),
        (Armt, {"degree": 0}, "backbone.degree is 0"),
        (Hmt, {"segment": 4, "num_sensory": 5}, "backbone.segment is 4 with backbone.num_sensory=5"),
        (BlockRecurrent, {"layer": 2}, "backbone.layer is 2; it must be the number of a block, 0 to 1"),
        (BlockRecurrent, {"gate": "open"}, "backbone.gate is 'open'"),
        (Memoria, {"depth": -1}, "backbone.depth is -1"),
        (Memoria, {"persist": 9, "num_long": 8}, "backbone.persist is 9; it must be at most backbone.num_long=8"),
        (Memoria, {"life": 1}, "backbone.life is 1 and gain"),
        (Landmark, {"block": 0}, "backbone.block is 0"),
        (Landmark, {"blocks": "landmark(by=segment)"}, "by of landmark is 'segment'; it must be one of document, row"),
    ],
)
def test_wrong_options_are_one_sentence(kind, options, says):
    with pytest.raises(UserError) as caught:
        model(kind, **options)
    assert says in str(caught.value)
