"""The sampler's invariants, exactly; which views are changed; what is refused."""

from collections import Counter
from functools import partial
from itertools import pairwise

import pytest
import torch

from cl.backbones.mlp import Mlp
from cl.config import TrainerConfig
from cl.core import Batch, UserError
from cl.hooks import Strategy
from cl.state import first_views
from cl.trainer import Trainer
from strategies.naive import Naive
from strategies.replay import Replay
from streams._strong import STRONG, turn_and_shift
from streams.permuted import permuted
from streams.split import split
from streams.view_batch import repeated, view_batch, white_of


def epochs(views, num_rows, count, seed=0):
    return [repeated(num_rows, e, torch.Generator().manual_seed(e), views, seed) for e in range(count)]


@pytest.mark.parametrize("views", [2, 3, 4, 6])
def test_each_row_is_seen_v_times_in_v_epochs(views):
    orders = epochs(views, 24, 3 * views)
    for cycle in range(3):
        counts = Counter(torch.cat(orders[cycle * views : (cycle + 1) * views]).tolist())
        assert counts == dict.fromkeys(range(24), views)


@pytest.mark.parametrize("views", [2, 3, 4, 6])
def test_views_are_adjacent_and_epochs_as_long(views):
    for order in epochs(views, 24, 2 * views):
        assert len(order) == 24
        groups = order.view(-1, views)
        assert (groups == groups[:, :1]).all()
        assert len(groups[:, 0].unique()) == 24 // views


