"""Rotated images: every experience shows the same images turned by another angle.

Pixels are taken from the nearest source pixel and corners are filled with 0, as in mammoth, GEM and Avalanche.

Source: Lopez-Paz & Ranzato, "Gradient Episodic Memory", 2017. As in mammoth's R-MNIST, angles are drawn from [0, 180)
for every experience, the first one included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from cl.core import Setting, Stream, UserError
from cl.seeding import derive_seed
from streams._images import Images
from streams._options import image_stream
from streams._remap import remap
from streams._settings import Piece, assemble, is_list, is_positive, require_flag, require_integer, require_setting


@image_stream
def rotated(
    images: Images,
    num_experiences: int = 10,
    setting: str = "domain_incremental",
    angles: str | Sequence[float] = "random",
    angle_range: float = 180.0,
    first_identity: bool = False,
    seed: int = 0,
) -> Stream:
    """Build the stream; images are rotated when a batch is formed, so all experiences share the memory of one.

    Args:
        images: in the place of this argument a call gives the arguments of `open_images`.
        setting: domain_incremental (one head) or task_incremental (a head per experience).
        angles: "random" draws each from [0, angle_range) by seed, "even" takes k * angle_range / num_experiences; or a
            list of degrees, counter-clockwise, one per experience.
        angle_range: degrees.
        first_identity: experience 0 shows the images as they are, whatever `angles` says.
        seed: of random angles, and of the choice of rows.

    Raises:
        UserError: a value outside its range, or a list of another length.
    """
    require_integer("stream.num_experiences", num_experiences)
    require_flag("stream.first_identity", first_identity)
    kind = require_setting(setting, (Setting.DOMAIN_INCREMENTAL, Setting.TASK_INCREMENTAL))
    degrees = _degrees(angles, angle_range, num_experiences, seed)
    if first_identity:
        degrees[0] = 0.0
    pieces = (
        Piece(
            f"rotation {k:02d} by {angle:.0f}",
            images.part,
            len(images.targets),
            len(images.eval_targets),
            tuple(range(images.num_classes)),
            partial(_view, angle=angle) if angle else None,
            f"rotation {k:02d}" if angles == "random" else "",
        )
        for k, angle in enumerate(degrees)
    )
    return assemble("rotated", images, kind, images.num_classes, pieces)


def _degrees(angles: str | Sequence[float], angle_range: float, count: int, seed: int) -> list[float]:
    if not is_positive(angle_range) or angle_range > 360:
        raise UserError(f"stream.angle_range is {angle_range!r}; it must be in (0, 360] degrees")
    if angles == "random":
        return [_uniform(derive_seed(seed, "rotation", k)) * angle_range for k in range(count)]
    if angles == "even":
        return [k * angle_range / count for k in range(count)]
    if is_list(angles, count) and all(isinstance(angle, int | float) and math.isfinite(angle) for angle in angles):
        return [float(angle) for angle in angles]
    raise UserError(
        f"stream.angles is {angles!r}; it must be random, even, or a list of stream.num_experiences={count} numbers"
    )


def _uniform(seed: int) -> float:
    return torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).item()


@lru_cache(maxsize=8)
def rotation(height: int, width: int, angle: float) -> Tensor:
    """For every pixel of the turned image the pixel it comes from, -1 outside; `angle` in degrees, counter-clockwise.

    Example:
        >>> rotation(2, 2, 90).tolist()
        [1, 3, 0, 2]
    """
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    y = torch.arange(height, dtype=torch.float64).unsqueeze(1) + 0.5 - height / 2
    x = torch.arange(width, dtype=torch.float64) + 0.5 - width / 2
    from_x = (cos * x - sin * y + width / 2).floor().long()
    from_y = (sin * x + cos * y + height / 2).floor().long()
    is_inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    return (from_y * width + from_x).where(is_inside, -1).flatten()


def _view(inputs: Tensor, angle: float) -> Tensor:
    return remap(inputs, rotation(*inputs.shape[-2:], angle))
