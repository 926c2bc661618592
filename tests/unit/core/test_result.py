"""`result.json`: complete, readable by anything, replaced in one step."""

import json
import math
import sys

import numpy as np
import pytest

from cl.result import Result, environment, replacing, write_text


def result(**changes):
    fields = {
        "stream": "s",
        "strategy": ["replay", "ewc"],
        "backbone": "mlp",
        "setting": "domain_incremental",
        "seed": 3,
        "experiences": ["a", "b"],
        "domains": ["a", "b"],
        "trained": [0, 1],
        "measure": "accuracy",
    }
    return Result(**(fields | changes))


def test_round_trip(tmp_path):
    one = result(R=[[0.5, None], [0.25, 1.0]], metrics={"final": 0.625}, status="done")
    one.save(tmp_path / "deep" / "result.json")
    assert Result.load(tmp_path / "deep" / "result.json") == one


def test_numbers_that_json_lacks_become_null(tmp_path):
    result(metrics={"bwt": math.nan, "fwt": math.inf}, R=[[math.nan]]).save(tmp_path / "result.json")
    text = (tmp_path / "result.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    content = json.loads(text)
    assert content["metrics"] == {"bwt": None, "fwt": None}
    assert content["R"] == [[None]]


def test_a_composition_is_one_label():
    assert result().label == "replay+ewc"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not a result file"),
        ("[]", "has schema 'list'"),
        ('{"schema": 99}', "has schema 99; this version reads schema 1"),
        ('{"schema": 1, "stream": "s"}', "is not a complete result"),
        ("\udc80", "is not a result file"),
    ],
)
def test_what_is_no_result_is_said_in_a_sentence(tmp_path, text, words):
    path = tmp_path / "result.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=words) as caught:
        Result.load(path)
    assert str(path) in str(caught.value)


def test_keys_of_later_versions_are_ignored(tmp_path):
    path = tmp_path / "result.json"
    result().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"later": 1}))
    assert Result.load(path).seed == 3


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_text(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cl.result.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_an_error_of_the_writer_is_told_as_it_was(tmp_path):
    path = tmp_path / "result.json"
    write_text(path, "old")
    with pytest.raises(TypeError, match="bytes-like"), replacing(path) as file:
        file.writelines([b"ne", "w"])
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_what_is_written_may_be_read_by_whom_any_new_file_may(tmp_path):
    write_text(tmp_path / "result.json", "{}")
    (tmp_path / "plain").touch()
    assert (tmp_path / "result.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_environment_says_where_a_number_comes_from():
    found = environment()
    assert found["versions"]["numpy"] == np.__version__
    assert found["system"] == sys.platform
    assert found["python"].count(".") == 2
