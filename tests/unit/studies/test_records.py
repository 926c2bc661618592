"""Pages of studies: made again from the runs kept beside them, and runs put back are those that were done."""

import gzip
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from cl.cli.folder import is_done, saved_config
from cl.result import Result

ROOT = Path(__file__).resolve().parents[3]
KEPT = sorted((ROOT / "docs" / "comparisons").glob("*/runs.jsonl.gz"))
LARGE = ("memory", "probes", "trc2")
"""Ten to twenty seconds each."""
RESULT = asdict(
    Result(
        *("text_domains", ["naive"], "gpt", "continual_pretraining", 0, ["c4"], ["c4"], [0], "loss"),
        R=[[0.25]],
        within=[[0, 1, 0, 0.5]],
        course=[[0, 1, 2, 0.5]],
        status="done",
    )
)
CONFIG = {
    "seed": 0,
    "stream": {"_target_": "streams.text_domains.text_domains", "domains": [], "tokenizer": "PLACE/bpe.json"},
    "strategy": {"naive": {"_target_": "strategies.naive.Naive"}},
    "backbone": {"_target_": "cl.backbones.gpt.Gpt"},
    "optimizer": {"_target_": "torch.optim.SGD", "lr": 1e-05},
    "schedule": {"_target_": "cl.schedules.constant"},
    "trainer": {"_target_": "cl.config.TrainerConfig"},
}
TUNING = {"naive": {"chosen": ["optimizer.lr=1e-05"]}}


@pytest.fixture
def records(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import _records

    return _records


def run_in(out, status="done"):
    folder = out / "stream" / "naive" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(CONFIG).replace("PLACE", str(out)).replace("1e-05", "0.00001"))
    (folder / "result.json").write_text(json.dumps(RESULT | {"status": status}))
    (out / "stream" / "tuning.json").write_text(json.dumps(TUNING))
    return folder


def test_a_run_put_back_elsewhere_is_the_same_run(records, tmp_path):
    here, there, page = tmp_path / "here", tmp_path / "there", tmp_path / "page"
    folder = run_in(here)
    records.keep(here, page, {"out": here})
    records.restore(there, page, {"out": there})
    back, wanted = there / folder.relative_to(here), json.loads(json.dumps(CONFIG).replace("PLACE", str(there)))
    assert saved_config(back) == wanted
    assert is_done(back, wanted)
    assert json.loads((back / "result.json").read_text()) == RESULT | {"course": [], "within": []}
    assert json.loads((there / "stream" / "tuning.json").read_text()) == TUNING


def test_places_of_the_machine_stay_out(records, tmp_path):
    run_in(tmp_path / "here")
    records.keep(tmp_path / "here", tmp_path, {"out": tmp_path / "here"})
    assert str(tmp_path).encode() not in gzip.decompress((tmp_path / records.RECORDS).read_bytes())
    once = (tmp_path / records.RECORDS).read_bytes()
    records.keep(tmp_path / "here", tmp_path, {"out": tmp_path / "here"})
    assert (tmp_path / records.RECORDS).read_bytes() == once


def test_what_is_there_stays(records, tmp_path):
    folder = run_in(tmp_path / "here")
    records.keep(tmp_path / "here", tmp_path, {})
    (folder / "result.json").write_text('{"status": "done", "seed": 1}')
    records.restore(tmp_path / "here", tmp_path, {})
    assert json.loads((folder / "result.json").read_text())["seed"] == 1


def test_unfinished_runs_are_not_kept(records, tmp_path):
    run_in(tmp_path / "here", status="interrupted")
    records.keep(tmp_path / "here", tmp_path, {})
    records.restore(tmp_path / "there", tmp_path, {})
    assert not list((tmp_path / "there").rglob("result.json"))
    assert list((tmp_path / "there").rglob("tuning.json"))


@pytest.mark.parametrize(
    "kept",
    [pytest.param(path, marks=pytest.mark.slow) if path.parent.name in LARGE else path for path in KEPT],
    ids=lambda path: path.parent.name,
)
def test_a_page_is_what_its_runs_say(kept, tmp_path):
    """From the committed runs alone, with the options that the page itself names."""
    before = (kept.parent / "README.md").read_text()
    words = before.split("Made by `python ", 1)[1].split("`", 1)[0].split()
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / kept.name).write_bytes(kept.read_bytes())
    places = ["--out", str(tmp_path / "runs"), "--page", str(tmp_path / "page"), "--page-only"]
    made = subprocess.run([sys.executable, *words, *places], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "page" / "README.md").read_text() == before
    # compressed by another zlib they may be other bytes
    again = tmp_path / "page" / kept.name
    assert gzip.decompress(again.read_bytes()) == gzip.decompress(kept.read_bytes())


@pytest.mark.parametrize(("status", "asked"), [(None, "run"), ("interrupted", "resume"), ("done", None)])
def test_a_run_that_was_stopped_goes_on(monkeypatch, tmp_path, status, asked):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import _study

    commands = []
    monkeypatch.setattr(_study, "cl", lambda words: commands.append(words[0]) or 0)
    folder = tmp_path / "stream" / "naive" / "seed-0" if status is None else run_in(tmp_path, status)
    _study.run_to_the_end(folder, ["stream=digits"])
    assert commands == ([] if asked is None else [asked])
