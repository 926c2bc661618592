"""Learning-rate factors against their formulas, written out again here; numbers by hand are in the doctests."""

from functools import partial
from math import cos, inf, pi, sqrt

import pytest
import torch

from cl.config import TrainerConfig
from cl.core import Setting, UserError
from cl.observe import Observer
from cl.schedules import (
    autoregressive,
    constant,
    cosine,
    fitted,
    infinite,
    inverse_square_root,
    linear,
    rewarmed_cosine,
    warmup_stable_decay,
)
from cl.setup import Span
from cl.testing import configs
from cl.testing.toy import ToyNet, toy_stream
from cl.trainer import Trainer
from strategies.naive import Naive

EVERY = [
    constant,
    linear,
    cosine,
    rewarmed_cosine,
    infinite,
    warmup_stable_decay,
    inverse_square_root,
    autoregressive,
]
RISING = [constant, linear, cosine, warmup_stable_decay]


def named(schedule):
    return schedule.__name__


def test_every_schedule_has_a_config_and_is_tested_here():
    assert {config.node["_target_"].rpartition(".")[2] for config in configs("schedule")} == set(map(named, EVERY))


@pytest.mark.parametrize("schedule", EVERY, ids=named)
@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup_frac", [0.0, 0.1, 0.2])
def test_factors_stay_in_the_unit_interval(schedule, total, warmup_frac):
    for step in range(total + 30):
        assert 0.0 <= schedule(step, total, warmup_frac=warmup_frac) <= 1.0


@pytest.mark.parametrize("schedule", EVERY, ids=named)
@pytest.mark.parametrize("starts", [None, (0, 40), (0, 20, 70)])
def test_nothing_rises_again_after_the_end(schedule, starts):
    """torch's and transformers' cosines climb back to 1 in a run that is longer than planned."""
    arguments = {} if starts is None or schedule in RISING else {"starts": starts}
    after = [schedule(step, 100, **arguments) for step in range(100, 260)]
    assert after == sorted(after, reverse=True)
    assert max(after) <= schedule(99, 100, **arguments) + 1e-12


@pytest.mark.parametrize("schedule", RISING, ids=named)
def test_warmup_rises_to_one_and_no_step_is_lost_at_rate_zero(schedule):
    ramp = [schedule(step, 20, warmup_frac=0.25) for step in range(5)]
    assert ramp == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert schedule(5, 20, warmup_frac=0.25) == pytest.approx(1.0)


@pytest.mark.parametrize("schedule", EVERY, ids=named)
def test_warmup_in_steps_is_warmup_in_shares(schedule):
    for step in range(40):
        assert schedule(step, 40, warmup_steps=8) == schedule(step, 40, warmup_frac=0.2)


@pytest.mark.parametrize("schedule", [linear, cosine])
def test_ends_at_the_final_factor_and_stays_there(schedule):
    assert schedule(0, 10, final=0.1) == 1.0
    assert schedule(10, 10, final=0.1) == pytest.approx(0.1)
    assert schedule(50, 10, final=0.1) == pytest.approx(0.1)


def test_after_a_warm_up_the_rest_of_the_span_is_the_decay():
    """Two of ten steps rise; the line and the half cosine then take the other eight, and no more."""
    course = {"warmup_steps": 2, "final": 0.2}
    straight = [linear(n, 10, **course) for n in range(1, 12)]
    assert straight == pytest.approx([1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2])
    curved = [cosine(n, 10, **course) for n in (2, 4, 6, 8, 10)]
    assert curved == pytest.approx([0.2 + 0.4 * (1 + cos(pi * n / 8)) for n in (0, 2, 4, 6, 8)])