def test_the_recall_interval_is_v_epochs():
    """A row comes back in the next cycle: V epochs later on average, never within its own cycle."""
    views, orders = 4, epochs(4, 40, 40)
    at = {row: [e for e, order in enumerate(orders) if row in order] for row in range(40)}
    for when in at.values():
        assert [e // views for e in when] == list(range(10))
    gaps = [b - a for when in at.values() for a, b in pairwise(when)]
    assert sum(gaps) / len(gaps) == pytest.approx(views, abs=0.2)


def test_cycles_and_seeds_differ():
    first, *_, later = epochs(4, 40, 5)
    assert not torch.equal(first, later)
    assert not torch.equal(first, epochs(4, 40, 1, seed=1)[0])


class Watch(Strategy):
    """Keeps what every step trained on."""

    def __init__(self):
        self.batches = []

    def on_batch(self, state, batch):
        self.batches.append((state.epoch, batch))
        return batch


def trained(stream, *strategies, epochs=4, batch_size=32):
    watch = Watch()
    trainer = Trainer(
        stream,
        Mlp,
        [*strategies, watch],
        optimizer=partial(torch.optim.SGD, lr=0.01),
        config=TrainerConfig(epochs=epochs, batch_size=batch_size, device="cpu", eval_rows=10),
    )
    trainer.run()
    return watch.batches, trainer


def test_as_many_steps_and_whole_groups_in_every_batch():
    base = split("digits", 2, train_rows=400)
    plain, _ = trained(base, Naive())
    batches, _ = trained(view_batch(base, 4, "none", "drop"), Naive())
    assert len(batches) == len(plain)
    for _, batch in batches:
        first = first_views(batch)
        assert (first == torch.arange(len(batch)) // 4 * 4).all()
        assert (batch.inputs == batch.inputs[first]).all(), "without strong changes all views are the same"


def test_a_run_sees_every_row_v_times():
    stream = view_batch(permuted("digits", 1, train_rows=320), 4, "none")
    batches, _ = trained(stream, Naive(), epochs=8)
    seen = Counter(row for _, batch in batches for row in batch.sample_ids.tolist())
    assert seen == dict.fromkeys(range(320), 8)


@pytest.mark.parametrize("strong", ["auto_augment", "rand_augment", "turn_and_shift"])
def test_first_views_stay_and_later_ones_change(strong):
    base = split("digits", 2, train_rows=200)
    stream = view_batch(base, 4, strong, "drop")
    experience = stream.experiences[0]
    rows = experience.load().rows(experience.order(experience.num_samples, 0, torch.Generator())[:64])
    batch = stream.prepare(rows)
    changed = stream.augment_rows(batch, torch.Generator().manual_seed(0))
    again = stream.augment_rows(batch, torch.Generator().manual_seed(0))
    other = stream.augment_rows(batch, torch.Generator().manual_seed(1))
    is_first = first_views(batch) == torch.arange(64)
    assert torch.equal(changed, again)
    assert not torch.equal(changed, other)
    assert torch.equal(changed[is_first], batch.inputs[is_first])
    different = (changed != batch.inputs).flatten(1).any(1)
    # the CIFAR-10 policy leaves many grey images as they are
    assert different[~is_first].float().mean() > 0.3
    assert changed.min() >= 0 and changed.max() <= 1
    assert torch.equal(batch.inputs, base.transform(rows.inputs)), "the batch that was given stays as it is"


def test_strong_changes_draw_from_the_generator_given():
    before = torch.get_rng_state()
    images = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for change in STRONG.values():
        if change is not None:
            assert change(images, torch.Generator().manual_seed(1)).dtype == torch.uint8
    assert torch.equal(before, torch.get_rng_state())


def test_turn_and_shift_moves_by_whole_pixels():
    """A single white pixel stays one pixel, near where it was."""
    images = torch.zeros(200, 1, 21, 21, dtype=torch.uint8)
    images[:, :, 10, 10] = 255
    found = turn_and_shift(images, torch.Generator().manual_seed(0))
    assert found.sum(dtype=torch.int64) == 200 * 255
    where = found.flatten(1).argmax(1)
    rows, columns = where // 21 - 10, where % 21 - 10
    assert (rows.unique().tolist(), columns.unique().tolist()) == ([-2, -1, 0, 1, 2], [-2, -1, 0, 1, 2])


def test_replayed_rows_are_no_views():
    """Only the stream's own rows are changed; the base's own augmentation is left to replayed ones."""
    stream = view_batch(permuted("digits", 2, train_rows=100), 4, "auto_augment")
    batches, trainer = trained(stream, Replay(capacity=20), epochs=2)
    pool = trainer.state.stream.transform(stream.experiences[1].load().rows(torch.arange(100)).inputs).flatten(1)
    replayed = [batch.inputs[part.rows].flatten(1) for _, batch in batches[-2:] for part in batch.parts[1:]]
    old = stream.transform(stream.experiences[0].load().rows(torch.arange(100)).inputs).flatten(1)
    every = torch.cat([pool, old])
    assert all((row == every).all(1).any() for row in torch.cat(replayed))


def test_white_is_found():
    assert white_of(split("digits").transform) == 16
    assert white_of(lambda raw: raw.float() / 255) == 255
    assert white_of(split("digits", standardise=True).transform) == 255


def test_rows_beyond_a_multiple():
    base = split("digits")
    rows = base.experiences[0].num_samples
    assert rows % 4
    with pytest.raises(UserError, match=rf"stream.views is 4, which does not divide the {rows} rows of experience 0"):
        view_batch(base)
    dropped = view_batch(base, remainder="drop").experiences[0]
    assert dropped.num_samples == rows - rows % 4
    batch = dropped.load().rows(torch.arange(dropped.num_samples))
    assert batch.sample_ids.tolist() == list(range(dropped.num_samples))
    assert len(Counter(image.numpy().tobytes() for image in batch.inputs)) == dropped.num_samples


BASE = permuted("digits", 2, train_rows=100)
WRONG = [
    ({"views": 3}, "stream.views is 3, which does not divide the 100 rows of experience 0 ('permutation 00')"),
    ({"views": 1}, "stream.views is 1; it must be an integer of at least 2"),
    ({"views": 200, "remainder": "drop"}, "stream.views is 200, more than the 100 rows of experience 0"),
    ({"strong": "blur"}, "stream.strong is 'blur'; it must be one of auto_augment, rand_augment"),
    ({"remainder": "keep"}, "stream.remainder is 'keep'; it must be one of refuse, drop"),
    ({"base": view_batch(BASE)}, "stream.base is view_batch_permuted_digits, whose rows come in an order of their own"),
]


@pytest.mark.parametrize(("arguments", "sentence"), WRONG)
def test_bad_input_is_one_sentence(arguments, sentence):
    with pytest.raises(UserError) as found:
        view_batch(**({"base": BASE} | arguments))
    assert str(found.value).startswith(sentence)


def test_the_batch_size_is_checked_before_training():
    with pytest.raises(UserError, match=r"stream.views is 4, which does not divide trainer.batch_size=30; views of a"):
        trained(view_batch(BASE), Naive(), batch_size=30)


def test_first_views_by_hand():
    rows = Batch(torch.zeros(6, 1), torch.zeros(6), torch.tensor([0, 1, 0, 0, 1, 1]), torch.tensor([5, 5, 5, 6, 5, 7]))
    assert first_views(rows).tolist() == [0, 1, 0, 3, 1, 5]
