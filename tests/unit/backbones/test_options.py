"""Options of mixers, rules and cells in words: each value is computed with, or refused in one sentence."""

import inspect

import pytest
import torch

from cl.backbones._spec import build_mixer, plugin, plugin_names
from cl.core import UserError

LAYERS = {
    "mixers": "{}",
    "memory_rules": "linear_memory(rule={})",
    "neural_rules": "neural_memory(rule={})",
    "rnn_cells": "nonlinear_rnn(cell={})",
    "scan_cells": "scan_rnn(cell={})",
}
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
            inner = "linear_memory, " if name in ("memory_cache", "mixture_of_memories") else ""
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
