"""One root seed, many generators that do not know each other."""

import subprocess
import sys

import torch

from cl.seeding import Seeds, derive_seed


def draw(generator):
    return torch.rand(3, generator=generator).tolist()


def test_derived_seeds_depend_on_every_name_and_on_their_order():
    seeds = {derive_seed(*names) for names in [(0,), (1,), (0, "a"), (0, "a", 1), (0, 1, "a"), (0, "a", 2)]}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_derived_seeds_are_the_same_in_every_process():
    """Python's `hash` is salted per process; a seed must not be."""
    code = "from cl.seeding import derive_seed; print(derive_seed(0, 'order'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # a change of this number changes every published run
    assert int(done.stdout) == derive_seed(0, "order") == 5231958647509549229


def test_a_named_generator_lives_on_and_a_fresh_one_does_not():
    seeds = Seeds(0)
    first, second = draw(seeds.named("replay")), draw(seeds.named("replay"))
    assert first != second
    assert draw(seeds.fresh("replay")) == draw(seeds.fresh("replay")) == first


def test_a_new_consumer_changes_no_other():
    alone, beside = Seeds(0), Seeds(0)
    beside.named("newcomer")
    draw(beside.named("newcomer"))
    assert draw(alone.named("replay")) == draw(beside.named("replay"))


def test_the_global_generator_is_borrowed_and_given_back():
    before = torch.get_rng_state()
    with Seeds(0).as_global("init"):
        first = torch.rand(2).tolist()
    with Seeds(0).as_global("init"):
        second = torch.rand(2).tolist()
    assert first == second
    assert torch.equal(before, torch.get_rng_state())


def test_state_goes_on_where_it_was_saved():
    seeds = Seeds(0)
    draw(seeds.named("replay"))
    saved = {name: state.clone() for name, state in seeds.state_dict().items()}
    expected = draw(seeds.named("replay"))
    restored = Seeds(0)
    restored.load_state_dict(saved)
    assert draw(restored.named("replay")) == expected
