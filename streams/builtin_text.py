"""Text that every Python carries, no download: documentation, then source code, then sums told in words.

English to Python is a weak shift, both to arithmetic a strong one: a model of half a million weights forgets measurably
in a minute (docs/language.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from cl.core import Setting, Stream, UserError
from streams import _builtin_sources as sources
from streams._language import Entry, Text, language_stream, require_order
from streams._settings import require_choice, require_flag, require_integer
from streams._shards import Piece, cache_folder, corpus_of
from streams._tokenizers import Bytes, Subwords, trained_bpe

DOMAINS: dict[str, Callable[[], Iterator[str]]] = {
    "docs": sources.docs,
    "code": sources.code,
    "arithmetic": sources.arithmetic,
}

VOCABULARY = 1024


def builtin_text(
    order: Sequence[Entry] | None = None,
    tokenizer: str = "bytes",
    vocabulary: int = VOCABULARY,
    context: int = 128,
    train_tokens: int | Mapping[str, int] | None = None,
    eval_tokens: int | None = 32_768,
    general: bool = True,
    eval_on: str = "test",
    cache: str | None = None,
) -> Stream:
    """Build the stream; about 1.4, 3.7 and 2.0 million bytes of docs, code and arithmetic.

    Args:
        order: the experiences, as in `text_domains`; None takes docs, code, arithmetic.
        tokenizer: "bytes", or "bpe" trained on the documentation.
        vocabulary: tokens of a trained BPE.
        context: T, tokens of a row.
        train_tokens: of each domain, or a mapping from domain to its own; more than there are repeats the text, and
            None takes one pass.
        eval_tokens: measure on so many tokens of each domain, from all over its held-out text; None takes all.
        general: also measure on text that no experience trains on: what every other compiled module says of itself. The
            others' is there for strategies that anchor on general text (`Stream.general`).
        eval_on: "test"; or "validation", which measures on documents that are otherwise trained on, and leaves those
            of the test alone: for choosing settings.
        cache: folder for tokenised text; None takes `$CL_CACHE`, or cl-lab in the user's cache folder.

    Raises:
        UserError: a value outside its range.
    """
    require_integer("stream.context", context)
    require_order(order)
    require_flag("stream.general", general)
    require_choice("stream.eval_on", eval_on, ("test", "validation"))
    budgets = train_tokens if isinstance(train_tokens, Mapping) else dict.fromkeys(DOMAINS, train_tokens)
    for name in budgets:
        require_choice("a key of stream.train_tokens", name, tuple(DOMAINS))
    for name, value in (("eval_tokens", eval_tokens), *((f"train_tokens of {key}", v) for key, v in budgets.items())):
        if value is not None:
            require_integer(f"stream.{name}", value, smallest=context + 1)
    folder, key = cache_folder(cache), sources.version_key()
    if tokenizer == "bytes":
        if vocabulary != VOCABULARY:
            raise UserError(
                f"stream.vocabulary is {vocabulary!r}, which nothing has while stream.tokenizer is 'bytes'; "
                f"it must be {VOCABULARY} unless stream.tokenizer is bpe"
            )
        chosen: Bytes | Subwords = Bytes()
    elif tokenizer == "bpe":
        require_integer("stream.vocabulary", vocabulary, smallest=258)
        read = _part(sources.docs(), is_train=True, eval_on="test")
        chosen = trained_bpe((text for text, _ in read), vocabulary, folder, key)
    else:
        raise UserError(f"stream.tokenizer is {tokenizer!r}; it must be bytes or bpe")
    texts = []
    for name, documents in DOMAINS.items():
        taught, measured = (
            corpus_of(name, _part(documents(), is_train, eval_on), chosen, folder, f"{key}-{name}-{is_train}-{eval_on}")
            for is_train in (True, False)
        )
        texts.append(Text(name, taught, measured, tokens=budgets.get(name)))
    if general:
        anchors, measured = (
            corpus_of("general", _alternate(first), chosen, folder, f"{key}-general-{first}") for first in (0, 1)
        )
        texts.append(Text("general", None, measured, general=anchors))
    sources.library.cache_clear()
    setting = Setting.CONTINUAL_PRETRAINING
    return language_stream("builtin_text", setting, texts, order, chosen, context, eval_tokens)


def _alternate(first: int) -> Iterator[Piece]:
    """Every other document of the general text."""
    yield from ((text, True) for number, text in enumerate(sources.general()) if number % 2 == first)


def _part(documents: Iterable[str], is_train: bool, eval_on: str) -> Iterator[Piece]:
    """Of every 16 documents the last is the test, and the one before it the validation where that is measured on."""
    test = sources.HOLD_OUT - 1
    held_out, unused = (test, None) if eval_on == "test" else (test - 1, test)
    for number, text in enumerate(documents):
        place = number % sources.HOLD_OUT
        if place != unused and (place != held_out) == is_train:
            yield text, True
