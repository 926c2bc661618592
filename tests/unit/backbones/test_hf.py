"""Models of transformers on packed text: borders, adapters, folders, and what is refused."""

import json
import shutil
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from cl.backbones import _hf_models
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
LAYERS = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "sliding_window": 3,
}
MISTRAL, GEMMA = {"model_type": "mistral", **LAYERS}, {"model_type": "gemma2", **LAYERS}
GPT_OSS = {"model_type": "gpt_oss", **LAYERS, "num_local_experts": 2, "num_experts_per_tok": 1}
BERT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
BART = {"model_type": "bart", "d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
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


@pytest.mark.parametrize("config", [None, GPT2, MISTRAL, GEMMA], ids=["llama", "gpt2", "window", "windows"])
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


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BERT, "reads the tokens ahead that it is to predict"),
        (BART, "or counts on there"),
        (GPT_OSS, "its sliding window of 3 tokens out of use, and stream.context is 12"),
        ({**GPT2, "n_positions": 8}, "reads at most 8 tokens (max_position_embeddings of its config)"),
    ],
    ids=["ahead", "positions", "window", "short"],
)
def test_a_model_that_would_read_rows_otherwise_than_told_is_refused(config, words):
    with pytest.raises(UserError) as error:
        model(config=config)
    assert words in str(error.value)


def test_positions_are_as_many_as_the_config_says():
    assert model(config={**GPT2, "n_positions": 40}).model.transformer.wpe.num_embeddings == 40
    assert model(config=GPT2).model.transformer.wpe.num_embeddings == 64


def test_hidden_is_what_the_head_reads():
    network = model()
    output = network(batch(packed()))
    torch.testing.assert_close(network.model.lm_head(output.hidden), output.logits)


def test_hidden_is_told_where_logits_are_capped_behind_the_head():
    network = model(config={**GEMMA, "final_logit_softcapping": 0.5})
    output = network(batch(packed()))
    torch.testing.assert_close((network.model.lm_head(output.hidden) / 0.5).tanh() * 0.5, output.logits)


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


def without_head(path):
    weights = load_file(path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def of_other_shapes(path):
    say(path, intermediate_size=48)


def cut(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def pickled(path):
    (path / "model.safetensors").unlink()
    torch.save({"weight": Touch(path / "run")}, path / "pytorch_model.bin")


def remote(path):
    (path / "its.py").write_text(f"open({str(path / 'run')!r}, 'w')")
    say(path, model_type="own", auto_map={"AutoConfig": "its.C", "AutoModelForCausalLM": "its.M"})


def broken(path):
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def adapted(path):
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(path), "peft_type": "LORA"}))


def without_end(path):
    file = path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|endoftext|>", "<|other|>"))
    (path / "tokenizer_config.json").unlink()
    own = read_tokenizer(str(path), download=False)
    Hf(info(0, own.vocabulary - 1)).model.save_pretrained(path)


def say(path, **values):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_head, "has no weights, or some of another shape, for lm_head.weight; they would be drawn"),
        (of_other_shapes, "for model.layers.0.mlp.down_proj.weight and 5 more"),
        (cut, "cannot be read: Error while deserializing header"),
        (pickled, "its pickle is damaged or holds more than tensors; give safetensors"),
        (remote, "contains custom code"),
        (broken, "weights with which it predicts no finite numbers"),
        (adapted, "is an adapter of peft; merge it into its model"),
        (without_end, "set eos_token in the tokenizer_config.json beside it"),
        (partial(say, attn_implementation="nobody/attention"), "attn_implementation='nobody/attention'; it must be"),
        (partial(say, quantization_config={"quant_method": "gptq", "bits": 4}), "is quantised (quantization_config)"),
    ],
)
def test_a_folder_that_is_no_whole_plain_model_is_refused_in_one_sentence(folder, tmp_path, change, words):
    """Nothing is drawn in place of what is not there, and nothing that a folder brings is run."""
    path = tmp_path / "model"
    shutil.copytree(folder[0], path)
    change(path)
    own = read_tokenizer(str(path), download=False)
    with pytest.raises(UserError) as error:
        Hf(info(own.separator, own.vocabulary, own.digest), pretrained=str(path))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (path / "run").exists()


def test_weights_that_nothing_uses_are_told(folder, tmp_path):
    path, own = tmp_path / "model", folder[1]
    shutil.copytree(folder[0], path)
    say(path, num_hidden_layers=1)
    with pytest.warns(UserWarning, match=r"has no place for some weights .*: model\.layers\.1\."):
        Hf(info(own.separator, own.vocabulary, own.digest), pretrained=str(path))


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
        ({"pretrained": 5}, "backbone.pretrained is 5; it must be the folder or the hub id"),
        ({"pretrained": ""}, "backbone.pretrained is ''"),
        ({"config": 5}, "backbone.config is 5; it must be a mapping"),
        ({"config": {**GPT2, "attn_implementation": "nobody/attention"}}, "it must be one of sdpa, eager"),
        ({"config": {**GPT2, "n_head": 0}}, "makes no causal language model"),
        ({"config": {"model_type": "llama", "hidden_size": "x"}}, "expected int, got str (value: 'x')"),
        ({"config": {"n_embd": 3}}, "has no model_type"),
        ({"config": {"model_type": "no-such"}}, "makes no causal language model"),
        ({"config": {"model_type": "bert", "hidden_size": 30}}, "makes no causal language model"),
        ({"lora": {"r": 3}}, "backbone.lora has no key 'r'"),
        ({"lora": {"rank": 0}}, "backbone.lora.rank is 0"),
        ({"lora": 4}, "backbone.lora is 4; it must be a mapping"),
        ({"lora": {"alpha": "x"}}, "backbone.lora.alpha is 'x'; it must be a finite number above 0"),
        ({"lora": {"alpha": -1}}, "backbone.lora.alpha is -1"),
        ({"lora": {"dropout": 1}}, "backbone.lora.dropout is 1; it must be a number from 0 to below 1"),
        ({"lora": {"target_modules": 5}}, "backbone.lora.target_modules is 5"),
        ({"lora": {"target_modules": "("}}, "backbone.lora cannot be put on this model"),
        ({"lora": {"target_modules": ["q_proj", "q_porj"]}}, "names 'q_porj', no layer of this model"),
        ({"lora": {}, "adapter": "a.b"}, "backbone.adapter is 'a.b'; it must be a name without dots"),
        (
            {"lora": {"target_modules": ["nowhere"]}},
            "names 'nowhere', no layer of this model; it has act_fn, down_proj",
        ),
    ],
)
def test_bad_requests_are_one_sentence(monkeypatch, tmp_path, options, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_hf_models, "hub_answers", lambda: False)
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
