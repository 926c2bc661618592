"""Where text comes from: local txt, line by line; local jsonl or parquet, or a hub id, through `datasets`."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from glob import escape
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from cl.core import UserError
from cl.hub import hub_address, hub_answers, offline
from streams._settings import is_positive, require_integer
from streams._shards import Piece
from streams._text_files import FORMATS, PACKED, digest, is_hidden, kind_of, lines


@dataclass(frozen=True)
class Domain:
    """One kind of text: where it is, and how much of it is trained on.

    Args:
        name: what tables and figures show; a column of R.
        path: a file (txt, jsonl, parquet; also packed, as .gz, .xz, .bz2, or .zst where the package zstandard is
            there), a folder of such files, without hidden ones, or a list; relative to data.root. Text is UTF-8.
        hub, config, split, revision: a data set on the hub.
        field: column with the text; a list of columns is joined by line ends.
        starts: regular expression of the rows (lines of a txt) with which a document begins; the others go on with the
            document before. Without it a txt file is one document, and so is every other row.
        eval_path, eval_split: text to measure on.
        eval_frac: share of the documents to measure on, where neither of the two is given.
        tokens: to train on; more than there are repeats the text, fewer take the first ones. None takes `passes`.
        passes: over the text.
        weight: share in a mixture, relative to the other domains in it; None takes every row as often as the others'.
    """

    name: str
    path: str | Sequence[str] | None = None
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    field: str | Sequence[str] = "text"
    starts: str | None = None
    eval_path: str | Sequence[str] | None = None
    eval_split: str | None = None
    eval_frac: float = 0.05
    tokens: int | None = None
    passes: int = 1
    weight: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise UserError(f"stream.domains has a name {self.name!r}; it must be a word")
        if (self.path is None) == (self.hub is None):
            raise UserError(
                f"domain {self.name!r} needs either `path` (local txt, jsonl or parquet) or `hub` (an id), not "
                f"{'none' if self.path is None else 'both'} of them"
            )
        for key, value in (("config", self.config), ("split", self.split), ("revision", self.revision)):
            if self.hub is None and value != getattr(Domain, key):
                raise UserError(
                    f"domain {self.name!r} has {key} {value!r}, which local files do not have; leave it out"
                )
        for key, words in (("path", self.path), ("eval_path", self.eval_path), ("field", self.field)):
            if not _is_words(words) and (words is not None or key == "field"):
                raise UserError(f"domain {self.name!r} has {key} {words!r}; it must be a string, or a list of them")
        if self.eval_split is not None and (self.path is not None or self.eval_split == self.split):
            raise UserError(
                f"domain {self.name!r} has eval_split {self.eval_split!r}, and would be measured on what it trains on; "
                "give another split of its hub id, or eval_path or eval_frac"
            )
        if not isinstance(self.eval_frac, int | float) or not 0 < self.eval_frac <= 0.5:
            raise UserError(f"domain {self.name!r} has eval_frac {self.eval_frac!r}; it must be in (0, 0.5]")
        if self.tokens is not None:
            require_integer(f"tokens of domain {self.name!r}", self.tokens)
        require_integer(f"passes of domain {self.name!r}", self.passes)
        if self.weight is not None and not is_positive(self.weight):
            raise UserError(f"domain {self.name!r} has weight {self.weight!r}; it must be a number above 0, or null")
        try:
            re.compile(self.starts or "")
        except (re.error, TypeError) as error:
            raise UserError(
                f"domain {self.name!r} has starts {self.starts!r}, no regular expression: {error}"
            ) from None

    @classmethod
    def of(cls, node: Any, where: str) -> Domain:
        """A domain from a config node.

        Raises:
            UserError: no mapping, an unknown key, or a value outside its range.
        """
        known = [each.name for each in fields(cls)]
        if not isinstance(node, Mapping):
            raise UserError(f"{where} is {node!r}; it must be a mapping such as {{name: news, path: news.jsonl}}")
        for key in node:
            if key not in known:
                raise UserError(f"{where} has no key {key!r}; its keys are {', '.join(known)}")
        if "name" not in node:
            raise UserError(f"{where} has no name; it needs one, such as {{name: news, path: news.jsonl}}")
        return cls(**node)


class Source:
    """The documents of one part of a domain.

    Args:
        part: "train" or "eval".
        root: folder that relative paths start from; None takes the working directory.
        download: fetch what is on the hub only.
        hashed: file -> digest of its bytes; sources that may share files share one that remembers.
    """

    def __init__(
        self, domain: Domain, part: str, root: str | None, download: bool, hashed: Callable[[Path], str] = digest
    ) -> None:
        self.domain, self.part, self.root, self.download, self.hashed = domain, part, root, download, hashed
        has_own = domain.eval_path is not None or domain.eval_split is not None
        self.paths = domain.eval_path if part == "eval" and domain.eval_path is not None else domain.path
        self.split = domain.eval_split if part == "eval" and domain.eval_split is not None else domain.split
        self.files = [] if self.paths is None else self._found(self.paths)
        # of the documents, to measure on
        self.share = None if has_own else domain.eval_frac

    def key(self) -> str:
        """Digest of everything that the documents depend on: local files by their bytes, the hub by its names."""
        domain = self.domain
        where = (
            [(self.hashed(file), kind_of(file)) for file in self.files]
            if self.files
            else [domain.hub, domain.config, self.split, domain.revision]
        )
        parts = (where, domain.field, domain.starts, self.share, self.part if self.share else "")
        return hashlib.sha256(json.dumps(parts, default=list).encode()).hexdigest()[:20]

    def places(self) -> list[str]:
        """Where its documents are, in the order in which they are counted."""
        domain = self.domain
        hub = f"{domain.hub}, {domain.config or 'no config'}, {self.split}"
        return [str(file.resolve()) for file in self.files] or [hub]

    def pieces(self) -> Iterator[Piece]:
        """Its text, read as it goes."""
        number, is_ours, is_any = -1, False, False
        for text, is_start in self._documents():
            if is_start:
                number += 1
                is_ours = self.share is None or _is_held_out(number, self.share) == (self.part == "eval")
            if is_ours:
                is_any = True
                yield text, is_start
        if self.part == "eval" and not is_any and number >= 0 and self.share:
            raise UserError(
                f"domain {self.domain.name!r} has {number + 1} documents, too few to hold out {self.share} of them; "
                "give it eval_path or eval_split, a larger eval_frac, or `starts` to cut its text into documents"
            )

    def _documents(self) -> Iterator[Piece]:
        starts = re.compile(self.domain.starts) if self.domain.starts else None
        for rows, is_text in self._tables():
            is_first, is_broken = True, True
            for text in rows:
                if starts is not None:
                    is_start = is_first or starts.search(text) is not None
                    yield (text if is_broken or is_start else "\n" + text), is_start
                elif text.strip() or is_text:
                    yield text, is_first or not is_text
                is_first, is_broken = False, text.endswith("\n")

    def _tables(self) -> Iterator[tuple[Iterator[str], bool]]:
        """Rows of each file, and whether they are lines."""
        if not self.files:
            yield self._column(self._hub_rows()), False
        for file in self.files:
            kind = kind_of(file)
            yield self._column(self._file_rows(file, kind)), kind == "text"

    def _column(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
        names = [self.domain.field] if isinstance(self.domain.field, str) else list(self.domain.field)
        num_missing = 0
        for row in rows:
            for name in names:
                if name not in row:
                    raise UserError(
                        f"domain {self.domain.name!r} has no field {name!r} in {self._where()}; its fields are "
                        f"{', '.join(map(str, row))}"
                    )
            values = [row[name] for name in names if row[name] is not None]
            if not all(isinstance(value, str) for value in values):
                raise UserError(f"domain {self.domain.name!r} has values that are no text in {'+'.join(names)}")
            num_missing += not values
            yield "\n".join(values)
        if num_missing:
            warnings.warn(
                f"domain {self.domain.name!r} has {num_missing} rows without {'+'.join(names)} in {self._where()}, "
                "which are left out",
                stacklevel=2,
            )

    def _where(self) -> str:
        return ", ".join(map(str, self.files[:2])) if self.files else str(self.domain.hub)

    # local files

    def _found(self, paths: str | Sequence[str]) -> list[Path]:
        wanted = [paths] if isinstance(paths, str) else list(paths)
        return [file for each in wanted for file in self._files(str(each))]

    def _files(self, wanted: str) -> list[Path]:
        path = Path(wanted).expanduser()
        if not path.is_absolute() and self.root is not None:
            path = Path(self.root).expanduser() / path
        if path.is_dir():
            every = (file for file in path.rglob("*") if kind_of(file) and not is_hidden(file, path))
            files = sorted(file for file in every if file.is_file())
        else:
            files = [path] if path.is_file() else []
        if not files:
            beside = "" if self.root else "; data.root is not set, so it is looked for from the working directory"
            raise UserError(f"domain {self.domain.name!r}: no txt, jsonl or parquet at {path}{beside}")
        for file in files:
            if kind_of(file) is None:
                raise UserError(
                    f"domain {self.domain.name!r}: {file} is of no known kind; it must end in "
                    f"{', '.join(FORMATS)}, or one of these and {', '.join(PACKED)}"
                )
            if file.suffix == ".zst" and find_spec("zstandard") is None:
                raise UserError(
                    f"domain {self.domain.name!r}: {file} is read by the package zstandard; `pip install zstandard`"
                )
        return files

    def _file_rows(self, file: Path, kind: str | None) -> Iterator[Mapping[str, Any]]:
        try:
            if kind == "text":
                yield from lines(file)
                return
            library = _library()  # before `offline`, which changes what is there
            # the library takes a path for a pattern, and counts its readers on a server, which a machine without a
            # network waits for
            with offline():
                rows = library.load_dataset(kind, data_files=[escape(str(file))], split="train", streaming=True)
            yield from rows
        except UserError:
            raise
        except StopIteration:  # what the library says of an empty file
            return
        except Exception as error:  # the library raises what its readers raise
            cause = str(error.__cause__ or error).splitlines() or [type(error).__name__]
            raise UserError(f"domain {self.domain.name!r}: {file} cannot be read as {kind}: {cause[0][:160]}") from None

    # the hub

    def _hub_rows(self) -> Iterator[Mapping[str, Any]]:
        """Streamed over the network when asked for, else what the hub's own cache on this machine holds.

        Raises:
            UserError: at once, where neither is possible; the sentence names the id, the local way and the flag.
        """
        _library()  # before `offline`, which changes what is there
        domain = self.domain
        way = (
            f"give domain {domain.name!r} local files with `path` and `eval_path` (txt, jsonl or parquet, relative to "
            "data.root)"
        )
        try:
            with offline():
                rows = _load(domain, self.split, streaming=False)
        except Exception:
            if not self.download:
                raise UserError(
                    f"data set {domain.hub} is not on this machine; {way}, or let it be fetched with data.download=true"
                ) from None
        else:
            yield from rows
            return
        if not hub_answers():
            raise UserError(
                f"data set {domain.hub} cannot be fetched: {hub_address()} does not answer; {way}"
            ) from None
        try:
            yield from _load(domain, self.split, streaming=True)
        except UserError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
            raise UserError(f"data set {domain.hub} cannot be fetched: {reason}; {way}") from None


def require_apart(trained: Sequence[Source], measured: Sequence[Source]) -> None:
    """Whether no document that is measured on is trained on, in its own domain or in another one.

    Raises:
        UserError: one is. Domains that hold out a part of the same text hold out the same documents where `path`,
            `starts` and `eval_frac` agree, and others where they do not.
    """
    cut = [[(source, (source.places(), source.domain.starts)) for source in part] for part in (trained, measured)]
    for (theirs, there), (ours, here) in product(*cut):
        shared = sorted({*here[0]} & {*there[0]})
        if not shared or (ours.share is not None and (ours.share, here) == (theirs.share, there)):
            continue
        what, way = shared[0], "give one of them other text"
        if ours.share is not None:
            what, way = f"documents of {what}", f"{way}, or both the same path, starts and eval_frac"
        raise UserError(
            f"domain {ours.domain.name!r} is measured on {what}, which domain {theirs.domain.name!r} trains on; {way}"
        )


def _is_words(value: object) -> bool:
    words = [value] if isinstance(value, str) else value
    return isinstance(words, Sequence) and len(words) > 0 and all(isinstance(word, str) and word for word in words)


def _is_held_out(number: int, share: float) -> bool:
    """Whether the document with this number is measured on: of every first n, share * n are, rounded down.

    Example:
        >>> [number for number in range(10) if _is_held_out(number, 0.4)]
        [2, 4, 7, 9]
    """
    return int((number + 1) * share + 1e-9) > int(number * share + 1e-9)


def _library() -> Any:
    """The library `datasets`, which tells of itself when it is imported."""
    logging.getLogger("datasets").setLevel(logging.WARNING)
    # its readers write a line about what they raise
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    import datasets

    return datasets


def _load(domain: Domain, split: str, streaming: bool) -> Any:
    return _library().load_dataset(
        domain.hub, domain.config, split=split, revision=domain.revision, streaming=streaming
    )
