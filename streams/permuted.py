"""Permuted images: every experience shows the same images under another fixed permutation of their pixels.

Source: Goodfellow et al., "An Empirical Investigation of Catastrophic Forgetting", 2013. Published protocols differ in
whether the first permutation is the identity: not so in mammoth, GPM and HLOP (`first_identity=False`, the default
here), so in the hypernetwork papers, which also pad the images to 32x32 first (`pad=2`).
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from cl.core import Setting, Stream, UserError
from cl.seeding import derive_seed
from streams._images import Images
from streams._options import image_stream
from streams._remap import remap
from streams._settings import Piece, assemble, require_flag, require_integer, require_setting


@image_stream
def permuted(
    images: Images,
    num_experiences: int = 10,
    setting: str = "domain_incremental",
    first_identity: bool = False,
    seed: int = 0,
) -> Stream:
    """Build the stream; images are permuted when a batch is formed, so all experiences share the memory of one.

    Args:
        images: in the place of this argument a call gives the arguments of `open_images`.
        setting: domain_incremental (one head) or task_incremental (a head per experience).
        first_identity: experience 0 shows the images as they are.
        seed: of the permutations, and of the choice of rows.

    Raises:
        UserError: a value outside its range, or an augmentation, which means nothing once neighbours are torn apart.
    """
    require_integer("stream.num_experiences", num_experiences)
    require_flag("stream.first_identity", first_identity)
    kind = require_setting(setting, (Setting.DOMAIN_INCREMENTAL, Setting.TASK_INCREMENTAL))
    if images.augment is not None:
        raise UserError("stream.augment moves images by a few pixels, which are permuted here; it must be none")
    pieces = (
        Piece(
            f"permutation {k:02d}",
            images.part,
            len(images.targets),
            len(images.eval_targets),
            tuple(range(images.num_classes)),
            None if first_identity and k == 0 else partial(_view, seed=derive_seed(seed, "permutation", k)),
        )
        for k in range(num_experiences)
    )
    return assemble("permuted", images, kind, images.num_classes, pieces)


@lru_cache(maxsize=8)
def permutation(num_pixels: int, seed: int) -> Tensor:
    """A pure function; only the last few are kept, so that a long stream needs no memory for them."""
    return torch.randperm(num_pixels, generator=torch.Generator().manual_seed(seed))


def _view(inputs: Tensor, seed: int) -> Tensor:
    return remap(inputs, permutation(inputs[0].numel(), seed))