DEFAULTS = {
    constant: {"warmup_frac": 0.0},
    linear: {"warmup_frac": 0.0, "final": 0.0},
    cosine: {"warmup_frac": 0.0, "final": 0.0},
    rewarmed_cosine: {"warmup_frac": 0.01, "final": 0.1, "rewarm": 1.0},
    infinite: {"warmup_frac": 0.01, "cooldown_frac": 0.6, "anneal_frac": 0.15, "constant": 0.55, "final": 0.1},
    warmup_stable_decay: {"warmup_frac": 0.01, "decay_frac": 0.1, "final": 0.0},
    inverse_square_root: {"warmup_frac": 0.01, "cooldown_frac": 0.0, "final": 0.0},
    autoregressive: {"warmup_frac": 0.01, "final": 0.1},
}


@pytest.mark.parametrize("schedule", EVERY, ids=named)
def test_defaults_are_those_of_the_sources(schedule):
    """Warm-up over 1 %, a final rate of a tenth, a decay over the last tenth: what their pages say, given by hand."""
    course = [schedule(n, 300) for n in range(310)]
    assert course == [schedule(n, 300, **DEFAULTS[schedule]) for n in range(310)]


def test_cosine_is_slow_at_both_ends():
    values = [cosine(step, 4) for step in range(5)]
    assert values == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466, 0.0])


def test_rewarmed_cosine_is_a_cosine_per_experience():
    course = partial(rewarmed_cosine, total=300, warmup_frac=0.1, final=0.1, rewarm=0.5, starts=(0, 100))
    for n in (10, 37, 99):
        assert course(n) == pytest.approx(0.1 + 0.45 * (1 + cos(pi * (n - 10) / 90)))
    for n in (120, 200, 299, 300):
        assert course(n) == pytest.approx(0.1 + 0.2 * (1 + cos(pi * (n - 120) / 180)))
    # the re-warm climbs from where the decay ended
    assert [course(n) for n in (100, 109, 119)] == pytest.approx([0.1 + 0.4 / 20, 0.1 + 0.4 / 2, 0.5])
    assert course(0) == pytest.approx(0.1)


def test_infinite_at_the_points_of_the_official_form():
    """gpt-neox, branch infinite_lr: warm-up, cool-down, constant, anneal with eta_c (eta_min / eta_c)^(m / N_a)."""
    course = partial(
        infinite, total=1000, warmup_frac=0.1, cooldown_frac=0.4, anneal_frac=0.2, constant=0.5, final=0.05
    )
    assert course(49) == pytest.approx(0.5)
    for k in (0, 100, 399):
        assert course(100 + k) == pytest.approx(0.5 + 0.25 * (1 + cos(pi * k / 400)))
    assert {course(n) for n in (500, 650, 800)} == {0.5}
    for m in (1, 77, 199):
        assert course(800 + m) == pytest.approx(0.5 * 0.1 ** (m / 200))
    assert course(1000) == course(5000) == 0.05
    values = [course(n) for n in range(99, 1100)]
    assert values == sorted(values, reverse=True), "it rises after the warm-up"


def test_infinite_with_the_inverse_square_root():
    course = partial(
        infinite, total=1000, warmup_frac=0, cooldown_frac=0.5, constant=0.4, cooldown="inverse_sqrt", timescale=3.0
    )
    for k in (0, 125, 499):
        f = 1 / sqrt(1 + 3 * k / 500) - 1
        assert course(k) == pytest.approx(1 + (0.4 - 1) / (1 / sqrt(4) - 1) * f)
    assert course(500) == 0.4


def test_infinite_without_a_cooldown_falls_to_the_constant_at_once():
    course = partial(infinite, total=10, warmup_steps=2, cooldown_frac=0.0, anneal_steps=2, constant=0.5, final=0.5)
    assert [course(n) for n in range(11)] == pytest.approx([0.5, 1.0, *[0.5] * 9])
    # sums of shares are rounded: after 0.3 of five steps come 0.3 more, from step round(1.5) = 2 to 3: one step
    shares = partial(infinite, warmup_frac=0.1, cooldown_frac=0.2, anneal_frac=0.3, constant=0.5, final=0.1)
    assert [shares(n, 5) for n in (3, 4)] == pytest.approx([0.5, 0.5])


