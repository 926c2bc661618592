"""Relevance maps: what a finished task answers never changes; tasks are found by their inputs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from cl.core import Batch, Setting, UserError
from cl.testing import toy_stream
from strategies.derpp import Derpp
from strategies.lwf import Lwf
from strategies.replay import Replay
from strategies.rmn import Rmn, _add, _jump, _net
from streams.permuted import permuted

SETTINGS = [Setting.DOMAIN_INCREMENTAL, Setting.TASK_INCREMENTAL]


def answers(lab, rmn, setting):
    """Logits of each map, after each experience, on rows of the experience that made it."""
    kept = []

    class Keeper(lab.Recorder):
        def on_experience_end(self, state):
            row = []
            for k, experience in enumerate(state.stream.experiences[: state.experience.id + 1]):
                batch = state.prepare(experience.load().rows(torch.arange(30)))
                with torch.no_grad():
                    row.append(_net(state.model)(batch, which=k).logits)
            kept.append(row)

    keeper = Keeper()
    optimizer = lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)  # noqa: E731
    _, trainer = lab.run([rmn, keeper], setting, optimizer=optimizer, epochs=3)
    return kept, trainer


def check(lab, setting):
    kept, trainer = answers(lab, Rmn(density=0.5), setting)
    for k in range(3):
        for later in kept[k:]:
            assert torch.equal(later[k], kept[k][k])
    net = _net(trainer.state.model)
    assert not torch.equal(net.maps(0)[0], net.maps(0)[1])
    return trainer


@pytest.mark.parametrize("setting", SETTINGS)
def test_finished_tasks_answer_the_same_bit_for_bit(lab, setting):
    trainer = check(lab, setting)
    result = trainer.ledger.result
    if setting == Setting.TASK_INCREMENTAL:
        for j in range(3):
            assert len({row[j] for row in result.R[j:]}) == 1
    assert result.R[0][0] > 0.6


def test_it_needs_the_frozen_weights(lab, monkeypatch):
    monkeypatch.setattr(Rmn, "_held", lambda self, state: [])
    lab.dies(lambda: check(lab, SETTINGS[0]))


@pytest.mark.parametrize(("density", "sparsity"), [(0.5, 0.0), (0.3, 2.0)])
def test_a_masked_network_is_the_product_of_weights_and_map(lab, density, sparsity):
    """Forward, and the gradients of weights and scores, written out for the first step of SGD."""
    decay = 0.2
    recorder, trainer = lab.run(
        [Rmn(density=density, sparsity=sparsity, map_lr=3.0)],
        Setting.DOMAIN_INCREMENTAL,
        optimizer=partial(torch.optim.SGD, lr=lab.lr, weight_decay=decay),
        epochs=None,
        max_steps=1,
    )
    step = recorder.steps[0]
    scores = {f"scores.{k}": step.before[f"scores.{k}"].requires_grad_() for k in range(4)}
    names = ["first.weight", "first.bias", "head.weight", "head.bias"]
    order = _net(trainer.state.model).names
    weights = {name: step.before[f"backbone.{name}"].requires_grad_() for name in order}
    assert sorted(order) == sorted(names)
    shown = {}
    for k, name in enumerate(order):
        a = scores[f"scores.{k}"]
        shown[name] = weights[name] * ((a > 0).double() + torch.sigmoid(10 * a) - torch.sigmoid(10 * a).detach())
    x = step.batch.inputs.flatten(1)
    hidden = (x @ shown["first.weight"].T + shown["first.bias"]).relu()
    loss = torch.nn.functional.cross_entropy(hidden @ shown["head.weight"].T + shown["head.bias"], step.batch.targets)
    every = [1 / (1 + (-10 * a).exp()) for a in scores.values()]
    pull = sparsity * sum(each.sum() for each in every) / sum(each.numel() for each in every)
    if sparsity:
        lab.close(step.terms["rmn"], pull.item())
    (loss + pull).backward()
    for k, name in enumerate(order):
        gradient = weights[name].grad + decay * weights[name]
        lab.close(step.after[f"backbone.{name}"], (weights[name] - lab.lr * gradient).detach())
        a = scores[f"scores.{k}"]
        lab.close(step.after[f"scores.{k}"], (a - 3 * lab.lr * a.grad).detach())
    drawn = scores["scores.0"].detach()
    assert float((drawn > 0).double().mean()) == pytest.approx(density, abs=0.05)
    # little or much: even over a fifth, so that the share that is relevant lies between 0 and a fifth of the density
    assert (drawn.min() / 0.2, drawn.max() / 0.2) == pytest.approx((density - 1, density), abs=0.02)


def test_a_closed_map_is_pulled_nowhere(lab):
    _, trainer = lab.run([rmn := Rmn(density=0.5, sparsity=2.0)])
    assert not rmn.is_open and rmn.penalty(trainer.state, None, None) is None


def test_a_new_map_begins_without_the_moments_of_the_last(lab):
    """Adam knows nothing of the scores in the first step of an experience, and goes on for the weights."""
    known = []

    class Keeper(lab.Recorder):
        def on_batch(self, state, batch):
            net = _net(state.model)
            known.append([[p in state.optimizer.state for p in each] for each in (net.scores, net.weights())])
            return batch

    keeper = Keeper()
    lab.run([Rmn(density=0.5), keeper], optimizer=partial(torch.optim.Adam, lr=0.01))
    first = [k for k, step in enumerate(keeper.steps) if k == 0 or step.experience != keeper.steps[k - 1].experience]
    assert len(first) == 3
    for number, (scores, weights) in enumerate(known):
        assert scores == [number not in first] * 4
        assert weights == [number > 0] * 4


@pytest.mark.parametrize("other", [Replay(40), Derpp(40), Lwf()], ids=lambda other: other.name)
def test_heads_move_under_their_own_map_only(lab, other):
    """Another strategy's rows of old tasks pass through the running map, which their heads are not made for."""
    kept = []

    class Keeper(lab.Recorder):
        def on_experience_end(self, state):
            kept.append([state.prepare(e.load().rows(torch.arange(30))) for e in state.stream.experiences])
            with torch.no_grad():
                kept[-1] = [_net(state.model)(rows, which=k).logits for k, rows in enumerate(kept[-1])]

    lab.run([Rmn(density=0.5), other, Keeper()], Setting.TASK_INCREMENTAL)
    for k in range(3):
        for later in kept[k:]:
            assert torch.equal(later[k], kept[k][k])


