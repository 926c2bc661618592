"""`cl list NAME`: whatever can be chosen by a name is explained, with the options that a run would get."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cl.backbones._spec import PARTS, plugin_names
from cl.cli import build, listing
from cl.cli.compose import composed, node_name, plain
from cl.cli.details import NEEDED, details
from cl.cli.main import main


def settings_of(*words: str) -> dict[str, object]:
    """What a run with these words is made with."""
    return build.settings(plain(composed("run", list(words))))


@pytest.mark.parametrize("kind", list(listing.LISTS))
def test_every_name_of_a_list_is_explained(kind: str) -> None:
    for entry in listing.LISTS[kind]():
        found = [str(each) for each in details(entry.name.partition("=")[2] or entry.name)]
        # the comment of a config begins its line with a capital there
        assert any(entry.line.partition(" On ")[0].lower().rstrip(".") in text.lower() for text in found), entry.name


@pytest.mark.parametrize("folder", PARTS)
def test_every_part_of_a_backbone_is_explained(folder: str) -> None:
    for name in plugin_names(folder):
        assert any(each.use == PARTS[folder][1].format(name) and each.texts for each in details(name)), name


def test_options_of_strategies_are_those_of_a_run() -> None:
    """All in one composition; Hydra, not the file, says what a run would get."""
    names = [entry.name for entry in listing.strategies()]
    run = settings_of(f"strategy=[{','.join(names)}]")
    for name in names:
        (found,) = (each for each in details(name) if each.use == f"strategy={name}")
        prefix = f"strategy.{node_name(name)}."
        assert found.options == {key: value for key, value in run.items() if key.startswith(prefix)}, name


@pytest.mark.parametrize("words", ["backbone=armt", "backbone=hope", "optimizer=adamw", "schedule=infinite", "trainer"])
def test_other_options_are_those_of_a_run(words: str) -> None:
    group, _, name = words.partition("=")
    run = settings_of(*([words] if name else []))
    (found,) = (each for each in details(name or group) if each.use == words)
    assert found.options == {key: value for key, value in run.items() if key.startswith(f"{group}.")}


def test_a_file_of_several_streams_is_told_with_the_options_of_one() -> None:
    (found,) = details("split_mnist")
    assert found.options["stream.dataset"] == "mnist" and found.options["stream.num_experiences"] == 5
    (digits,) = details("split_digits")
    assert digits.texts == found.texts and digits.options["stream.dataset"] == "digits"


def test_what_a_person_sees(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("list", "derpp", "memory_cache")) == 0
    said = capsys.readouterr().out
    assert said.startswith("strategy=derpp\n\n") and "Buzzega et al." in said
    assert "  strategy.derpp.replay_batch_size  null\n" in said
    # one name, three things
    assert "\nbackbone=memory_cache\n" in said and "\nbackbone.blocks=memory_cache\n" in said
    assert "\nfrom kernels.memory_cache import memory_cache\n" in said
    assert NEEDED not in details("derpp")[0].options.values()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("replai",), "nothing is called 'replai' (did you mean replay?); the lists are streams, "),
        (("../secrets",), "nothing is called '../secrets'; the lists are streams, "),
        (("replay", "colour=red"), "'colour' is no option of `cl list`; there is format"),
    ],
)
def test_a_name_that_nothing_has(
    words: tuple[str, ...], sentence: str, is_refused: Callable[[tuple[str, ...], str], None]
) -> None:
    is_refused(("list", *words), sentence)
