"""Rows on their way: batches, their parts, data sets, streams."""

import pytest
import torch

from cl.core import (
    Batch,
    EvalSet,
    Experience,
    Part,
    Setting,
    Source,
    Stream,
    StreamInfo,
    TensorData,
    UserError,
    shuffled,
)


def batch(first, count, task_id=None):
    ids = torch.arange(first, first + count)
    tasks = None if task_id is None else torch.full((count,), task_id)
    return Batch(ids.float().unsqueeze(1), ids % 3, torch.zeros_like(ids), ids, tasks, ids.to(torch.uint8).unsqueeze(1))


def test_a_fresh_batch_is_one_current_part():
    rows = batch(0, 4)
    assert rows.parts == (Part(0, 4),)
    assert (rows.num_current, len(rows)) == (4, 4)
    assert rows.current() is rows


def test_extending_keeps_the_origin_of_every_row():
    mixed = batch(0, 4).extended(batch(10, 2), Source.REPLAY, "a", 0.5).extended(batch(20, 3), Source.ANCHOR, "b")
    assert mixed.sample_ids.tolist() == [0, 1, 2, 3, 10, 11, 20, 21, 22]
    assert mixed.parts == (
        Part(0, 4),
        Part(4, 6, Source.REPLAY, "a", 0.5),
        Part(6, 9, Source.ANCHOR, "b"),
    )
    assert [part.start for part in mixed.parts_of("b")] == [6]
    assert mixed.num_current == 4
    assert mixed.current().sample_ids.tolist() == [0, 1, 2, 3]
    assert mixed.current().parts == (Part(0, 4),)


def test_extending_changes_neither_operand():
    left, right = batch(0, 4), batch(10, 2)
    left.extended(right, Source.REPLAY, "a")
    assert left.parts == (Part(0, 4),)
    assert right.parts == (Part(0, 2),)
    assert len(left) == 4


def test_a_column_that_one_side_lacks_is_dropped():
    assert batch(0, 2, task_id=1).extended(batch(5, 1), Source.REPLAY, "a").task_id is None
    assert batch(0, 2, task_id=1).extended(batch(5, 1, task_id=0), Source.REPLAY, "a").task_id.tolist() == [1, 1, 0]


def test_rows_are_picked_in_every_column():
    picked = batch(0, 6, task_id=2)[torch.tensor([4, 1])]
    assert picked.sample_ids.tolist() == [4, 1]
    assert picked.targets.tolist() == [1, 1]
    assert picked.raw.flatten().tolist() == [4, 1]
    assert picked.task_id.tolist() == [2, 2]
    assert picked.parts == (Part(0, 2),)


def test_moving_to_the_same_device_is_free():
    rows = batch(0, 2)
    assert rows.to(torch.device("cpu")) is rows


def test_a_part_is_a_slice():
    part = Part(3, 7)
    assert len(part) == 4
    assert torch.arange(10)[part.rows].tolist() == [3, 4, 5, 6]


def test_tensor_data_fetches_rows_by_number():
    data = TensorData(torch.arange(12).view(6, 2), torch.arange(6) % 2, experience_id=3, task_id=1)
    rows = data.rows(torch.tensor([5, 0]))
    assert rows.inputs.tolist() == [[10, 11], [0, 1]]
    assert (rows.experience_id.tolist(), rows.task_id.tolist()) == ([3, 3], [1, 1])
    assert rows.sample_ids.tolist() == [5, 0]
    assert rows.raw is None


def test_concatenated_data_keep_their_experience_and_task():
    pieces = [TensorData(torch.full((2, 1), k), torch.zeros(2, dtype=torch.int64), k, k) for k in (0, 1)]
    rows = TensorData.concat(pieces).rows(torch.arange(4))
    assert rows.experience_id.tolist() == rows.task_id.tolist() == [0, 0, 1, 1]
    assert TensorData.concat([TensorData(piece.inputs, piece.targets) for piece in pieces]).task_id is None


def test_shuffled_names_every_row_once_and_differs_by_generator():
    first, second = (shuffled(50, 0, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(50))
    assert first.tolist() != second.tolist()


def stream_of(domains, measured=("a", "b"), **options):
    data = TensorData(torch.zeros(4, 1, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    experiences = [Experience(k, name, name, lambda: data, 4) for k, name in enumerate(domains)]
    eval_sets = [EvalSet(name, lambda: data, 4) for name in measured]
    info = StreamInfo("s", Setting.DOMAIN_INCREMENTAL, (1,), 2, len(experiences))
    return Stream(info, experiences, eval_sets, **options)


def test_revisits_share_a_column_and_strangers_have_none():
    assert stream_of(["a", "b", "a", "c"]).trained_domains == [0, 1, 0, -1]


def test_first_experiences_are_measured_on_what_they_teach():
    cut = stream_of(["a", "b", "a"]).first(1)
    assert [experience.name for experience in cut.experiences] == ["a"]
    assert [eval_set.domain for eval_set in cut.eval_sets] == ["a"]
    more = stream_of(["a", "b"], ["a", "b", "longer words"])
    assert [eval_set.domain for eval_set in more.first(1).eval_sets] == ["a", "longer words"]


def test_preparing_transforms_keeps_the_raw_rows_and_augments_only_on_request():
    stream = stream_of(
        ["a"],
        transform=lambda raw: raw.float() + 1,
        augment=lambda inputs, generator: inputs + torch.rand(inputs.shape, generator=generator),
    )
    rows = stream.experiences[0].load().rows(torch.arange(4))
    plain = stream.prepare(rows)
    assert plain.inputs.tolist() == [[1.0]] * 4
    assert plain.raw is rows.inputs
    augmented = stream.prepare(rows, torch.Generator().manual_seed(0))
    assert augmented.inputs.tolist() != plain.inputs.tolist()
    assert augmented.raw.tolist() == [[0]] * 4


def test_user_errors_are_value_errors():
    with pytest.raises(ValueError, match="sentence"):
        raise UserError("sentence")
