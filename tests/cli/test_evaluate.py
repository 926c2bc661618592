"""`cl evaluate`: lm-eval's numbers on answers that are known by hand, offline, and no code of a task is run."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cl.cli.main import main
from cl.core import UserError
from cl.interop import harness
from streams._tokenizers import Bytes

CHOICE = """task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: colours.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITE = """task: next_letters
dataset_path: json
dataset_kwargs: {data_files: {test: letters.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["e"], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ROLL = """task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: letters.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list: [{metric: bits_per_byte}]
"""
COLOURS = [
    {"question": "a", "choices": ["b", "z"], "answer": 0},
    {"question": "c", "choices": ["x", "d"], "answer": 1},
    {"question": "a", "choices": ["z", "b"], "answer": 0},
]
LETTERS = [{"prompt": "a", "target": "bcd"}, {"prompt": "b", "target": "cx"}]


def alphabet(tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a model that knows the alphabet: after a letter comes the next one, with 3 more than all others."""
    return 3.0 * F.one_hot((tokens + 1) % 257, 257).float()


RIGHT = 3.0 - math.log(math.exp(3.0) + 256)
"""Its log-probability of the next letter; of any other it is 3 less."""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in (("colours", CHOICE), ("letters", WRITE), ("rolling", ROLL)):
        (folder / f"{name}.yaml").write_text(text)
    for name, rows in (("colours", COLOURS), ("letters", LETTERS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_lm_eval_scores_answers_known_by_hand(tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    found = harness.evaluate(alphabet, Bytes(), 16, harness.read_tasks(tasks), batch_size=2)
    # the third colour says that "z" follows "a"
    assert found["colours"]["acc"] == pytest.approx(2 / 3)
    # "bcd" stops before "e"; "cd" is not "cx"
    assert found["next_letters"]["exact_match"] == pytest.approx(1 / 2)
    # "a" after the separator and "b" after it: neither is the next token
    assert found["rolling"]["bits_per_byte"] == pytest.approx(-(RIGHT - 3.0) / math.log(2))


def test_scores_of_single_requests(tasks: Path) -> None:
    pytest.importorskip("lm_eval")

    class Request:
        def __init__(self, *arguments: object) -> None:
            self.args = arguments

    model = harness._model(alphabet, Bytes(), 4, batch_size=2)
    asked = [Request("a", "bc"), Request("a", "bd"), Request("", "a"), Request("x ", "y"), Request("abcdef", "ghi")]
    scores = model.loglikelihood(asked)
    assert scores[0] == (pytest.approx(2 * RIGHT), True)
    assert scores[1] == (pytest.approx(2 * RIGHT - 3.0), False)
    assert scores[2] == (pytest.approx(RIGHT - 3.0), False), "without a context the separator stands before"
    # the blank belongs to the answer: after "x" comes " ", and after " " comes "y"
    assert scores[3] == (pytest.approx(2 * RIGHT - 6.0), False)
    assert scores[4] == (pytest.approx(3 * RIGHT), True), "a context that is too long loses its beginning"
    # eight letters in windows of four: the first after the separator, seven after their predecessors
    assert model.loglikelihood_rolling([Request("abcdefgh")]) == [pytest.approx(8 * RIGHT - 3.0)]
    assert model.generate_until([Request("a", {"until": ["f"], "max_gen_toks": 9})]) == ["bcde"]
    assert model.generate_until([Request("a", {"until": [], "max_gen_toks": 3})]) == ["bcd"]
    with pytest.raises(UserError, match="greedily"):
        model.generate_until([Request("a", {"do_sample": True})])


def test_a_run_is_evaluated_from_its_folder(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    small = ("backbone=gpt", "backbone.width=16", "backbone.num_layers=1", "backbone.num_heads=2", "stream.context=32")
    words = ("run", "tracking=none", "debug=tiny", "stream=builtin_text", "trainer.max_steps=2", "trainer.eval_rows=4")
    assert main((*words, *small, "hydra.run.dir=run")) == 0

    def files() -> list[bytes]:
        # Hydra's log of this process goes on
        return sorted(path.read_bytes() for path in Path("run").rglob("*") if path.is_file() and path.name != "run.log")

    before = files()
    assert main(("evaluate", "run", f"tasks={tasks}", "limit=2", "out=scores.json")) == 0
    assert files() == before
    scores = json.loads(Path("scores.json").read_text())
    assert scores["step"] == 6 and set(scores["tasks"]) == {"colours", "next_letters", "rolling"}
    # hardly trained: bytes are about equally likely
    assert 6 < scores["tasks"]["rolling"]["bits_per_byte"] < 10
    assert "bits_per_byte" in capsys.readouterr().out


def test_scores_go_to_the_folder_and_to_mlflow_once(
    tasks: Path,
    empty_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The harness is replaced by known numbers, so that this needs no lm-eval; what MLflow holds is read from it."""
    client_of = pytest.importorskip("mlflow").MlflowClient
    monkeypatch.chdir(tmp_path)
    small = ("backbone=gpt", "backbone.width=16", "backbone.num_layers=1", "backbone.num_heads=2", "stream.context=32")
    words = ("run", "debug=tiny", "stream=builtin_text", "trainer.max_steps=2", "trainer.eval_rows=4")
    uri = f"sqlite:///{shutil.copy(empty_store, tmp_path)}"
    assert main((*words, *small, "tracking=mlflow", "hydra.run.dir=runs/one")) == 0
    run_id = json.loads(Path("runs/one/result.json").read_text())["mlflow_run_id"]
    monkeypatch.setattr(harness, "evaluate", lambda *_: {"colours": {"acc": 0.25, "acc_norm": float("nan")}})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for more in ((), (), ("num_fewshot=2", "limit=3")):
        assert main(("evaluate", "../runs/one", f"tasks={tasks}", *more)) == 0
    monkeypatch.chdir(tmp_path)
    report = json.loads(Path("runs/one/tasks.json").read_text())
    assert report["experiences"] == 3 and report["num_fewshot"] == 2 and report["tasks"]["colours"]["acc"] == 0.25
    assert not list((tmp_path / "elsewhere").iterdir()), "the run's own store is found from anywhere"
    client = client_of(tracking_uri=uri)
    for name in ("lm_eval/colours/acc", "lm_eval/colours/num_fewshot_2_limit_3/acc"):
        assert [(p.step, p.value) for p in client.get_metric_history(run_id, name)] == [(3, 0.25)]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and not any("acc_norm" in name for name in run.data.metrics)
    assert "tasks.json" in {each.path for each in client.list_artifacts(run_id)}
    assert run_id in capsys.readouterr().out
    # a store that does not answer loses nothing
    (tmp_path / "mlruns.db").write_text("no database")
    monkeypatch.setattr(harness, "evaluate", lambda *_: {"letters": {"acc": 0.75}})
    assert main(("evaluate", "runs/one", f"tasks={tasks}")) == 0
    assert "sends the scores later" in capsys.readouterr().out
    assert '"lm_eval/letters/acc"' in Path("runs/one/metrics.jsonl").read_text()


# what is refused

BAD = {
    "a function": ("doc_to_text: !function evil.run\n", "has !function, which runs code"),
    "python": ("metadata: !!python/object/apply:os.system [ls]\n", "runs code"),
    "a class": ("class: evil\n", "has 'class'; allowed are"),
    "an include": ("include: ../other.yaml\n", "has 'include'; allowed are"),
    "a prompt of a package": ("use_prompt: promptsource:x\n", "has 'use_prompt'; allowed are"),
    "a metric of the hub": ("metric_list: [{metric: bleu, hf_evaluate: true}]\n", "one of lm-eval's own"),
}


@pytest.mark.parametrize("case", BAD)
def test_tasks_that_run_code_are_refused(case: str, tasks: Path) -> None:
    line, expected = BAD[case]
    key = line.partition(":")[0]
    kept = [each for each in CHOICE.splitlines(keepends=True) if not each.startswith(f"{key}:")]
    (tasks / "colours.yaml").write_text("".join(kept) + line)
    with pytest.raises(UserError) as error:
        harness.read_tasks(tasks)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("dataset_path: json", "dataset_path: allenai/c4", "must be one of json, csv, parquet, text"),
        ("dataset_path: json", "dataset_path: ./script.py", "must be one of json, csv, parquet, text"),
        ("{test: colours.jsonl}", "{test: ../../secret}", "must be a file beside the task"),
        ("{test: colours.jsonl}", "{test: 'https://example.org/x.jsonl'}", "must be a file beside the task"),
        ("task: colours", "task: rolling", "two files in"),
        ("task: colours", "name: colours", "has no `task: NAME`"),
        ("multiple_choice", "shell", "output_type in"),
    ],
)
def test_tasks_that_leave_their_folder_are_refused(old: str, new: str, expected: str, tasks: Path) -> None:
    (tasks / "colours.yaml").write_text(CHOICE.replace(old, new))
    with pytest.raises(UserError) as error:
        harness.read_tasks(tasks)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        # a template that would reach the interpreter
        ("{{question}}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("metric: acc", "metric: someones/metric", "which lm-eval does not have"),
    ],
)
def test_templates_and_metrics_stay_inside(old: str, new: str, expected: str, tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    (tasks / "colours.yaml").write_text(CHOICE.replace(old, new))
    with pytest.raises(UserError, match=expected):
        harness.evaluate(alphabet, Bytes(), 16, harness.read_tasks(tasks))


def test_what_is_missing_is_said(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'cl-lab\[lm-eval\]'"):
        harness.evaluate(alphabet, Bytes(), 16, harness.read_tasks(tasks))
    for words, expected in (
        (("evaluate", "."), "needs tasks=FOLDER"),
        (("evaluate", ".", "tasks=nowhere"), "which is no folder"),
        (("evaluate", ".", f"tasks={tmp_path}/tasks"), "is not a run folder"),
        (("evaluate", ".", "tasks=x", "limit=0"), "limit is 0; it must be an integer of at least 1"),
    ):
        assert main(words) == 2
        assert expected in capsys.readouterr().err
