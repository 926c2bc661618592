"""Adapters on a pretrained model from the command line: small checkpoints, every verb, and a base in half precision."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cl.backbones.hf import Hf
from cl.cli import build
from cl.cli.folder import saved_config
from cl.cli.main import main
from cl.cli.resume import trained
from cl.core import Setting, StreamInfo
from cl.result import Result
from streams._tokenizer_folder import write_tokenizer
from streams._tokenizers import Bytes

pytest.importorskip("peft")
TEXT = "".join(f"Document {k}: as many words as {k * k} and {'so ' * (k % 7)}on.\n\n" for k in range(120))
DOMAIN = "{name: one, path: one.txt, starts: '^Document', eval_frac: 0.3}"
WORDS = (
    "stream=text_domains", f"stream.domains=[{DOMAIN}]", "stream.order=[one, one]", "stream.context=32",
    "stream.eval_tokens=600", "stream.tokenizer=model", "tracking=none", "optimizer=adamw", "optimizer.lr=0.02",
    "trainer.max_steps=4", "trainer.batch_size=4", "seed=0", "backbone=hf", "backbone.pretrained=model",
    "backbone.lora={rank: 2}",
)  # fmt: skip
HALF = "backbone.dtype=bfloat16"
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with text and a model of float32 weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CL_DATA_ROOT", raising=False)
    monkeypatch.setenv("CL_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    Path("one.txt").write_text(TEXT)
    Path("model").mkdir()
    about = StreamInfo("text", Setting.CONTINUAL_PRETRAINING, (32,), 257, 1, measure="loss", separator=256)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Hf(about, config=dict(LLAMA)).write(Path("model"))
    write_tokenizer(Path("model"), Bytes())


def run(*words: str) -> Result:
    assert main(("run", *WORDS, *words, "out=run")) == 0
    return Result.load(Path("run/result.json"))


def payload(folder: str = "run") -> dict:
    return torch.load(max(Path(folder).glob("checkpoints/*.pt")), weights_only=True)


def stop_after_the_first_experience() -> None:
    max(Path("run").glob("checkpoints/*.pt")).unlink()
    content = Path("run/result.json").read_text()
    Path("run/result.json").write_text(content.replace('"status": "done"', '"status": "interrupted"'))


def change_model() -> None:
    weights = load_file("model/model.safetensors")
    weights["model.norm.weight"][0] += 1e-6
    save_file(weights, "model/model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("strategy", "num_changed"),
    [(("strategy=naive",), 0), (("strategy=naive", HALF), 0), (("strategy=o_lora",), 7)],
    ids=["naive", "half", "merged"],
)
def test_a_checkpoint_holds_what_has_changed_and_a_stopped_run_goes_on(
    strategy: tuple[str, ...], num_changed: int
) -> None:
    """The seven linear layers of the block are those into which `o_lora` merges after the first experience."""
    whole, state = run(*strategy), payload()["state"]
    base = load_file("model/model.safetensors").keys()
    assert len(state["frozen"]) == len(base) - num_changed
    held = {name for name in state["model"] if "lora_" not in name}
    assert len(held) == num_changed and all(name.endswith("base_layer.weight") for name in held)
    stop_after_the_first_experience()
    assert main(("resume", "run")) == 0
    assert Result.load(Path("run/result.json")).R == whole.R
    again = payload()["state"]
    assert all(torch.equal(again["model"][name], value) for name, value in state["model"].items())
    assert again["frozen"] == state["frozen"]


def test_every_verb_goes_on_from_a_small_checkpoint() -> None:
    run("strategy=o_lora")
    changed = {name: value for name, value in payload()["state"]["model"].items() if "base_layer" in name}
    assert changed
    assert main(("extend", "run", "trainer.max_steps=6", "out=longer")) == 0
    assert main(("fork_anneal", "run", "steps=2", "out=annealed")) == 0
    assert main(("rewarm", "run", "schedule=cosine", "stream.order=[one, one, one]", "out=other")) == 0
    for folder in ("longer", "annealed"):
        found = payload(folder)["state"]["model"]
        assert all(torch.equal(found[name], value) for name, value in changed.items())
    R, R_init = (
        getattr(Result.load(Path(f"{name}/result.json")), key) for name, key in (("run", "R"), ("other", "R_init"))
    )
    assert R_init[0] == pytest.approx(R[-1][0], rel=1e-6), "merged weights were taken over"
    assert main(("resume", "other")) == 0
    assert len(payload("other")["state"]["frozen"]) == len(payload()["state"]["frozen"])


def test_another_model_in_the_folder_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    run("strategy=naive")
    stop_after_the_first_experience()
    before = {path.name for path in Path().iterdir()}
    change_model()
    verbs = (
        ("resume", "run"),
        ("export", "run", "to=new"),
        ("extend", "run", "trainer.max_steps=6"),
        ("fork_anneal", "run"),
        ("rewarm", "run", "schedule=cosine", "stream.order=[one]"),
    )

    def refusal(*words: str) -> str:
        capsys.readouterr()
        assert main(words) == 2
        # transformers has drawn its bar before
        return capsys.readouterr().err.splitlines()[-1]

    for verb in verbs:
        said = refusal(*verb)
        assert "cl: the pretrained model (model) is not the one that the run began with" in said
        assert said.endswith("model.norm.weight differ; put the old files back, or start a new run")
    Path("model/model.safetensors").unlink()
    assert "backbone.pretrained is 'model', which cannot be read" in refusal("resume", "run")
    Path("model").rename("moved")
    assert "'model'" in refusal("resume", "run")
    assert {path.name for path in Path().iterdir()} - {"moved"} == before - {"model"}


def test_a_checkpoint_of_a_version_without_these_settings_goes_on() -> None:
    """It has all weights, and the fingerprint of a config that knew of no `dtype`."""
    whole = run("strategy=naive")
    stop_after_the_first_experience()
    path = max(Path("run").glob("checkpoints/*.pt"))
    old, state = payload(), trained(Path("run"))[0].state
    old["state"]["model"] = dict(state.model.state_dict())
    del old["state"]["frozen"]
    config = saved_config(Path("run"))
    flat = {k: v for k, v in build.settings(config).items() if k not in (*build.FREE, "backbone.dtype")}
    expected = hashlib.sha256(json.dumps(flat, sort_keys=True, default=str).encode()).hexdigest()[:12]
    assert old["fingerprint"] == expected == build.fingerprint(config)
    assert build.fingerprint(config | {"backbone": {**config["backbone"], "dtype": "bfloat16"}}) != expected
    torch.save(old, path)
    assert main(("resume", "run")) == 0
    assert Result.load(Path("run/result.json")).R == whole.R


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_export_is_the_rounded_base_with_whole_adapters(dtype: str) -> None:
    """W + s B A by hand, s = 2, from the folder and the slow adapters of the checkpoint; transformers answers alike."""
    from transformers import AutoModelForCausalLM

    result = run("strategy=i_lora", f"backbone.dtype={dtype}")
    assert result.R[-1][0] < result.R_init[0]
    assert main(("export", "run", "to=new")) == 0
    assert json.loads(Path("new/config.json").read_text())["dtype"] == "float32"
    base, found, slow = load_file("model/model.safetensors"), load_file("new/model.safetensors"), {}
    for name, value in payload()["strategies"][0]["slow"].items():
        slow[name.removeprefix("model.base_model.model.")] = value.double()
    num_adapted = 0
    for name, value in base.items():
        expected = value.to(getattr(torch, dtype)).double()
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.default.weight" in slow:
            expected += 2 * slow[f"{layer}.lora_B.default.weight"] @ slow[f"{layer}.lora_A.default.weight"]
            num_adapted += 1
        assert (found[name] - expected).norm() <= 1e-6 * expected.norm(), name
    assert num_adapted == 7
    trainer = trained(Path("run"))[0]
    trainer.strategies[0].settle(trainer.state)
    tokens = torch.tensor([[256, *b"Document 7: as many words"]])
    with torch.inference_mode():
        said = AutoModelForCausalLM.from_pretrained("new").eval()(tokens).logits
        half = trainer.state.model.eval().model(input_ids=tokens).logits.float()
    assert (said - half).norm() <= 4 * torch.finfo(getattr(torch, dtype)).eps * said.norm(), "what the run measured"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((HALF, "++backbone.lora=null"), "backbone.dtype is 'bfloat16' and every weight is trained"),
        (("backbone.dtype=bf16",), "backbone.dtype is 'bf16'; it must be one of float32, bfloat16, float16"),
        ((HALF, "strategy=o_lora"), "o_lora adds adapters to the weights that they adapt, and backbone.dtype is"),
        ((HALF, "strategy=reg_lora"), "reg_lora adds adapters to the weights"),
    ],
)  # fmt: skip
def test_what_half_precision_would_lose_is_refused(
    words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(("run", *WORDS, *words, "out=run")) == 2
    assert sentence in capsys.readouterr().err
    assert not Path("run").exists()
