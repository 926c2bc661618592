"""Text to tokens and back: bytes, subwords trained on the first domain, or a model's own.

No special token can be written in text: documents are kept apart by a `separator`, a token that the encoders never
make, however the text looks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cl.core import UserError
from streams._settings import unwritable

if TYPE_CHECKING:
    import tokenizers

END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
"""Tokens that end a document in known models, looked for where a tokenizer's folder does not say which one does."""


class Tokenizer(Protocol):
    """What streams need of a tokenizer.

    Attributes:
        digest: agrees exactly for tokenizers that make the same tokens.
        vocabulary: number of tokens, the separator included.
        separator: token that stands before every document.
        token_bytes: (vocabulary,) UTF-8 bytes that each token stands for; None where a token does not say.
    """

    digest: str
    vocabulary: int
    separator: int

    @property
    def token_bytes(self) -> np.ndarray | None: ...

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, tokens: Iterable[int]) -> str: ...


class Bytes:
    """UTF-8 bytes as they are, and a separator.

    Example:
        >>> tokenizer = Bytes()
        >>> tokenizer.encode(["hé"])[0].tolist(), tokenizer.decode([104, 195, 169, 256])
        ([104, 195, 169], 'hé')
    """

    digest = "bytes"
    vocabulary = 257
    separator = 256

    @cached_property
    def token_bytes(self) -> np.ndarray:
        return np.append(np.ones(256, np.int64), 0)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8", "replace"), np.uint8) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode("utf-8", "replace")


class Subwords:
    """A tokenizer of the `tokenizers` library.

    Args:
        content: of its file, JSON.
        separator: token that is there for it already; None adds one behind the others.
    """

    def __init__(self, content: str, separator: int | None = None) -> None:
        from tokenizers import Tokenizer as Library

        self.content = content
        self._library: tokenizers.Tokenizer = Library.from_str(content)
        self._library.no_truncation()
        self._library.no_padding()
        # text that spells a special token is text
        self._library.encode_special_tokens = True
        # some vocabularies leave numbers out, and are as long as their last one says
        size = max(self._library.get_vocab().values(), default=-1) + 1
        self.separator = size if separator is None else separator
        self.vocabulary = size + (separator is None)
        self.digest = hashlib.sha256(f"{self.separator}\n{content}".encode()).hexdigest()[:16]
        self._is_byte_level = _has_byte_level(json.loads(content))

    @cached_property
    def token_bytes(self) -> np.ndarray | None:
        if not self._is_byte_level:
            return None
        # a byte-level token is written with one letter per byte
        sizes = np.zeros(self.vocabulary, np.int64)
        added = self._library.get_added_tokens_decoder()
        for letters, token in self._library.get_vocab().items():
            if token not in added:
                sizes[token] = len(letters)
            elif not added[token].special:
                # written as the text that it is, such as the runs of spaces of GPT-NeoX
                sizes[token] = len(added[token].content.encode())
        return sizes

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, np.uint32) for each in found]

    def decode(self, tokens: Iterable[int]) -> str:
        known = [int(token) for token in tokens if token != self.separator]
        text: str = self._library.decode(known, skip_special_tokens=True)
        return text


def _has_byte_level(content: dict[str, Any]) -> bool:
    decoder = content.get("decoder") or {}
    return "ByteLevel" in [decoder.get("type"), *(each.get("type") for each in decoder.get("decoders", ()))]


def trained_bpe(texts: Iterable[str], vocabulary: int, cache: Path, key: str) -> Subwords:
    """Byte-level byte-pair encoding, trained on `texts` or read from an earlier training on the same.

    Args:
        vocabulary: tokens wanted, the separator included; a small text may give fewer.
        key: digest of the texts; names the file together with the vocabulary.

    Source: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016, on bytes as in GPT-2.
    """
    from cl.result import write_text

    path = cache / "tokenizers" / f"bpe-{vocabulary}-{key}.json"
    if not path.is_file():
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, models, pre_tokenizers, trainers

        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary - 1,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        library.train_from_iterator(texts, trainer)
        try:
            write_text(path, library.to_str())
        except OSError as error:
            raise unwritable(path.parent, error) from None
    return Subwords(path.read_text())


def read_tokenizer(name: str, download: bool) -> Subwords:
    """A model's own tokenizer: a `tokenizer.json`, the folder that holds it, or the hub id of the model.

    Raises:
        UserError: it cannot be found or read, or does not say which token ends a document.
    """
    if not isinstance(name, str) or not name:
        raise UserError(f"stream.tokenizer is {name!r}; it must be bytes, bpe, or a folder, file or hub id")
    path = Path(name).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        if path.is_dir() or path.suffix == ".json":
            raise UserError(f"stream.tokenizer is {name!r}, and {file} is not there; it must be a tokenizer.json")
        file = fetched(name, "tokenizer.json", download)
    try:
        content = file.read_text()
        library = Subwords(content)._library
        ends = _declared_ends(file, name, download)
    except UserError:
        raise
    except Exception as error:  # the library raises bare exceptions
        raise UserError(f"stream.tokenizer is {name!r}, but {file} cannot be read: {str(error)[:120]}") from None
    for end in (*ends, *END_NAMES):
        token = library.token_to_id(end)
        if token is not None:
            return Subwords(content, token)
    return Subwords(content)


def _declared_ends(file: Path, name: str, download: bool) -> list[str]:
    """The end-of-text token that `tokenizer_config.json` beside the tokenizer names."""
    beside = file.with_name("tokenizer_config.json")
    if not beside.is_file():
        if Path(name).expanduser().exists():
            return []
        beside = fetched(name, "tokenizer_config.json", download)
    end = json.loads(beside.read_text()).get("eos_token")
    return [end["content"] if isinstance(end, dict) else end] if end else []


def fetched(name: str, file: str, download: bool) -> Path:
    """A file of a model on the hub, from the hub's cache on this machine or over the network."""
    from huggingface_hub import hf_hub_download

    from cl.hub import hub_address, hub_answers, offline

    try:
        with offline():
            return Path(hf_hub_download(name, file, local_files_only=True))
    except Exception:  # absent, or no id at all: the sentences below say so
        pass
    way = "give a folder with its tokenizer.json as stream.tokenizer"
    if not download:
        raise UserError(
            f"stream.tokenizer is {name!r}: no folder here, and not in the hub's cache; {way}, or let it be fetched "
            "with data.download=true; bytes and bpe need neither"
        )
    if not hub_answers():
        raise UserError(
            f"tokenizer {name} cannot be fetched: {hub_address()} does not answer; {way}, or take bytes or bpe"
        )
    try:
        return Path(hf_hub_download(name, file))
    except Exception as error:
        raise UserError(f"tokenizer {name} cannot be fetched: {str(error).splitlines()[0]}; {way}") from None