def test_infinite_does_not_look_at_experiences_unless_each_is_annealed():
    steps = {"warmup_steps": 5, "cooldown_steps": 10}
    plain = partial(infinite, total=100, anneal_steps=10, **steps)
    assert [plain(n, starts=(0, 50)) for n in range(100)] == [plain(n) for n in range(100)]
    each = partial(infinite, total=100, anneal_frac=0.2, is_annealed_each=True, starts=(0, 50), **steps)
    assert each(40) == each(50) == each(89) == 0.55
    assert each(45) == each(95) == pytest.approx(0.55 * (0.1 / 0.55) ** 0.5)


def test_warmup_stable_decay_matches_transformers():
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    for shape in ("linear", "cosine"):
        theirs = transformers.get_wsd_schedule(
            optimizer, num_warmup_steps=10, num_stable_steps=60, num_decay_steps=30, decay_type=shape, min_lr_ratio=0.1
        ).lr_lambdas[0]
        course = partial(warmup_stable_decay, total=100, warmup_frac=0.1, decay_frac=0.3, final=0.1, decay=shape)
        # warm-ups differ: theirs climbs from the final rate
        assert [course(n) for n in range(10, 101)] == pytest.approx([theirs(n) for n in range(10, 101)])


def test_the_other_shapes_of_a_stable_run_at_its_end():
    course = partial(warmup_stable_decay, total=10, warmup_steps=1, decay_steps=4, final=0.25)
    assert [course(n, decay="exponential") for n in range(5, 11)] == pytest.approx(
        [1, *(4 ** (-n / 4) for n in range(5))]
    )
    fallen = [(1 / sqrt(1 + 10 * n / 4) - 1) / (1 / sqrt(11) - 1) for n in range(5)]
    found = [course(n, decay="inverse_sqrt") for n in range(5, 11)]
    assert found == pytest.approx([1, *(1 - 0.75 * f for f in fallen)])


def test_inverse_square_root_stays_where_the_run_ends():
    """Step n is number n + 1; from step 100 on it is number 101, and after a cool-down of one step `final`."""
    assert [inverse_square_root(n, 100, warmup_steps=4) for n in (99, 100, 101, 300)] == pytest.approx(
        [sqrt(4 / 100), *[sqrt(4 / 101)] * 3]
    )
    cooled = partial(inverse_square_root, total=100, warmup_steps=4, cooldown_steps=1, final=0.05)
    assert [cooled(n) for n in (99, 100, 300)] == pytest.approx([0.95 * sqrt(4 / 100) + 0.05, 0.05, 0.05])


def test_inverse_square_root_at_the_points_of_the_card():
    """transformers, timescale = warm-up [measured]: 1.0 at 10, 0.5 at 40, 0.25 at 160; our step n is number n + 1."""
    course = partial(inverse_square_root, total=1000, warmup_steps=10)
    assert [course(n - 1) for n in (10, 40, 160)] == pytest.approx([1.0, 0.5, 0.25])


@pytest.mark.parametrize("warmup", [{"warmup_steps": 0}, {"warmup_frac": 0.0}, {"warmup_steps": 1}])
def test_inverse_square_root_without_a_warm_up_is_the_bare_curve(warmup):
    assert [inverse_square_root(n, 100, **warmup) for n in range(4)] == pytest.approx([1, 2**-0.5, 3**-0.5, 0.5])


def test_inverse_square_root_cools_down_in_every_round_and_goes_on_with_the_curve():
    course = partial(inverse_square_root, total=200, warmup_steps=4, cooldown_steps=20, final=0.05, starts=(0, 100))
    curve = lambda n: 0.95 * sqrt(4 / n) + 0.05  # noqa: E731
    assert course(79) == pytest.approx(curve(80))
    assert course(90) == pytest.approx(0.5 * (curve(81) + 0.05))
    assert course(100) == pytest.approx(curve(101))
    assert course(200) == 0.05


