"""The nouns of the platform: a batch and its rows (`batches`), a stream and its experiences (`streams`)."""

from cl.core.batches import COLUMNS, Batch, Data, Output, Part, Source, TensorData
from cl.core.streams import (
    IGNORED,
    LARGEST_INTEGER,
    Answer,
    EvalSet,
    Experience,
    Order,
    Score,
    Setting,
    Stream,
    StreamInfo,
    UserError,
    as_stored,
    shuffled,
)

__all__ = [
    "COLUMNS",
    "IGNORED",
    "LARGEST_INTEGER",
    "Answer",
    "Batch",
    "Data",
    "EvalSet",
    "Experience",
    "Order",
    "Output",
    "Part",
    "Score",
    "Setting",
    "Source",
    "Stream",
    "StreamInfo",
    "TensorData",
    "UserError",
    "as_stored",
    "shuffled",
]