def test_what_cannot_move_has_no_gradient(lab):
    """Or a norm that gradients are clipped by would know of it."""
    norms, num_frozen = [], 0
    rmn = Rmn(density=0.5)

    class Keeper(lab.Recorder):
        def on_gradients(self, state):
            super().on_gradients(state)
            nonlocal num_frozen
            for weight, frozen in zip(_net(state.model).weights(), _net(state.model).frozen(), strict=True):
                num_frozen += int(frozen.sum())
                norms.append(float(weight.grad[frozen].norm()))

    lab.run([rmn, Keeper()], clip_norm=0.1)
    assert num_frozen > 0 and not any(norms)


def test_the_share_of_weights_in_use_is_noted(lab):
    recorder, trainer = lab.run([Rmn(density=0.5)])
    noted = [value for name, *_, value in trainer.ledger.result.extra if name == "rmn_used"]
    for value, model in zip(noted, recorder.ends, strict=True):
        maps = [buffer.any(0).flatten() for name, buffer in model.named_buffers() if "maps_" in name]
        assert value == pytest.approx(torch.cat(maps).double().mean().item())
    assert 0.4 < noted[0] < noted[1] < noted[2] < 1


def test_a_task_never_trained_is_answered_by_the_map_in_use(lab):
    _, trainer = lab.run([rmn := Rmn(density=0.5)], Setting.TASK_INCREMENTAL)
    state = trainer.state
    rows = Batch.cat([state.prepare(e.load().rows(torch.arange(5))) for e in state.stream.experiences])
    wanted = [_net(state.model)(rows, which=k).logits for k in (0, 2, 2)]
    del rmn.tasks["head 1"]
    found = rmn.eval_forward(state, rows).logits
    for k, each in enumerate(wanted):
        lab.close(found[5 * k : 5 * k + 5], each[5 * k : 5 * k + 5])


