"""Thinning, resume and the journal, without MLflow."""

import json
import logging
import sqlite3
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from cl.config import TrainerConfig
from cl.core import Setting, UserError
from cl.hooks import Strategy
from cl.testing import ToyNet, toy_stream
from cl.tracking import Journal, Memory, Point, Recorder, has_ended, read_journal
from cl.tracking.base import first_line
from cl.tracking.journal import JOURNAL
from cl.trainer import Trainer


def curves(found):
    return sorted((p.name, p.step, round(p.value, 9)) for p in found)


def test_training_points_are_means_since_the_last_one(make_result, tell):
    memory = Memory(every_steps=4)
    tell([memory], make_result(), last=1)
    # steps 1..10 with loss = step: two full windows, and what remains at the end of the experience
    assert memory.curve("train/loss") == [(4, 2.5), (8, 6.5), (10, 9.5)]
    assert memory.curve("train/ewc") == [(4, 0.5), (8, 0.5), (10, 0.5)]
    assert memory.curve("train/lr") == [(4, 0.1), (8, 0.1), (10, 0.1)]


def test_a_term_that_is_sometimes_absent_counts_as_zero(make_result):
    memory = Memory(every_steps=2)
    memory.on_start(make_result(), {})
    memory.on_experience_start(SimpleNamespace(step=0), 2)
    memory.on_step(None, {"loss": 1.0}, 0.1)
    memory.on_step(None, {"loss": 3.0, "derpp": 2.0}, 0.1)
    assert memory.curve("train/loss") == [(2, 2.0)]
    assert memory.curve("train/derpp") == [(2, 1.0)]


def test_within_points_follow_the_steps_told(make_result):
    memory = Memory()
    memory.on_start(make_result(), {})
    memory.on_experience_start(SimpleNamespace(step=0), 2)
    memory.on_step(None, {"loss": 1.0}, 0.1)
    memory.on_within(None, [0.25, None, None])
    assert memory.points == [("train/within/task_00", 0.25, 1)]


def test_what_is_traced_before_the_first_step_is_written_once(tmp_path):
    """The trainer tells of it before it says where the run goes on, from where the result is read."""

    class Traces(Strategy):
        def on_run_start(self, state):
            state.trace("begun", 1.0)

        def on_experience_start(self, state):
            state.trace("entered", 2.0)

    Trainer(
        toy_stream(Setting.DOMAIN_INCREMENTAL, num_experiences=2),
        ToyNet,
        [Traces()],
        optimizer=partial(torch.optim.SGD, lr=0.1),
        config=TrainerConfig(max_steps=3, device="cpu"),
        run_dir=tmp_path,
        observers=[Journal(tmp_path)],
    ).run()
    found = [tuple(p) for p, _ in read_journal(tmp_path / JOURNAL)[1] if p.name in ("train/begun", "train/entered")]
    assert found == [("train/begun", 1.0, 0), ("train/entered", 2.0, 0), ("train/entered", 2.0, 3)]


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "10"])
def test_every_steps_is_checked(value):
    with pytest.raises(UserError, match=rf"every_steps is {value!r}; it must be an integer of at least 1"):
        Memory(every_steps=value)


@pytest.mark.parametrize("steps_done", [0, 2, 3])
def test_resumed_journal_equals_an_uninterrupted_one(make_result, tell, tmp_path, steps_done):
    whole, broken = Journal(tmp_path / "whole", every_steps=4), Journal(tmp_path / "broken", every_steps=4)
    tell([whole], make_result())
    # killed in the second experience; the new process knows the row and the step of the last checkpoint
    tell([broken], make_result(), stop_at=19)
    broken.flush()
    again = Journal(tmp_path / "broken", every_steps=4)
    tell([again], make_result(R=[[0.9, 0.2, None]]), first=1, steps_done=steps_done)

    expected, found = ([p for p, _ in read_journal(journal.path)[1]] for journal in (whole, again))
    assert sorted((p.name, p.step) for p in found) == sorted((p.name, p.step) for p in expected)
    is_on_a_point = steps_done in (0, 2)
    if is_on_a_point:
        assert curves(found) == curves(expected)


def test_a_resumed_journal_keeps_its_name(make_result, tell, tmp_path):
    tell([Journal(tmp_path)], make_result(), stop_at=19)
    before, _ = read_journal(tmp_path / "metrics.jsonl")
    tell([Journal(tmp_path)], make_result(R=[[0.9, 0.2, None]]), first=1)
    assert read_journal(tmp_path / "metrics.jsonl")[0]["journal"] == before["journal"]


def test_row_completed_just_before_a_crash_is_not_missed(make_result, tell, tmp_path):
    """The checkpoint comes before `on_evaluation`; a crash between them leaves a row that was never told."""
    whole, broken = Journal(tmp_path / "whole"), Journal(tmp_path / "broken")
    tell([whole], make_result())
    tell([broken], make_result(), stop_at=9)
    tell([broken], make_result(R=[[0.9, 0.2, None]]), first=1)
    evaluated = [curves(p for p, _ in read_journal(j.path)[1] if "train/" not in p.name) for j in (whole, broken)]
    assert evaluated[0] == evaluated[1]


