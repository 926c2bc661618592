"""Every config in configs/stream/ builds a stream that keeps the contract.

Streams over embedded data run always; those over a data root where it is there, and marked slow.
"""

import inspect
import os
from pathlib import Path
from typing import Any

import pytest

from cl.core import UserError
from cl.testing import Config, StreamContract, configs
from cl.testing.plugins import camel_case

ROOT = Path(__file__).resolve().parents[2]
DATA_ROOT = os.environ.get("CL_DATA_ROOT") or str(ROOT.parent / "shared" / "data")


def given(config: Config) -> dict[str, Any]:
    """The config's own arguments; skips the test when the data of a stream inside it are not on this machine."""
    try:
        return config.arguments(seed=0, data={"root": DATA_ROOT, "download": False})
    except UserError as error:
        # only absent data are a reason; a config that is wrong must fail
        if "data.root" not in str(error):
            raise
        pytest.skip(str(error))


def contract_of(config: Config) -> type[StreamContract]:
    """A test class for one config, built with the config's own arguments."""
    make = config.target()
    # drawing rows shows that the seed arrives, also where the classes come in a fixed order
    seeded_by = {"train_rows": 400} if "train_rows" in inspect.signature(make).parameters else {}
    # every loading turns all images anew
    few = {"train_rows": 6000} if config.name == "mnist360" else {}
    arguments = property(lambda self: given(config) | few)
    members = {"make": staticmethod(make), "seeded_by": seeded_by, "arguments": arguments}
    if "root" in config.node:
        is_absent = pytest.mark.skipif(not Path(DATA_ROOT).is_dir(), reason=f"no data in {DATA_ROOT}")
        members["pytestmark"] = [pytest.mark.slow, is_absent]
    return type(f"Test{camel_case(config.name.replace('/', '_'))}", (StreamContract,), members)


for found in configs("stream"):
    contract = contract_of(found)
    globals()[contract.__name__] = contract
del contract
