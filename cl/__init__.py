"""Continual-learning experiments: streams, strategies, backbones, kernels, and the numbers that come out.

The commands live in `cl.cli`; in Python the road is

    from cl.trainer import Trainer
    result = Trainer(stream, backbone, strategies, optimizer=...).run()
"""

import importlib
import importlib.util
from pathlib import Path

__version__ = "0.1.0"


def _share_kernels_namespace() -> None:
    """Make our `kernels` folder importable beside a published package of the same name.

    Ours has no `__init__.py`, so a regular `kernels` package always wins the name and its other users
    (transformers) keep working; we only append our folder to its search path.
    """
    ours = Path(__file__).resolve().parent.parent / "kernels"
    if not ours.is_dir():
        return
    spec = importlib.util.find_spec("kernels")
    is_foreign = spec is not None and spec.origin is not None
    if is_foreign:
        path = importlib.import_module("kernels").__path__
        if str(ours) not in map(str, path):
            path.append(str(ours))


_share_kernels_namespace()
