"""Options of mixers, rules and cells in words: each value is computed with, or refused in one sentence."""

import inspect

import pytest
import torch

from cl.backbones._spec import PARTS, build_mixer, place_of, plugin, plugin_names
from cl.backbones.gpt import Gpt
from cl.core import Setting, StreamInfo, UserError

LAYERS = {folder: words.removeprefix("backbone.blocks=") for folder, (_, words) in PARTS.items() if folder != "mlps"}
WRAPPERS = ("memory_cache", "mixture_of_memories")
WRONG = {
    "bool": ["word", "1"],
    "int": ["word", "true", "1.5", "[1]"],
    "float": ["word", "true", "nan", "inf"],
    "str": ["3"],
}


def options(folder):
    """Words that set each option, without its value, the option's name and its kind."""
    for name in plugin_names(folder):
        for option, parameter in inspect.signature(plugin(folder, name, "")).parameters.items():
            inner = "linear_memory, " if name in WRAPPERS else ""
            words = LAYERS[folder].format(f"{name}({inner}{option}=VALUE)")
            yield words, option, str(parameter.annotation).split(" | ")[0]


@pytest.mark.parametrize("folder", LAYERS)
def test_values_of_another_kind_are_one_sentence(folder):
    for words, option, kind in options(folder):
        for value in WRONG.get(kind, []):
            with pytest.raises(UserError) as error:
                build_mixer(words.replace("VALUE", value), 16, num_heads=2)
            assert option in str(error.value), words
            assert "\n" not in str(error.value), words


@pytest.mark.parametrize("folder", LAYERS)
def test_numbers_outside_their_range_are_one_sentence(folder):
    """Zero and minus one are refused, or mean something that can be computed."""
    for words, _, kind in options(folder):
        for value in ["0", "-1"] if kind in ("int", "float") else []:
            try:
                mixer = build_mixer(words.replace("VALUE", value), 16, num_heads=2)
            except UserError:
                continue
            assert mixer(torch.randn(1, 5, 16))[0].isfinite().all(), words


@pytest.mark.parametrize("folder", PARTS)
def test_the_place_of_a_name_is_one_that_can_be_built(folder):
    info = StreamInfo("digits", Setting.CLASS_INCREMENTAL, (1, 8, 8), 10, 2)
    for name in plugin_names(folder):
        words = PARTS[folder][1].format(name)
        assert f"'{words}'" in place_of(name)
        option, _, value = words.removeprefix("backbone.").partition("=")
        if name not in WRAPPERS:
            Gpt(info, **{"width": 16, "num_heads": 2, "num_layers": 1, option: value})


def test_a_name_of_another_place_is_told_its_own():
    with pytest.raises(UserError, match="; titans is a rule of neural_memory: backbone=gpt"):
        build_mixer("linear_memory(rule=titans)", 16, num_heads=2)
    with pytest.raises(UserError, match=r"must be one of [\w, ]+$"):
        build_mixer("mamba", 16, num_heads=2)