def test_jump_is_one_where_rows_agree_and_large_where_they_do_not():
    generator = torch.Generator().manual_seed(0)
    kept = {}
    _add(kept, torch.randn(400, 50, generator=generator, dtype=torch.float64))
    same = [_jump(torch.randn(16, 50, generator=generator, dtype=torch.float64), kept) for _ in range(40)]
    assert 0.8 < sum(same) / 40 < 1.2
    assert max(same) < 2.5
    # a shift by one deviation: B n / (B + n) more than chance
    other = _jump(1 + torch.randn(16, 50, generator=generator, dtype=torch.float64), kept)
    assert other == pytest.approx(1 + 16 * 400 / 416, rel=0.2)


def test_jump_by_hand():
    """Rows (0, 0) and (2, 4): mean (1, 2), variance 2 + 8; a row (1, 7) is 25 away."""
    kept = {}
    row = torch.tensor([[1.0, 7.0]], dtype=torch.float64)
    assert _jump(row, kept) == float("inf")
    _add(kept, torch.zeros(1, 2, dtype=torch.float64))
    assert _jump(row, kept) == float("inf"), "a single row says nothing of chance"
    _add(kept, torch.tensor([[2.0, 4.0]], dtype=torch.float64))
    assert _jump(row, kept) == pytest.approx(25 / (10 * (1 + 1 / 2)))
    assert _jump(row.repeat(4, 1), kept) == pytest.approx(25 / (10 * (1 / 4 + 1 / 2)))


@pytest.mark.parametrize("level", [0.0, 0.1, 1 / 3, -7.3])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_jump_of_rows_that_are_all_the_same(level, num_rows):
    """Nothing is left to chance: the same rows are no jump, also where sums do not give 0, and others are one."""
    kept = {}
    for _ in range(7):
        _add(kept, torch.full((3, 40), level, dtype=torch.float64))
    assert abs(_jump(torch.full((num_rows, 40), level, dtype=torch.float64), kept)) < 1e-6
    for other in (level + 0.01, level - 2.0):
        assert _jump(torch.full((num_rows, 40), other, dtype=torch.float64), kept) > 1e6


def test_tasks_of_constant_rows_are_recognised():
    """A grey of one kind, of another, and both again: two maps."""
    rmn, visits = Rmn(boundaries="detected"), []
    rmn.moments = [{}]

    def enter(state, known):
        rmn.moments += [{}] if known is None else []
        rmn.active = len(rmn.moments) - 1 if known is None else known

    rmn._enter = enter
    state = SimpleNamespace(micro_step=0, note=lambda name, value: None)
    for level in (0.0, 0.0, 0.1, 0.1, 0.0, 0.1, 0.1, 0.0):
        blank = torch.zeros(4, dtype=torch.int64)
        rmn._look(state, Batch(torch.full((4, 40), level, dtype=torch.float64), blank, blank, blank))
        visits.append(rmn.active)
    assert visits == [0, 0, 1, 1, 0, 1, 1, 0]


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (4, 4)])
def test_every_row_is_counted_and_one_row_is_no_task(lab, batch_size, accumulation):
    """The rows of one domain, one at a time, or four to a micro-batch."""
    stream = toy_stream(Setting.DOMAIN_INCREMENTAL).first(1)
    rmn = Rmn(boundaries="detected", max_maps=5)
    lab.run([rmn], stream, batch_size=batch_size, accumulation=accumulation)
    assert rmn.num_maps == 1 and float(rmn.moments[0]["count"]) == 192
    inputs = lab.stream_of(stream).experiences[0].load().inputs.double() / 127.5 - 1
    lab.close(rmn.moments[0]["sum"], inputs.flatten(1).sum(0), rtol=1e-6)
    lab.close(rmn.moments[0]["squares"], inputs.flatten(1).square().sum(0), rtol=1e-6)


