"""Every image config, on tiny data: labels, shapes and ranges are what the stream announces."""

from importlib import import_module
from itertools import chain
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

FOLDER = Path(__file__).parents[3] / "configs" / "stream"
FAMILIES = ("permuted", "rotated", "split")
NAMES = sorted(path.stem for family in FAMILIES for path in FOLDER.glob(f"{family}_*.yaml"))
DATASETS = ("digits", "mnist", "fashion_mnist", "kmnist")


def built(name, root, **overrides):
    config = OmegaConf.create({"seed": 3, "data": {"root": root, "download": False}})
    config.stream = OmegaConf.load(FOLDER / f"{name}.yaml")
    node = OmegaConf.to_container(config, resolve=True)["stream"] | overrides
    module, function = node.pop("_target_").rsplit(".", 1)
    return getattr(import_module(module), function)(**node)


def test_every_family_offers_the_data_sets_that_make_sense():
    expected = {f"{family}_{dataset}" for family in FAMILIES for dataset in DATASETS}
    assert set(NAMES) == expected | {"split_cifar10", "split_cifar100"}


@pytest.mark.parametrize(
    ("name", "setting"),
    [(name, f"{kind}_incremental") for name in NAMES for kind in ("task", "domain")]
    + [(name, "class_incremental") for name in NAMES if name.startswith("split")],
)
def test_stream_keeps_what_it_announces(data_root, name, setting):
    stream = built(name, data_root, setting=setting)
    info = stream.info
    assert info.name == name
    assert info.setting == setting
    assert info.num_experiences == len(stream.experiences) == len(stream.eval_sets)
    assert [e.id for e in stream.experiences] == list(range(info.num_experiences))
    assert len({eval_set.domain for eval_set in stream.eval_sets}) == info.num_experiences
    assert stream.trained_domains == list(range(info.num_experiences))
    is_standard = name.startswith("split_cifar")
    for part in chain(stream.experiences, stream.eval_sets):
        data = part.load()
        assert len(data) == part.num_samples > 0
        stored = data.rows(torch.arange(min(len(data), 20)))
        batch = stream.prepare(stored, torch.Generator().manual_seed(0))
        assert stored.inputs.dtype == torch.uint8
        assert batch.raw is stored.inputs
        assert batch.inputs.dtype == torch.float32
        assert tuple(batch.inputs.shape[1:]) == info.input_shape
        assert batch.targets.dtype == torch.int64
        assert batch.targets.min() >= 0
        assert batch.targets.max() < info.num_outputs
        assert (batch.inputs.min() < 0) if is_standard else (batch.inputs.min() >= 0 and batch.inputs.max() <= 1)
        assert (batch.task_id is None) == (setting != "task_incremental")
    for experience in stream.experiences:
        assert set(experience.load().targets.tolist()) == set(experience.classes)


@pytest.mark.parametrize("name", NAMES)
def test_seed_decides_everything(data_root, name):
    def content(seed):
        stream = built(name, data_root, seed=seed, eval_on="validation", validation_frac=0.5)
        return [part.load().shown.numpy().tobytes() for part in (stream.experiences[1], stream.eval_sets[1])]

    assert content(0) == content(0)
    assert not set(content(0)) & set(content(1))
