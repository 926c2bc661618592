"""What tests of commands share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cl.cli.main import main

Refusal = Callable[[tuple[str, ...], str], None]


@pytest.fixture
def is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Checks that a command is answered, in an empty folder, by one sentence and exit code 2, and leaves no run."""

    def check(words: tuple[str, ...], expected: str) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("CL_DATA_ROOT", raising=False)
        assert main(words) == 2
        said = capsys.readouterr().err.strip()
        assert expected in said
        assert said.startswith("cl: ") and len(said.splitlines()) == 1, said
        assert "Traceback" not in said
        assert not list(tmp_path.rglob("result.json")), "a refused run left a result behind"
        assert not list(tmp_path.rglob("*.pt"))

    return check
