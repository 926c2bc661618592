"""What `cl run` refuses of language models, through the real command: one sentence, exit code 2, nothing begun."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

from cl.cli.main import main

NEWS = "{name: news, path: news.jsonl, eval_path: held.jsonl}"
RUN = ("run", "tracking=none", "hydra.run.dir=begun", "optimizer=adamw", "trainer.max_steps=2")
SMALL = ("backbone=gpt", "backbone.width=16", "backbone.num_layers=1", "backbone.num_heads=2")
TEXT = ("stream=text_domains", "stream.context=16", f"stream.domains=[{NEWS}]", *SMALL)

TASKS = ("stream=text_tasks", "data.root=.", "stream.folder=tasks", *SMALL)


def domain(text: str) -> tuple[str, ...]:
    return (*TEXT[:2], f"stream.domains=[{text}]", *SMALL)


REFUSED = {
    "a hub id without leave to fetch": (
        domain("{name: web, hub: nobody/nothing, eval_split: test}"),
        ["data set nobody/nothing is not on this machine", "`path`", "data.download=true"],
    ),
    "a hub id without a network": (
        (*domain("{name: web, hub: nobody/nothing, eval_split: test}"), "data.download=true"),
        ["data set nobody/nothing cannot be fetched", "does not answer", "`path`"],
    ),
    "a tokenizer without a network": (
        (*TEXT, "stream.tokenizer=nobody/nothing", "data.download=true"),
        ["tokenizer nobody/nothing cannot be fetched", "does not answer"],
    ),
    "a model that is not here": (
        (*TEXT[:3], "backbone=hf", "backbone.pretrained=nobody/nothing"),
        ["backbone.pretrained is 'nobody/nothing'", "data.download=true"],
    ),
    "a model without a network": (
        (*TEXT[:3], "backbone=hf", "backbone.pretrained=nobody/nothing", "data.download=true"),
        ["model nobody/nothing cannot be fetched", "does not answer"],
    ),
    "a missing field": (domain(NEWS[:-1] + ", field: body}"), ["has no field 'body'", "its fields are text"]),
    "an empty domain": (domain(NEWS.replace("news.jsonl", "empty.jsonl")), ["domain 'news' is empty"]),
    "a missing file": (domain(NEWS.replace("news.jsonl", "lost.jsonl")), ["lost.jsonl"]),
    "a document longer than a shard": ((*TEXT, "stream.shard_tokens=40"), ["does not fit a shard", "`starts`"]),
    "another model's tokenizer": (
        (*TEXT[:3], "stream.tokenizer=bpe", "stream.vocabulary=300", "backbone=hf", "backbone.pretrained=model"),
        ["model model", "stream.tokenizer=model"],
    ),
    "gere without general text": ((*TEXT, "strategy=gere"), ["gere replays general text", "stream.general"]),
    "phases longer than the schedule": (
        (*TEXT, "schedule=infinite", "schedule.warmup_steps=900"),
        ["900 of warmup"],
    ),
    "a budget twice": ((*TEXT, "trainer.max_tokens=100"), ["max_steps and max_tokens", "exactly one"]),
    "adapters where there are none": ((*TEXT, "strategy=o_lora"), ["o_lora works on LoRA adapters", "backbone.lora"]),
    "adapters of no rank": ((*TEXT, "backbone.lora={rank: 0}"), ["backbone.lora.rank is 0"]),
    "an order that is none": (
        (*TASKS, "stream.order=order_9"),
        ["stream.order is 'order_9'", "long, order_1"],
    ),
    "a task that is not there": (
        (*TASKS, "stream.order=[yelp]"),
        ["names 'yelp'", "there are colours"],
    ),
    "general text that is not there": (
        (*TASKS, "stream.order=[colours]", "stream.general={name: web, path: lost.jsonl}", "strategy=gere"),
        ["lost.jsonl"],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """News, an empty domain, a task, and a model of transformers with a tokenizer of its own."""
    root = tmp_path_factory.mktemp("refusals")
    rows = [json.dumps({"text": f"news {k}: the weather is going to be fine, and so on and so on"}) for k in range(40)]
    (root / "news.jsonl").write_text("\n".join(rows) + "\n")
    (root / "held.jsonl").write_text("\n".join(rows[:4]) + "\n")
    (root / "empty.jsonl").write_text('{"text": ""}\n')
    task = root / "tasks" / "colours"
    task.mkdir(parents=True)
    (task / "labels.json").write_text('["green", "white"]')
    for name in ("train", "test"):
        (task / f"{name}.jsonl").write_text('{"text": "grass", "label": "green"}\n' * 4)
    return root


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1, vocab_size=400, **ends)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    own = tokenizers.Tokenizer(tokenizers.models.BPE())
    own.save(str(folder / "model" / "tokenizer.json"))
    return folder / "model"


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_one_sentence(
    case: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    if case == "another model's tokenizer":
        request.getfixturevalue("model")
        capsys.readouterr()
    words, said = REFUSED[case]
    asked: list[str] = []
    monkeypatch.chdir(folder)
    monkeypatch.delenv("CL_DATA_ROOT", raising=False)
    monkeypatch.setenv("CL_CACHE", str(folder / "cache"))
    for module in ("streams._documents", "streams._tokenizers", "cl.backbones._hf_models", "cl.hub"):
        _no_network(monkeypatch, module, asked)
    assert main((*RUN, *words)) == 2
    # transformers draws a bar while it reads weights
    captured, *others = (
        line for line in capsys.readouterr().err.splitlines() if line and "Loading weights" not in line
    )
    assert captured.startswith("cl: ") and not others, (captured, others)
    assert all(part in captured for part in said), captured
    assert len(asked) <= 1, "the hub is asked once, not until patience ends"
    assert not list(folder.rglob("result.json"))


def _no_network(monkeypatch: pytest.MonkeyPatch, module: str, asked: list[str]) -> None:
    """`hub_answers`, wherever it was imported to, says no and is counted."""

    def silent() -> bool:
        asked.append(module)
        return False

    monkeypatch.setattr(import_module(module), "hub_answers", silent, raising=False)
