"""Folders, files and disks that a command cannot work with: one clear sentence, and what is there stays."""

from __future__ import annotations

import errno
import gzip
import logging
import os
import shutil
from pathlib import Path

import pytest

from cl.cli.main import main

RUN = ("run", "tracking=none", "debug=tiny")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main((*RUN, "limit_experiences=1", f"out={folder}")) == 0
    return folder


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_folder_that_holds_a_run_is_not_overwritten(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run_dir / "result.json").read_text()
    assert main(("run", "tracking=none", "debug=tiny", f"hydra.run.dir={run_dir}")) == 2
    assert "already holds a run; go on with `cl resume" in capsys.readouterr().err
    assert (run_dir / "result.json").read_text() == before


def test_a_checkpoint_of_another_config_is_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, result = run_dir / "config.yaml", run_dir / "result.json"
    config.write_text(config.read_text().replace("lr: 0.1", "lr: 0.2"))
    result.write_text(result.read_text().replace('"done"', '"interrupted"'))
    assert main(("resume", str(run_dir))) == 2
    assert "belongs to a run with other settings" in capsys.readouterr().err
    assert len(list(run_dir.glob("checkpoints/*.pt"))) == 2


def test_a_config_from_disk_cannot_call_anything_else(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "result.json").unlink()
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("torch.optim.SGD", "os.system"))
    assert main(("resume", str(run_dir))) == 2
    assert "'os.system', which makes no optimizer" in capsys.readouterr().err


def test_a_result_that_is_no_result_is_named(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "result.json").write_text("{")
    assert main(("resume", str(run_dir))) in (1, 2)
    assert "result.json is not a result file" in capsys.readouterr().err


def test_a_wrapper_that_is_none_is_refused_of_a_finished_run_too(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(("resume", str(run_dir), "trainer.parallel=many")) == 2
    assert "trainer.parallel is 'many'; it must be one of none, ddp, fsdp" in capsys.readouterr().err


def test_a_report_in_a_place_that_cannot_be_written(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("report", str(run_dir), "out=/proc/x")) == 2
    assert "the folder /proc/x cannot be written" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main((*RUN, "hydra.run.dir=file/run")) == 2
    assert "file/run" in capsys.readouterr().err


@pytest.mark.parametrize("mark", "?%")
def test_a_working_folder_that_no_address_of_a_store_can_name(
    mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / f"a{mark}b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for words in (("run", "debug=tiny", "out=out"), ("compare", "debug=tiny", "seeds=1", "out=out"), ("ui",)):
        assert main(words) == 2
        assert f"mlruns.db' has {mark} in its path" in capsys.readouterr().err
    assert list(tmp_path.rglob("*")) == [folder]


def test_damaged_images_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for kind in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{kind}-ubyte.gz").write_bytes(gzip.compress(b"\x00\x00\x08\x03" + b"\x00\x00\x00\x05" * 3 + b"ab"))
    assert main((*RUN, "stream=permuted_mnist", f"data.root={tmp_path}")) == 2
    assert "is damaged: its header announces" in capsys.readouterr().err


def test_a_disk_too_full_for_the_log_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(logging.StreamHandler, "flush", full)
    monkeypatch.setattr(os, "fsync", full)
    assert main((*RUN, "hydra.run.dir=run")) == 1
    assert capsys.readouterr().err == "cl: [Errno 28] No space left on device\n"


def test_a_full_disk_stops_the_run_and_keeps_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    written = []

    def fsync(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    assert main((*RUN, "hydra.run.dir=run")) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert len(list((tmp_path / "run" / "checkpoints").glob("*.pt"))) == 2
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))
