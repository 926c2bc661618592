"""Which tests of the shipped contracts are slow here; the suites know no marks, so that anyone may use them."""

import pytest

SLOW = (
    "test_resumes_exactly_among_others",
    "test_through_the_avalanche_adapter_the_weights_match",
    "test_works_under_bfloat16",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.name.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
