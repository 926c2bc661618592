"""Relevance maps: what a finished task answers never changes; tasks are found by their inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cl.core import Setting, UserError
from cl.testing import toy_stream
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
    monkeypatch.setattr("strategies._relevance.RelevanceNet.frozen", lambda net: [torch.zeros(())] * len(net.names))
    monkeypatch.setattr(Rmn, "step", lambda self, state, batch, update: update())
    lab.dies(lambda: check(lab, SETTINGS[0]))


def test_a_masked_network_is_the_product_of_weights_and_map(lab):
    """Forward, and the gradients of weights and scores, written out for the first step of SGD."""
    recorder, trainer = lab.run([Rmn(density=0.5, map_lr=3.0)], Setting.DOMAIN_INCREMENTAL, epochs=None, max_steps=1)
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
    loss.backward()
    for k, name in enumerate(order):
        lab.close(step.after[f"backbone.{name}"], (weights[name] - lab.lr * weights[name].grad).detach())
        a = scores[f"scores.{k}"]
        lab.close(step.after[f"scores.{k}"], (a - 3 * lab.lr * a.grad).detach())
    share = float((scores["scores.0"] > 0).double().mean())
    assert 0.4 < share < 0.6


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
    recorder, _ = lab.run([rmn := Rmn(density=0.5, boundaries="detected", max_maps=2)], stream, batch_size=64)
    late = [step for step in recorder.steps if step.experience == 2]
    assert rmn.num_maps == 2 and rmn.active == 1 and rmn.is_open
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
