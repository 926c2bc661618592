"""Every wrong request: one clear sentence that names the value and what is allowed, exit code 2, nothing left."""

from __future__ import annotations

import errno
import gzip
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cl.cli.main import main

RUN = ("run", "tracking=none", "debug=tiny")
COMPARE = ("compare", "tracking=none", "debug=tiny")

CASES = {
    "no such command": (("rum",), "'rum' is no command; the commands are run, compare"),
    "a word that is no setting": ((*COMPARE, "replay"), "'replay' is no setting; settings are written name=value"),
    "unknown stream": (
        (*RUN, "stream=permuted_mnits"),
        "no stream 'permuted_mnits' (did you mean permuted_mnist?); there are blurry",
    ),
    "unknown strategy": ((*RUN, "strategy=reply"), "no strategy 'reply' (did you mean replay?); there are agem"),
    "unknown strategy in a list": ((*RUN, "strategy=[replay,derp]"), "no strategy 'derp' (did you mean derpp?)"),
    "unknown backbone": (
        (*RUN, "backbone=transformer9"),
        "no backbone 'transformer9' (did you mean transformer?); there are armt",
    ),
    "unknown schedule": ((*RUN, "schedule=square"), "no schedule 'square'; there are autoregressive"),
    "unknown experiment": ((*RUN, "+experiment=nothing"), "no experiment 'nothing'; there are builtin_text"),
    "unknown top-level key": (
        (*RUN, "sed=1"),
        "no setting 'sed' (did you mean seed?); there are seed, limit_experiences",
    ),
    "unknown key of data": (
        (*RUN, "data.rot=x"),
        "no setting 'data.rot' (did you mean root?); there are root, download",
    ),
    "a setting below a number": ((*RUN, "seed.x=1"), "no setting 'seed.x'"),
    "misspelt group": ((*RUN, "+experiments=demo"), "no setting 'experiments'; there are stream, strategy"),
    "misspelt group of a comparison": ((*COMPARE, "+experiments=demo"), "no setting 'experiments'"),
    "unknown option of a strategy": (
        (*RUN, "strategy=replay", "strategy.replay.capasity=5"),
        "strategy.replay has no option 'capasity'; its options are capacity",
    ),
    "option of a strategy that is not selected": (
        (*RUN, "strategy.derpp.alpha=0.5"),
        "strategy.derpp was not selected",
    ),
    "unknown option of the trainer": (
        (*RUN, "trainer.epoch=5"),
        "trainer has no option 'epoch'; its options are epochs",
    ),
    "steps that are no number": (
        (*RUN, "trainer.max_steps=many"),
        "trainer.max_steps is 'many'; it must be an integer",
    ),
    "negative batch size": ((*RUN, "trainer.batch_size=-1"), "trainer.batch_size is -1"),
    "two budgets": ((*RUN, "trainer.epochs=1"), "a budget is exactly one of epochs, max_steps, max_tokens"),
    "unknown precision": (
        (*RUN, "trainer.precision=fp64"),
        "trainer.precision is 'fp64'; it must be one of fp32, bf16",
    ),
    "absent device": ((*RUN, "trainer.device=tpu9"), "trainer.device is 'tpu9'"),
    "clip at zero": ((*RUN, "trainer.clip_norm=0"), "trainer.clip_norm is 0; it must be positive"),
    "negative seed": ((*RUN, "seed=-1"), "seed is -1; it must be an integer of at least 0"),
    "seed in words": ((*RUN, "seed=one"), "seed is 'one'; it must be an integer"),
    "learning rate in words": ((*RUN, "optimizer.lr=fast"), "optimizer.lr is 'fast'; it must be a number"),
    "learning rates in a list": ((*RUN, "optimizer.lr=[0.1]"), "optimizer.lr is [0.1]; it must be a number"),
    "learning rate that is a truth": ((*RUN, "optimizer.lr=true"), "optimizer.lr is True; it must be a number"),
    "one beta": ((*RUN, "optimizer=adam", "optimizer.betas=0.9"), "optimizer.betas is 0.9; it must be a list"),
    "word for a switch of the optimizer": (
        (*RUN, "optimizer.foreach=no"),
        "optimizer.foreach is 'no'; it must be true",
    ),
    "an option of what a stream is around": (
        (*RUN, "stream=power_law", "stream.base.num_experiences=0"),
        "stream.base.num_experiences is 0; it must be",
    ),
    "kinds in a list": (
        (*RUN, "backbone=recurrent", "backbone.kind=[gru]"),
        "backbone.kind is ['gru']; it must be a name",
    ),
    "threshold in words": (
        (*RUN, "backbone=snn", "backbone.threshold=x"),
        "backbone.threshold is 'x'; it must be a number",
    ),
    "seed that is a truth": ((*RUN, "seed=true"), "seed is True; it must be an integer of at least 0"),
    "seed of a stream in words": ((*RUN, "stream.seed=one"), "stream.seed is 'one'; it must be an integer"),
    "limit that is a truth": ((*RUN, "limit_experiences=true"), "limit_experiences is True; it must be an integer"),
    "steps of no experience": (
        (*RUN, "trainer.max_steps=[]"),
        "trainer.max_steps is []; it must be an integer of at least 1, or a list of one for each experience",
    ),
    "starts of no experience": (
        (*RUN, "schedule=autoregressive", "schedule.starts=[]"),
        "schedule.starts is []; it must rise from 0",
    ),
    "number in a list": (
        (*RUN, "schedule=infinite", "schedule.timescale=[2]"),
        "schedule.timescale is [2]; it must be a",
    ),
    "no debug": ((*RUN[:2], "debug=null"), "there is no debug 'null'; there are overfit, tiny"),
    "number for a name": ((*RUN, "strategy=3"), "there is no strategy '3'; there are agem"),
    "list of no stream": ((*RUN, "stream=[]"), "there is no stream '[]'; there are blurry"),
    "number for a base": (
        (*RUN, "stream=power_law", "stream@stream.base=3"),
        "there is no stream '3'; there are blurry",
    ),
    "two values for one setting": (
        (*RUN, "seed=0", "optimizer.lr=0.1", "seed=1"),
        "cl: 'seed=0' and 'seed=1' both set seed; give one of them",
    ),
    "two lists of strategies": (
        (*COMPARE, "strategies=naive", "strategies=[replay,joint]"),
        "cl: 'strategies=naive' and 'strategies=[replay,joint]' both set strategies; give one of them",
    ),
    "two steps to explain": (("explain", *RUN[1:], "at=3", "at=30"), "cl: 'at=3' and 'at=30' both set at; give one"),
    "value without a name": ((*RUN, "=3"), "'=3' is no setting; settings are written name=value"),
    "value that cannot be read": ((*RUN, "seed=(("), "'seed=((' is no setting; settings are written name=value"),
    "unknown flag": ((*RUN, "--nonsense"), "cl: unrecognized arguments: --nonsense; `cl run --hydra-help` shows"),
    "flag without its value": (("run", "--cfg"), "cl: argument --cfg/-c: expected one argument"),
    "flag of another value": ((*RUN, "--cfg", "jobs"), "cl: argument --cfg/-c: invalid choice: 'jobs'"),
    "no config": ((*RUN, "--config-name", "walk"), "there is no config 'walk'; there are compare, run"),
    "unknown option of the optimizer": ((*RUN, "optimizer.momentun=0.9"), "optimizer has no option 'momentun'"),
    "setting that the stream does not offer": (
        (*RUN, "stream.setting=class_incremental"),
        "stream.setting is 'class_incremental'; it must be one of domain_incremental",
    ),
    "no experiences": ((*RUN, "stream.num_experiences=0"), "stream.num_experiences is 0"),
    "classes that do not divide": ((*RUN, "stream=split_digits", "stream.num_experiences=11"), "11"),
    "no data root": ((*RUN, "stream=permuted_mnist", "data.root=null"), "data set mnist needs data.root"),
    "data root that is no folder": ((*RUN, "stream=permuted_mnist", "data.root=/nowhere"), "'/nowhere', which is not"),
    "data root without the files": ((*RUN, "stream=split_mnist", "data.root=."), "train-images-idx3-ubyte"),
    "empty buffer": ((*RUN, "strategy=replay", "strategy.replay.capacity=0"), "capacity"),
    "unknown buffer policy": (
        (*RUN, "strategy=replay", "strategy.replay.policy=random"),
        "'random'",
    ),
    "buffer below its batch": (
        (*RUN, "strategy=derpp", "strategy.derpp.capacity=5", "strategy.derpp.replay_batch_size=10"),
        "derpp.replay_batch_size is 10; it must be at most derpp.capacity, 5",
    ),
    "borrowed buffer below the batch": (
        (*RUN, "strategy=[replay,fpf]", "strategy.fpf.buffer_of=replay", "strategy.replay.capacity=5"),
        "fpf.replay_batch_size is 32; it must be at most the capacity of the buffer of replay, 5",
    ),
    "pool below the stream's batch": (
        (*RUN, "stream=power_law", "stream.buffer_rows=40"),
        "stream.buffer_rows is 40, less than one batch; it must be at least trainer.batch_size=64",
    ),
    "impossible ratio": (
        (*RUN, "stream=power_law", "stream.ratio=1.5"),
        "stream.ratio is 1.5; it must be above 0 and at most 1, since an old experience has no more rows than a new",
    ),
    "impossible exponent": (
        (*RUN, "stream=power_law", "stream.exponent=-1"),
        "stream.exponent is -1; it must be a finite number of at least 0",
    ),
    "modules that are not there": (
        (*RUN, "strategy=kfpf", "strategy.kfpf.modules=[nothing,head]"),
        "has 'nothing', which matches no module with parameters; the model's modules are head (Linear), body.1",
    ),
    "periods of no parameter": (
        (*RUN, "strategy=update_periods", "strategy.update_periods.periods={nothing.*: 2}"),
        "update_periods.periods names 'nothing.*', which fits no parameter; there are",
    ),
    "unlearning of a loss that is not known yet": (
        (*RUN, "strategy=[refresh,replay]", "strategy.refresh.mode=paper"),
        "and replay behind it changes the batch; put refresh last, as in strategy=[replay,refresh]",
    ),
    "buffer of a strategy that keeps none": (
        (*RUN, "strategy=[ewc,fpf]", "strategy.fpf.buffer_of=ewc"),
        "fpf.buffer_of is 'ewc'; it must be a strategy that keeps a buffer beside fpf (no strategy of this run)",
    ),
    "nothing to divide by in the first experience": (
        (*RUN, "strategy=refresh", "strategy.refresh.mode=paper", "strategy.refresh.damping=0"),
        "refresh.damping is 0; it must be above 0 in paper mode, since there is no Fisher estimate yet in the first",
    ),
    "no Fisher estimate at all": (
        (*RUN, "strategy=refresh", "strategy.refresh.mode=paper", "limit_experiences=1"),
        "which goes by the Fisher information of earlier experiences, and stream permuted_digits has one experience",
    ),
    "views that do not divide a batch": (
        (*RUN, "stream=view_batch", "stream.views=3"),
        "stream.views is 3, which does not divide trainer.batch_size=64; views of a row must share a batch",
    ),
    "views that do not divide the rows": (
        (*RUN, "stream=view_batch", "stream.remainder=refuse"),
        "stream.views is 4, which does not divide the 290 rows of experience 0 ('classes 0 1'); let",
    ),
    "unknown perturbation": (
        (*RUN, "stream=scole_digits", "stream.perturbation=rain"),
        "it must be one of random, none",
    ),
    "unknown head": ((*RUN, "backbone=convnet", "backbone.head=cosine"), "it must be one of linear, weight_norm"),
    "target that is no strategy": (
        (*RUN, "+strategy.mine._target_=os.system"),
        "strategy.mine._target_ is 'os.system', which makes no strategy; it must be a subclass of cl.hooks.Strategy",
    ),
    "target that does not exist": ((*RUN, "+strategy.mine._target_=nowhere.Mine"), "'nowhere.Mine' cannot be imported"),
    "limit of zero experiences": ((*RUN, "limit_experiences=0"), "limit_experiences is 0"),
    "store that does not answer": (("run", "debug=tiny", "tracking.uri=http://127.0.0.1:9"), "does not answer"),
    "store of unknown kind": (("run", "debug=tiny", "tracking.uri=ftp://x"), "ftp"),
    "store that is a number": (("run", "debug=tiny", "tracking.uri=3"), "tracking.uri is 3; it must be a name"),
    "no steps between points": (
        ("run", "debug=tiny", "tracking.every_steps=often"),
        "cl: tracking.every_steps is 'often'; it must be an integer of at least 1",
    ),
    "comparison of a number": ((*COMPARE, "strategies=3"), "there is no strategy '[3]'; there are agem"),
    "comparison of nothing": ((*COMPARE, "strategies=[]"), "strategies is empty"),
    "comparison of twice the same": ((*COMPARE, "strategies=naive,naive"), "names a composition twice: naive"),
    "comparison without seeds": ((*COMPARE, "seeds=0"), "seeds is 0; it must be a number of seeds of at least 1"),
    "comparison without workers": ((*COMPARE, "jobs=0.5"), "jobs is 0.5; it must be an integer of at least 1"),
    "comparison with no worker": ((*COMPARE, "jobs=0"), "jobs is 0; it must be an integer of at least 1, or null"),
    "composition of twice the same": (
        (*COMPARE, "strategies=[[naive,naive]]"),
        "strategies has [naive,naive], which names a strategy twice",
    ),
    "comparison in a place that cannot be written": (
        (*COMPARE, "strategies=naive", "seeds=1", "out=/proc/x"),
        "the folder /proc/x cannot be written",
    ),
    "options of a strategy that is not compared": (
        (*COMPARE, "strategies=naive", "+strategy.ewc={strength: 1}"),
        "is for ewc, which is not compared; strategies are naive",
    ),
    "option for a strategy that is not compared": (
        (*COMPARE, "strategies=naive,replay", "strategy.ewc.strength=1"),
        "is for ewc, which is not compared; strategies are naive, replay",
    ),
    "a single run's option in a comparison": ((*COMPARE, "seed=1"), "`cl compare` takes strategies=... and seeds=..."),
    "unknown reference": ((*COMPARE, "strategies=naive,replay", "reference=ewc"), "reference is 'ewc'; it must be one"),
    "unknown launcher": ((*COMPARE, "strategies=naive", "launcher=pbs"), "launcher is 'pbs'; it must be local, joblib"),
    "references": (
        (*COMPARE, "strategies=naive", "reference=[naive]"),
        "reference is ['naive']; it must be one of naive",
    ),
    "launchers": (
        (*COMPARE, "strategies=naive", "launcher=[joblib]"),
        "launcher is ['joblib']; it must be local, joblib",
    ),
    "resume without a folder": (("resume",), "takes one run folder, got 0"),
    "resume of a folder that is no run": (("resume", "."), "is not a run folder: it has no config.yaml"),
    "report on nothing": (("report", "."), "there is no result.json under"),
    "report on no folder": (("report", "absent"), "absent is not a folder"),
    "unknown list": (("list", "optimisers"), "nothing is called 'optimisers'; the lists are streams, strategies"),
    "list with a value": (("list", "streams=3"), "'streams' is no option of `cl list`; there is format"),
    "claims without a name": (("reproduce", "seeds=abc"), "seeds is 'abc'; it must be a number of at least 1"),
    "settings without a claim": (("reproduce", "sedes=3"), "sedes=3: nothing is run without the name of a claim"),
    "step beyond the run": (("explain", "debug=tiny", "at=1000"), "at is '1000'; it must be a step from 0 to"),
    "figure of unknown kind": (
        ("explain", "debug=tiny", "sensitivity=2", "figure=y.xyz"),
        "figure is 'y.xyz'; it must be a file that ends in ",
    ),
    "figure in a place that cannot be written": (
        ("explain", "debug=tiny", "sensitivity=2", "figure=/proc/x/y.png"),
        "the folder /proc/x cannot be written",
    ),
    "claim without a worker": (("reproduce", "split_mnist_sgd", "jobs=0"), "jobs is '0'; it must be a number of at"),
    "claim without data": (
        ("reproduce", "split_mnist_sgd", "tracking=none", "data.root=null"),
        "data set mnist needs data.root",
    ),
    "claim in a place that cannot be written": (
        ("reproduce", "split_mnist_sgd", "tracking=none", "out=/proc/x"),
        "the folder /proc/x cannot be written",
    ),
    "page in a place that cannot be written": (
        ("reproduce", "split_mnist_sgd", "tracking=none", "page=/proc/x/page.md"),
        "the folder /proc/x cannot be written",
    ),
    "unknown claim": (("reproduce", "cold_fusion"), "'cold_fusion' is no claim; the claims are all"),
    "port that is no port": (("ui", "port=99999"), "port is '99999'; it must be a number from 1 to 65535"),
    "no store to show": (("ui",), "there is no store at"),
    "unknown option of doctor": (("doctor", "uri=x"), "'uri=x' is no option of `cl doctor`"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_and_exit_code_2(name: str, is_refused: Callable[[tuple[str, ...], str], None]) -> None:
    is_refused(*CASES[name])


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
