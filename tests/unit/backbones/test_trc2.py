"""TRC2 against its equations written out token by token, and the invariants of its specification."""

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from cl.backbones._cells import ages
from cl.backbones.gpt import Gpt
from cl.backbones.trc2 import Trc2
from cl.backbones.trc2_parts import hippocampus as hippocampus_file
from cl.core import IGNORED, Batch, Part, Setting, Source, StreamInfo
from cl.seeding import Seeds

SEPARATOR, VOCABULARY, CONTEXT = 10, 11, 24
SMALL = {"width": 16, "num_layers": 4, "num_heads": 2, "num_kv_heads": 1, "mlp_width": 8, "num_slots": 12, "top": 3}
EXPERTS = {"mlp": "moe(experts=8, top=2, shared=1)"}


def info(setting=Setting.CONTINUAL_PRETRAINING, shape=(CONTEXT,), separator=SEPARATOR):
    is_text = setting == Setting.CONTINUAL_PRETRAINING
    measure = "loss" if is_text else "accuracy"
    return StreamInfo("text", setting, shape, VOCABULARY, 1, measure=measure, separator=separator)


def made(kind=Trc2, **options):
    with Seeds(0).as_global("init"):
        return kind(info(), **({**SMALL} if kind is Trc2 else {}) | options)


def baseline(**options):
    names = ("width", "num_layers", "num_heads", "num_kv_heads", "mlp_width")
    return made(Gpt, **{name: SMALL[name] for name in names}, **EXPERTS, **options)


def batch(tokens, experience=0):
    ids = torch.arange(len(tokens))
    return Batch(tokens, tokens.roll(-1, 1), torch.full_like(ids, experience), ids)


def packed(seed=0, num_rows=3):
    """Random tokens with a document border at 7 and at 15."""
    tokens = torch.randint(SEPARATOR, (num_rows, CONTEXT), generator=torch.Generator().manual_seed(seed))
    tokens[:, 7] = tokens[:, 15] = SEPARATOR
    return tokens


def trained(steps=12, **options):
    """A model whose gates are open, whose store is filled and whose critic has learnt."""
    return copy.deepcopy(_trained(steps, **options))


