"""Networks. A backbone is built for a stream, maps a `Batch` to an `Output`, and leaves its last layer to a head.

One file, one backbone, one config; files whose names start with an underscore are what backbones share.
"""

from cl.backbones._heads import Backbone, MultiHead, Stage, commit_all
from cl.backbones._saved import load_backbone, save_backbone

__all__ = ["Backbone", "MultiHead", "Stage", "commit_all", "load_backbone", "save_backbone"]
