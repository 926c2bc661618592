"""`cl extend`, `cl rewarm`, `cl fork_anneal`: three ways to go on that are no `cl resume`, and what each promises."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from cl.cli.main import main
from cl.result import Result

RUN = ("run", "tracking=none", "debug=tiny", "limit_experiences=2", "strategy=replay", "trainer.evaluate=all")
LINEAR = ("schedule=linear", "schedule.final=0.2")


def run(folder: str, *words: str) -> Result:
    assert main((*RUN, *words, f"hydra.run.dir={folder}")) == 0
    return Result.load(Path(folder) / "result.json")


def checkpoint(folder: str) -> dict:
    return torch.load(max(Path(folder).glob("checkpoints/*.pt")), weights_only=True)


def stopped(folder: str, whole: str, step: int) -> None:
    """A copy of a run as it was after `step` steps."""
    shutil.copytree(whole, folder)
    for path in Path(folder).glob("checkpoints/*.pt"):
        if int(path.stem.split("-")[1]) > step:
            path.unlink()
    content = Path(folder, "result.json").read_text()
    Path(folder, "result.json").write_text(content.replace('"status": "done"', '"status": "interrupted"'))


def same(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def digest(folder: str) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a schedule, and all that it was on its way: a checkpoint after every five steps."""
    folder = tmp_path_factory.mktemp("branches")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cl.checkpoint.KEPT", 99)
        assert main((*RUN, *LINEAR, "trainer.checkpoint_every=5", f"hydra.run.dir={folder / 'run'}")) == 0
    return folder / "run"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


# extend


def test_an_extended_run_is_the_one_that_was_planned_longer() -> None:
    run("short")
    longer = run("longer", "trainer.max_steps=[20,32]")
    before = digest("short")
    assert main(("extend", "short", "trainer.max_steps=32", "out=more")) == 0
    more = Result.load(Path("more/result.json"))
    assert (more.R, more.R_init) == (longer.R, longer.R_init)
    assert same(checkpoint("more")["state"], checkpoint("longer")["state"])
    assert same(checkpoint("more")["strategies"], checkpoint("longer")["strategies"])
    assert {(i, step) for i, step, *_ in more.within} == {(1, 40)}, "the old last row is a measurement inside"
    assert digest("short") == before, "nothing is written where it came from"
    assert yaml.safe_load(Path("more/config.yaml").read_text())["origin"]["step"] == 40


