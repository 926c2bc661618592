"""A stream of a thousand experiences needs the memory of one."""

import gc
import tracemalloc

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


@pytest.mark.parametrize("stream", [permuted("digits", 20), rotated("digits", 20)])
def test_loading_one_after_another_peaks_at_one(stream):
    def peak(count):
        tracemalloc.reset_peak()
        start = tracemalloc.get_traced_memory()[0]
        for k in range(count):
            stream.experiences[k].load()
            stream.eval_sets[k].load()
        return tracemalloc.get_traced_memory()[1] - start

    tracemalloc.start()
    try:
        peak(1)
        one, all_of_them = peak(1), peak(20)
    finally:
        tracemalloc.stop()
    assert one >= 1437 * 64
    assert all_of_them < 1.1 * one


def test_split_takes_the_rows_it_needs_and_no_more():
    stream = split("digits")
    before = image_bytes()
    data = stream.experiences[0].load()
    assert image_bytes() - before == len(data) * 64
