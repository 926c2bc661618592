"""Scripts for a card, tried without one: peers are stand-ins, and what that machine lacks cannot be imported."""

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[3]

CARD_MACHINE = """
import importlib.abc, sys, types
from pathlib import Path
import torch

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hydra", "omegaconf", "mlflow", "avalanche", "torchvision", "datasets"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())

class GatedDeltaNet(torch.nn.Module):
    def __init__(self, hidden_size, layer_idx, num_heads, head_dim, expand_v):
        super().__init__()
        assert num_heads * head_dim == hidden_size and expand_v == 1
        self.inner = torch.nn.Linear(hidden_size, 4 * hidden_size)
        self.out = torch.nn.Linear(4 * hidden_size, hidden_size)
    def forward(self, hidden_states):
        return self.out(self.inner(hidden_states)), None, None

class KimiDeltaAttention(GatedDeltaNet):
    def forward(self, hidden_states):
        raise RuntimeError("no card")

class GatedLinearAttention(torch.nn.Module):
    def __init__(self, hidden_size, layer_idx, num_heads, expand_k, expand_v, use_short_conv):
        raise AssertionError("is not to be asked for")

for name in ("fla", "fla.layers", "fla.layers.gated_deltanet", "fla.layers.kda"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["fla.layers.gated_deltanet"].GatedDeltaNet = GatedDeltaNet
sys.modules["fla.layers.kda"].KimiDeltaAttention = KimiDeltaAttention

import kernels.bench.__main__, kernels.check_gpu, language_speed, memory_speed, on_gpu
try:
    memory_speed.main()
except SystemExit as end:
    print("ended with", end)
sys.argv[1] = "page"
memory_speed.main()
"""


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_layers_of_others_stand_beside_ours(tmp_path):
    """In the same decoder, of as many weights; one that is absent or fails is a sentence, and the others go on."""
    out = tmp_path / "speed.json"
    sizes = ["--tokens", "16", "--rows", "2", "--width", "32", "--layers", "1", "--repeats", "1"]
    words = ["train", "--peers", "--blocks", "gla", "kda", "gated_delta", "rmt", *sizes, "--out", str(out)]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CARD_MACHINE, *words], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "fla GatedLinearAttention is left out: ModuleNotFoundError" in done.stdout
    assert "ended with fla KimiDeltaAttention: RuntimeError: no card" in done.stdout
    (group,) = json.loads(out.read_text()).values()
    assert list(group) == ["attention", "gla", "kda", "gated_delta", "fla GatedDeltaNet", "rmt"]
    weights = [row["weights"] for row in group.values()]
    assert max(weights) < 1.03 * min(weights)
    ours, theirs = group["gated_delta"], group["fla GatedDeltaNet"]
    page = out.with_suffix(".md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("| gated_delta ")]
    assert line.endswith(f"| {theirs['seconds'] / ours['seconds']:.2f}x |")
    assert "of fla's layer |" in page


def test_operations_are_those_that_are_counted():
    """Half of the attention is masked in what torch multiplies, and not in what a model has to do."""
    import language_speed

    settings = {"width": 32, "num_layers": 2, "num_heads": 4}
    stream, tokens = language_speed.documentation(24)
    made = partial(language_speed.Gpt, **settings)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model = made(stream.info)
        model.separator = None
        model.head(model.features(tokens[:24].unsqueeze(0)))
    masked = 2 * 2 * 24 * 32
    expected = language_speed.flops_of_a_token(made, stream.info, settings)
    assert counter.get_total_flops() / 24 == expected / 3 + masked


def test_one_network_takes_the_place_of_the_small_ones():
    import language_speed

    given = argparse.Namespace(width=0)
    assert language_speed.chosen(given, language_speed.MODELS) is language_speed.MODELS
    given = argparse.Namespace(width=768, layers=14, heads=12, context=1024, batch=16, steps=20)
    ((title, (settings, *rest)),) = language_speed.chosen(given, language_speed.MODELS).items()
    assert title == "width 768, 14 layers, 16 rows of 1024"
    assert settings == {"width": 768, "num_layers": 14, "num_heads": 12}
    assert rest == [1024, 16, 20]


def test_a_size_is_added_behind_the_words_of_the_stream(monkeypatch):
    """And without one the requests are what they were, so that runs are found again."""
    from study_language import COMMON, STREAMS, Language

    asked = []
    monkeypatch.setattr(Language, "compare", lambda self, folder, strategies, *words: asked.append(words))
    Language(data="data").train("local", ("naive", ()))
    Language(data="data", width=512, layers=8, words=("trainer.batch_size=4",)).train("local", ("naive", ()))
    plain, large = asked
    assert plain == (*STREAMS["local"], *COMMON)
    assert large == (*plain, "backbone.width=512", "backbone.num_layers=8", "trainer.batch_size=4")


def test_every_item_has_its_turn(monkeypatch, capsys, tmp_path):
    """After one that fails and one that never ends; those without time are said to have had none."""
    import on_gpu

    items = {
        "fails": ("-c", "raise SystemExit('it broke')"),
        "hangs": ("-c", "import signal; signal.pause()"),
        "works": ("-c", "print('well'); open('OUT/found', 'w').write('1')"),
    }
    made = {name: on_gpu.Item(1 if name == "hangs" else 60, words, words) for name, words in items.items()}
    monkeypatch.setattr(on_gpu, "ITEMS", made)
    assert on_gpu.main([str(tmp_path)]) == 1
    table = (tmp_path / "table.md").read_text().splitlines()[2:]
    assert [line.split(" | ")[1] for line in table] == ["exit code 1", "stopped after 1 s", "done"]
    assert "it broke" in table[0]
    assert "well" in table[2]
    assert (tmp_path / "found").read_text() == "1"
    assert on_gpu.main([str(tmp_path), "--items", "works"]) == 0
    assert on_gpu.main([str(tmp_path), "--items", "works", "--seconds", "0"]) == 1
    assert "| works | no time | 0 |" in capsys.readouterr().out


def test_items_fit_into_two_calls():
    """Of at most seven minutes each, and of no more files than come back from a borrowed machine."""
    from on_gpu import ITEMS

    first, second = (("tests", "check", "bench"), tuple(ITEMS)[3:])
    assert tuple(ITEMS)[:3] == first
    for names in (first, second):
        assert sum(ITEMS[name].seconds for name in names) <= 480
        files = {word for name in names for word in ITEMS[name].words if word.startswith("OUT/")}
        assert len(files) + len(("log.txt", "table.md")) <= 8
