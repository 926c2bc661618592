"""Tokenised text on disk: written once, read through memory maps, so that no length of text takes memory.

A corpus is a folder: `manifest.json` and shards, flat files of token ids. Every shard begins and ends with the
separator and holds whole documents, `s d1 s d2 s ... s dn s`: a token follows only what is in its own document, and the
end of every document is predicted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cl.core import UserError
from cl.result import write_text
from streams._settings import unwritable
from streams._tokenizers import Tokenizer

FORMAT = 3
SHARD_TOKENS = 1 << 26
BATCH_CHARS = 1 << 20
"""Text is tokenised so many characters at a time."""

Piece = tuple[str, bool]
"""Some text, and whether a document begins with it."""


@dataclass(frozen=True)
class Corpus:
    """A tokenised text.

    Args:
        folder: where its shards are.
        shards: file and number of tokens of each.
        dtype: of the ids, which are below `vocabulary`.
        num_bytes: UTF-8 bytes of the text.
        content: sha256 of all ids.
    """

    folder: str
    shards: tuple[tuple[str, int], ...]
    dtype: str
    vocabulary: int
    num_documents: int
    num_tokens: int
    num_bytes: int
    content: str

    def tokens(self, number: int) -> np.ndarray:
        """The ids of shard `number`, mapped and not read."""
        file, count = self.shards[number]
        return np.memmap(Path(self.folder) / file, np.dtype(self.dtype), "r", shape=(count,))

    def decoded(self, tokenizer: Tokenizer) -> Iterator[str]:
        """Its documents as text again."""
        for number in range(len(self.shards)):
            tokens = self.tokens(number)
            ends = np.flatnonzero(tokens == tokenizer.separator)
            for low, high in pairwise(ends):
                yield tokenizer.decode(tokens[low + 1 : high].tolist())


def cache_folder(wanted: str | None) -> Path:
    """Where tokenised text is kept: as asked, or `$CL_CACHE`, or the user's cache folder."""
    if wanted is not None:
        return Path(wanted).expanduser().absolute()
    if os.environ.get("CL_CACHE"):
        return Path(os.environ["CL_CACHE"]).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "cl-lab"


def corpus_of(
    name: str,
    pieces: Iterable[Piece],
    tokenizer: Tokenizer,
    cache: Path,
    key: str,
    limit: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Corpus:
    """The corpus that `key` stands for: found in the cache, or tokenised from `pieces` and put there.

    Args:
        name: of the domain, for sentences.
        key: digest of everything that the tokens depend on, but for `limit` and the tokenizer.
        limit: take documents until there are so many tokens; None takes all.

    Raises:
        UserError: no text, a document longer than a shard, or a cache that cannot be written.
    """
    parts = (FORMAT, key, tokenizer.digest, limit, shard_tokens)
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]
    folder = cache / "corpora" / f"{_file_name(name)}-{digest}"
    found = _opened(folder)
    if found is not None:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unfinished-"))
    except OSError as error:
        raise unwritable(folder.parent, error) from None
    try:
        _Writer(name, unfinished, tokenizer, limit, shard_tokens).write(pieces)
        if _opened(folder) is None:  # absent or damaged; where another process was faster, its own stays
            shutil.rmtree(folder, ignore_errors=True)
        try:
            os.replace(unfinished, folder)
        except OSError:
            if _opened(folder) is None:
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    written = _opened(folder)
    if written is None:
        raise UserError(f"{folder} was written but cannot be read back; is the disk full?")
    return written


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)[:40]


