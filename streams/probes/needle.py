"""A needle in a haystack of segments: one fact, read some segments ago, asked at the very end.

    inputs   . . . ! k v . . . | . . . ! k' v' . . | . . . . ? k        target at the last token: v

The needle and some needles with other keys lie between drawn tokens. In experience d the one that is asked for lies d
segments before the question, so that a network that reads segment by segment has to carry it over d borders; training
goes from near to far, and a row is as long in every experience.

Source: own design, in the spirit of passkey retrieval (Mohtashami & Jaggi, 2023) and of the curriculum over segments in
    the Recurrent Memory Transformer (Bulatov et al., 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Generator, Tensor

from cl.core import IGNORED, Setting, Stream, UserError
from streams._settings import require_integer
from streams.probes._sequences import Part, probe, require_integers, without_replacement

NEEDLE, QUESTION = 0, 1


def needle(
    segment: int = 32,
    segments: int = 4,
    test_segments: Sequence[int] = (8,),
    distractors: int = 2,
    keys: int = 16,
    fillers: int = 32,
    train_rows: int = 5000,
    eval_rows: int = 500,
    seed: int = 0,
) -> Stream:
    """Build the stream.

    Args:
        segment: tokens of a segment.
        segments: of a row in training; as many experiences, from the needle in the last one to that in the first.
        test_segments: longer rows to measure on, with the needle in their first segment.
        distractors: needles with other keys, in any segment.
        keys: to choose from; there are as many values.
        fillers: different tokens between.
        train_rows, eval_rows: of every experience, and of every domain.

    Raises:
        UserError: a value outside its range, or needles that do not fit.
    """
    require_integer("stream.segment", segment, smallest=8)
    require_integer("stream.segments", segments)
    further = require_integers("test_segments", test_segments, smallest=2) if test_segments else []
    require_integer("stream.distractors", distractors, smallest=0)
    for name, value in (("keys", keys), ("fillers", fillers)):
        require_integer(f"stream.{name}", value)
    for name, value in (("train_rows", train_rows), ("eval_rows", eval_rows)):
        require_integer(f"stream.{name}", value, smallest=4)
    if distractors >= keys:
        raise UserError(f"stream.distractors is {distractors}; it must be below stream.keys={keys}")
    fewest = min([segments, *further])
    if distractors >= num_slots(segment, fewest):
        raise UserError(
            f"stream.distractors is {distractors}; it must be below the {num_slots(segment, fewest)} needles that "
            f"{fewest} segments of {segment} tokens hold"
        )

    def part(count: int, distance: int, num_rows: int) -> Part:
        law = partial(haystack, segment, count, distance, distractors, keys, fillers)
        return Part(f"{distance} of {count} segments back", law, num_rows)

    train = [part(segments, distance, train_rows) for distance in range(segments)]
    test = [part(segments, distance, eval_rows) for distance in range(segments)]
    test += [part(count, count - 1, eval_rows) for count in further if count != segments]
    return probe("needle", Setting.CONTINUAL_PRETRAINING, 2 + 2 * keys + fillers, train, test, seed)


def num_slots(segment: int, segments: int) -> int:
    """Needles that fit: whole slots of three tokens, counted from the start of each segment; the question is last.

    Example:
        >>> num_slots(8, 2), num_slots(9, 2)
        (4, 5)
    """
    return (segments - 1) * (segment // 3) + (segment - 2) // 3


def haystack(
    segment: int,
    segments: int,
    distance: int,
    distractors: int,
    keys: int,
    fillers: int,
    num_rows: int,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """Rows of `segment * segments` tokens: keys are tokens 2 to 1 + keys, values follow, then fillers."""
    length = segment * segments
    inputs = torch.randint(2 + 2 * keys, 2 + 2 * keys + fillers, (num_rows, length), generator=generator)
    chosen = 2 + without_replacement(num_rows, keys, 1 + distractors, generator)
    values = 2 + keys + torch.randint(keys, (num_rows, 1 + distractors), generator=generator)
    per_segment = segment // 3
    own = segments - 1 - distance
    free = per_segment if own < segments - 1 else (segment - 2) // 3
    slot = own * per_segment + torch.randint(free, (num_rows, 1), generator=generator)
    draws = torch.rand(num_rows, num_slots(segment, segments), generator=generator)
    others = draws.scatter(1, slot, -1.0).topk(distractors, 1).indices
    slots = torch.cat((slot, others), 1)
    places = slots // per_segment * segment + slots % per_segment * 3
    inputs.scatter_(1, places, NEEDLE).scatter_(1, places + 1, chosen).scatter_(1, places + 2, values)
    inputs[:, -2], inputs[:, -1] = QUESTION, chosen[:, 0]
    targets = torch.full((num_rows, length), IGNORED)
    targets[:, -1] = values[:, 0]
    return inputs, targets
