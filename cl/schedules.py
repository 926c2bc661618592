"""Learning-rate schedules: pure functions of the step that return a factor of the optimizer's own rate.

Nothing is carried along, so a run resumes with one integer. Past their end all of them stay where they are: a cosine
that goes on, as torch's and transformers' do, would warm up again without being asked. In the first warm-up, step n of
N has the factor (n + 1) / N, so that no step is lost at rate 0. Phases are given as shares of the span (`..._frac`) or
in steps (`..._steps`), which then take the place of the shares.

Schedules with phases per experience take `starts`, the first step of each; the trainer fills it in.
"""

from __future__ import annotations

import inspect
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise, product

from torch.optim import Optimizer

from cl.core import UserError

Schedule = Callable[[int, int], float]
"""(step from 0, steps in the span) -> factor in [0, 1] of the optimizer's own rate."""

DECAYS = ("linear", "cosine", "exponential", "inverse_sqrt")


def set_learning_rate(optimizer: Optimizer, factor: float) -> float:
    """Scale every group's own rate, kept as `initial_lr`; returns the rate of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    rate: float = optimizer.param_groups[0]["lr"]
    return rate


def fitted(schedule: Schedule, steps: Sequence[int], span: str) -> Schedule:
    """The schedule for experiences of so many steps each, checked before anything is trained.

    Args:
        span: "run": one course over all experiences, and `starts` are theirs; "experience": one course over each.

    Raises:
        UserError: phases that do not fit, or a value outside its range.
    """
    parameters, is_run = inspect.signature(schedule).parameters, span == "run"
    given = parameters["starts"].default if "starts" in parameters else None
    is_list = isinstance(given, Sequence) and all(type(start) is int for start in given)
    if given is not None and not is_list:
        raise UserError(f"schedule.starts is {given!r}; it must be a list of integers, or null for those of the run")
    starts = given or (tuple(accumulate(steps[:-1], initial=0)) if is_run else (0,))
    if is_run and "starts" in parameters and given is None:
        keyed: Callable[..., float] = schedule
        schedule = partial(keyed, starts=starts)
    # phases of an experience are looked at when it is reached
    for total, start in product({sum(steps)} if is_run else set(steps), starts):
        schedule(start, total)
    return schedule


def constant(step: int, total: int, warmup_frac: float = 0.0, warmup_steps: int | None = None) -> float:
    """The base rate throughout, after an optional linear warm-up.

    Example:
        >>> [constant(step, 4, warmup_frac=0.5) for step in range(4)]
        [0.5, 1.0, 1.0, 1.0]
    """
    (warmup,) = _phases(total, warmup=(warmup_frac, warmup_steps))
    return _warmed(step, total, warmup)[0]


def linear(
    step: int, total: int, warmup_frac: float = 0.0, final: float = 0.0, warmup_steps: int | None = None
) -> float:
    """Straight line from 1 to `final`, which is reached at step `total`; clamped after.

    Example:
        >>> [linear(step, 4) for step in (0, 2, 4, 9)]
        [1.0, 0.5, 0.0, 0.0]
    """
    (warmup,) = _phases(total, warmup=(warmup_frac, warmup_steps))
    ramp, progress = _warmed(step, total, warmup)
    return ramp * _decayed("linear", progress, 1.0, _share("final", final))


def cosine(
    step: int, total: int, warmup_frac: float = 0.0, final: float = 0.0, warmup_steps: int | None = None
) -> float:
    """Half a cosine from 1 to `final`, clamped after its end (Loshchilov & Hutter, 2017, without restarts).

    Example:
        >>> [round(cosine(step, 4), 3) for step in (0, 2, 4, 9)]
        [1.0, 0.5, 0.0, 0.0]
    """
    (warmup,) = _phases(total, warmup=(warmup_frac, warmup_steps))
    ramp, progress = _warmed(step, total, warmup)
    return ramp * _decayed("cosine", progress, 1.0, _share("final", final))


def rewarmed_cosine(
    step: int,
    total: int,
    warmup_frac: float = 0.01,
    final: float = 0.1,
    rewarm: float = 1.0,
    warmup_steps: int | None = None,
    starts: Sequence[int] | None = None,
) -> float:
    """A cosine for every experience: re-warm to `rewarm` of the rate, then re-decay to `final`.

    Args:
        warmup_frac: share of each experience.
        rewarm: peak of every experience after the first, as a factor of the base rate.

    Source: Ibrahim et al., "Simple and Scalable Strategies to Continually Pre-train Large Language Models", 2024:
    warm-up over 1 %, final rate a tenth. Differences: a re-warm climbs from `final`, where the last decay ended; the
    paper's climbs from 0.

    Example:
        >>> [round(rewarmed_cosine(step, 8, 0.5, 0.0, starts=(0, 4)), 3) for step in range(8)]
        [0.5, 1.0, 1.0, 0.5, 0.5, 1.0, 1.0, 0.5]
    """
    final, rewarm = _share("final", final), _share("rewarm", rewarm)
    round_, local, length = _round(step, total, starts)
    (warmup,) = _phases(length, warmup=(warmup_frac, warmup_steps))
    peak = rewarm if round_ else 1.0
    if local < warmup:
        floor = min(final, peak) if round_ else 0.0
        return floor + (peak - floor) * (local + 1) / warmup
    return _decayed("cosine", _progress(local - warmup, length - warmup), peak, min(final, peak))


def infinite(
    step: int,
    total: int,
    warmup_frac: float = 0.01,
    cooldown_frac: float = 0.6,
    anneal_frac: float = 0.15,
    constant: float = 0.55,
    final: float = 0.1,
    cooldown: str = "cosine",
    timescale: float = 10.0,
    is_annealed_each: bool = False,
    warmup_steps: int | None = None,
    cooldown_steps: int | None = None,
    anneal_steps: int | None = None,
    starts: Sequence[int] | None = None,
) -> float:
    """Warm up, cool down to `constant`, stay there through every experience, anneal to `final` at the end.

    n steps after the warm-up, of N_c of cool-down:
    cosine: c + (1 - c) / 2 (1 + cos(pi n / N_c))
    inverse_sqrt: 1 + (c - 1) f(n / N_c) / f(1), f(t) = 1 / sqrt(1 + a t) - 1
    anneal, m of N_a steps: c (final / c)^(m / N_a)

    Args:
        warmup_frac, cooldown_frac: shares of the run; give steps in their place where its length is not known yet.
        anneal_frac: share of the run, or of each experience with `is_annealed_each`; 0 never anneals.
        constant, final: factors of the base rate.
        cooldown: shape, cosine or inverse_sqrt; `timescale` is the a of the latter.
        is_annealed_each: anneal at the end of every experience, the next one going on at `constant`.

    Source: Ibrahim et al., 2024, and Singh et al., "Beyond Cosine Decay", 2025; form and phases as in the branch
    infinite_lr of EleutherAI/gpt-neox. Their next domain starts from the weights before the anneal.

    Example:
        >>> course = dict(warmup_steps=2, cooldown_steps=4, anneal_steps=2, constant=0.5, final=0.125)
        >>> [round(infinite(step, 10, **course), 3) for step in (0, 1, 2, 4, 6, 8, 9, 10, 99)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.5, 0.25, 0.125, 0.125]
    """
    constant, final = _share("constant", constant), _share("final", final)
    if not 0 < final <= constant:
        raise UserError(f"schedule.final is {final!r}; it must be above 0 and at most schedule.constant={constant!r}")
    if cooldown not in ("cosine", "inverse_sqrt"):
        raise UserError(f"schedule.cooldown is {cooldown!r}; it must be cosine or inverse_sqrt")
    is_number = isinstance(timescale, int | float) and not isinstance(timescale, bool)
    if not is_number or not 0 < timescale < math.inf:
        raise UserError(f"schedule.timescale is {timescale!r}; it must be a finite number above 0")
    _, local, length = _round(step, total, starts) if is_annealed_each else (0, step, total)
    anneal = {"anneal": (anneal_frac, anneal_steps)}
    begin = {"warmup": (warmup_frac, warmup_steps), "cooldown": (cooldown_frac, cooldown_steps)}
    warmup, num_cooldown, *rest = _phases(total, **begin, **({} if is_annealed_each else anneal))
    (num_anneal,) = rest or _phases(length, **anneal)
    if step < warmup:
        rate = (step + 1) / warmup
    elif step < warmup + num_cooldown:
        rate = _decayed(cooldown, (step - warmup) / num_cooldown, 1.0, constant, timescale)
    else:
        rate = constant
    since = local - (length - num_anneal)
    return rate if num_anneal == 0 or since < 0 else _decayed("exponential", _progress(since, num_anneal), rate, final)


def warmup_stable_decay(
    step: int,
    total: int,
    warmup_frac: float = 0.01,
    decay_frac: float = 0.1,
    final: float = 0.0,
    decay: str = "linear",
    warmup_steps: int | None = None,
    decay_steps: int | None = None,
) -> float:
    """Warm up, stay, and decay at the end of the run to `final`.

    Args:
        decay: shape: linear, cosine, exponential (`final` above 0) or inverse_sqrt.

    Source: Hu et al., "MiniCPM", 2024: a decay over the last tenth.

    Example:
        >>> [round(warmup_stable_decay(step, 10, 0.2, 0.4), 2) for step in (0, 1, 5, 6, 8, 10, 30)]
        [0.5, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    """
    warmup, num_decay = _phases(total, warmup=(warmup_frac, warmup_steps), decay=(decay_frac, decay_steps))
    final = _share("final", final)
    if decay not in DECAYS:
        raise UserError(f"schedule.decay is {decay!r}; it must be one of {', '.join(DECAYS)}")
    if decay == "exponential" and final == 0:
        raise UserError("schedule.final is 0, which an exponential decay never reaches; it must be above 0")
    since = step - (total - num_decay)
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if since < 0 or num_decay == 0 else _decayed(decay, _progress(since, num_decay), 1.0, final)


def inverse_square_root(
    step: int,
    total: int,
    warmup_frac: float = 0.01,
    cooldown_frac: float = 0.0,
    final: float = 0.0,
    warmup_steps: int | None = None,
    cooldown_steps: int | None = None,
    starts: Sequence[int] | None = None,
) -> float:
    """(1 - final) sqrt(N_w / n) + final after N_w steps of warm-up, n counted through the whole run.

    Args:
        cooldown_frac: share at the end of each experience that falls linearly from there to `final`; the next
            experience goes on with the curve.

    Source: Zhai et al., "Scaling Vision Transformers", 2022; with a cool-down per round in TiC-LM (Li et al., 2025;
    apple/ml-tic-lm training/utils.py).

    Example:
        >>> [inverse_square_root(step, 100, warmup_steps=4) for step in (1, 3, 15, 63)]
        [0.5, 1.0, 0.5, 0.25]
    """
    (warmup,) = _phases(total, warmup=(warmup_frac, warmup_steps))
    final = _share("final", final)
    warmup = max(1, warmup)

    def curve(number: int) -> float:
        return number / warmup if number <= warmup else (1.0 - final) * math.sqrt(warmup / number) + final

    _, local, length = _round(step, total, starts)
    (cooldown,) = _phases(length, cooldown=(cooldown_frac, cooldown_steps))
    since = local - (length - cooldown)
    if cooldown == 0 or since < 0:
        return curve(min(step, total) + 1)
    return _decayed("linear", _progress(since, cooldown), curve(step - since + 1), final)


def autoregressive(
    step: int,
    total: int,
    warmup_frac: float = 0.01,
    final: float = 0.1,
    warmup_steps: int | None = None,
    starts: Sequence[int] | None = None,
) -> float:
    """A cosine for every experience, whose peak is where one long cosine over all steps so far would be.

    peak of round i, which starts at s_i and ends at e_i: cosine(s_i + w, span e_i); peaks of equal rounds fall as
    1, 1/2, 1/4, ... roughly, with no budget known in advance.

    Args:
        warmup_frac: share of each experience, w steps.

    Source: the "AR" meta-schedule of TiC-LM (Li et al., 2025; apple/ml-tic-lm training/utils.py).

    Example:
        >>> [round(autoregressive(step, 30, 0.0, 0.0, starts=(0, 10, 20)), 3) for step in (0, 5, 10, 15, 20)]
        [1.0, 0.5, 0.5, 0.25, 0.25]
    """
    final = _share("final", final)
    _, local, length = _round(step, total, starts)
    (warmup,) = _phases(length, warmup=(warmup_frac, warmup_steps))
    begin = step - local
    peak = _decayed("cosine", _progress(begin, begin + length - warmup), 1.0, final)
    if local < warmup:
        return peak * (local + 1) / warmup
    return _decayed("cosine", _progress(local - warmup, length - warmup), peak, final)


# phases


def _warmed(step: int, total: int, warmup: int) -> tuple[float, float]:
    """Factor of the linear warm-up, and progress in [0, 1] through what comes after it."""
    if step < warmup:
        return (step + 1) / warmup, 0.0
    return 1.0, _progress(step - warmup, total - warmup)


def _progress(done: int, length: int) -> float:
    return min(1.0, done / max(1, length))


def _decayed(shape: str, progress: float, high: float, low: float, timescale: float = 10.0) -> float:
    """From `high` to `low`, reached exactly at progress 1."""
    if progress >= 1:
        return low
    if shape == "exponential":
        return float(high * (low / high) ** progress)
    if shape == "cosine":
        fallen = 0.5 * (1.0 - math.cos(math.pi * progress))
    elif shape == "inverse_sqrt":
        fallen = (1 / math.sqrt(1 + timescale * progress) - 1) / (1 / math.sqrt(1 + timescale) - 1)
    else:
        fallen = progress
    return high + (low - high) * fallen


def _round(step: int, total: int, starts: Sequence[int] | None) -> tuple[int, int, int]:
    """Number of the experience that a step is in, the step within it, and its length."""
    starts = (0,) if starts is None else starts
    if list(starts[:1]) != [0] or any(b <= a for a, b in pairwise(starts)) or starts[-1] >= max(1, total):
        raise UserError(f"schedule.starts is {list(starts)}; it must rise from 0 and stay below the {total} steps")
    number = bisect_right(starts, step) - 1
    end = starts[number + 1] if number + 1 < len(starts) else total
    return number, step - starts[number], end - starts[number]


def _phases(total: int, **phases: tuple[float, int | None]) -> tuple[int, ...]:
    """Steps of each phase from (share, steps or None).

    Of shares their sums are rounded, so that phases which fill the span fit it.

    Raises:
        UserError: a value outside its range, or phases longer than the span.
    """
    found, shares = {}, 0.0
    for name, (share, steps) in phases.items():
        if steps is None:
            before, shares = shares, shares + _share(f"{name}_frac", share)
            found[name] = round(shares * total) - round(before * total)
        elif isinstance(steps, int) and not isinstance(steps, bool) and steps >= 0:
            found[name] = steps
        else:
            raise UserError(f"schedule.{name}_steps is {steps!r}; it must be an integer of at least 0, or null")
    if sum(found.values()) > total:
        listed = " and ".join(f"{count} of {name}" for name, count in found.items())
        raise UserError(
            f"the schedule has {listed}, more steps than the {total} it is for; shorten a phase or train longer"
        )
    return tuple(found.values())


def _share(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f"schedule.{name} is {value!r}; it must be a number from 0 to 1")
    return value