def test_a_stray_row_is_left_again(lab):
    """Rows of A, one that fits nothing, A again: back to A's map; of B after that, one by one: a single new map."""
    rmn, visits, notes = Rmn(boundaries="detected"), [], []
    rmn.moments = [{}]

    def enter(state, known):
        rmn.moments += [{}] if known is None else []
        rmn.active = len(rmn.moments) - 1 if known is None else known

    rmn._enter = enter
    state = SimpleNamespace(micro_step=0, note=lambda name, value: notes.append(value))
    draws = torch.Generator().manual_seed(0)
    for shift, num_rows in [(0, 30), (0, 30), (9, 1), (0, 1), (0, 30), *[(-5, 1)] * 5, (0, 30)]:
        inputs = shift + torch.randn(num_rows, 40, generator=draws)
        blank = torch.zeros(num_rows, dtype=torch.int64)
        rmn._look(state, Batch(inputs, blank, blank, blank))
        visits.append(rmn.active)
    assert visits == [0, 0, 1, 0, 0, 2, 2, 2, 2, 2, 0]
    assert notes == [1, 0, 2, 0]
    assert [float(kept["count"]) for kept in rmn.moments] == [121, 1, 5]


def test_detected_tasks_with_labels_are_answered_by_their_maps(lab):
    stream = permuted(dataset="digits", num_experiences=3, setting="task_incremental")
    _, trainer = lab.run([rmn := Rmn(density=0.5, boundaries="detected")], stream, batch_size=64)
    assert rmn.tasks == {"head 0": 0, "head 1": 1, "head 2": 2}
    state = trainer.state
    for k, experience in enumerate(state.stream.experiences):
        rows = state.prepare(experience.load().rows(torch.arange(5)))
        lab.close(rmn.eval_forward(state, rows).logits, _net(state.model)(rows, which=k).logits)


def test_tasks_are_detected_and_recognised(lab):
    """Three permutations, the first one again: three maps, each begun at the first step of its permutation."""
    stream = permuted(dataset="digits", num_experiences=3)
    again = replace(stream.experiences[0], id=3, name="again")
    info = replace(stream.info, num_experiences=4)
    stream = replace(stream, experiences=[*stream.experiences, again], info=info)
    rmn = Rmn(density=0.5, boundaries="detected", max_maps=5)
    begun = []

    class Keeper(lab.Recorder):
        def on_gradients(self, state):
            super().on_gradients(state)
            if not begun or begun[-1][2] != rmn.active:
                begun.append((state.experience.id, state.step, rmn.active))

    recorder, trainer = lab.run([rmn, Keeper()], stream, epochs=1, batch_size=64)
    per_experience = len(recorder.steps) // 4
    assert [(experience, active) for experience, _, active in begun[:1]] == [(0, 0)]
    found = [(step, active) for _, step, active in begun]
    assert found == [(k * per_experience, active) for k, active in enumerate((0, 1, 2, 0))]
    assert rmn.num_maps == 3
    assert [name for name, *_ in trainer.ledger.result.extra].count("rmn_map") == 3


