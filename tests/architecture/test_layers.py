"""Lower never imports higher, siblings never import each other (CONTRIBUTING.md, The house)."""

from graphlib import CycleError, TopologicalSorter

# from low to high; names on a line are siblings, names in a tuple are one group whose members see those before them
NOUNS = ("cl.seeding", "cl.hub", "cl.core", "cl.result", "cl.distributed", "cl.shards", "cl.frozen", "cl.scaling")
FOUNDATION = (*NOUNS, "cl.state", "cl.hooks", "cl.observe")
BOOKS = ("cl.loader", "cl.config", "cl.ledger", "cl.checkpoint", "cl.branch")
TRAINER = (*BOOKS, "cl.evaluation", "cl.setup", "cl.trainer")
LAYERS = [
    ["kernels", "configs"],
    [FOUNDATION],
    ["cl.metrics", "cl.buffers", "cl.backbones", "cl.schedules"],
    [TRAINER, "cl.tracking", "cl.report"],
    ["strategies", "streams", "cl.interop"],
    ["cl.cli", "cl.testing"],
]
FREE = {"cl", "cl.__main__"}
"""The package itself, which anyone may import, and the entry point, which imports the commands."""

HOUSE = ("cl", "strategies", "streams", "kernels", "configs")


def place(module):
    """(layer, group, position within the group) of a module, None for what is outside of the house or free."""
    for height, layer in enumerate(LAYERS):
        for number, group in enumerate(layer):
            for position, name in enumerate(group if isinstance(group, tuple) else (group,)):
                if module == name or module.startswith(f"{name}."):
                    return height, number, position if isinstance(group, tuple) else 0
    return None


def allowed(importer, imported):
    """Whether the first place may import the second one."""
    if importer[0] != imported[0]:
        return importer[0] > imported[0]
    return importer[1] == imported[1] and importer[2] >= imported[2]


def test_every_module_has_a_place(sources):
    lost = [source.module for source in sources if source.module not in FREE and place(source.module) is None]
    assert not lost, f"give these a layer here and in CONTRIBUTING.md, The house: {lost}"


def test_nobody_imports_upwards_or_sideways(sources):
    wrong = []
    for source in sources:
        here = place(source.module)
        for found in source.imports if here else ():
            there = place(found.module)
            if there and not allowed(here, there):
                wrong.append(f"{source.where(found.line)} imports {found.module}")
    assert not wrong, "\n".join(wrong)


def test_imports_have_no_cycle(sources):
    modules = {source.module for source in sources}
    graph = {}
    for source in sources:
        names = [found.module for found in source.imports if not found.is_lazy and found.module.split(".")[0] in HOUSE]
        # `from package import name`: the name may be a module of its own or something inside the package
        used = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[source.module] = {name for name in used if name in modules and name != source.module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"modules import each other: {' -> '.join(error.args[1])}") from None


def test_the_rule_bites():
    """The checker finds what it is there for."""
    assert not allowed(place("cl.core"), place("cl.hooks"))
    assert not allowed(place("cl.backbones.mlp"), place("cl.buffers.ring"))
    assert not allowed(place("cl.trainer"), place("cl.tracking.base"))
    assert not allowed(place("strategies.replay"), place("streams.split"))
    assert not allowed(place("cl.testing.toy"), place("cl.cli.run"))
    assert allowed(place("strategies.der"), place("strategies._rehearsal"))
    assert allowed(place("cl.trainer"), place("cl.ledger"))
    assert not allowed(place("cl.ledger"), place("cl.trainer"))