@cache
def _trained(steps, **options):
    model = made(**({"min_surprise": 0.5, "chunk": 8} | options)).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(5 if p.dim() > 1 else 1)
            if name.startswith("shifts"):
                p.normal_(generator=torch.Generator().manual_seed(1))
        if model.episodes is not None:
            model.episodes.hippocampus.opening.fill_(2.0)
            model.episodes.hippocampus.threshold.fill_(0.0)
    for seed in range(steps):
        rows = batch(packed(seed), experience=seed // 6)
        model.commit(rows, model(rows))
    return model


def buffers(model):
    return {name: value.clone() for name, value in model.named_buffers()}


def is_same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_columns_are_wired_as_written():
    """Column by column: s^{l+1} = thalamus_l(H) + [l >= injection] feedback(H^injection), added to the next queries."""
    model, tokens = trained(injection=2).eval(), packed(99)
    reset = model.resets(tokens)
    before = ages(CONTEXT, reset, torch.zeros(3, dtype=torch.int64)) - 1
    h, side, store, critic = model.embed(tokens), None, model.episodes.hippocampus, model.episodes.critic
    for number, column in enumerate(model.blocks, 1):
        shift = None if side is None else model.shifts[str(number - 1)](side)
        h = h + column.mixer(column.mixer_norm(h), reset=reset, query_shift=shift)[0]
        h = h + column.mlp(column.mlp_norm(h))[0]
        if number == 2:
            thought = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            feedback, gap = store(thought)[0], critic.gap(thought)
            known = critic.normalised((0.9 * gap[:, 1:-1] - gap[:, :-2]).clamp(min=0))
            known = F.pad(known, (2, 0)).masked_fill(before < 2, 0)
        if number < 4:
            part = model.thalami[str(number - 1)]
            alert = known if number >= 2 else torch.zeros_like(before, dtype=h.dtype)
            side = part(h, part.init_state(3, h.new_zeros(())), before, alert)[0]
            side = side + feedback if number >= 2 else side
    assert feedback.ne(0).any()
    torch.testing.assert_close(model(batch(tokens)).logits, model.head(model.norm(h)), atol=1e-5, rtol=1e-5)


# the specification's invariants


@pytest.mark.parametrize("is_training", [True, False])
def test_nothing_leaks_from_the_future(is_training):
    """Invariant 1, with a store that is read and a router that is alert."""
    model = trained().train(is_training)
    assert model.episodes.hippocampus.is_filled.any()
    tokens = packed(99)
    for t in (5, 12, 18, CONTEXT - 1):
        other = tokens.clone()
        other[:, t:] = (other[:, t:] + 1) % SEPARATOR
        left, right = model(batch(tokens)).logits, model(batch(other)).logits
        # experts read tokens in groups, whose size changes the last digit
        torch.testing.assert_close(left[:, :t], right[:, :t], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(left[:, t:], right[:, t:], atol=1e-3)


def test_no_gradient_comes_from_the_future():
    """The same as a derivative: exactly 0, whatever the rounding."""
    model = trained()
    x = model.embed(packed(99)).detach().requires_grad_()
    for t in (3, 11, 20):
        found = torch.autograd.grad(model.read(x, reset=model.resets(packed(99)))[0][:, t].sum(), x)[0]
        assert found[:, t + 1 :].eq(0).all()
        assert found[:, t].ne(0).any()


def test_forward_changes_nothing_and_draws_nothing():
    """Invariant 2."""
    model = trained()
    before, random = buffers(model), torch.get_rng_state()
    model(batch(packed(99)))
    model.step(batch(packed(98)))
    assert is_same(before, buffers(model))
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("cuts", [[1] * CONTEXT, [5, 2, 8, 1, 8], [16, 8]])
@pytest.mark.parametrize("mode", ["chunk", "recurrent"])
def test_reading_in_pieces_gives_what_the_whole_gives(cuts, mode):
    """Invariant 3, over document borders."""
    model, tokens = trained().eval(), packed(99)
    whole, state, pieces = model(batch(tokens)).logits, None, []
    for piece in tokens.split(cuts, 1):
        output = model.step(batch(piece), state, mode)
        state = output.state
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=2e-4, rtol=2e-4)


def test_documents_do_not_see_each_other():
    model, tokens = trained().eval(), packed(99)
    whole = model(batch(tokens)).logits
    for low, high in ((0, 7), (7, 15), (15, CONTEXT)):
        torch.testing.assert_close(whole[:, low:high], model(batch(tokens[:, low:high])).logits, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("is_training", [True, False])
def test_begins_as_the_mixture_of_experts_bit_for_bit(is_training):
    """Invariant 4, with the store full and the side path drawn at random: W_s is zero."""
    model, plain, rows = made().train(is_training), baseline().train(is_training), batch(packed())
    with torch.no_grad():
        model.episodes.hippocampus.keys.normal_()
        model.episodes.hippocampus.values.normal_()
        model.episodes.hippocampus.is_filled.fill_(True)
    output, wanted = model(rows), plain(rows)
    assert torch.equal(output.logits, wanted.logits)
    assert output.auxiliary == wanted.auxiliary
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[name], p) for name, p in plain.named_parameters())
    loss = F.cross_entropy(output.logits.flatten(0, 1), rows.targets.flatten())
    loss.backward()
    assert any(shift.weight.grad.abs().sum() > 0 for shift in model.shifts.values()), "the gate could never open"


def test_an_empty_store_answers_nothing():
    """Invariant 4, with every gate open: no slot, no feedback, and the same network as without store."""
    model = trained(steps=0).eval()
    without = trained(steps=0, has_hippocampus=False).eval()
    without.load_state_dict({name: value for name, value in model.state_dict().items() if name in without.state_dict()})
    assert torch.equal(model(batch(packed())).logits, without(batch(packed())).logits)