def _opened(folder: Path) -> Corpus | None:
    """The corpus in a folder; None when there is none, or a damaged one, which is then written again."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        corpus = Corpus(str(folder), tuple(map(tuple, manifest.pop("shards"))), **manifest)
        width = np.dtype(corpus.dtype).itemsize
        is_whole = all((folder / file).stat().st_size == width * count for file, count in corpus.shards)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return corpus if is_whole else None


class _Writer:
    """Turns pieces of text into the files of a corpus; holds one document at a time."""

    def __init__(self, name: str, folder: Path, tokenizer: Tokenizer, limit: int | None, shard_tokens: int) -> None:
        self.name, self.folder, self.tokenizer = name, folder, tokenizer
        self.limit, self.shard_tokens = limit, shard_tokens
        self.dtype = np.dtype(np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.uint32)
        self.separator = np.array([tokenizer.separator], self.dtype).tobytes()
        self.shards: list[tuple[str, int]] = []
        self.document: list[np.ndarray] = []
        self.document_tokens = self.document_bytes = 0
        self.num_documents = self.num_tokens = self.num_bytes = 0
        self.digest = hashlib.sha256()

    def write(self, pieces: Iterable[Piece]) -> None:
        """All pieces, then the manifest."""
        self._file: BinaryIO | None = None
        self._count = 0
        try:
            for batch in _batches(_joined(pieces)):
                for tokens, (text, is_start) in zip(self.tokenizer.encode([t for t, _ in batch]), batch, strict=True):
                    if is_start:
                        self._end_document()
                        if self.limit is not None and self.num_tokens >= self.limit:
                            return self._finish()
                    self._add(tokens, text)
            self._end_document()
            self._finish()
        finally:
            if self._file is not None:
                self._file.close()

    def _add(self, tokens: np.ndarray, text: str) -> None:
        self.document.append(tokens.astype(self.dtype))
        self.document_tokens += len(tokens)
        self.document_bytes += len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
        if self.document_tokens + 2 > self.shard_tokens:
            raise UserError(
                f"domain {self.name!r} has a document of more than {self.shard_tokens - 2} tokens, which does not fit "
                "a shard; give the domain `starts`, a regular expression of the lines that begin a document, or raise "
                "stream.shard_tokens"
            )

    def _end_document(self) -> None:
        if self.document_tokens:
            if self._count + self.document_tokens + 2 > self.shard_tokens:
                self._end_shard()
            self._put(self.separator, 1)
            for tokens in self.document:
                self._put(tokens.tobytes(), len(tokens))
            self.num_documents += 1
            self.num_bytes += self.document_bytes
        self.document, self.document_tokens, self.document_bytes = [], 0, 0

    def _put(self, content: bytes, count: int) -> None:
        if self._file is None:
            self._file = open(self.folder / f"shard-{len(self.shards):05d}.bin", "wb")  # noqa: SIM115
        self._file.write(content)
        self.digest.update(content)
        self._count += count
        self.num_tokens += count

    def _end_shard(self) -> None:
        if self._file is not None:
            self._put(self.separator, 1)
            self._file.close()
            self.shards.append((Path(self._file.name).name, self._count))
        self._file, self._count = None, 0

    def _finish(self) -> None:
        self._end_shard()
        if not self.num_documents:
            raise UserError(f"domain {self.name!r} is empty: there is no text in it; look at its path, field and split")
        corpus = Corpus(
            folder="",
            shards=tuple(self.shards),
            dtype=self.dtype.name,
            vocabulary=self.tokenizer.vocabulary,
            num_documents=self.num_documents,
            num_tokens=self.num_tokens,
            num_bytes=self.num_bytes,
            content=self.digest.hexdigest(),
        )
        manifest = asdict(corpus)
        del manifest["folder"]
        write_text(self.folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def _joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same text in as few pieces as `BATCH_CHARS` allows, none of two documents.

    Tokenizers look across lines: many begin every text that they are given with a blank, and know empty lines.
    """
    parts: list[str] = []
    chars, is_first = 0, True
    for text, is_start in pieces:
        if parts and (is_start or chars >= BATCH_CHARS):
            yield "".join(parts), is_first
            parts, chars = [], 0
        is_first = is_first if parts else is_start
        parts.append(text)
        chars += len(text)
    if parts:
        yield "".join(parts), is_first


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    chars = 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece[0])
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
