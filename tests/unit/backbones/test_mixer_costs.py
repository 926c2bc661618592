"""Weights, operations and bytes of state of the mixers, against the formulas of their docstrings."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cl.backbones._spec import build_mixer
from cl.state import tensor_bytes

OPTIONS = [{}, {"conv": 0, "gate": False}, {"key_width": 4, "value_width": 6}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_weights_operations_and_bytes_are_the_formulas(options):
    """D (2 H K + 3 H V) multiply-adds a token, weights alike, and a state that no text makes larger."""
    width, heads, rows, length = 32, 4, 2, 40
    words = ", ".join(f"{name}={str(value).lower()}" for name, value in options.items())
    layer = build_mixer(f"linear_memory(rule=linear(normaliser=false), {words})", width, num_heads=heads)
    k, v = options.get("key_width", 8), options.get("value_width", 8)
    conv, gates = options.get("conv", 4), 3 if options.get("gate", True) else 2
    products = width * (2 * heads * k + gates * heads * v)
    channels = heads * (2 * k + v)
    assert sum(p.numel() for p in layer.parameters()) == products + conv * channels + v
    x = torch.randn(rows, length, width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for projection in (layer.query, layer.key, layer.value, layer.gate, layer.out):
            if projection is not None:
                projection(torch.randn(rows, length, projection.in_features))
    assert counter.get_total_flops() == 2 * products * rows * length
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _, state = layer(x)
    seen = counter.get_flop_counts()["Global"]
    assert sum(n for op, n in seen.items() if "mm" in str(op)) >= 2 * products * rows * length
    numbers = heads * k * v + max(0, conv - 1) * channels
    assert tensor_bytes({name: state[name] for name in ("memory", "tail")}) == 4 * rows * numbers


def test_ridge_weights_and_bytes_are_the_formulas():
    width, heads, head = 32, 4, 8
    layer = build_mixer("ridge_memory(mix=false, forget=false)", width, num_heads=heads)
    weights = 5 * width * heads * head + 4 * 3 * heads * head + width * heads + head
    assert sum(p.numel() for p in layer.parameters()) == weights
    _, state = layer(torch.randn(2, 40, width))
    assert tensor_bytes(state) == 4 * 2 * (2 * heads * head**2 + 3 * 3 * heads * head)


def test_attention_operations_are_the_formula():
    """2 D^2 (1 + G / H) for the projections and 2 S D for scores and sums; a window sees 2 W keys."""
    width, heads, groups, length = 32, 4, 2, 64
    for words, seen in (("attention(num_kv_heads=2)", length), ("attention(num_kv_heads=2, window=8)", 16)):
        layer = build_mixer(words, width, num_heads=heads)
        # as two matrix products, since the fused operation of the processor is not counted
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            layer(torch.randn(1, length, width))
        operations = 2 * length * (2 * width**2 * (1 + groups / heads) + 2 * seen * width)
        assert counter.get_total_flops() == pytest.approx(operations)


def test_a_window_bounds_the_state():
    layer, state = build_mixer("attention(window=8)", 32, num_heads=4), None
    for _ in range(5):
        _, state = layer(torch.randn(1, 20, 32), state)
    assert state["key"].shape[2] == 7
    assert int(state["position"]) == 100


@pytest.mark.parametrize("words", ["attention(window=8)", "linear_memory", "linear_memory(rule=mlstm)", "ridge_memory"])
def test_no_text_makes_the_state_larger(words):
    layer = build_mixer(words, 32, num_heads=4)
    with torch.no_grad():
        _, state = layer(torch.randn(1, 16, 32))
        early = tensor_bytes(state)
        _, state = layer(torch.randn(1, 2000, 32), state)
    assert tensor_bytes(state) == early
    _, state = build_mixer("attention", 32, num_heads=4)(torch.randn(1, 16, 32))
    assert tensor_bytes(state["key"], state["value"]) == 4 * 2 * 16 * 32, "attention keeps every key and value"