def test_without_labels_the_most_confident_map_answers(lab):
    kept = []

    class Keeper(lab.Recorder):
        def on_experience_end(self, state):
            batch = state.prepare(state.stream.experiences[0].load().rows(torch.arange(50)))
            with torch.no_grad():
                every = [_net(state.model)(batch, which=k).logits for k in range(rmn.num_maps)]
                found = rmn.eval_forward(state, batch).logits
            kept.append((every, found))

    rmn = Rmn(density=0.5)
    lab.run([rmn, Keeper()], Setting.DOMAIN_INCREMENTAL, epochs=2)
    every, found = kept[-1]
    chosen = set()
    for row in range(50):
        entropies = [float(torch.distributions.Categorical(logits=each[row].float()).entropy()) for each in every]
        best = min(range(3), key=entropies.__getitem__)
        chosen.add(best)
        lab.close(found[row], every[best][row], rtol=1e-5, atol=1e-5)
    assert len(chosen) > 1


def test_with_no_map_left_the_last_one_is_learnt_on(lab):
    """Two maps for A, B, A again, C: A is answered by its own map, C is learnt on B's and leaves A's alone."""
    stream = toy_stream(Setting.DOMAIN_INCREMENTAL)
    first, second, third = stream.experiences
    again, last = replace(first, id=2, name="again"), replace(third, id=3)
    info = replace(stream.info, num_experiences=4)
    stream = replace(stream, experiences=[first, second, again, last], info=info)
    recorder, trainer = lab.run([rmn := Rmn(density=0.5, max_maps=2)], stream, epochs=3)
    net, ends = _net(trainer.state.model), [_net(model) for model in recorder.ends]
    assert rmn.tasks == {first.domain: 0, second.domain: 1, last.domain: 1}
    is_same = [torch.equal(a, b) for a, b in zip(ends[1].parameters(), ends[2].parameters(), strict=True)]
    assert all(is_same)
    for number, (score, weight, then) in enumerate(zip(net.scores, net.weights(), ends[2].weights(), strict=True)):
        needed = ends[0].maps(number)[0]
        assert torch.equal(net.maps(number), torch.stack([needed, score > 0]))
        assert torch.equal(weight[needed], then[needed])
        only_second = ends[2].maps(number)[1] & ~needed
        assert not only_second.any() or not torch.equal(weight[only_second], then[only_second])
    assert any(not torch.equal(net.maps(k)[1], ends[2].maps(k)[1]) for k in range(len(net.names)))
    assert trainer.ledger.result.R[3][2] > trainer.ledger.result.R[2][2] + 0.1


def test_detected_tasks_use_up_the_maps_and_go_on(lab):
    stream = permuted(dataset="digits", num_experiences=3)
    rmn = Rmn(density=0.5, boundaries="detected", max_maps=2)
    recorder, trainer = lab.run([rmn], stream, batch_size=64)
    late = [step for step in recorder.steps if step.experience == 2]
    assert rmn.num_maps == 2 and rmn.active == 1 and rmn.is_open
    assert [value for name, *_, value in trainer.ledger.result.extra if name == "rmn_map"] == [1.0]
    assert len(late) > 4
    for step in late:
        assert any(not torch.equal(p, step.after[name]) for name, p in step.before.items() if "scores" in name)


def test_declared_bytes_are_those_of_the_maps(lab):
    _, trainer = lab.run([rmn := Rmn(density=0.5, max_maps=5)])
    maps = [buffer for name, buffer in trainer.state.model.named_buffers() if "maps_" in name]
    weights = 12 * 64 + 12 + 12 * 4 + 4
    assert sum(each.numel() * each.element_size() for each in maps) == 5 * weights
    assert rmn.cost(trainer.state, 16).buffer_bytes == 5 * weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, r"rmn.density is 0; it must be a finite number above 0"),
        ({"density": 2}, r"rmn.density is 2; it must be at most 1"),
        ({"boundaries": "guessed"}, r"rmn.boundaries is 'guessed'; it must be one of given, detected"),
        ({"max_maps": 0}, r"rmn.max_maps is 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(UserError, match=message):
        Rmn(**options)
