"""A tokenizer as the files that transformers reads one from, `read_tokenizer` too, with the same tokens."""

from __future__ import annotations

import json
from pathlib import Path

from streams._tokenizers import END_NAMES, Bytes, Subwords


def write_tokenizer(folder: Path, tokenizer: Bytes | Subwords) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`; the separator is the end of a text there."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library

    content = tokenizer.content if isinstance(tokenizer, Subwords) else _single_bytes()
    library = Library.from_str(content)
    end = library.id_to_token(tokenizer.separator)
    if end is None:
        end = next(name for name in END_NAMES if library.token_to_id(name) is None)
        library.add_special_tokens([AddedToken(end, special=True, normalized=False)])
        content = library.to_str(pretty=True)
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(told, indent=1) + "\n")


def _single_bytes() -> str:
    """Subwords of one byte each, numbered as the bytes."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    library = Library(models.BPE({letter: byte for byte, letter in enumerate(byte_letters())}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    text: str = library.to_str(pretty=True)
    return text


def byte_letters() -> list[str]:
    """The letter that byte-level tokenizers write for each byte: itself where it can be seen, else the next one free.

    Example:
        >>> letters = byte_letters()
        >>> letters[104], letters[32], len(set(letters))
        ('h', 'Ġ', 256)
    """
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    free = iter(range(256, 512))
    return [chr(byte if byte in seen else next(free)) for byte in range(256)]
