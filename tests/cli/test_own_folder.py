"""A run has a folder of its own: what is there already stays, any name will do, and what is broken is said."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from cl.cli import lock
from cl.cli.branch import options
from cl.cli.main import main
from cl.result import Result

TINY = ("run", "tracking=none", "debug=tiny", "limit_experiences=1", "trainer.max_steps=2")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_files_of_somebody_else_stay(capsys: pytest.CaptureFixture[str]) -> None:
    own = {Path("config.yaml"): "mine: true", Path("checkpoints/step-best.pt"): "x", Path("checkpoints/x.tmp"): "y"}
    Path("checkpoints").mkdir()
    for path, text in own.items():
        path.write_text(text)
    assert main((*TINY, "out=.")) == 2
    assert "holds other files (checkpoints, config.yaml); a run takes a folder of its own" in capsys.readouterr().err
    assert {path: path.read_text() for path in own} == own


def test_an_empty_folder_stays_where_the_run_is_refused() -> None:
    Path("results").mkdir()
    assert main((*TINY, "out=results", "trainer.batch_size=0")) == 2
    assert Path("results").is_dir()
    assert not list(Path("results").iterdir())
    assert main((*TINY, "out=fresh", "trainer.batch_size=0")) == 2
    assert not Path("fresh").exists()


def test_a_folder_that_is_being_trained_in_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main((*TINY, "out=one")) == 0
    with lock.alone(Path("one")):
        Path("one/result.json").unlink()
        before = {path: path.read_bytes() for path in Path("one").rglob("*") if path.is_file()}
        for words in ((*TINY, "out=one"), ("resume", "one")):
            assert main(words) == 2
            assert "one is being trained by another process" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in Path("one").rglob("*") if path.is_file()} == before
    assert main(("resume", "one")) == 0


def test_a_run_that_was_killed_at_its_start_starts_again() -> None:
    assert main((*TINY, "out=one")) == 0
    Path("one/result.json").unlink()
    for path in Path("one/checkpoints").iterdir():
        path.unlink()
    assert main((*TINY, "out=one")) == 0
    assert Result.load(Path("one/result.json")).status == "done"


@pytest.mark.parametrize("name", ["mes résultats/größe (1)", "it's", "#1", "lr=0.1", "2024"])
def test_any_name_of_a_folder_will_do(name: str) -> None:
    assert main((*TINY, f"out={name}")) == 0
    assert Path(name, "result.json").is_file()


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("trainer.reset_optimizer=no", "trainer.reset_optimizer is 'no'; it must be true or false"),
        ("trainer.batch_size=true", "trainer.batch_size is True; it must be an integer"),
        ("strategy=[replay,replay]", "'strategy=[replay,replay]' names replay twice"),
        ("trainer.device=null", "trainer.device is None; it must be a name"),
        ("trainer.schedule_steps=5", "trainer.schedule_steps is 5; it must be a list"),
        ("optimizer.betas=[]", "optimizer has no option 'betas'"),
        ("optimizer.lr=nan", "optimizer.lr is nan; it must be a finite number"),
        ("optimizer.weight_decay=inf", "optimizer.weight_decay is inf; it must be a finite number"),
    ],
)
def test_words_are_no_truth_and_nan_is_no_rate(word: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main((*TINY, word)) == 2
    assert sentence in capsys.readouterr().err


def test_a_last_update_that_breaks_the_weights_fails_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """No loss follows that would show it."""
    assert main((*TINY[:-1], "out=one", "trainer.max_steps=1", "optimizer.lr=1e38", "optimizer.weight_decay=1e6")) == 1
    result = Result.load(Path("one/result.json"))
    assert result.status == "failed"
    assert "the update left weights that are not finite at step 0 (experience 0, 'permutation 00')" in result.error
    assert "the last good checkpoint is one/checkpoints/step-000000000.pt" in result.error
    assert [path.name for path in Path("one").glob("checkpoints/step-*")] == ["step-000000000.pt"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stream: x\nseed: 0", "it lacks strategy, backbone, optimizer, schedule, trainer"),
        ("stream: größe".encode("latin-1"), "config.yaml cannot be read: 'utf-8' codec"),
    ],
)
def test_half_a_config_is_one_sentence(text: str | bytes, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("one").mkdir()
    Path("one/config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(("resume", "one")) == 2
    assert sentence in capsys.readouterr().err


OWN = """
from cl.hooks import Strategy
class Mine(Strategy):
    def penalty(self, state, batch, output):
        return {}["boom"]
