"""`cl export`: what other people's code reads from the folder is the network that the run measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cl.backbones import load_backbone
from cl.cli import build
from cl.cli.folder import saved_config
from cl.cli.main import main
from cl.core import Batch, UserError
from cl.result import Result
from streams._tokenizer_folder import write_tokenizer
from streams._tokenizers import Bytes, read_tokenizer, trained_bpe

TEXT = "".join(f"Document {k}: as many words as {k * k}, naïve – and {'so ' * (k % 7)}on.\n\n" for k in range(120))
DOMAIN = "{name: one, path: one.txt, starts: '^Document', eval_frac: 0.3}"
WORDS = (
    "run", "stream=text_domains", f"stream.domains=[{DOMAIN}]", "stream.context=32", "stream.eval_tokens=600",
    "tracking=none", "optimizer=adamw", "optimizer.lr=0.02", "trainer.max_steps=6", "trainer.batch_size=4", "seed=0",
)  # fmt: skip
MODEL = ("backbone=hf", "backbone.config={model_type: llama, hidden_size: 16, intermediate_size: 24, "
         "num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1}")  # fmt: skip
LORA = ("backbone.lora={rank: 2}",)
TWICE = ("stream.order=[one, one]",)
"""Adapters of the first experience are added to the weights, or kept beside those of the second."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CL_DATA_ROOT", raising=False)
    monkeypatch.setenv("CL_CACHE", str(tmp_path / "cache"))
    Path("one.txt").write_text(TEXT)


def exported(*words: str) -> Result:
    assert main((*words, "out=one")) == 0
    assert main(("export", "one", "to=made/here")) == 0
    assert [path.name for path in Path("made").iterdir()] == ["here"], "nothing else is left there"
    return Result.load(Path("one/result.json"))


def held_out() -> Iterator[Batch]:
    """Every row that each domain of the run is measured on."""
    stream = build.make_stream(saved_config(Path("one")))
    for each in stream.eval_sets:
        data = each.load()
        yield stream.prepare(data.rows(torch.arange(len(data))))


def loss_of_documents(answer: Callable[[Tensor], Tensor], separator: int) -> float:
    """Mean loss of the next token, every document of every row read on its own, beginning with its separator."""
    rows, losses = next(held_out()), []
    for tokens, targets in zip(rows.inputs, rows.targets, strict=True):
        begins = sorted({0, *(tokens == separator).nonzero().flatten().tolist(), len(tokens)})
        for low, high in pairwise(begins):
            losses.append(F.cross_entropy(answer(tokens[None, low:high])[0], targets[low:high], reduction="none"))
    return float(torch.cat(losses).double().mean())


