"""Published numbers on real MNIST, 3 seeds, exact protocols: what `cl reproduce` says of each claim.

Needs MNIST in torchvision's layout in `CL_DATA_ROOT`, or beside the repository in ../shared/data.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from cl.cli import listing
from cl.cli.main import main
from cl.cli.reproduce import read_claims

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("CL_DATA_ROOT", ROOT.parent / "shared" / "data"))
CLAIMS = {entry.name: read_claims(entry.name, entry.line) for entry in listing.experiments()}
AFFORDABLE = sorted(name for name, claims in CLAIMS.items() if claims and not claims[0].is_expensive)

# the same stream, or the same strategy on another one, is among those that CI runs
REST = [
    "mnist360_er_500",
    "rehearsal_exponential",
    "rehearsal_power_law_tenth",
    "scole_mnist_masked",
    "scole_mnist_sgd",
]
"""Affordable, but together as long as all others: only `make test-all` runs these."""
COVER = [name for name in AFFORDABLE if name not in REST]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DATA / "MNIST" / "raw").is_dir(), reason=f"no MNIST in {DATA}; set CL_DATA_ROOT"),
]


@pytest.mark.parametrize("names", [COVER, pytest.param(REST, marks=pytest.mark.grid)], ids=["cover", "rest"])
def test_every_affordable_claim_holds(
    names: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(AFFORDABLE) >= 20 and set(REST) < set(AFFORDABLE)
    code = main(("reproduce", *names, f"data.root={DATA}", "tracking=none", "seeds=3", "page=page.md"))
    capsys.readouterr()
    said = Path("page.md").read_text()
    claims = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| ")][2:]
    assert code == 0, said
    assert {claim[0] for claim in claims} == set(names)
    assert {claim[5] for claim in claims} <= {"holds", "differs", "not asserted"}, said
