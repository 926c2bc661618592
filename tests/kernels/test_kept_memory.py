"""What the backward keeps, and the most that forward and backward hold at once."""

import kernel_properties as props
import pytest
import torch
from all_cases import each
from kernel_properties import CASES
from rnn_cases import RNN_CASES


def kept_numbers(case):
    """Elements kept for the backward beside the inputs."""
    inputs = {n: x.float().requires_grad_() for n, x in props.draw(case, 256).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        case.op(**inputs, backend="chunked", chunk=32)
    own = {x.untyped_storage().data_ptr() for x in inputs.values()}
    return inputs, sum(x.numel() for x in kept if x.untyped_storage().data_ptr() not in own)


@each([case for case in CASES.values() if not case.is_scan])
def test_matrix_states_keep_a_state_per_chunk(case):
    assert kept_numbers(case)[1] <= 2 * 8 * 2 * 5 * 7


@each(RNN_CASES)
def test_nonlinear_recurrences_keep_twice_their_inputs(case):
    """(The M2RNN: a state per chunk.)"""
    inputs, extra = kept_numbers(case)
    assert extra <= (8 * inputs["initial_state"].numel() if case.name == "m2rnn" else 2 * inputs["x"].numel())


@pytest.mark.slow
@pytest.mark.parametrize(
    "problem",
    ["linear_scan", "gla_scalar", "gla_channel", "deltanet", "gated_deltanet", "kda", "newton_gru", "newton_lstm"],
)
def test_peak_memory_of_forward_and_backward(problem):
    """Outputs, chunk states, gradients and all scratch together: at most twice the inputs plus the chunk states."""
    from kernels.bench.measure import passes, peak_bytes
    from kernels.bench.shapes import PROBLEMS

    shape = (4, 2048, 4, 64)
    inputs = PROBLEMS[problem].draw(shape, torch.float32, torch.device("cpu"))
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    call = passes(PROBLEMS[problem].op, [leaves], torch.ones_like(PROBLEMS[problem].op(**leaves)[0]), True)
    assert peak_bytes(call) <= 2 * PROBLEMS[problem].allowance(inputs, shape)
