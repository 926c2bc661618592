"""From corpora to a stream of packed text: which domains each experience trains on, in which shares and how long."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from cl.core import Data, EvalSet, Experience, Setting, Stream, StreamInfo, UserError, shuffled
from streams._packing import Mixed, Packed, as_ids, pass_by_pass, require_windows, text_bytes
from streams._settings import is_positive
from streams._shards import Corpus
from streams._tokenizers import Tokenizer

MANY_PASSES = 4
"""Text repeated more often than this teaches little new (Muennighoff et al., 2023), so a run says so."""


@dataclass(frozen=True)
class Text:
    """A domain, tokenised.

    Args:
        train: None for a domain that is measured only.
        general: rows for strategies to anchor on, of a domain that is measured only.
        tokens, passes, weight: as in `Domain`.
    """

    name: str
    train: Corpus | None
    held_out: Corpus
    tokens: int | None = None
    passes: int = 1
    weight: float | None = None
    general: Corpus | None = None


Entry = str | Sequence[str] | Mapping[str, float]
"""One experience: a domain, several in the shares of their own weights, or several with a weight each."""


def language_stream(
    name: str,
    setting: Setting,
    texts: Sequence[Text],
    order: Sequence[Entry] | None,
    tokenizer: Tokenizer,
    context: int,
    eval_tokens: int | None,
) -> Stream:
    """The stream that trains on `order` and measures every text, those without training rows included.

    Args:
        setting: continual_pretraining; said by each family of streams, where `cl list` reads it.
        order: one entry per experience; None takes every domain once, as listed. A domain may come again.
        eval_tokens: measured of each text, in rows from all over it; None takes all.

    Raises:
        UserError: an order that names no domain, or a domain too short for one row.
    """
    by_name = {text.name: text for text in texts}
    if len(by_name) != len(texts):
        raise UserError(
            f"stream.domains names {_twice([t.name for t in texts])!r} twice; every domain has its own name"
        )
    trainable = {text.name: text for text in texts if text.train is not None}
    entries = list(trainable) if order is None else order
    planned = [_shares(entry, trainable) for entry in entries]
    if not planned:
        raise UserError("stream.order is empty; it must name at least one domain")
    first_seen: dict[str, int] = {}
    experiences = []
    for number, (entry, shares) in enumerate(zip(entries, planned, strict=True)):
        for domain in shares:
            first_seen.setdefault(domain, number)
        visits = sum(earlier == shares for earlier in planned[:number])
        is_dealt = isinstance(entry, Mapping)
        experiences.append(_experience(number, shares, is_dealt, visits, trainable, first_seen, context))
    eval_sets = []
    for text in texts:
        windows = require_windows(text.name, text.held_out, context)
        count = windows if eval_tokens is None else min(windows, -(-eval_tokens // context))
        load = partial(Packed, text.held_out, context, count, spread_over=windows)
        eval_sets.append(EvalSet(text.name, load, count, text_bytes(load(), text.held_out, tokenizer)))
    info = StreamInfo(
        name,
        setting,
        (context,),
        tokenizer.vocabulary,
        len(experiences),
        measure="loss",
        separator=tokenizer.separator,
        tokenizer=tokenizer.digest,
    )
    anchors = [general_rows(text.name, text.general, context) for text in texts if text.general is not None]
    general = anchors[0] if anchors else None
    return Stream(info, experiences, eval_sets, as_ids, content=_content(texts), general=general, codec=tokenizer)


def general_rows(name: str, corpus: Corpus, context: int) -> partial[Packed]:
    """What `Stream.general` is for a corpus."""
    require_windows(name, corpus, context)
    return partial(Packed, corpus, context)


def _twice(names: Sequence[str]) -> str:
    return next(name for name in names if names.count(name) > 1)


def _content(texts: Sequence[Text]) -> str:
    parts = [
        corpus.content for text in texts for corpus in (text.train, text.held_out, text.general) if corpus is not None
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def require_order(order: object) -> None:
    """Raise `UserError` for what is no list of experiences."""
    if order is not None and (isinstance(order, str) or not isinstance(order, Sequence)):
        raise UserError(f"stream.order is {order!r}; it must be a list of domains, such as [news,code]")
    for entry in order or ():
        if not isinstance(entry, str | Sequence | Mapping):
            raise UserError(
                f"stream.order holds {entry!r}; an experience is a domain, a list of domains, or a mapping from domain "
                "to weight"
            )


def _shares(entry: Entry, texts: Mapping[str, Text]) -> dict[str, float | None]:
    """The domains of an experience and their weights."""
    if isinstance(entry, Mapping):
        shares: dict[str, float | None] = dict(entry)
    else:
        names = [entry] if isinstance(entry, str) else list(entry)
        shares = {name: texts[name].weight if name in texts else None for name in names}
    for name, weight in shares.items():
        if name not in texts:
            raise UserError(f"stream.order names {name!r}, no domain to train on; the domains are {', '.join(texts)}")
        if weight is not None and not is_positive(weight):
            raise UserError(f"stream.order gives {name!r} the weight {weight!r}; it must be a number above 0")
    if not shares:
        raise UserError("stream.order has an experience without domains; it must name at least one")
    if len({weight is None for weight in shares.values()}) > 1:
        raise UserError(
            f"stream.order mixes {', '.join(shares)}, of which only some have a weight; give all of them one"
        )
    return shares


def _experience(
    number: int,
    shares: Mapping[str, float | None],
    is_dealt: bool,
    visits: int,
    texts: Mapping[str, Text],
    first_seen: Mapping[str, int],
    context: int,
) -> Experience:
    new = [name for name in shares if first_seen[name] == number]
    windows = {name: require_windows(name, _train(texts[name]), context) for name in shares}
    full = {name: _num_rows(texts[name], windows[name], context) for name in shares}
    rows = full
    if len(shares) > 1 and None not in shares.values():
        # a list takes what all its domains have, weights in the order itself deal out what the new ones have
        total = sum(full[name] for name in (new if is_dealt and new else shares))
        weights = {name: float(weight or 0) for name, weight in shares.items()}
        rows = {name: max(1, round(total * weights[name] / sum(weights.values()))) for name in shares}
    for name in shares:
        if rows[name] > MANY_PASSES * windows[name]:
            warnings.warn(
                f"experience {number} trains {rows[name] / windows[name]:.1f} times on the text of {name}", stacklevel=2
            )
    parts = [partial(Packed, _train(texts[name]), context, rows[name], first_seen[name]) for name in shares]
    if len(shares) > 1:
        # some rows of an old domain are from all over what was trained then, and others in another experience
        parts = [
            part if name in new else partial(part, spread_over=min(windows[name], full[name]), shift=number)
            for name, part in zip(shares, parts, strict=True)
        ]
    title = "+".join(shares) + (f" ({visits + 1})" if visits else "")
    order = pass_by_pass(next(iter(windows.values()))) if len(shares) == 1 else shuffled
    return Experience(
        number,
        title,
        # a mixture teaches what is new in it, and all of itself where that is not one domain
        new[0] if len(new) == 1 else "+".join(shares),
        partial(_load, parts),
        sum(rows.values()),
        order=order,
        practises=tuple(shares) if len(shares) > 1 else (),
    )


def _train(text: Text) -> Corpus:
    assert text.train is not None
    return text.train


def _num_rows(text: Text, num_windows: int, context: int) -> int:
    """Rows that a domain is trained on when it comes: its budget in tokens, or its passes."""
    return text.passes * num_windows if text.tokens is None else max(1, -(-text.tokens // context))


def _load(parts: Sequence[Callable[[], Packed]]) -> Data:
    loaded = [part() for part in parts]
    return loaded[0] if len(loaded) == 1 else Mixed(loaded)
