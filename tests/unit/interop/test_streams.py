"""Benchmarks of Avalanche as streams: settings, heads, classes, domains, rows, and how they are held."""

import pickle

import pytest
import torch

pytest.importorskip("avalanche")
import streams
from cl.core import Setting, UserError
from cl.interop import _streams
from cl.interop.avalanche import as_benchmark, from_avalanche, stream
from cl.testing import StreamContract, toy_stream


def class_incremental(data, transform=None, order=(3, 1, 0, 2, 5, 4)):
    from avalanche.benchmarks import class_incremental_benchmark

    transform = transform or data.half
    parts = {"train": data.items(transform), "test": data.items(transform)}
    return class_incremental_benchmark(parts, num_experiences=3, class_order=list(order))


def test_streams_package_gives_the_same_function():
    assert streams.from_avalanche is from_avalanche


def test_class_incremental_keeps_the_order_of_classes(data):
    made = from_avalanche(class_incremental(data))
    assert made.info.setting == Setting.CLASS_INCREMENTAL
    assert [e.classes for e in made.experiences] == [(1, 3), (0, 2), (4, 5)]
    assert (made.info.num_outputs, made.info.num_heads, made.info.input_shape) == (6, 1, (1, 4, 4))
    assert made.trained_domains == [0, 1, 2]


def test_rows_are_those_of_the_benchmark(data):
    benchmark = class_incremental(data)
    made = from_avalanche(benchmark)
    theirs = benchmark.train_stream[1].dataset
    rows = made.prepare(made.experiences[1].load().rows(torch.tensor([7, 2])))
    for row, number in enumerate((7, 2)):
        assert torch.equal(rows.inputs[row], theirs[number][0])
        assert int(rows.targets[row]) == theirs[number][1]
    assert rows.sample_ids.tolist() == [7, 2] and rows.experience_id.tolist() == [1, 1]


def test_task_labels_choose_heads(data):
    from avalanche.benchmarks import task_incremental_benchmark

    made = from_avalanche(task_incremental_benchmark(class_incremental(data), reset_task_labels=True))
    assert made.info.setting == Setting.TASK_INCREMENTAL and made.info.num_heads == 3
    assert [e.task_id for e in made.experiences] == [0, 1, 2]
    assert made.eval_sets[2].load().rows(torch.arange(3)).task_id.tolist() == [2, 2, 2]


def test_classic_task_incremental_labels_count_within_the_head(data):
    from avalanche.benchmarks import nc_benchmark

    benchmark = nc_benchmark(
        data.items(), data.items(), 3, task_labels=True, class_ids_from_zero_in_each_exp=True, seed=1
    )
    made = from_avalanche(benchmark)
    assert made.info.num_outputs == 2 and [e.classes for e in made.experiences] == [(0, 1)] * 3


def test_new_instances_are_domain_incremental_and_share_the_test_set(data):
    from avalanche.benchmarks import new_instances_benchmark

    made = from_avalanche(new_instances_benchmark(data.items(), data.items(), num_experiences=4, seed=0))
    assert made.info.setting == Setting.DOMAIN_INCREMENTAL
    assert made.trained_domains == [0, 0, 0, 0] and len(made.eval_sets) == 1


def test_online_experiences_are_measured_on_their_origin(data):
    from avalanche.benchmarks.scenarios.online import split_online_stream

    benchmark = class_incremental(data)
    online = split_online_stream(benchmark.train_stream, experience_size=10, shuffle=False)
    made = from_avalanche(online, test=benchmark.test_stream)
    assert len(made.experiences) == 12 and made.trained_domains == [0] * 4 + [1] * 4 + [2] * 4


def test_drifting_online_stream(data):
    from avalanche.benchmarks.scenarios.online import split_continuous_linear_decay_stream

    benchmark = class_incremental(data)
    online = split_continuous_linear_decay_stream(benchmark.train_stream, 10, 5, 0.5, shuffle=True)
    made = from_avalanche(online, test=benchmark.test_stream)
    assert len(made.experiences) > 3 and all(e.num_samples == 10 for e in made.experiences)


def test_repetition_finds_the_test_set_that_covers_the_classes(data):
    from avalanche.benchmarks import benchmark_from_datasets

    low, high = data.targets < 3, data.targets >= 3
    train = [data.tensors(rows) for rows in (low, high, low, low, high)]
    benchmark = benchmark_from_datasets(train=train, test=[data.tensors(low), data.tensors(high)])
    made = from_avalanche(benchmark)
    assert made.trained_domains == [0, 1, 0, 0, 1]