@pytest.mark.parametrize(("reads", "in_training"), [("training", True), ("never", False)])
def test_measured_as_if_the_store_were_empty(reads, in_training):
    model, rows = trained(), batch(packed(99))
    filled = {is_training: model.train(is_training)(rows).logits for is_training in (True, False)}
    empty = copy.deepcopy(model)
    empty.episodes.hippocampus.is_filled.fill_(False)
    model.reads_store = reads
    for is_training, is_read in ((True, in_training), (False, False)):
        wanted = filled[is_training] if is_read else empty.train(is_training)(rows).logits
        assert torch.equal(model.train(is_training)(rows).logits, wanted)
    assert not torch.equal(filled[False], empty(rows).logits)


def test_evaluation_never_writes():
    """Invariant 5."""
    model = trained()
    before = buffers(model)
    output = model.eval()(batch(packed(99)))
    model.commit(batch(packed(99)), output)
    assert is_same(before, buffers(model))
    rows = batch(packed(99))
    model.train().commit(rows, model(rows))
    assert not is_same(before, buffers(model))


# replayed rows


def with_replay(rows, count):
    mixed = batch(rows)
    mixed.parts = (Part(0, count), Part(count, len(rows), Source.REPLAY, "replay"))
    return mixed


def test_replayed_rows_take_the_plain_road():
    model, rows = trained().eval(), packed(99, 5)
    plain = copy.deepcopy(model)
    for shift in plain.shifts.values():
        torch.nn.init.zeros_(shift.weight)
    mixed, alone, bare = model(with_replay(rows, 3)), model(batch(rows)), plain(batch(rows))
    torch.testing.assert_close(mixed.logits[:3], alone.logits[:3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed.logits[3:], bare.logits[3:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mixed.logits[3:], alone.logits[3:], atol=1e-3)
    model.is_replay_bypassed = False
    assert torch.equal(model(with_replay(rows, 3)).logits, alone.logits)


def test_only_rows_of_the_stream_are_written():
    rows, left, right = packed(99, 5), trained(), trained()
    other = rows.clone()
    other[3:] = packed(55, 2)
    for model, tokens in ((left, rows), (right, other)):
        mixed = with_replay(tokens, 3)
        model.commit(mixed, model(mixed))
    for name, value in buffers(left).items():
        torch.testing.assert_close(value, buffers(right)[name], atol=1e-5, rtol=1e-5)


# writing


def test_commit_writes_the_state_of_the_event_and_of_what_followed(monkeypatch):
    monkeypatch.setattr(hippocampus_file, "ALIKE", 2.0)  # merge nothing
    model = trained(steps=3, num_slots=64, min_surprise=-9.0)
    rows = batch(packed(99))
    output = model(rows)
    before = model.episodes.hippocampus.is_filled.clone()
    model.commit(rows, output)
    added = (model.episodes.hippocampus.is_filled & ~before).nonzero().flatten()
    assert len(added)
    h = output.state.hidden
    for slot in added:
        pairs = [
            (b, t)
            for b in range(3)
            for t in range(CONTEXT)
            if torch.equal(h[b, t], model.episodes.hippocampus.keys[slot])
        ]
        # documents begin with the same state, wherever they stand
        followers = [(b, t + 1) for b, t in pairs if torch.equal(h[b, t + 1], model.episodes.hippocampus.values[slot])]
        assert followers
        assert all(rows.inputs[b, t] != SEPARATOR for b, t in followers), "what follows a document is no part of it"


def test_ignored_tokens_are_neither_written_nor_learnt_from():
    model, rows = trained(), batch(packed(99))
    rows.targets[:] = IGNORED
    before = buffers(model)
    model.commit(rows, model(rows))
    after = buffers(model)
    for name in (
        "episodes.critic.weight",
        "episodes.critic.moments",
        "episodes.hippocampus.keys",
        "episodes.hippocampus.is_filled",
    ):
        assert torch.equal(before[name], after[name])


def test_surprise_reaches_the_late_routers_two_tokens_later():
    """s_t is known once token t + 1 is read; a border between documents stops it."""
    model, rows = trained(), batch(packed(99))
    calls = []
    for part in model.thalami.values():
        part.register_forward_pre_hook(lambda module, given: calls.append(given[3]))
    trace = model(rows).state
    early, late = calls[: model.injection - 1], calls[model.injection - 1 :]
    assert all(each.eq(0).all() for each in early)
    assert late
    own = model.episodes.critic.normalised(trace.surprise)
    for t in range(2, CONTEXT):
        wanted = torch.zeros(3) if t in (7, 8, 15, 16) else own[:, t - 2]
        torch.testing.assert_close(late[0][:, t], wanted)
    assert late[0][:, :2].eq(0).all()
    assert late[0].ne(0).any()


def test_store_without_critic_takes_the_most_costly_tokens():
    model = trained(has_critic=False)
    assert model.episodes.critic.bias.eq(0).all()
    assert model.episodes.hippocampus.is_filled.any()
    rows = batch(packed(99))
    output = model(rows)
    before = model.episodes.hippocampus.step.clone()
    model.commit(rows, output)
    loss = F.cross_entropy(output.logits.transpose(1, 2), rows.targets, reduction="none")
    loss[:, [6, 14, CONTEXT - 1]] = 0
    worst = output.state.hidden.flatten(0, 1)[loss.flatten().argmax()]
    written = (model.episodes.hippocampus.step != before).nonzero().flatten()
    part = model.episodes.hippocampus
    alike = [F.cosine_similarity(part.key(part.keys[n]), part.key(worst), dim=0) for n in written]
    assert max(alike) > 0.94, "written as it is, or merged with one that is alike"


# parts that can be left out


@pytest.mark.parametrize("has_thalamus", [True, False])
@pytest.mark.parametrize("has_hippocampus", [True, False])
def test_every_part_can_be_left_out(has_thalamus, has_hippocampus):
    options = {"has_thalamus": has_thalamus, "has_hippocampus": has_hippocampus}
    model, rows = trained(**options), batch(packed(99))
    names = " ".join(model.state_dict())
    assert ("thalami" in names) == has_thalamus
    assert ("hippocampus" in names) == ("critic" in names) == has_hippocampus
    assert ("shifts" in names) == (has_thalamus or has_hippocampus)
    assert model.commits == has_hippocampus
    assert model(rows).logits.isfinite().all()
    if not has_thalamus and not has_hippocampus:
        plain = baseline()
        plain.load_state_dict(model.state_dict())
        assert torch.equal(model(rows).logits, plain(rows).logits)


@pytest.mark.parametrize("left_out", [None, "has_past", "has_competition", "has_gate", "has_critic"])
def test_gates_open_in_training(left_out):
    """Every weight of the side path gets a gradient once W_s has left zero and something is stored."""
    model = trained(**({left_out: False} if left_out else {}))
    rows = batch(packed(99))
    output = model(rows)
    (F.cross_entropy(output.logits.flatten(0, 1), rows.targets.flatten()) + sum(output.auxiliary.values())).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert [name for name in silent if "experts" not in name] == []


@pytest.mark.parametrize("shape", [(1, 8, 8), (6, 5)])
def test_images_and_sequences_are_read_and_stored(shape):
    with Seeds(0).as_global("init"):
        model = Trc2(info(Setting.DOMAIN_INCREMENTAL, shape, None), **SMALL, min_surprise=0.0)
    ids = torch.arange(5)
    rows = Batch(torch.randn(5, *shape), ids, ids * 0, ids)
    for _ in range(4):
        model.commit(rows, model(rows))
    assert model.episodes.critic.bias.ne(0).all()
    assert model.episodes.hippocampus.is_filled.any()


def test_recomputed_blocks_give_the_same_gradients():
    found = []
    for is_checkpointed in (False, True):
        model = trained(steps=3, is_checkpointed=is_checkpointed)
        model(batch(packed(99))).logits.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-4)
