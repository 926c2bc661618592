"""The wheel, installed where nothing of the clone is in sight, also beside a foreign package named `kernels`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source") / "cl-lab"
    skipped = shutil.ignore_patterns(".git", ".venv", "runs", "tests", "benchmarks", "__pycache__", "mlartifacts")
    shutil.copytree(ROOT, source, ignore=skipped)
    out = tmp_path_factory.mktemp("wheel")
    # hatchling is installed with the development extra, so nothing is fetched
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


class Installed:
    """A fresh environment that sees this one's libraries, but not its editable install of the clone."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.python = folder / "bin" / "python"
        self.site = Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
        # a path file's own path files are not read, so the editable install stays out of sight
        (self.site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(self, *words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        environment["OMP_NUM_THREADS"] = "1"
        return subprocess.run(
            [str(self.python), *map(str, words)], capture_output=True, text=True, cwd=cwd, env=environment, check=True
        )

    def install(self, wheel: Path) -> None:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--no-index",
                "--target",
                self.site,
                wheel,
            ],
            check=True,
            capture_output=True,
        )


@pytest.fixture
def installed(tmp_path: Path, wheel: Path) -> Installed:
    environment = Installed(tmp_path / "venv")
    environment.install(wheel)
    return environment


def test_runs_from_an_empty_folder(installed: Installed, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    found = installed.run("-c", "import cl, configs, streams; print(cl.__file__, configs.__file__)", cwd=empty)
    assert all(str(installed.site) in path for path in found.stdout.split())
    assert "permuted_mnist" in installed.run("-m", "cl", "list", "streams", cwd=empty).stdout
    words = ("compare", "strategies=naive,replay", "seeds=1", "debug=tiny", "limit_experiences=1", "out=out")
    said = installed.run("-m", "cl", *words, cwd=empty).stdout
    assert "report: out/report/report.html" in said
    assert (empty / "out" / "replay" / "seed-0" / "result.json").is_file()
    assert (empty / "mlruns.db").is_file()


def test_kernels_live_beside_a_foreign_package_of_that_name(installed: Installed, tmp_path: Path) -> None:
    """The foreign package keeps its name and its contents; ours is found under it, wherever it lies."""
    foreign = tmp_path / "elsewhere" / "kernels"
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("def get_kernel():\n    return 'foreign'\n")
    code = (
        f"import sys; sys.path.insert(0, {str(foreign.parent)!r})\n"
        "import cl, kernels\n"
        "from kernels.linear_scan import linear_scan\n"
        "import torch\n"
        "h, last = linear_scan(torch.full((1, 3, 1), 0.5), torch.ones(1, 3, 1))\n"
        "print(kernels.get_kernel(), h.flatten().tolist())"
    )
    assert installed.run("-c", code, cwd=tmp_path).stdout.split(" ", 1) == ["foreign", "[1.0, 1.5, 1.75]\n"]


def test_kernels_installed_into_the_foreign_package_s_own_folder(installed: Installed, tmp_path: Path) -> None:
    (installed.site / "kernels" / "__init__.py").write_text("def get_kernel():\n    return 'foreign'\n")
    code = "import cl, kernels; from kernels.linear_scan import linear_scan as ours\n"
    code += "print(kernels.get_kernel(), ours.__name__)"
    assert installed.run("-c", code, cwd=tmp_path).stdout.strip() == "foreign linear_scan"


def test_the_wheel_brings_no_foreign_top_level_names(wheel: Path) -> None:
    import zipfile

    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {
        "cl",
        "configs",
        "kernels",
        "strategies",
        "streams",
    }
    files = zipfile.ZipFile(wheel).namelist()
    assert "kernels/__init__.py" not in files and "configs/__init__.py" in files
    assert "configs/strategy/replay.yaml" in files and "cl/report/assets/report.css" in files
