"""A stream of a thousand experiences needs the memory of one."""

import gc

import pytest
import torch

from streams.permuted import permuted
from streams.rotated import rotated
from streams.split import split


def image_bytes():
    """Bytes of live uint8 tensors, each storage once."""
    gc.collect()
    live = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype == torch.uint8]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in live}.values())


@pytest.mark.parametrize("family", [permuted, rotated])
@pytest.mark.slow
def test_a_thousand_experiences_hold_no_images(family):
    family("digits", 1)
    before = image_bytes()
    stream = family("digits", 1000, "task_incremental")
    assert image_bytes() == before
    for k in (0, 500, 999):
        stream.experiences[k].load()
        stream.eval_sets[k].load()
    assert image_bytes() == before
    assert stream.experiences[999].load().rows(torch.arange(1)).task_id.item() == 999


@pytest.mark.parametrize("stream", [permuted("digits", 6), rotated("digits", 6, angles="even")])
def test_experiences_share_their_images(stream):
    """All of them loaded at once hold the images of one; a batch costs its own rows."""
    before = image_bytes()
    loaded = [part.load() for pair in zip(stream.experiences, stream.eval_sets, strict=True) for part in pair]
    assert image_bytes() == before
    rows = [data.rows(torch.arange(10)).inputs for data in loaded]
    assert len({row.numpy().tobytes() for row in rows}) == len(rows)
    assert image_bytes() - before == 12 * 10 * 64


def test_split_takes_the_rows_it_needs_and_no_more():
    stream = split("digits")
    before = image_bytes()
    data = stream.experiences[0].load()
    assert image_bytes() - before == len(data) * 64
