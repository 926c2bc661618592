"""A graph of objects is written and read back: shared, circular, in place, and nothing but what may be made."""

import copy
import io
from collections import OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("avalanche")
from avalanche.training.utils import ParamData, cycle

from cl.interop._snapshot import again, read, write

CPU = torch.device("cpu")


def there_and_back(root, fresh=None, known=frozenset(), name_of=lambda thing: None, external=None):
    """Through a file that is loaded without executing anything."""
    file = io.BytesIO()
    torch.save(write(root, name_of), file)
    file.seek(0)
    return read(torch.load(file, weights_only=True), fresh or {}, external, set(known), CPU)


def test_values():
    root = {
        "plain": [1, 2.5, "a", None, True],
        "kinds": (1, {2, 3}, frozenset({4}), deque([5]), range(2, 9, 3)),
        "dicts": OrderedDict(a=defaultdict(int, {1: 2})),
        "many": list(range(100)),
        "arrays": [np.arange(3.0), np.float64(2.0), torch.arange(3)],
        "torch": [torch.device("cpu"), torch.float16, torch.Size([2, 3])],
    }
    found = there_and_back(root)
    assert found["plain"] == root["plain"] and found["kinds"] == root["kinds"] and found["many"] == root["many"]
    assert found["dicts"] == root["dicts"] and found["dicts"]["a"][7] == 0 and type(found["dicts"]) is OrderedDict
    assert found["torch"] == root["torch"]
    assert np.array_equal(found["arrays"][0], np.arange(3.0)) and found["arrays"][2].tolist() == [0, 1, 2]


def test_shared_and_circular():
    shared = {"x": torch.zeros(2)}
    shared["self"] = shared
    found = there_and_back({"a": shared, "b": [shared]})
    assert found["a"] is found["b"][0] is found["a"]["self"]


def test_a_network_with_its_optimizer_and_a_copy_of_it():
    def made():
        network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        return {"network": network, "optimizer": torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)}

    root = made()
    for _ in range(2):
        root["network"](torch.randn(5, 3)).square().sum().backward()
        root["optimizer"].step()
    root["teacher"] = copy.deepcopy(root["network"])
    fresh = made()
    before = list(fresh["network"].parameters())
    found = there_and_back(root, fresh)
    assert all(a is b for a, b in zip(before, found["network"].parameters(), strict=True)), "in place"
    assert found["optimizer"].param_groups[0]["params"][0] is before[0]
    assert torch.equal(
        found["optimizer"].state[before[0]]["momentum_buffer"],
        root["optimizer"].state[next(root["network"].parameters())]["momentum_buffer"],
    )
    for name in ("network", "teacher"):
        wanted = root[name].state_dict()
        assert all(torch.equal(value, wanted[key]) for key, value in found[name].state_dict().items())
    assert next(found["teacher"].parameters()) is not before[0]
    found["teacher"](torch.randn(2, 3))


def test_hooks_of_the_fresh_network_stay():
    def made():
        network, calls = nn.Linear(2, 2), []
        network.register_forward_hook(lambda *_: calls.append(1))
        return network, calls

    fresh, calls = made()
    there_and_back({"network": made()[0]}, {"network": fresh})["network"](torch.zeros(1, 2))
    assert calls == [1]


def test_unread_generators_begin_anew_and_read_ones_are_refused():
    found = there_and_back({"loader": cycle([1, 2])})["loader"]
    assert [next(found) for _ in range(3)] == [1, 2, 1]
    begun = cycle([1, 2])
    next(begun)
    with pytest.raises(ValueError, match="read already"):
        write({"loader": begun}, lambda thing: None)


def test_a_generator_that_has_ended_has_no_beginning():
    begun, ended = cycle([1, 2]), (number for number in ())
    next(begun)
    assert next(again(begun)) == 1 and next(begun) == 2
    assert next(ended, "nothing") == next(again(ended), "nothing") == "nothing"


def test_classes_of_theirs_without_their_constructor():
    made = ParamData("w", (2, 2))
    found = there_and_back({"w": made})["w"]
    assert type(found) is ParamData and torch.equal(found.data, made.data) and found.init_function is torch.zeros


def test_things_of_the_run_are_named():
    run = object()
    found = there_and_back(
        {"a": [run]}, name_of=lambda thing: "run" if thing is run else None, external={"run": run}.__getitem__
    )
    assert found["a"][0] is run


class Mine:
    def __init__(self):
        raise AssertionError("constructors are not called")


def test_other_classes_only_where_the_fresh_graph_has_them():
    mine = Mine.__new__(Mine)
    mine.value = 3
    with pytest.raises(ValueError, match="Mine, which is not Avalanche's"):
        there_and_back({"a": mine})


@pytest.mark.parametrize(
    "node",
    [
        {"is": "named", "name": ["os", "system"]},
        {"is": "named", "name": ["builtins", "eval"]},
        {"is": "named", "name": ["avalanche.training.utils", "torch.load"]},
        {"is": "named", "name": ["cl.interop._snapshot", "read"]},
        {"is": "object", "class": ["subprocess", "Popen"], "attributes": {}},
        {"is": "object", "class": ["avalanche.models.utils", "nn.os.system"], "attributes": {}},
        {"is": "generator", "name": ["os", "walk"], "arguments": ["/"]},
        {"is": "generator", "name": ["avalanche.training.utils", "trigger_plugins"], "arguments": []},
        {"is": "member", "class": ["os", "system"], "name": "x"},
        {"is": "anything else"},
    ],
    ids=str,
)
def test_a_hostile_file_makes_nothing(node):
    import subprocess  # noqa: F401  (there to be found)

    with pytest.raises((ValueError, KeyError)):
        read({"root": {"a": [0]}, "nodes": [node]}, {}, {}.__getitem__, set(), CPU)
