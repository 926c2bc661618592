"""docs/language.md is true: its commands run, on little text, and what they refuse is one sentence with exit code 2."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from cl.cli.main import main
from cl.testing import configs

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "language.md").read_text()
COMMANDS = [line for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
SMALL = {
    "builtin_text": ["stream.train_tokens=2000", "stream.eval_tokens=1000"],
    "text_domains": ["stream.eval_tokens=1000", "trainer.max_steps=2", "backbone.width=16"],
    "text_tasks": ["stream.vocabulary=300", "stream.train_rows=8", "stream.eval_rows=4", "backbone.width=16"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with small files in the layout of the development data."""
    path = tmp_path_factory.mktemp("language")
    text = path / "DATA" / "text"
    news = [{"text": f"news {k}: the weather is going to be fine, and so on and so on"} for k in range(200)]
    sums = [{"question": f"what is {k} and {k}, all in all?", "answer": f"#### {2 * k}"} for k in range(80)]
    wiki = "".join(f" = Title {k} = \n \n some words about the title, and then some more \n" for k in range(60))
    files = {
        "c4/train.jsonl": news, "c4/validation.jsonl": news, "wikitext/train.txt": wiki,
        "wikitext/validation.txt": wiki, "gsm8k/train.jsonl": sums, "gsm8k/test.jsonl": sums,
        "shakespeare/train.txt": "All:\nSpeak, speak.\n" * 80,
        "shakespeare/validation.txt": "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 40,
    }  # fmt: skip
    for task in ("sst2", "agnews"):
        rows = [{"text": f"a text of {task}, number {k}", "label": ("Good", "Bad")[k % 2]} for k in range(12)]
        files |= {f"tasks/{task}/train.jsonl": rows, f"tasks/{task}/test.jsonl": rows}
        files[f"tasks/{task}/labels.json"] = '["Good", "Bad"]'
    for name, content in files.items():
        (text / name).parent.mkdir(parents=True, exist_ok=True)
        is_text = isinstance(content, str)
        (text / name).write_text(content if is_text else "".join(json.dumps(row) + "\n" for row in content))
    (path / "news.jsonl").write_text("".join(json.dumps(row) + "\n" for row in news))
    (path / "code.txt").write_text("".join(f"def f{k}(x):\n    return x + {k}\n\n" for k in range(400)))
    return path


@pytest.fixture
def run(folder, monkeypatch, capfd):
    """Runs a command of the page in that directory; in this process, which has imported everything."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CL_CACHE", str(folder / "cache"))
    monkeypatch.delenv("CL_DATA_ROOT", raising=False)

    def call(command, *more):
        code = main([*shlex.split(command)[1:], *more])
        said = capfd.readouterr()
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    return call


def small(command):
    """What makes a command of the page run in seconds."""
    kind = "text_tasks" if "text_tasks" in command else "builtin_text"
    kind = "text_domains" if "text_local" in command or "text_domains" in command else kind
    words = SMALL[kind] if "hf" not in command else ["stream.train_tokens=2000", "stream.eval_tokens=1000"]
    return [*words, "tracking=none"]


def test_the_page_has_what_this_file_runs():
    assert len(COMMANDS) >= 8 and {shlex.split(line)[0] for line in COMMANDS} == {"cl"}
    named = {config.name for config in configs("schedule")}
    assert all(f"`{name}`" in PAGE for name in named), "every schedule has a line"
    orders = {config.name.removeprefix("trc2_") for config in configs("experiment") if config.name.startswith("trc2_")}
    assert orders == {"cwg", "cgw", "wcg", "wgc", "gcw", "gwc"} and all(order in PAGE for order in orders)


FAST = COMMANDS.index("cl run +experiment=trc2_gcw stream=text_domains data.root=DATA")


@pytest.mark.parametrize(
    "command",
    [line if k == FAST else pytest.param(line, marks=pytest.mark.slow) for k, line in enumerate(COMMANDS)],
)
def test_commands_run(run, tmp_path, command):
    is_run = command.startswith("cl run")
    is_compare = command.startswith("cl compare")
    where = [f"hydra.run.dir={tmp_path}/run"] if is_run else [f"out={tmp_path}/out", "jobs=1"] if is_compare else []
    done = run(command, *small(command), *where)
    assert done.returncode == 0, done.stdout + done.stderr
    if is_compare:
        assert "chosen" in done.stdout and (tmp_path / "out" / "tuning.json").is_file()
        return
    if not is_run:
        assert "learning rate over" in done.stdout and "█" in done.stdout
        return
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "done" and result["setting"] == "continual_pretraining"
    if "trc2_gcw" in command:
        assert result["experiences"] == ["gsm8k", "c4", "wikitext"]
        assert result["domains"] == ["c4", "wikitext", "gsm8k"]
        assert result["metrics"]["bits_per_byte"] > 0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("cl run stream=trc2 backbone=gpt", ["allenai/c4", "`path`", "data.download=true"]),
        ("cl run stream=builtin_text", ["backbone mlp", "backbone=gpt"]),
        ("cl run +experiment=builtin_text schedule=infinite schedule.warmup_steps=99999", ["99999 of warmup"]),
    ],
)
def test_wrong_requests_are_one_sentence(run, tmp_path, command, words):
    done = run(command, "tracking=none", "stream.eval_tokens=1000", f"hydra.run.dir={tmp_path}/run")
    assert done.returncode == 2, done.stdout + done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert done.stderr.strip().count("\n") == 0 and not list(tmp_path.rglob("result.json"))


@pytest.mark.slow
def test_changed_data_is_refused_on_resume(run, folder, tmp_path):
    domains = "stream.domains=[{name: news, path: news.jsonl}]"
    command = f"cl run stream=text_domains '{domains}' stream.context=32 backbone=gpt trainer.max_steps=2 tracking=none"
    done = run(command, f"hydra.run.dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    # as a stopped run leaves it
    result = tmp_path / "run" / "result.json"
    result.write_text(result.read_text().replace('"status": "done"', '"status": "interrupted"'))
    path = folder / "news.jsonl"
    before = path.read_text()
    try:
        path.write_text(before.replace("weather", "climate"))
        done = run(f"cl resume {tmp_path}/run")
        assert done.returncode == 2 and "put the old data back" in done.stderr
    finally:
        path.write_text(before)
    assert run(f"cl resume {tmp_path}/run").returncode == 0, "the refused attempt lost nothing"
    assert json.loads(result.read_text())["status"] == "done"


def test_explain_draws_the_learning_rate_of_the_whole_run():
    from functools import partial

    import torch

    from cl.cli.explain import schedule_plot
    from cl.config import TrainerConfig
    from cl.core import Setting
    from cl.schedules import rewarmed_cosine
    from cl.testing.toy import ToyNet, toy_stream
    from cl.trainer import Trainer
    from strategies.naive import Naive

    trainer = Trainer(
        toy_stream(Setting.CONTINUAL_PRETRAINING),
        ToyNet,
        [Naive()],
        optimizer=partial(torch.optim.SGD, lr=0.5),
        schedule=partial(rewarmed_cosine, warmup_frac=0.0, final=0.0),
        config=TrainerConfig(max_steps=4, device="cpu"),
    )
    *bars, ticks = schedule_plot(trainer).split("\n")
    assert bars[0].startswith("0.5 |") and ticks.endswith("+^---^---^---")
    assert [column for column, bar in enumerate(bars[0].split("|")[1]) if bar == "█"] == [0, 4, 8]
