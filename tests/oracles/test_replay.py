"""Replay against a plain loop with separate forward passes."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from cl.core import Batch, Setting
from strategies.der import Der
from strategies.replay import Replay

WEIGHT, SIZE = 0.6, 10


def check(lab, average, setting=Setting.TASK_INCREMENTAL):
    recorder, trainer = lab.run([Replay(40, SIZE, WEIGHT, average=average)], setting)
    model = deepcopy(recorder.start)
    for step in recorder.steps:
        current, *replayed = [step.batch[part.rows] for part in step.batch.parts]
        if average == "source":
            loss = sum(
                w * lab.label_loss(model, rows) for w, rows in zip([1.0, WEIGHT], [current, *replayed], strict=False)
            )
        else:
            terms = [
                F.cross_entropy(model(rows).logits, rows.targets, reduction="sum") for rows in (current, *replayed)
            ]
            loss = sum(w * term for w, term in zip([1.0, WEIGHT], terms, strict=False)) / len(step.batch)
        gradients = lab.gradient(model, loss)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= lab.lr * gradients[name]
        lab.close(step.after, lab.weights(model))
    return recorder, trainer


@pytest.mark.parametrize("average", ["source", "row"])
def test_replay_is_the_plain_loop(lab, average):
    recorder, _ = check(lab, average)
    assert [len(step.batch.parts) for step in recorder.steps[:3]] == [1, 2, 2]


@pytest.mark.parametrize("average", ["source", "row"])
def test_rows_are_drawn_for_a_whole_step_however_it_is_cut(lab, average):
    """Four micro-batches show ten stored rows between them, and train on the loss of one batch."""
    recorder, _ = lab.run([Replay(40, SIZE, WEIGHT, average=average)], batch_size=4, accumulation=4)
    model = deepcopy(recorder.start)
    for k in range(4, len(recorder.steps), 4):
        pieces = recorder.steps[k : k + 4]
        model.load_state_dict(pieces[0].before)
        current = Batch.cat([piece.batch.current() for piece in pieces])
        replayed = Batch.cat([piece.batch[part.rows] for piece in pieces for part in piece.batch.parts[1:]])
        assert len(current) == 16 and len(set(lab.rows_of(replayed))) == len(replayed) == SIZE
        shares = (1.0, WEIGHT) if average == "source" else (16 / 26, WEIGHT * SIZE / 26)
        gradients = lab.gradient(
            model,
            sum(share * lab.label_loss(model, rows) for share, rows in zip(shares, (current, replayed), strict=True)),
        )
        lab.close(pieces[-1].after, {name: p - lab.lr * gradients[name] for name, p in pieces[0].before.items()})


@pytest.mark.parametrize("is_first", [True, False])
def test_a_mean_over_rows_leaves_out_those_without_a_label_loss(lab, is_first):
    """Rows that `der` adds are told by their logits; labels are one mean over the others, in either order."""
    pair = [Replay(40, SIZE, average="row"), Der(40, SIZE, alpha=1e-9)]
    recorder, _ = lab.run(pair if is_first else pair[::-1])
    for step in recorder.steps[1::5]:
        model = deepcopy(recorder.start)
        model.load_state_dict(step.before)
        rows = torch.cat([torch.arange(p.start, p.stop) for p in step.batch.parts if p.owner != "der"])
        assert len(rows) == step.batch.num_current + SIZE
        gradients = lab.gradient(model, lab.label_loss(model, step.batch[rows]))
        lab.close(step.after, {name: p - lab.lr * gradients[name] for name, p in step.before.items()})


def test_the_oracle_needs_the_replayed_rows(lab, monkeypatch):
    whole = Batch.extended
    monkeypatch.setattr(
        Batch, "extended", lambda self, rows, source, owner, weight=1.0: whole(self, rows, source, owner, 0.0)
    )
    lab.dies(lambda: check(lab, "source"))


def test_stored_rows_are_those_of_the_stream(lab):
    _, trainer = lab.run([Replay(30)], Setting.TASK_INCREMENTAL)
    buffer = trainer.strategies[0].buffer
    rows = buffer.rows(torch.arange(len(buffer)))
    for row in range(len(rows)):
        experience = trainer.state.stream.experiences[int(rows.experience_id[row])]
        source = experience.load().rows(rows.sample_ids[row : row + 1])
        assert torch.equal(source.inputs[0], rows.inputs[row])
        assert source.targets[0] == rows.targets[row]
        assert rows.task_id[row] == experience.task_id


def test_avalanche_variant_does_not_replay_the_running_experience(lab):
    recorder, trainer = lab.run([Replay(30, policy="experience_balanced", update="experience_end", average="row")])
    for step in recorder.steps:
        for part in step.batch.parts[1:]:
            assert step.batch.experience_id[part.rows].max() < step.experience
    shares = trainer.strategies[0].buffer.columns["experience_id"].bincount()
    assert shares.tolist() == [10, 10, 10]
