"""Which tests of the shipped contracts are slow here; the suites know no marks, so that anyone may use them."""

from zlib import crc32

import pytest

SLOW = (
    "test_resumes_exactly_among_others",
    "test_through_the_avalanche_adapter_the_weights_match",
    "test_works_under_half_precision",
    "test_loss_scaling_changes_nothing",
    "test_runs_on_a_card",
    "test_forgets_less_than_naive",
)
# a run of its own for every setting: one of a strategy's settings, not the same for all, is enough for the fast tests
ONCE = (
    "test_same_seed_same_run",
    "test_resumes_exactly",
    "test_penalty_may_be_asked_twice",
    "test_a_step_is_the_same_however_it_is_cut",
    "test_leaves_modes_hooks_and_requires_grad_as_found",
    "test_first_step_is_naive",
    "test_runs_under_half_precision",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.name.startswith(SLOW) or is_elsewhere(item):
            item.add_marker(pytest.mark.slow)


def is_elsewhere(item):
    """Whether the strategy or backbone shows this promise in another setting already."""
    subject = getattr(item.cls, "strategy", item.cls)
    if getattr(item, "originalname", None) not in ONCE or not hasattr(subject, "settings"):
        return False
    settings = sorted(subject.settings)
    return item.callspec.params["setting"] != settings[crc32(subject.__name__.encode()) % len(settings)]