def test_autoregressive_peaks_lie_on_one_cosine_over_all_steps_so_far():
    """TiC-LM: round i of S steps peaks at the value, at step iS + w, of one cosine that spans (i + 1)S steps."""
    total, warmup = 50, 5
    starts = tuple(range(0, 4 * total, total))
    for i in range(4):
        span = (i + 1) * total
        peak = 0.55 + 0.45 * cos(pi * (i * total + warmup - warmup) / (span - warmup))
        course = partial(autoregressive, total=4 * total, warmup_frac=0.1, final=0.1, starts=starts)
        assert course(i * total + warmup - 1) == pytest.approx(peak)
        assert course(i * total + warmup) == pytest.approx(peak)
        middle = i * total + warmup + 15
        assert course(middle) == pytest.approx(0.1 + (peak - 0.1) / 2 * (1 + cos(pi * 15 / 45)))


def test_phases_that_fill_the_span_fit_whatever_its_length():
    """Each was once rounded by itself: 45 + 338 + 68 steps of 450, and 4 + 4 of 7, were refused."""
    halves = [warmup_stable_decay(n, 7, 0.5, 0.5) for n in range(8)]
    assert halves == pytest.approx([1 / 4, 1 / 2, 3 / 4, 1, 1, 2 / 3, 1 / 3, 0])
    phases = {"warmup_frac": 0.1, "cooldown_frac": 0.75, "anneal_frac": 0.15}
    course = [infinite(n, 450, **phases, constant=0.5, final=0.1) for n in range(451)]
    assert course[44] == course[45] == 1.0
    assert course[45 + 100] == pytest.approx(0.5 + 0.25 * (1 + cos(pi * 100 / 337)))
    assert course[381] > course[382] == 0.5
    assert course[382 + 17] == pytest.approx(0.5 * 0.2 ** (17 / 68))
    assert course[450] == 0.1
    for total in range(1, 100):
        assert infinite(0, total, **phases) <= 1
        assert warmup_stable_decay(total, total, 0.3, 0.7) in (0.0, 1.0)


