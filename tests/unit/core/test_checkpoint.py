"""Checkpoints survive crashes, full disks and foreign files; nothing in them runs."""

import errno
import os
import pickle
import resource

import pytest
import torch

from cl import checkpoint
from cl.core import UserError

PRINT = "abc123"


def save(folder, step, value=0, fingerprint=PRINT):
    return checkpoint.save(folder, step, {"value": value, "weights": torch.full((4,), float(step))}, fingerprint)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    path = save(tmp_path / "new" / "folder", 7, value={"a": [1, None, "x"]})
    found, payload = checkpoint.load_latest(tmp_path / "new" / "folder", PRINT)
    assert found == path
    assert payload["value"] == {"a": [1, None, "x"]}
    assert payload["weights"].tolist() == [7.0] * 4


def test_two_are_kept(tmp_path):
    for step in (0, 5, 10, 15):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-000000010.pt", "step-000000015.pt"]


def test_an_open_one_is_older_than_the_other_of_its_step(tmp_path):
    assert checkpoint.load_open(tmp_path, 9, PRINT) is None
    for step, is_open in ((8, False), (9, True), (9, False)):
        checkpoint.save(tmp_path, step, {"value": is_open}, PRINT, is_open)
    assert names(tmp_path) == ["step-000000009-open.pt", "step-000000009.pt"]
    assert checkpoint.load_latest(tmp_path, PRINT)[1]["value"] is False
    assert checkpoint.load_open(tmp_path, 9, PRINT)["value"] is True
    assert checkpoint.load_open(tmp_path, 8, PRINT) is None
    (tmp_path / "step-000000009.pt").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert checkpoint.load_latest(tmp_path, PRINT)[1]["value"] is True
    checkpoint.save(tmp_path, 4, {"value": None}, PRINT)
    assert names(tmp_path) == ["step-000000004.pt"], "of a course that was left"


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (9, 10, 100):
        save(tmp_path, step)
    assert checkpoint.load_latest(tmp_path, PRINT)[0].name == "step-000000100.pt"


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_a_truncated_one_is_named_and_the_one_before_is_used(tmp_path, length):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    content = bad.read_bytes()
    bad.write_bytes(content[:length])
    with pytest.warns(UserWarning, match="cannot be read") as caught:
        path, _ = checkpoint.load_latest(tmp_path, PRINT)
    assert path == good
    assert len(caught) == 1
    assert str(bad) in str(caught[0].message)
    assert "\n" not in str(caught[0].message)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_foreign_file_is_not_executed(tmp_path, write):
    good = save(tmp_path, 1)
    write(
        {"format": checkpoint.FORMAT, "fingerprint": PRINT, "x": Evil(tmp_path / "owned")},
        tmp_path / "step-000000002.pt",
    )
    with pytest.warns(UserWarning, match="step-000000002"):
        assert checkpoint.load_latest(tmp_path, PRINT)[0] == good
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [{"model": 1}, [1, 2], {"format": "cl-lab checkpoint 0"}])
def test_a_file_of_another_format_is_passed_over(tmp_path, content):
    good = save(tmp_path, 1)
    torch.save(content, tmp_path / "step-000000002.pt")
    with pytest.warns(UserWarning, match="not a checkpoint of this version"):
        assert checkpoint.load_latest(tmp_path, PRINT)[0] == good


def test_other_settings_are_refused(tmp_path):
    save(tmp_path, 1, fingerprint="other1")
    with pytest.raises(UserError, match="its fingerprint is other1, this run's is abc123"):
        checkpoint.load_latest(tmp_path, PRINT)


@pytest.mark.parametrize("exists", [True, False])
def test_nothing_to_resume_from_is_said(tmp_path, exists):
    folder = tmp_path if exists else tmp_path / "nowhere"
    with pytest.raises(UserError, match="holds no readable checkpoint"):
        checkpoint.load_latest(folder, PRINT)


def test_when_all_are_damaged_it_says_so(tmp_path):
    save(tmp_path, 1).write_bytes(b"x")
    with pytest.warns(UserWarning, match="cannot be read"), pytest.raises(UserError, match="no readable checkpoint"):
        checkpoint.load_latest(tmp_path, PRINT)


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["cl.checkpoint.torch.save", "cl.checkpoint.os.fsync", "cl.result.os.replace"])
def test_a_full_disk_costs_nothing_but_this_checkpoint(tmp_path, monkeypatch, place):
    save(tmp_path, 1)
    save(tmp_path, 2)
    before = names(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 3)
    assert names(tmp_path) == before
    assert checkpoint.load_latest(tmp_path, PRINT)[1]["weights"].tolist() == [2.0] * 4


def test_a_disk_that_is_really_full_is_what_the_error_says(tmp_path):
    """torch's own error would be about a position in its archive; a limit on the size of files is a small disk."""
    save(tmp_path, 1)
    before, limits = names(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*step-000000002\.pt'"):
            checkpoint.save(tmp_path, 2, {"weights": torch.zeros(100_000), "more": torch.zeros(10_000)}, PRINT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == before


def test_half_written_files_of_killed_runs_are_cleared(tmp_path):
    (tmp_path / "step-000000001.pt.99.tmp").write_bytes(b"half")
    save(tmp_path, 1)
    assert names(tmp_path) == ["step-000000001.pt"]


def test_later_checkpoints_of_an_earlier_run_do_not_survive_the_first_one_of_a_new_run(tmp_path):
    """Otherwise resuming the new run would take up the old one."""
    for step in (80, 90):
        save(tmp_path, step)
    save(tmp_path, 0)
    assert names(tmp_path) == ["step-000000000.pt"]


def test_a_damaged_newest_one_is_replaced_on_the_way(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 20).write_bytes(b"damaged")
    save(tmp_path, 15)
    assert names(tmp_path) == ["step-000000010.pt", "step-000000015.pt"]


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for step in range(4):
        save(tmp_path, step)
    assert "notes.txt" in names(tmp_path)