def test_tensors_are_gathered_where_they_are(data):
    from avalanche.benchmarks import benchmark_from_datasets

    made = from_avalanche(benchmark_from_datasets(train=[data.tensors()], test=[data.tensors()]))
    assert isinstance(made.experiences[0].load(), _streams.Gathered)


def test_rows_behind_a_transform_are_fetched_once(data, monkeypatch):
    made = from_avalanche(class_incremental(data))
    first = made.experiences[0].load()
    monkeypatch.setattr(_streams.Fetched, "rows", lambda *_: pytest.fail("fetched again"))
    assert made.experiences[0].load().rows(torch.arange(3)).inputs.equal(first.rows(torch.arange(3)).inputs)


def test_memory_is_bounded(data, monkeypatch):
    monkeypatch.setattr(_streams, "MEMORY_BYTES", 40 * 16 * 4)
    _streams._held.clear()
    made = from_avalanche(class_incremental(data))
    for experience in made.experiences:
        experience.load()
    assert len(_streams._held) == 1
    monkeypatch.setattr(_streams, "MEMORY_BYTES", 10)
    _streams._held.clear()
    assert isinstance(made.experiences[0].load(), _streams.Fetched)


def test_random_transforms_are_drawn_anew(data):
    made = from_avalanche(class_incremental(data, data.jittered))
    loaded = made.experiences[0].load()
    first, again = (loaded.rows(torch.arange(4)).inputs for _ in range(2))
    assert not torch.equal(first, again)


def test_another_setting_than_there_is(data):
    with pytest.raises(
        UserError, match="must be one of class_incremental, domain_incremental; the benchmark has no task labels"
    ):
        from_avalanche(class_incremental(data), setting="continual_pretraining")
    assert from_avalanche(class_incremental(data), setting="domain_incremental").info.setting == "domain_incremental"


def test_images_that_are_no_tensors_are_refused(data):
    from torchvision.transforms import ToPILImage

    with pytest.raises(UserError, match="add a transform"):
        from_avalanche(class_incremental(data, ToPILImage()))


def test_there_and_back_is_the_same_stream():
    ours = toy_stream(Setting.TASK_INCREMENTAL)
    assert from_avalanche(as_benchmark(ours)) is ours


def test_text_has_no_labels():
    with pytest.raises(UserError, match="one class per row"):
        as_benchmark(toy_stream(Setting.CONTINUAL_PRETRAINING))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("Nope", {}, "no benchmark 'Nope'; it has CLEAR"),
        ("SplitMNIST", {"n_exp": 3}, "n_experiences"),
        ("no.such.module", {}, "cannot be imported"),
        ("PermutedMNIST", {"n_experiences": 2, "root": "/nowhere/at/all"}, "could not be made from data.root"),
    ],
)
def test_wrong_requests_are_one_sentence(name, options, said, monkeypatch):
    import avalanche.benchmarks.classic as classic

    def offline(*args, dataset_root=None, n_experiences=0, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr(classic, "PermutedMNIST", offline)
    with pytest.raises(UserError, match=said):
        stream(name, **options)


def test_gzipped_mnist_is_unpacked_beside_and_not_inside(tmp_path, monkeypatch):
    import gzip

    from cl.interop._classic import _readable

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"labels"))
    found = _readable(str(tmp_path))
    assert found != str(tmp_path)
    assert (type(raw)(found) / "MNIST" / "raw" / "train-labels-idx1-ubyte").read_bytes() == b"labels"
    assert [path.name for path in raw.iterdir()] == ["train-labels-idx1-ubyte.gz"]


def digits(seed: int = 0):
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
    from torch.utils.data import TensorDataset

    from streams._images import load_images

    images = load_images("digits")
    pairs = ((images.inputs, images.targets), (images.eval_inputs, images.eval_targets))
    whole = [TensorDataset(inputs.float(), targets) for inputs, targets in pairs]
    generator = torch.Generator().manual_seed(seed)

    def part(k, is_test):
        rows = (pairs[is_test][1] // 5 == k).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        labels = pairs[is_test][1].tolist()
        every = AvalancheDataset([whole[is_test]], data_attributes=[DataAttribute(labels, "targets")])
        return every.subset(rows.tolist())

    return benchmark_from_datasets(train=[part(0, 0), part(1, 0)], test=[part(0, 1), part(1, 1)])


class TestDigits(StreamContract):
    @staticmethod
    def make(seed: int = 0):
        return from_avalanche(digits(seed))


def test_pickles_are_small_enough_to_send(data):
    made = from_avalanche(class_incremental(data))
    again = pickle.loads(pickle.dumps(made))
    assert again.info == made.info
