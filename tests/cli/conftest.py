"""What tests of commands share."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from cl.cli.main import main


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of `words` and their `sentence` gets them from its module's REFUSED: a request in a line, what is said of
    it in the next, indented; lines that begin with # are headings."""
    if "sentence" in metafunc.fixturenames and hasattr(metafunc.module, "REFUSED"):
        lines = [line for line in metafunc.module.REFUSED.strip().splitlines() if not line.startswith("#")]
        requests, sentences = lines[::2], [line.strip() for line in lines[1::2]]
        assert not any(line.startswith(" ") for line in requests) and len(set(requests)) == len(sentences)
        metafunc.parametrize(
            ("words", "sentence"), [*zip(map(shlex.split, requests), sentences, strict=True)], ids=requests
        )


Refusal = Callable[[tuple[str, ...], str], None]


@pytest.fixture
def is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Checks that a command is answered, in an empty folder, by one sentence and exit code 2, and leaves nothing."""

    def check(words: tuple[str, ...], expected: str) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("CL_DATA_ROOT", raising=False)
        before = set(tmp_path.rglob("*"))
        assert main(words) == 2
        said = capsys.readouterr().err.strip()
        assert expected in said
        assert said.startswith("cl: ") and len(said.splitlines()) == 1, said
        assert "Traceback" not in said
        assert set(tmp_path.rglob("*")) == before, "a refused request left something behind"

    return check