def test_resume_with_nothing_left_keeps_all_and_adds_the_last_values(make_result, tell, tmp_path):
    journal = Journal(tmp_path, every_steps=5)
    result = make_result()
    tell([journal], result, status="interrupted")
    before = read_journal(journal.path)[1]
    assert not any(p.name.startswith(("final/", "cost/")) for p, _ in before)
    tell([Journal(tmp_path, every_steps=5)], result, first=3)
    after = read_journal(journal.path)[1]
    assert after[: len(before)] == before
    assert {p.name.split("/")[0] for p, _ in after[len(before) :]} == {"final", "cost"}


def test_a_fresh_run_in_an_old_folder_starts_a_new_journal(make_result, tell, tmp_path):
    tell([Journal(tmp_path)], make_result())
    old = read_journal(tmp_path / "metrics.jsonl")
    tell([Journal(tmp_path)], make_result(), last=1, status="interrupted")
    header, rows = read_journal(tmp_path / "metrics.jsonl")
    assert header["journal"] != old[0]["journal"]
    assert max(p.step for p, _ in rows if not p.name.startswith("train/")) == 1


def test_a_run_that_fails_before_its_first_step_leaves_the_journal_alone(make_result, tell, tmp_path):
    tell([Journal(tmp_path)], make_result())
    before = (tmp_path / "metrics.jsonl").read_text()
    tell([Journal(tmp_path)], make_result(), last=0, status="failed")
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_journal_says_where_the_run_belongs(make_result, tell, settings, tmp_path):
    tell([Journal(tmp_path, experiment="e", suite="s")], make_result())
    header, _ = read_journal(tmp_path / "metrics.jsonl")
    assert (header["experiment"], header["suite"], header["settings"]) == ("e", "s", settings)
    assert header["result"]["strategy"] == ["derpp", "refresh"]


def test_the_journal_knows_whether_the_end_was_told(make_result, tell, tmp_path):
    assert has_ended(tmp_path), "a run that keeps none cannot be asked"
    result = make_result()
    tell([Journal(tmp_path)], result, last=2, status="interrupted")
    assert not has_ended(tmp_path)
    tell([Journal(tmp_path)], result, first=2)
    assert has_ended(tmp_path)


@pytest.mark.parametrize("line", ["5", "[1]", '{"name": "a"}', '{"name": "a", "value": "x", "step": 1, "time": 1}'])
def test_lines_that_are_no_points_are_skipped(tmp_path, line):
    point = '{"name": "a", "value": 0.5, "step": 2, "time": 7.5}'
    (tmp_path / JOURNAL).write_text(f'{{"journal": "one"}}\n{line}\n{point}\n')
    assert read_journal(tmp_path / JOURNAL) == ({"journal": "one"}, [(Point("a", 0.5, 2), 7.5)])


def test_damaged_lines_are_skipped(make_result, tell, tmp_path):
    journal = Journal(tmp_path, every_steps=5)
    tell([journal], make_result())
    good = read_journal(journal.path)
    with journal.path.open("a") as file:
        file.write('{"name": "train/loss", "val')
    assert read_journal(journal.path) == good


def test_journal_is_on_disk_at_a_checkpoint(make_result, tell, tmp_path):
    journal = Journal(tmp_path, every_steps=2)
    tell([journal], make_result(), stop_at=5)
    assert not read_journal(journal.path)[1]
    journal.on_checkpoint(None, "")
    assert [p.step for p, _ in read_journal(journal.path)[1] if p.name == "train/loss"] == [2, 4]


def test_points_wait_no_longer_than_flush_every_s(make_result, tell, tmp_path):
    journal = Journal(tmp_path, every_steps=2, flush_every_s=0.0)
    tell([journal], make_result(), stop_at=5)
    assert len(read_journal(journal.path)[1]) == 6


def test_a_full_disk_is_told_once_and_does_not_stop_the_run(make_result, tell, tmp_path, caplog, monkeypatch):
    journal, memory, result = Journal(tmp_path), Memory(), make_result()

    def full(batch):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal, "write", full)
    with caplog.at_level(logging.WARNING):
        tell([journal, memory], result)
    assert [r.getMessage() for r in caplog.records] == [
        "Journal cannot write ([Errno 28] No space left on device); the run goes on without it"
    ]
    assert memory.curve("final/bwt")


@pytest.mark.parametrize(
    ("inside", "told"),
    [
        (sqlite3.OperationalError("database or disk is full"), "database or disk is full"),
        (ConnectionRefusedError(111, "Connection refused"), "[Errno 111] Connection refused"),
        (TimeoutError("timed out"), "timed out"),
        (OSError("of a library, with nothing from the system"), "of the library"),
        (KeyError("key"), "of the library"),
    ],
)
@pytest.mark.parametrize("link", ["__cause__", "__context__"])
def test_what_the_system_or_sqlite_said_is_told_and_not_what_was_wrapped_around_it(inside, told, link):
    wrapped, middle = RuntimeError("of the library\n[SQL: ...]"), ValueError("between")
    setattr(wrapped, link, middle)
    setattr(middle, link, inside)
    assert first_line(wrapped) == told


def test_what_an_error_says_fits_into_a_sentence():
    assert first_line(RuntimeError("\n  first\nsecond")) == "first"
    assert first_line(RuntimeError()) == "RuntimeError"
    assert first_line(RuntimeError("x" * 300)) == "x" * 200


def test_journal_lines_are_plain_json(make_result, tell, tmp_path):
    tell([Journal(tmp_path)], make_result())
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[1:]:
        assert set(json.loads(line)) == {"name", "value", "step", "time"}


def test_recorder_needs_a_writer():
    with pytest.raises(NotImplementedError):
        Recorder().write([])
