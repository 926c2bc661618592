"""Ages, selection, rewiring and freezing of sparse units (steps 1 to 4 and 6 of SHARP), each by plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from strategies._sparse_units import SparseUnits, as_weights, top_units


def small_units(seed=0, prune=0.5):
    """A convolution, a convolution, and a linear layer that reads four positions of each channel."""
    layers = [nn.Conv2d(2, 5, 3), nn.Conv2d(5, 4, 3), nn.Linear(16, 6)]
    units, generator = SparseUnits(), torch.Generator().manual_seed(seed)
    units.pruned(layers, prune, generator)
    for ages in units.ages[1:]:
        ages.copy_(torch.randint(0, 4, ages.shape, generator=generator))
    return layers, units, generator


# 1: ages, and the start


def test_ages_grow_from_one_on():
    _, units, _ = small_units()
    units.ages[1] = torch.tensor([0, 1, 2, 5, 0])
    units.promote()
    assert units.ages[1].tolist() == [0, 2, 3, 6, 0]
    assert set(units.ages[0].tolist()) == {99}


def test_the_first_convolution_stays_whole_and_others_are_pruned_by_kernels():
    layers = [nn.Conv2d(2, 40, 3), nn.Conv2d(40, 50, 3), nn.Linear(800, 60)]
    units = SparseUnits()
    units.pruned(layers, 0.6, torch.Generator().manual_seed(0))
    assert units.masks[0].all()
    for layer, mask in zip(layers[1:], units.masks[1:], strict=True):
        assert mask.float().mean().item() == pytest.approx(0.4, abs=0.04)
        alive = (layer.weight != 0).flatten(2).any(2) if layer.weight.dim() == 4 else layer.weight != 0
        assert torch.equal(alive, mask)
    dense = [nn.Linear(30, 40)]
    units.pruned(dense, 0.6, torch.Generator().manual_seed(0))
    assert not units.masks[0].all(), "only a convolution of the input stays whole"


# 2: selection


def test_the_fewest_units_that_carry_the_share():
    generator = torch.Generator().manual_seed(0)
    for share in (0.3, 0.9, 1.0):
        total = torch.rand(12, generator=generator)
        ranked = sorted(range(12), key=lambda unit: -float(total[unit]))
        wanted, carried = set(), 0.0
        for unit in ranked:
            wanted.add(unit)
            carried += float(total[unit])
            if carried >= share * float(total.sum()) - 1e-6:
                break
        assert set(top_units(total, share).nonzero().squeeze(1).tolist()) == wanted
    assert top_units(torch.zeros(3), 0.9).sum() == 1


def test_selection_leaves_older_units_alone():
    _, units, _ = small_units()
    units.ages = [units.ages[0], torch.tensor([0, 1, 2, 3, 0])]
    maps = torch.zeros(7, 5, 2, 2)
    maps[:, 0], maps[:, 2], maps[:, 4] = 3.0, 50.0, 2.9
    units.select([maps], 0.999)
    assert units.ages[1].tolist() == [1, 0, 2, 3, 1]
    units.select([maps], 0.85)
    assert units.ages[1].tolist() == [0, 0, 2, 3, 0], "unit 2 carries enough by itself"


# 3 and 4: rewiring


def by_unit(units, number):
    """(target, column, source unit) of every possible connection of a layer."""
    mask, num = units.masks[number], len(units.ages[number])
    span = mask.shape[1] // num
    return [(o, i, i // span) for o in range(mask.shape[0]) for i in range(mask.shape[1])]


@pytest.mark.parametrize("seed", range(5))
def test_what_leaves_the_plastic_pool_is_dropped(seed):
    _, units, _ = small_units(seed)
    before = [mask.clone() for mask in units.masks]
    counts = units.drop()
    for number, mask in enumerate(units.masks):
        num = 0
        for target, column, source in by_unit(units, number):
            is_loose = units.ages[number][source] == 0 and units.ages[number + 1][target] != 0
            num += bool(before[number][target, column]) and bool(is_loose)
            assert mask[target, column] == (before[number][target, column] and not is_loose)
        assert counts[number] == num
    assert sum(counts) > 0


@pytest.mark.parametrize("seed", range(5))
def test_rewiring_conserves_the_number_of_connections(seed):
    layers, units, generator = small_units(seed)
    before = [int(mask.sum()) for mask in units.masks]
    dropped = units.drop()
    kept = [mask.clone() for mask in units.masks]
    for layer in layers:
        nn.init.ones_(layer.weight)
    left = units.grow(layers, dropped, generator)
    units.apply(layers)
    for number, (layer, mask) in enumerate(zip(layers, units.masks, strict=True)):
        assert int(mask.sum()) == before[number] - left[number]
        new = mask & ~kept[number]
        assert (kept[number] & ~mask).sum() == 0
        assert (units.ages[number + 1][new.any(1)] == 0).all(), "only plastic units get new connections"
        is_new, is_kept = as_weights(new, layer.weight), as_weights(kept[number], layer.weight)
        assert (layer.weight[is_new] == 0).all() and (layer.weight[is_kept] == 1).all()
        room = int(((units.ages[number + 1] == 0)[:, None] & ~kept[number]).sum())
        assert left[number] == max(0, dropped[number] - room)


def test_new_connections_are_drawn_from_all_places():
    hits = torch.zeros(3, 4)
    for seed in range(600):
        layer = nn.Linear(4, 3)
        units = SparseUnits()
        units.pruned([layer], 0.0, torch.Generator())
        units.masks[0].fill_(False)
        units.ages[1] = torch.tensor([0, 2, 0])
        assert units.grow([layer], [2], torch.Generator().manual_seed(seed)) == [0]
        hits += units.masks[0]
    assert (hits[1] == 0).all() and ((hits[[0, 2]] - 150).abs() < 4 * (600 * 3 / 16) ** 0.5).all()


# 6: the end of an experience


def test_plastic_units_are_drawn_anew():
    layers = [nn.Linear(100, 200), nn.Linear(200, 100)]
    units, generator = SparseUnits(), torch.Generator().manual_seed(0)
    units.pruned(layers, 0.5, generator)
    units.ages[1][:100], units.ages[2][:50] = 2, 3
    before = [layer.weight.clone() for layer in layers]
    nn.init.ones_(layers[0].bias)
    units.reinitialise(layers, generator)
    for layer, old, mask, num in zip(layers, before, units.masks, (100, 50), strict=True):
        assert torch.equal(layer.weight[:num], old[:num])
        new = layer.weight[num:][mask[num:]]
        assert new.std().item() == pytest.approx((2 / layer.weight.shape[0]) ** 0.5, rel=0.05)
        assert (layer.weight[num:][~mask[num:]] == 0).all()
    assert layers[0].bias[:100].eq(1).all() and layers[0].bias[100:].eq(0).all()


def test_a_plastic_map_is_drawn_at_the_scale_of_all_that_leaves_a_unit():
    """He's normal: 2 / (50 maps of 3x3 places), with no bias to draw."""
    layers = [nn.Conv2d(30, 50, 3, bias=False)]
    units, generator = SparseUnits(), torch.Generator().manual_seed(0)
    units.pruned(layers, 0.5, generator)
    units.reinitialise(layers, generator)
    assert layers[0].weight.std().item() == pytest.approx((2 / 450) ** 0.5, rel=0.03)


def test_frozen_by_age():
    _, units, _ = small_units()
    units.ages[1:] = [torch.tensor([0, 1, 2, 3, 4]), torch.tensor([1, 2, 3, 4]), torch.tensor([0, 1, 2, 3, 4, 5])]
    found = [frozen.nonzero().squeeze(1).tolist() for frozen in units.frozen(cut=1, num_recent=2)]
    assert found == [[2, 3, 4], [3], [4, 5]]
