"""Modules forget unequally: the ranking of `cl explain sensitivity=100` on split MNIST, as it was measured."""

import os
from pathlib import Path

import pytest

from cl.cli.compose import composed, plain
from cl.cli.sensitivity import measured
from cl.metrics.sensitivity import ranked, sensitivity

DATA = Path(os.environ.get("CL_DATA_ROOT", Path(__file__).resolve().parents[3] / "shared" / "data"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DATA / "MNIST" / "raw").is_dir(), reason=f"no MNIST in {DATA}; set CL_DATA_ROOT"),
]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_output_layer_first_input_layer_last(seed: int) -> None:
    words = ["+experiment=split_mnist_sgd", f"data.root={DATA}", "tracking=none", f"seed={seed}"]
    snapshots = measured(plain(composed("run", words)), every=100)
    # measured for one seed, late from step 600: 33.6, 13.5 and 5.6; biases 61.5, 25.0 and 10.6
    assert snapshots.late_from in (5, 6)
    values = sensitivity(snapshots.changes, snapshots.late_from)
    out, second, first = (values[f"{name}.weight"] for name in ("head", "body.3", "body.1"))
    assert out > second > first
    assert out / first > 3
    assert all(values[f"{name}.bias"] > values[f"{name}.weight"] for name in ("head", "body.3", "body.1"))
    assert ranked(sensitivity(snapshots.by_module, snapshots.late_from)) == ["head", "body.3", "body.1"]
