"""Every op in every form, one table: what the families of tests run over."""

import pytest
from attention_cases import ATTENTION_CASES
from kernel_properties import CASES, OpCase
from memory_cases import MEMORY_CASES
from rnn_cases import RNN_CASES

ALL = {**CASES, **MEMORY_CASES, **RNN_CASES, **ATTENTION_CASES}


def each(cases: dict[str, OpCase] | list[OpCase]) -> pytest.MarkDecorator:
    """Parametrise a test by `case`."""
    listed = list(cases.values()) if isinstance(cases, dict) else cases
    return pytest.mark.parametrize("case", listed, ids=[case.name for case in listed])