def test_the_schedule_keeps_its_plan_unless_it_is_stretched(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rate = checkpoint(str(done))["state"]["optimizer"]["param_groups"][0]["initial_lr"]
    assert main(("extend", str(done), "trainer.max_steps=30", "out=kept")) == 0
    assert "keeps the 40 steps it was planned for; the factor of the next step is 0.2, it was 0.2" in said(capsys)
    assert last_rate("kept") == pytest.approx(0.2 * rate)
    assert main(("extend", str(done), "trainer.max_steps=30", "stretch=true", "out=stretched")) == 0
    # 1 - 0.8 * 40 / 50 at step 40, 1 - 0.8 * 49 / 50 at step 49
    assert "the factor of the next step is 0.36, it was 0.2" in said(capsys)
    assert last_rate("stretched") == pytest.approx((1 - 0.8 * 49 / 50) * rate)


def last_rate(folder: str) -> float:
    return checkpoint(folder)["state"]["optimizer"]["param_groups"][0]["lr"]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


CLOSED = ["si", "lwf", "refresh", "ewc", "mas", "gpm", "hebbian", "agem", "fast_slow", "fpf"]
CLOSED += ["rmn", "weight_factorization", "recall_merge", "replay strategy.replay.update=experience_end"]


@pytest.mark.parametrize("strategy", CLOSED)
def test_an_experience_that_strategies_had_closed_goes_on_as_if_it_had_not_ended(strategy: str) -> None:
    """Importance was added twice, rows were stored twice, and the network held to where the shorter run had ended."""
    words = ("tracking=none", "debug=tiny", "limit_experiences=2", *f"strategy={strategy}".split(), "optimizer=adam")
    assert main(("run", *words, "trainer.max_steps=4", "hydra.run.dir=short")) == 0
    assert main(("run", *words, "trainer.max_steps=[4,7]", "hydra.run.dir=longer")) == 0
    before = digest("short")
    assert main(("extend", "short", "trainer.max_steps=7", "out=more")) == 0
    assert digest("short") == before
    more, longer = checkpoint("more"), checkpoint("longer")
    assert same(more["state"], longer["state"]) and same(more["strategies"], longer["strategies"])
    found, wanted = (Result.load(Path(folder, "result.json")) for folder in ("more", "longer"))
    assert (found.R, found.traces, found.extra) == (wanted.R, wanted.traces, wanted.extra)
    moves = strategy in ("recall_merge", "fast_slow", "fpf", "rmn", "refresh")
    assert bool(found.within) != moves, "what is measured of a network that strategies moved is not this one's"


def test_a_copy_is_annealed_from_before_the_experience_was_closed() -> None:
    words = ("tracking=none", "debug=tiny", "limit_experiences=2", "strategy=si", "trainer.max_steps=4")
    assert main(("run", *words, "hydra.run.dir=short")) == 0
    anneal = ["schedule=infinite", "schedule.warmup_frac=0", "schedule.cooldown_frac=0", "schedule.anneal_frac=1"]
    assert main(("fork_anneal", "short", "steps=3", "out=forked")) == 0
    course = ("schedule.constant=1.0", "trainer.schedule_start=8", "trainer.max_steps=[4,7]")
    assert main(("run", *words[:-1], *anneal, *course, "hydra.run.dir=longer")) == 0
    assert same(checkpoint("forked")["strategies"], checkpoint("longer")["strategies"])


@pytest.mark.parametrize("strategy", ["rmn", "weight_factorization", "recall_merge", "ewc", "mas"])
def test_what_was_merged_for_good_is_not_trained_on(
    strategy: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of before, which kept nothing of how it was when its last experience was still open: rmn took steps that
    changed nothing, weight_factorization went on as naive training, and ewc held the weights where the experience had
    left them, and added its importance once more, without a word."""
    monkeypatch.setattr("cl.checkpoint.KEPT", 9)
    words = ("tracking=none", "debug=tiny", "limit_experiences=2", f"strategy={strategy}", "trainer.max_steps=2")
    assert main(("run", *words, "trainer.checkpoint_every=1", "hydra.run.dir=short")) == 0
    Path("short/checkpoints/step-000000004-open.pt").unlink()
    for verb, options in {"extend": ["trainer.max_steps=4"], "fork_anneal": ["steps=2"]}.items():
        capsys.readouterr()
        assert main((verb, "short", *options, "out=more")) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert f"{strategy} " in told
        assert "when experience 1 ended, at step 4 of short, and cannot train on it any longer" in told
        assert not Path("more").exists()
    stopped("half", "short", 3)
    assert main(("extend", "half", "trainer.max_steps=4", "out=more")) == 0


def test_where_nothing_was_kept_before_the_end_extend_says_who_closes_twice(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("tracking=none", "debug=tiny", "limit_experiences=2", "strategy=[replay,si]", "trainer.max_steps=2")
    assert main(("run", *words, "hydra.run.dir=short")) == 0
    assert main(("extend", "short", "trainer.max_steps=4", "out=exact")) == 0
    assert "close it again" not in said(capsys)
    Path("short/checkpoints/step-000000004-open.pt").unlink()
    assert main(("extend", "short", "trainer.max_steps=4", "out=more")) == 0
    assert "note: replay, si had closed the last experience at step 4 and will close it again" in said(capsys)


def test_a_run_that_was_stopped_is_extended_from_where_it_stands(done: Path) -> None:
    stopped("half", str(done), 35)
    assert main(("extend", "half", "trainer.max_steps=25", "out=more")) == 0
    assert Result.load(Path("more/result.json")).cost["updates"] == 20 + 25
    assert yaml.safe_load(Path("more/config.yaml").read_text())["trainer"]["max_steps"] == [20, 25]


# fork_anneal


def test_the_line_that_was_forked_does_not_notice(done: Path) -> None:
    stopped("forked", str(done), 35)
    before = digest("forked")
    assert main(("fork_anneal", "forked", "steps=4", "final=0.05", "out=annealed")) == 0
    assert digest("forked") == before
    assert main(("resume", "forked")) == 0
    assert same(checkpoint("forked")["state"], checkpoint(str(done))["state"])
    whole, line = Result.load(done / "result.json"), Result.load(Path("forked/result.json"))
    assert (whole.R, whole.metrics) == (line.R, line.metrics)


def test_the_annealed_copy_falls_to_the_final_rate_and_is_measured_everywhere(done: Path) -> None:
    stopped("forked", str(done), 35)
    assert main(("fork_anneal", "forked", "steps=4", "final=0.05", "out=annealed")) == 0
    annealed, state = Result.load(Path("annealed/result.json")), checkpoint("annealed")["state"]
    assert annealed.status == "done" and annealed.cost["updates"] == 39
    assert len(annealed.R) == 2 and None not in annealed.R[1]
    assert annealed.R[0] == Result.load(done / "result.json").R[0]
    # at step 35 of 40 the line has 1 - 0.8 * 35 / 40 = 0.3; after 3 of 4 steps to 0.05 it is 0.3 * (1 / 6)^(3 / 4)
    group = state["optimizer"]["param_groups"][0]
    assert group["lr"] / group["initial_lr"] == pytest.approx(0.3 * (1 / 6) ** 0.75)


def test_a_fork_at_the_end_of_an_experience_anneals_on_that_experience(done: Path) -> None:
    assert main(("fork_anneal", str(done), "steps=3", "out=annealed")) == 0
    assert Result.load(Path("annealed/result.json")).cost["updates"] == 43
    assert yaml.safe_load(Path("annealed/config.yaml").read_text())["trainer"]["max_steps"] == [20, 23]


# rewarm


def test_a_new_schedule_spans_the_rest_of_the_stream(done: Path) -> None:
    stopped("half", str(done), 35)
    before = digest("half")
    assert main(("rewarm", "half", "schedule=linear", "schedule.final=0.5", "optimizer.lr=0.5", "out=warm")) == 0
    assert digest("half") == before
    group = checkpoint("warm")["state"]["optimizer"]["param_groups"][0]
    assert group["initial_lr"] == pytest.approx(0.5)
    # its last of 5 steps: 1 - 0.5 * 4 / 5
    assert group["lr"] == pytest.approx(0.5 * 0.6)
    config = yaml.safe_load(Path("warm/config.yaml").read_text())
    assert config["origin"]["verb"] == "rewarm" and config["origin"]["checkpoint"] == "step-000000035.pt"
    assert config["schedule"] == {"_target_": "cl.schedules.linear", "final": 0.5}


def test_another_stream_begins_with_the_weights(done: Path) -> None:
    words = ("schedule=constant", "stream=permuted_digits", "stream.num_experiences=2", "out=other")
    assert main(("rewarm", str(done), *words)) == 0
    other, old = Result.load(Path("other/result.json")), Result.load(done / "result.json")
    # the same two domains: what the model knew before the first step is what it knew at the end
    assert other.R_init == old.R[-1]
    assert other.cost["updates"] == 40


STREAM = """
_target_: streams.permuted.permuted
dataset: digits
num_experiences: 2
"""


def test_a_stream_of_ones_own_is_found_in_its_folder(done: Path) -> None:
    Path("conf/stream").mkdir(parents=True)
    Path("conf/stream/mine.yaml").write_text(STREAM)
    words = ("schedule=constant", "stream=mine", "hydra.searchpath=[file://conf]", "out=other")
    assert main(("rewarm", str(done), *words)) == 0
    assert Result.load(Path("other/result.json")).R_init == Result.load(done / "result.json").R[-1]


def test_a_finished_run_resumes_and_extends_under_its_new_name(done: Path) -> None:
    assert main(("extend", str(done), "trainer.max_steps=22", "out=more")) == 0
    assert main(("resume", "more")) == 0
    assert main(("extend", "more", "trainer.max_steps=24", "out=still_more")) == 0
    config = yaml.safe_load(Path("still_more/config.yaml").read_text())["trainer"]
    assert config["max_steps"] == [20, 24] and config["schedule_steps"] == [20, 20]


# what cannot be asked for

BAD = {
    "extend without a budget": (("extend", "RUN"), "needs the new budget: one of trainer.epochs=N"),
    "two budgets": (("extend", "RUN", "trainer.max_steps=9", "trainer.epochs=9"), "exactly one of trainer.epochs"),
    "no more than planned": (("extend", "RUN", "trainer.max_steps=20"), "to extend is to give more"),
    "a budget that is none": (("extend", "RUN", "trainer.max_steps=many"), "it must be an integer of at least 1"),
    "too few lists of steps": (
        ("extend", "RUN", "trainer.max_steps=[30]"),
        "trainer.max_steps lists the steps of 1 experiences, and the run has 2",
    ),
    "too many for a new schedule": (
        ("rewarm", "RUN", "schedule=cosine", "trainer.max_steps=[20,20,40]"),
        "trainer.max_steps lists the steps of 3 experiences, and the run has 2",
    ),
    "another setting": (("extend", "RUN", "optimizer.lr=1"), "is no setting of `cl extend`; its settings are"),
    "stretch is no switch": (("extend", "RUN", "trainer.max_steps=30", "stretch=3"), "it must be true or false"),
    "rewarm without a schedule": (("rewarm", "RUN"), "needs a new schedule"),
    "rewarm of a finished run": (("rewarm", "RUN", "schedule=cosine"), "is done: say what to train on"),
    "a number for a schedule": (("rewarm", "RUN", "schedule=3"), "there is no schedule '3'; there are autoregressive"),
    "no such schedule": (("rewarm", "RUN", "schedule=sawtooth"), "sawtooth"),
    "a schedule that does not fit": (
        ("rewarm", "RUN", "schedule=cosine", "schedule.warmup_steps=99", "trainer.max_steps=30"),
        "more steps than the 10 it is for",
    ),
    "a rate that is none": (("rewarm", "RUN", "schedule=cosine", "optimizer.lr=-1"), "it must be positive"),
    "anneal to nothing": (("fork_anneal", "RUN", "final=0"), "it must be a number above 0"),
    "anneal for no steps": (("fork_anneal", "RUN", "steps=0"), "it must be an integer of at least 1"),
    "no rate at all": (
        ("rewarm", "RUN", "schedule=linear", "trainer.max_steps=30", "optimizer.lr=.inf"),
        "positive and finite",
    ),
    "no number": (
        ("rewarm", "RUN", "schedule=linear", "trainer.max_steps=30", "optimizer.lr=true"),
        "positive and finite",
    ),
    "weights that do not fit": (
        ("rewarm", "RUN", "schedule=linear", "stream=split_digits", "stream.setting=domain_incremental"),
        "do not fit this run: Error(s) in loading state_dict for Mlp: size mismatch for",
    ),
    "no run": (("fork_anneal", "."), "is not a run folder"),
    "no folder": (("rewarm",), "takes one run folder, got 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_one_sentence(case: str, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = BAD[case]
    assert main(tuple(str(done) if word == "RUN" else word for word in words)) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert not list(done.parent.glob("run-*")), "nothing was begun"


def test_the_folder_of_a_run_is_not_overwritten(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("extend", str(done), "trainer.max_steps=30", f"out={done}")) == 2
    assert "already holds a run; choose another folder" in capsys.readouterr().err


def test_a_run_of_avalanche_is_not_begun_anew(capsys: pytest.CaptureFixture[str]) -> None:
    """Its loop knows no list of steps, which every branch has: nothing is left of the attempt."""
    words = [word for word in RUN if not word.startswith("strategy=")]
    assert main((*words, "strategy=avalanche/Naive", "out=theirs")) == 0
    for words in (("extend", "trainer.max_steps=30"), ("fork_anneal", "steps=3")):
        assert main((words[0], "theirs", *words[1:])) == 2
        assert "Avalanche's template gives every experience as many steps" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["theirs"]


def test_a_folder_is_called_as_it_is_written(done: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """007 is no number, and many shells leave the ~ of a word as it is."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert main(("export", str(done), "to=007")) == 0
    assert main(("export", str(done), "to=~/net")) == 0
    assert Path("007/backbone.json").is_file() and (tmp_path / "home/net/backbone.json").is_file()


def test_a_folder_with_other_files_is_not_taken(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("x")
    assert main(("extend", str(done), "trainer.max_steps=30", "out=mine")) == 2
    assert "mine holds other files (notes.txt); a run takes a folder of its own" in capsys.readouterr().err
    assert [path.name for path in Path("mine").iterdir()] == ["notes.txt"]


def test_a_schedule_that_ended_at_zero_is_not_extended(capsys: pytest.CaptureFixture[str]) -> None:
    run("zero", "schedule=linear")
    assert main(("extend", "zero", "trainer.max_steps=30")) == 2
    assert "ended at a learning rate of 0" in capsys.readouterr().err


def test_a_schedule_changed_by_hand_is_refused_on_resume(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped("half", str(done), 35)
    path = Path("half/config.yaml")
    path.write_text(path.read_text().replace("final: 0.2", "final: 0.9"))
    assert main(("resume", "half")) == 2
    assert "belongs to a run with other settings" in capsys.readouterr().err