"""


def test_a_mistake_in_a_strategy_of_ones_own_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    Path("own_mistake.py").write_text(OWN)
    assert main((*TINY, "strategy=own_mistake.Mine", "out=one")) == 1
    said = capsys.readouterr()
    assert "cl: KeyError: 'boom' (in penalty, line 5 of own_mistake.py; --debug" in said.err
    assert "Traceback" not in said.out + said.err
    log = Path("one/run.log").read_text()
    assert "the run failed" in log and "own_mistake.py" in log


UNREADABLE = """
import numpy as np
from cl.hooks import Strategy
class Mine(Strategy):
    def __init__(self, kept):
        self.kept = kept
    def state_dict(self):
        kept = {"set": {1}, "array": [np.zeros(1)], "number": np.float64(1), "plain": (1, None, "a", {"b": 2.0})}
        return {"seen": kept[self.kept]}
    def load_state_dict(self, state):
        pass
"""


@pytest.mark.parametrize(
    ("kept", "is_a"), [("set", "is a set"), ("array", "[0] is a ndarray"), ("number", "is a float64")]
)
def test_a_state_that_no_checkpoint_holds_is_refused_at_the_first_one(
    kept: str, is_a: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own_unreadable.py").write_text(UNREADABLE)
    words = (*TINY, "strategy=own_unreadable.Mine")
    assert main((*words, f"strategy.own_unreadable.kept={kept}", "out=one")) == 2
    said = capsys.readouterr().err
    assert f"strategy own_unreadable: state_dict()['seen']{is_a if is_a[0] == '[' else f' {is_a}'}, which a " in said
    assert not list(Path("one").rglob("*.pt"))
    assert main((*words, "strategy.own_unreadable.kept=plain", "out=two")) == 0


def test_a_config_without_a_node_of_its_own_is_told_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    Path("conf/strategy").mkdir(parents=True)
    Path("conf/strategy/mine.yaml").write_text("_target_: strategies.naive.Naive\n")
    assert main((TINY[0], "--config-dir", "conf", "strategy=mine", *TINY[1:])) == 2
    assert "begin its config file with `# @package strategy.NAME`" in capsys.readouterr().err


FOLDER_GIVEN = {
    "run": ("--config-dir", "conf"),
    "run, joined": ("--config-dir=conf",),
    "run, searched": ("hydra.searchpath=[file://conf]",),
    "explain": ("hydra.searchpath=['conf']",),
}


@pytest.mark.parametrize("case", FOLDER_GIVEN)
def test_a_config_called_as_one_of_ours_is_not_passed_over(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = (case.partition(",")[0], *FOLDER_GIVEN[case], "strategy=naive", *TINY[1:])
    assert main(words) == 2
    assert "conf is no folder; configs of your own are to be read from it" in capsys.readouterr().err
    Path("conf/strategy").mkdir(parents=True)
    Path("conf/strategy/naive.yaml").write_text("# @package strategy.naive\n_target_: strategies.joint.Joint\n")
    assert main(words) == 2
    sentence = "conf/strategy/naive.yaml would not be read: naive of strategy is one of ours; give it another name"
    assert sentence in capsys.readouterr().err
    Path("conf/strategy/naive.yaml").rename("conf/strategy/other.yaml")
    assert main(words) == 0


def test_a_refused_branch_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main((*TINY, "out=one")) == 0
    before = sorted(Path().iterdir())
    words = ("rewarm", "one", "schedule=cosine", "stream=permuted_digits", "stream.num_experiences=0")
    assert main(words) == 2
    assert "stream.num_experiences is 0" in capsys.readouterr().err
    assert sorted(Path().iterdir()) == before


def test_numbers_as_people_write_them() -> None:
    _, found = options(["run", "optimizer.lr=1e-3", "steps=5", "out=2024"], "x", ("optimizer.lr", "steps", "out"))
    assert found == {"optimizer.lr": 0.001, "steps": 5, "out": "2024"}
    assert math.isclose(options(["run", "final=-2E+1"], "x", ("final",))[1]["final"], -20)


def test_where_the_curves_are_is_said_with_the_store(capsys: pytest.CaptureFixture[str]) -> None:
    assert main((*TINY[:1], *TINY[2:], "out=one", "tracking.uri=sqlite:///other.db")) == 0
    assert "forgetting curves: `cl ui uri=sqlite:///other.db`" in capsys.readouterr().out
    assert main(("resume", "one")) == 0
    assert "forgetting curves: `cl ui uri=sqlite:///other.db`" in capsys.readouterr().out