@pytest.mark.parametrize(
    "more",
    [
        (),
        (*LORA, *TWICE, "strategy=o_lora"),
        (*LORA, *TWICE, "strategy=i_lora"),
        (*LORA, *TWICE, "strategy=reg_lora", "stream.tokenizer=bpe", "stream.vocabulary=280"),
        ("trainer.precision=bf16", "strategy=replay"),
    ],
    ids=["all weights", "o_lora", "i_lora", "reg_lora, subwords", "bf16"],
)
def test_transformers_measures_what_the_run_measured(more: tuple[str, ...]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = exported(*WORDS, *MODEL, *more)
    model = AutoModelForCausalLM.from_pretrained("made/here").eval()
    separator = AutoTokenizer.from_pretrained("made/here").eos_token_id
    assert model.config.vocab_size == separator + 1
    with torch.inference_mode():
        found = loss_of_documents(lambda tokens: model(tokens).logits, separator)
    assert found == pytest.approx(result.R[-1][0], rel=2e-2 if "trainer.precision=bf16" in more else 1e-5)


def test_another_run_begins_where_this_one_ended() -> None:
    result = exported(*WORDS, *MODEL)
    assert main((*WORDS, "backbone=hf", "backbone.pretrained=made/here", "stream.tokenizer=made/here", "out=two")) == 0
    assert Result.load(Path("two/result.json")).R_init[0] == pytest.approx(result.R[-1][0], rel=1e-6)


@pytest.mark.parametrize("more", [(), (*LORA, *TWICE, "strategy=o_lora")], ids=["all weights", "adapters"])
def test_our_decoder_measures_what_the_run_measured(more: tuple[str, ...]) -> None:
    result = exported(*WORDS, "backbone=gpt", "backbone.width=16", "backbone.num_layers=1", *more)
    assert not any("lora" in name for name, _ in load_backbone("made/here").named_parameters())
    model, rows = load_backbone(Path("made/here")), next(held_out())
    with torch.inference_mode():
        found = F.cross_entropy(model(rows).logits.flatten(0, 1).double(), rows.targets.flatten())
    assert float(found) == pytest.approx(result.R[-1][0], rel=1e-5)


def test_a_classifier_is_as_right_as_it_was_and_knows_its_defaults() -> None:
    result = exported("run", "stream=split_digits", "tracking=none", "trainer.max_steps=20", "strategy=replay")
    model = load_backbone("made/here")
    for column, rows in enumerate(held_out()):
        with torch.inference_mode():
            right = (model(rows).logits.argmax(1) == rows.targets).double().mean()
        assert float(right) == pytest.approx(result.R[-1][column])
    told = json.loads(Path("made/here/backbone.json").read_text())
    assert told["options"]["hidden"], "a later version with other defaults makes the same network"


@pytest.mark.filterwarnings("error:trainer.parallel")
def test_a_run_of_several_processes_is_exported_by_one() -> None:
    words = ("run", "stream=split_digits", "limit_experiences=1", "tracking=none", "trainer.max_steps=2")
    assert main((*words, "out=one")) == 0
    config = Path("one/config.yaml")
    config.write_text(config.read_text().replace("max_steps: 2\n", "max_steps: 2\n  parallel: ddp\n"))
    assert "parallel: ddp" in config.read_text()
    assert main(("export", "one", "to=made/here")) == 0


@pytest.mark.parametrize("kind", ["bytes", "subwords"])
def test_tokenizers_of_transformers_write_the_same_tokens(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = Bytes() if kind == "bytes" else trained_bpe([TEXT], 290, tmp_path, "key")
    odd = ["naïve – words", " two  spaces\n\n\ttab", "".join(map(chr, range(1, 0x250))), "日本 🙂", "<|endoftext|>", ""]
    write_tokenizer(tmp_path, tokenizer)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), read_tokenizer(str(tmp_path), download=False)
    assert theirs.eos_token_id == ours.separator == tokenizer.separator
    assert len(theirs) == ours.vocabulary == tokenizer.vocabulary
    for text in odd:
        expected = tokenizer.encode([text])[0].tolist()
        assert ours.encode([text])[0].tolist() == expected
        assert theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == expected
        assert theirs.decode(expected) == text
    if kind == "bytes":
        assert tokenizer.encode(["é"])[0].tolist() == [0xC3, 0xA9]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("strategy=hypernet",), "hypernet puts Hypernetwork around the network, and only a network is exported"),
        (("strategy=icarl",), "without its strategies the network answers otherwise than the run"),
    ],
)
def test_a_network_that_is_not_all_of_the_answer_is_refused(
    words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ("stream=split_digits", "tracking=none", "trainer.max_steps=3", "limit_experiences=2")
    assert main(("run", *tiny, *words, "out=one")) == 0
    assert main(("export", "one", "to=made/here")) == 2
    assert sentence in capsys.readouterr().err
    assert not any(Path("made").iterdir())


def test_wrong_words_are_a_sentence_and_nothing_is_touched(capsys: pytest.CaptureFixture[str]) -> None:
    Path("full").mkdir()
    Path("full/mine").write_text("mine")
    for words, sentence in (
        (("one",), "needs to=FOLDER"),
        (("one", "to=full"), "to=full is there already"),
        (("full", "to=new"), "full is not a run folder"),
        (("one", "to=full/mine/new"), "the folder full/mine cannot be written: Not a directory"),
        (("to=new",), "takes one run folder, got 0"),
        (("one", "into=new"), "'into' is no setting of `cl export`; its settings are to"),
    ):
        assert main(("export", *words)) == 2
        assert sentence in capsys.readouterr().err
    assert Path("full/mine").read_text() == "mine"
    assert not Path("new").exists()


def test_a_run_in_avalanches_loop_is_refused_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ("stream=split_digits", "tracking=none", "trainer.max_steps=3", "limit_experiences=2")
    assert main(("run", *tiny, "strategy=avalanche/Naive", "out=one")) == 0
    assert main(("export", "one", "to=made")) == 2
    assert "cl: avalanche_Naive puts Learner around the network" in capsys.readouterr().err


def test_a_damaged_folder_is_a_sentence_and_runs_nothing() -> None:
    exported("run", "stream=permuted_digits", "limit_experiences=1", "tracking=none", "trainer.max_steps=1")
    folder = Path("made/here")
    words = json.loads((folder / "backbone.json").read_text())

    def refusal(content: object) -> str:
        (folder / "backbone.json").write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(UserError) as refused:
            load_backbone(folder)
        return str(refused.value)

    assert "cannot be read" in refusal("{")
    assert "cannot be read: KeyError: 'info'" in refusal({"backbone": "x", "options": {}})
    assert "is no torch.nn.Module" in refusal(words | {"backbone": "os.system"})
    assert "cannot be imported" in refusal(words | {"backbone": "nowhere.Net"})
    assert "do not fit" in refusal(words | {"options": words["options"] | {"hidden": [3]}})
    (folder / "model.safetensors").write_bytes(b"short")
    assert "do not fit" in refusal(words)
    (folder / "model.safetensors").unlink()
    assert "model.safetensors is not there" in refusal(words)
