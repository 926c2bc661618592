"""Models of transformers on packed text: borders, adapters, folders, and what is refused."""

import json
import time
from functools import partial

import pytest
import torch

from cl.backbones import hf
from cl.backbones.hf import Hf, separated
from cl.config import TrainerConfig
from cl.core import Batch, Setting, StreamInfo, UserError
from cl.seeding import Seeds
from cl.trainer import Trainer
from strategies.replay import Replay
from streams._tokenizers import read_tokenizer, trained_bpe
from streams.builtin_text import builtin_text

pytest.importorskip("transformers")
SEPARATOR, VOCABULARY, CONTEXT = 10, 11, 12
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}
MAMBA = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}


def info(separator=SEPARATOR, vocabulary=VOCABULARY, tokenizer=""):
    return StreamInfo(
        "text",
        Setting.CONTINUAL_PRETRAINING,
        (CONTEXT,),
        vocabulary,
        1,
        measure="loss",
        separator=separator,
        tokenizer=tokenizer,
    )


def model(about=None, **options):
    with Seeds(0).as_global("init"):
        made = Hf(about or info(), **options)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(5 if p.dim() > 1 else 1)
    return made.eval()


def batch(tokens):
    ids = torch.arange(len(tokens))
    return Batch(tokens, tokens.roll(-1, 1), torch.zeros_like(ids), ids)


def packed():
    tokens = torch.randint(SEPARATOR, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    tokens[:, 5] = SEPARATOR
    return tokens


@pytest.mark.parametrize("config", [None, GPT2], ids=["llama", "gpt2"])
def test_packed_documents_give_what_each_gives_alone(config):
    network, tokens = model(config=config), packed()
    whole = network(batch(tokens)).logits
    for low, high in ((0, 5), (5, CONTEXT)):
        alone = network.model(input_ids=tokens[:, low:high]).logits
        torch.testing.assert_close(whole[:, low:high], alone, atol=1e-3, rtol=1e-3)
    blind = model(config=config, is_separated=False)
    assert not torch.allclose(blind(batch(tokens)).logits[:, 5:], whole[:, 5:], atol=1e-2)


def test_masks_are_those_of_the_documents():
    found = separated(torch.tensor([[10, 1, 10, 2, 3], [1, 2, 3, 4, 5]]), 10, torch.float32)
    assert found["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]
    seen = found["attention_mask"][:, 0] == 0
    assert seen[0].long().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert torch.equal(seen[1], torch.ones(5, 5, dtype=torch.bool).tril())


def test_a_model_that_cannot_keep_documents_apart_is_not_trained_across_them_silently():
    with pytest.raises(UserError, match=r"backbone\.is_separated=false"):
        model(config=MAMBA)
    assert model(config=MAMBA, is_separated=False)(batch(packed())).logits.isfinite().all()


def test_hidden_is_what_the_head_reads():
    network = model()
    output = network(batch(packed()))
    torch.testing.assert_close(network.model.lm_head(output.hidden), output.logits)


def test_lora_trains_adapters_only_and_starts_from_the_model_itself():
    plain, adapted = Hf(info()), None
    with Seeds(3).as_global("init"):
        plain = Hf(info())
    with Seeds(3).as_global("init"):
        adapted = Hf(info(), lora={"rank": 2}, adapter="first")
    rows = batch(packed())
    assert torch.equal(plain.eval()(rows).logits, adapted.eval()(rows).logits), "B is 0 before any training"
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and ".first." in name for name in trained)
    adapted.model.add_adapter("second", adapted.model.peft_config["first"])
    adapted.model.set_adapter("second")
    adapted(rows).logits.sum().backward()
    assert any(p.grad is not None and ".second." in name for name, p in adapted.named_parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pretrained model with its own tokenizer, as people keep them."""
    path = tmp_path_factory.mktemp("model")
    from tokenizers import Tokenizer

    library = Tokenizer.from_str(trained_bpe(["the cat sat on the mat"] * 20, 290, path / "bpe", "x")._library.to_str())
    library.add_special_tokens(["<|endoftext|>"])
    (path / "tokenizer.json").write_text(library.to_str())
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    own = read_tokenizer(str(path), download=False)
    # embeddings padded beyond the tokenizer, as many models have them
    Hf(info(own.separator, own.vocabulary + 14)).model.save_pretrained(path)
    return path, own


def test_a_folder_is_loaded_with_its_weights(folder):
    path, own = folder
    about = info(own.separator, own.vocabulary, own.digest)
    left, right = (Hf(about, pretrained=str(path)).eval() for _ in range(2))
    rows = batch(packed())
    assert left(rows).logits.shape == (2, CONTEXT, own.vocabulary)
    assert torch.equal(left(rows).logits, right(rows).logits)
    assert {p.dtype for p in left.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"tokenizer": "bytes"}, "another tokenizer"), ({"vocabulary": 5000}, "tokens and the stream's tokenizer 5000")],
)
def test_a_tokenizer_that_is_not_the_models_is_refused(folder, changes, words):
    path, own = folder
    about = info(**({"separator": own.separator, "vocabulary": own.vocabulary, "tokenizer": own.digest} | changes))
    with pytest.raises(UserError, match=words) as error:
        Hf(about, pretrained=str(path))
    assert f"stream.tokenizer={path}" in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pretrained": "nobody/nothing"}, "data.download=true"),
        ({"pretrained": "nobody/nothing", "download": True}, "does not answer"),
        ({"pretrained": ".", "config": {}}, "both set"),
        ({"pretrained": "."}, "cannot be read"),
        ({"config": {"n_embd": 3}}, "has no model_type"),
        ({"config": {"model_type": "no-such"}}, "makes no causal language model"),
        ({"config": {"model_type": "bert", "hidden_size": 30}}, "makes no causal language model"),
        ({"lora": {"r": 3}}, "backbone.lora has no key 'r'"),
        ({"lora": {"rank": 0}}, "backbone.lora.rank is 0"),
        ({"lora": {"target_modules": ["nowhere"]}}, "cannot be put on this model"),
    ],
)
def test_bad_requests_are_one_sentence(monkeypatch, tmp_path, options, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hf, "hub_answers", lambda: False)
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    with pytest.raises(UserError) as error:
        Hf(info(), **options)
    assert not naps, "the hub was asked again and again"
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options", [{}, {"lora": {"rank": 2}}, {"is_checkpointed": True}], ids=["full", "lora", "save"]
)
def test_trains_stops_and_goes_on(tmp_path, options):
    """Replay on a transformers model; checkpoints hold adapters and optimizer."""

    def trainer(name):
        return Trainer(
            builtin_text(context=16, train_tokens=640, eval_tokens=320, general=False),
            partial(Hf, **options),
            [Replay(20)],
            optimizer=partial(torch.optim.AdamW, lr=0.01),
            config=TrainerConfig(batch_size=8, checkpoint_every=2, device="cpu"),
            run_dir=tmp_path / name,
        )

    whole = trainer("whole").run()
    stopped = trainer("stopped")
    plain = stopped._step

    def step(*arguments):
        plain(*arguments)
        if stopped.state.step == 8:
            stopped.request_stop()

    stopped._step = step
    assert stopped.run().status == "interrupted"
    assert trainer("stopped").run(resume=True).R == whole.R
    assert whole.R[0][0] < whole.R_init[0]
