"""Local files of text: their kinds, their lines and their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cl.core import UserError

FORMATS = {".txt": "text", ".text": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
PACKED = (".gz", ".zst", ".xz", ".bz2")


def kind_of(file: Path) -> str | None:
    """What it is read as, by the end of its name; None for what is no text."""
    suffix = file.with_suffix("").suffix if file.suffix in PACKED else file.suffix
    return FORMATS.get(suffix)


def lines(file: Path) -> Iterator[Mapping[str, Any]]:
    """Lines of a txt, with their ends; the library `datasets` takes four times as long."""
    from fsspec.core import OpenFile
    from fsspec.implementations.local import LocalFileSystem
    from fsspec.utils import infer_compression

    # a byte order mark is no text
    with OpenFile(LocalFileSystem(), str(file), "rt", infer_compression(str(file)), "utf-8-sig") as opened:
        for line in opened:
            yield {"text": line}


def is_hidden(file: Path, folder: Path) -> bool:
    """Whether it is what programs keep there for themselves, such as the copies of text in `.ipynb_checkpoints`."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def digest(file: Path) -> str:
    """sha256 of its bytes."""
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
