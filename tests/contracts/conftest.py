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


# of the two ways to run on a pretended card, of which the second does all that the first does, CI takes one in each
# setting of a strategy, and both if there is only one
PLAIN, SCALED = "test_runs_on_a_card", "test_loss_scaling_changes_nothing"


def pytest_collection_modifyitems(items):
    for item in items:
        promise, subject = getattr(item, "originalname", None), getattr(item.cls, "strategy", item.cls)
        if item.name.startswith(SLOW) or (promise in ONCE and is_elsewhere(item, subject)):
            item.add_marker(pytest.mark.slow)
        is_one_of_two = promise in (PLAIN, SCALED) and hasattr(item.cls, "strategy") and len(subject.settings) > 1
        if is_one_of_two and is_elsewhere(item, subject) != (promise == PLAIN):
            item.add_marker(pytest.mark.grid)


def is_elsewhere(item, subject):
    """Whether the strategy or backbone shows this promise in another setting already."""
    if not hasattr(subject, "settings"):
        return False
    settings = sorted(subject.settings)
    return item.callspec.params["setting"] != settings[crc32(subject.__name__.encode()) % len(settings)]