@pytest.mark.parametrize(
    ("schedule", "arguments", "words"),
    [
        (infinite, {"warmup_steps": 60, "cooldown_steps": 50}, "60 of warmup and 50 of cooldown"),
        (infinite, {"constant": 0.1, "final": 0.5}, "schedule.final is 0.5"),
        (infinite, {"cooldown": "linear"}, "cosine or inverse_sqrt"),
        (warmup_stable_decay, {"warmup_frac": 0.6, "decay_frac": 0.6}, "more steps than the 100"),
        (warmup_stable_decay, {"decay": "none"}, "one of linear"),
        (warmup_stable_decay, {"decay": "exponential"}, "must be above 0"),
        (rewarmed_cosine, {"warmup_steps": 30, "starts": (0, 80)}, "30 of warmup"),
        (rewarmed_cosine, {"rewarm": 2.0}, "from 0 to 1"),
        (cosine, {"warmup_frac": -0.1}, "schedule.warmup_frac is -0.1"),
        (cosine, {"warmup_steps": 1.5}, "schedule.warmup_steps is 1.5"),
        (autoregressive, {"starts": (0, 200)}, "schedule.starts"),
        (autoregressive, {"starts": ()}, "schedule.starts is []"),
        (autoregressive, {"starts": (0, 100)}, "stay below the 100 steps"),
        (autoregressive, {"starts": (0, 60, 60)}, "must rise from 0"),
        (autoregressive, {"starts": (0, 60, 40)}, "must rise from 0"),
        (infinite, {"final": 0}, "schedule.final is 0; it must be above 0"),
        (infinite, {"warmup_steps": 50, "cooldown_steps": 40, "anneal_steps": 20}, "and 20 of anneal, more steps than"),
        (infinite, {"timescale": 0}, "schedule.timescale is 0"),
        (infinite, {"timescale": True}, "schedule.timescale is True"),
        (infinite, {"timescale": "x"}, "schedule.timescale is 'x'; it must be a finite number above 0"),
        (infinite, {"timescale": inf, "cooldown": "inverse_sqrt"}, "schedule.timescale is inf"),
        (inverse_square_root, {"cooldown_frac": 3}, "schedule.cooldown_frac is 3"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_phases_are_one_sentence(schedule, arguments, words):
    with pytest.raises(UserError) as error:
        [schedule(step, 100, **arguments) for step in range(100)]
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("starts", [5, "ab", [0, 1.5]])
def test_starts_that_are_no_steps_are_one_sentence(starts):
    with pytest.raises(UserError, match=r"schedule\.starts is .*; it must be a list of integers, or null"):
        fitted(partial(infinite, starts=starts), [10, 30], "run")


def test_fitted_fills_in_the_starts_of_the_experiences():
    course = fitted(partial(rewarmed_cosine, final=0.0, warmup_frac=0.0), [10, 30], "run")
    assert course(10, 40) == 1.0
    assert course(25, 40) == pytest.approx(0.5)
    own = fitted(partial(rewarmed_cosine, final=0.0, warmup_frac=0.0, starts=(0, 20)), [10, 30], "run")
    assert own(20, 40) == 1.0, "starts given by the user stay"
    assert fitted(cosine, [10, 30], "experience") is cosine


def test_a_longer_experience_waits_for_the_next_one():
    """`cl extend` in the first of two experiences once re-warmed in the midst of it, and left the second at rate 0."""
    span = Span([30, 30], TrainerConfig(schedule_steps=[20, 20]))
    places = [span.at(k, step) for k in (0, 1) for step in range(30)]
    falling = fitted(linear, span.steps, "run")
    wanted = [*range(20), *[19] * 10, *range(20, 50)]
    assert [falling(*place) for place in places] == pytest.approx([max(0, 1 - n / 40) for n in wanted])
    rounds = fitted(partial(rewarmed_cosine, warmup_frac=0.0, final=0.1), span.steps, "run")
    one = [0.1 + 0.45 * (1 + cos(pi * n / 20)) for n in range(20)]
    assert [rounds(*place) for place in places] == pytest.approx([*one, *[one[-1]] * 10, *one, *[0.1] * 10])
    rest = Span([30, 30], TrainerConfig(schedule_start=40))
    assert [rest.at(1, step) for step in (10, 29)] == [(0, 20), (19, 20)]


def trainer(schedule, **config):
    return Trainer(
        toy_stream(Setting.CONTINUAL_PRETRAINING),
        ToyNet,
        [Naive()],
        optimizer=partial(torch.optim.SGD, lr=0.5),
        schedule=schedule,
        config=TrainerConfig(batch_size=16, device="cpu", **config),
    )


def test_trainer_follows_the_schedule():
    run = trainer(partial(rewarmed_cosine, warmup_steps=2), max_steps=6)
    rates = []

    class Rates(Observer):
        def on_step(self, state, losses, lr):
            rates.append(lr)

    run.ledger.observers.append(Rates())
    run.run()
    wanted = [0.5 * rewarmed_cosine(n, 18, warmup_steps=2, starts=(0, 6, 12)) for n in range(18)]
    assert rates == pytest.approx(wanted)
    assert max(rates[12:]) == pytest.approx(0.5)


def test_trainer_refuses_a_schedule_that_does_not_fit_before_it_trains():
    with pytest.raises(UserError, match="more steps than the 18"):
        trainer(partial(infinite, warmup_steps=15, cooldown_steps=10), max_steps=6)
    with pytest.raises(UserError, match="more steps than the 6"):
        trainer(partial(cosine, warmup_steps=15), max_steps=6, schedule_span="experience")


@pytest.mark.parametrize(
    "schedule",
    [
        partial(rewarmed_cosine, warmup_steps=5),
        partial(autoregressive, warmup_steps=5),
        partial(inverse_square_root, cooldown_steps=5),
        partial(infinite, is_annealed_each=True, anneal_steps=5),
    ],
)
def test_phases_of_a_short_later_experience_are_refused_before_it_trains(schedule):
    """It once trained on the experiences before it, and failed there."""
    with pytest.raises(UserError, match="more steps than the 4"):
        trainer(schedule, max_steps=[6, 6, 4])
    with pytest.raises(UserError, match="more steps than the 3"):
        trainer(partial(schedule, starts=(0, 15)), max_steps=6)
