"""Split images: classes are divided exactly, and labels are what the setting says."""

import pytest
import torch

from cl.core import UserError
from streams._images import load_images
from streams.split import split

SETTINGS = ("class_incremental", "task_incremental", "domain_incremental")


def original_classes(shown):
    """Labels that the data set gives the rows shown."""
    whole = load_images("digits")
    label = {
        image.numpy().tobytes(): target.item()
        for inputs, targets in (whole.part(True), whole.part(False))
        for image, target in zip(inputs, targets, strict=True)
    }
    return torch.tensor([label[image.numpy().tobytes()] for image in shown])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("order", ["fixed", "shuffled", [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]])
def test_classes_are_divided_exactly_and_labelled_by_setting(setting, order):
    stream, whole = split("digits", 5, setting, class_order=order, seed=1), load_images("digits")
    is_local = setting != "class_incremental"
    assert stream.info.num_outputs == (2 if is_local else 10)
    assert stream.info.num_heads == (5 if setting == "task_incremental" else 1)
    seen, num_rows, num_eval = [], 0, 0
    for k, (experience, eval_set) in enumerate(zip(stream.experiences, stream.eval_sets, strict=True)):
        train, held_out = experience.load(), eval_set.load()
        assert (len(train), len(held_out)) == (experience.num_samples, eval_set.num_samples)
        classes = [int(c) for c in experience.name.split()[1:]]
        for data in (train, held_out):
            shown = original_classes(data.inputs)
            assert shown.unique().tolist() == sorted(classes)
            expected = torch.tensor([classes.index(c) for c in shown.tolist()]) if is_local else shown
            assert torch.equal(data.targets, expected)
            assert data.experience_id == k
            assert data.task_id == (k if setting == "task_incremental" else None)
        assert experience.classes == ((0, 1) if is_local else tuple(classes))
        seen += classes
        num_rows, num_eval = num_rows + len(train), num_eval + len(held_out)
    assert sorted(seen) == list(range(10))
    assert (num_rows, num_eval) == (len(whole.targets), len(whole.eval_targets))
    if order == "fixed":
        assert seen == list(range(10))
    if isinstance(order, list):
        assert seen == order


def test_shuffled_order_is_drawn_by_seed():
    drawn = [split("digits", class_order="shuffled", seed=s) for s in (0, 0, 1)]
    assert [[each.domain for each in stream.eval_sets] for stream in drawn] == [[f"part {k:02d}" for k in range(5)]] * 3
    names = [[e.name for e in stream.experiences] for stream in drawn]
    assert names[0] == names[1] != names[2]


def test_unequal_experiences():
    stream = split("digits", 3, "task_incremental", classes_per_experience=[4, 3, 3])
    assert [e.name for e in stream.experiences] == ["classes 0 1 2 3", "classes 4 5 6", "classes 7 8 9"]
    assert stream.info.num_outputs == 4
    assert [e.classes for e in stream.experiences] == [(0, 1, 2, 3), (0, 1, 2), (0, 1, 2)]
    assert [e.load().targets.max().item() for e in stream.experiences] == [3, 2, 2]
    base = split("digits", 6, classes_per_experience=[5, 1, 1, 1, 1, 1])
    assert [e.classes for e in base.experiences] == [(0, 1, 2, 3, 4), (5,), (6,), (7,), (8,), (9,)]


def test_names_stay_short_and_unique():
    assert [e.name for e in split("digits", 1).experiences] == ["classes 0 1 2 3 4 and 5 more"]
    assert [e.name for e in split("digits", 10).experiences] == [f"class {c}" for c in range(10)]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_experiences": 3}, "is 3, which does not divide 10 classes; it must be one of 1, 2, 5, 10, or give"),
        ({"num_experiences": 11}, "does not divide 10 classes"),
        ({"num_experiences": 10, "setting": "task_incremental"}, "leaves an experience with one class only"),
        ({"num_experiences": 10, "setting": "domain_incremental"}, "leaves an experience with one class only"),
        (
            {"num_experiences": 2, "setting": "task_incremental", "classes_per_experience": [9, 1]},
            "leaves an experience with one class only",
        ),
        ({"classes_per_experience": [5, 5]}, "must have stream.num_experiences=5 entries that add up to 10 classes"),
        ({"num_experiences": 2, "classes_per_experience": [5, 4]}, "add up to 10 classes"),
        ({"num_experiences": 2, "classes_per_experience": [10, 0]}, "classes_per_experience is 0"),
        ({"classes_per_experience": 2}, "stream.classes_per_experience is 2; it must be a list"),
        ({"class_order": "reversed"}, "stream.class_order is 'reversed'; it must be fixed, shuffled, or a list"),
        ({"class_order": [0, 1, 2]}, "names every class from 0 to 9 once"),
        ({"class_order": [0] * 10}, "names every class from 0 to 9 once"),
        ({"class_order": 7}, "stream.class_order is 7"),
        ({"class_order": [False, True, *range(2, 10)]}, "stream.class_order is [False, True, 2"),
        ({"class_order": [0.0, *range(1, 10)]}, "stream.class_order is [0.0, 1, 2"),
    ],
)
def test_impossible_divisions_are_one_sentence(options, says):
    with pytest.raises(UserError) as caught:
        split("digits", **options)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
