"""Permuted images: every experience shows the same images under another fixed permutation of their pixels.

Source: Goodfellow et al., "An Empirical Investigation of Catastrophic Forgetting", 2013. Published protocols differ in
whether the first permutation is the identity: not so in mammoth, GPM and HLOP (`first_identity=False`, the default
here), so in the hypernetwork papers.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cl.core import EvalSet, Experience, Setting, Stream, StreamInfo, TensorData
from cl.seeding import derive_seed
from streams._images import Images, load_images, scaled
from streams._settings import heads, require_positive, require_setting, task_of


def permuted(
    dataset: str = "digits",
    num_experiences: int = 10,
    setting: str = "domain_incremental",
    first_identity: bool = False,
    seed: int = 0,
    root: str | None = None,
    download: bool = False,
) -> Stream:
    """Build the stream; images are permuted when an experience is loaded, so memory does not grow with its length.

    Args:
        dataset: digits, mnist, fashion_mnist, kmnist, cifar10 or cifar100.
        setting: domain_incremental (one head) or task_incremental (a head per experience).
        first_identity: experience 0 shows the images as they are.
        seed: of the permutations.
        root: folder of torchvision's data sets; the digits need none.
    """
    require_positive("stream.num_experiences", num_experiences)
    kind = require_setting(setting, (Setting.DOMAIN_INCREMENTAL, Setting.TASK_INCREMENTAL))
    images = load_images(dataset, root, download)
    experiences, eval_sets = [], []
    for k in range(num_experiences):
        name, task_id = f"permutation {k:02d}", task_of(kind, k)
        load = partial(_permuted, images, seed, k, first_identity and k == 0, task_id)
        num_samples = len(images.targets)
        classes = tuple(range(images.num_classes))
        experiences.append(Experience(k, name, name, partial(load, True), num_samples, classes, task_id))
        eval_sets.append(EvalSet(name, partial(load, False), len(images.eval_targets)))
    info = StreamInfo(
        f"permuted_{dataset}", kind, images.shape, images.num_classes, num_experiences, heads(kind, num_experiences)
    )
    return Stream(info, experiences, eval_sets, partial(scaled, largest=images.largest))


def permutation(num_pixels: int, seed: int, experience_id: int) -> Tensor:
    """Permutation of an experience: a pure function, so that no experience keeps one in memory."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "permutation", experience_id))
    return torch.randperm(num_pixels, generator=generator)


def _permuted(images: Images, seed: int, k: int, is_identity: bool, task_id: int | None, is_train: bool) -> TensorData:
    inputs = images.inputs if is_train else images.eval_inputs
    targets = images.targets if is_train else images.eval_targets
    if not is_identity:
        flat = inputs.flatten(1)
        order = permutation(flat.shape[1], seed, k)
        inputs = flat.index_select(1, order).view(inputs.shape)
    return TensorData(inputs, targets, k, task_id)
