"""Wrong arguments: one sentence that names the value and the allowed ones."""

from __future__ import annotations

import pytest

from cl.core import Setting, UserError
from cl.testing import toy_stream
from strategies.agem import Agem
from strategies.der import Der
from strategies.derpp import Derpp
from strategies.ewc import Ewc
from strategies.gem import Gem
from strategies.lwf import Lwf
from strategies.mas import Mas
from strategies.replay import Replay
from strategies.si import Si

WRONG = [
    (Replay, {"capacity": 0}, "replay.capacity is 0; it must be an integer of at least 1"),
    (Replay, {"capacity": 2.5}, "replay.capacity is 2.5; it must be an integer of at least 1"),
    (Replay, {"capacity": True}, "replay.capacity is True; it must be an integer of at least 1"),
    (
        Replay,
        {"capacity": 5, "replay_batch_size": 6},
        "replay.replay_batch_size is 6; it must be at most replay.capacity, 5",
    ),
    (
        Derpp,
        {"capacity": 5, "replay_batch_size": 6},
        "derpp.replay_batch_size is 6; it must be at most derpp.capacity, 5",
    ),
    (Replay, {"replay_batch_size": 0}, "replay.replay_batch_size is 0; it must be an integer of at least 1, or null"),
    (Replay, {"weight": -1}, "replay.weight is -1; it must be a finite number of at least 0"),
    (Replay, {"weight": float("nan")}, "replay.weight is nan; it must be a finite number of at least 0"),
    (Replay, {"policy": "lifo"}, "buffer policy is 'lifo'; the policies are class_balanced, experience_balanced"),
    (Replay, {"update": "never"}, "replay.update is 'never'; it must be one of step, experience_end"),
    (Replay, {"average": "mean"}, "replay.average is 'mean'; it must be one of source, row"),
    (Der, {"alpha": -0.1}, "der.alpha is -0.1; it must be a finite number of at least 0"),
    (Derpp, {"alpha": "big"}, "derpp.alpha is 'big'; it must be a finite number of at least 0"),
    (Derpp, {"beta": float("inf")}, "derpp.beta is inf; it must be a finite number of at least 0"),
    (Agem, {"memory": "ring"}, "agem.memory is 'ring'; it must be one of per_experience, one_batch"),
    (Agem, {"replay_batch_size": None}, "agem.replay_batch_size is None; it must be an integer of at least 1"),
    (Gem, {"margin": -1}, "gem.margin is -1; it must be a finite number of at least 0"),
    (Gem, {"ridge": 0}, "gem.ridge is 0; it must be a finite number above 0"),
    (Ewc, {"strength": -1}, "ewc.strength is -1; it must be a finite number of at least 0"),
    (Ewc, {"mode": "both"}, "ewc.mode is 'both'; it must be one of offline, online"),
    (Ewc, {"gamma": 0.9}, "ewc.gamma is 0.9; it must be 1 unless ewc.mode is online"),
    (Ewc, {"gamma": 1.1, "mode": "online"}, "ewc.gamma is 1.1; it must be at most 1"),
    (Ewc, {"labels": "false"}, "ewc.labels is 'false'; it must be one of true, sampled, all"),
    (Ewc, {"labels": "all", "convention": "avalanche"}, "ewc.labels is 'all'; it must be true when ewc.convention"),
    (Ewc, {"importance_rows": 0}, "ewc.importance_rows is 0; it must be an integer of at least 1, or null for all"),
    (Ewc, {"convention": "mine"}, "ewc.convention is 'mine'; it must be one of per_row, avalanche"),
    (Si, {"xi": 0}, "si.xi is 0; it must be a finite number above 0"),
    (Si, {"convention": "mine"}, "si.convention is 'mine'; it must be one of van_de_ven, zenke, avalanche"),
    (Mas, {"mix": 1}, "mas.mix is 1; it must be below 1"),
    (Lwf, {"temperature": 0}, "lwf.temperature is 0; it must be a finite number above 0"),
    (Lwf, {"convention": "mine"}, "lwf.convention is 'mine'; it must be one of plain, hinton"),
]


@pytest.mark.parametrize(("strategy", "arguments", "sentence"), WRONG)
def test_wrong_arguments_are_named(strategy, arguments, sentence):
    with pytest.raises(UserError) as found:
        strategy(**arguments)
    assert str(found.value).startswith(sentence)
    assert "\n" not in str(found.value)


def test_text_has_no_classes_to_balance():
    stream = toy_stream(Setting.CONTINUAL_PRETRAINING)
    Replay(policy="experience_balanced").check(stream)
    with pytest.raises(UserError, match=r"replay.policy is 'ring'; it must be reservoir or experience_balanced in"):
        Replay(policy="ring").check(stream)
