"""Text domains one after another, packed into rows of tokens: continual pretraining, measured by loss.

Every domain comes from local txt, jsonl or parquet, or from a hub id; it is tokenised once, into memory-mapped shards
with a manifest and a content hash. Documents are packed without padding, and attention and recurrent state start anew
at each (`StreamInfo.separator`). TRC2, C4 then WikiText-103 then GSM8K, is `stream=trc2`.

Source: order and packing after the protocols of Ibrahim et al., "Simple and Scalable Strategies to Continually
Pre-train Large Language Models", 2024, and of TRC2 (Khadangi, 2026).
Differences: the separator stands before a document and belongs to it, so that the first token of a document is
predicted from nothing, where most code predicts it from the document before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from cl.core import Setting, Stream, UserError
from streams._documents import Domain, Source, require_apart
from streams._language import Entry, Text, language_stream, require_order
from streams._settings import require_integer
from streams._shards import SHARD_TOKENS, Corpus, cache_folder, corpus_of
from streams._text_files import digest
from streams._tokenizers import Bytes, Tokenizer, read_tokenizer, trained_bpe

BPE_CHARS = 20_000_000
"""A BPE is trained on so much of the first domain at most."""


def text_domains(
    domains: Sequence[Mapping[str, Any]],
    name: str = "text_domains",
    order: Sequence[Entry] | None = None,
    general: Mapping[str, Any] | None = None,
    tokenizer: str = "bytes",
    vocabulary: int = 4096,
    context: int = 256,
    eval_tokens: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    root: str | None = None,
    cache: str | None = None,
    download: bool = False,
) -> Stream:
    """Build the stream; text is tokenised the first time, and found in the cache from then on.

    Args:
        domains: what there is, each a mapping with the keys of `streams._documents.Domain`: name, path or hub, ...
        name: what results are reported under.
        order: the experiences: names of domains, `[a, b]` for a mixture by the domains' weights, `{a: 0.05, b: 0.95}`
            for one by these weights, of as many tokens as its new domains have, each share rounded to whole rows and at
            least one. None takes every domain once.
            `[[a], [a, b]]` is the cumulative reference, `[[a, b]]` the joint one, at as many tokens as the domains have
            together.
        general: one more domain, which is measured and never trained on. With an eval_path, eval_split or eval_frac of
            its own, the rest of it is there for strategies that anchor on general text (`Stream.general`).
        tokenizer: "bytes", "bpe" (trained on the first domain of the order), or a model's own: its folder, its
            tokenizer.json or its hub id.
        vocabulary: tokens of a trained BPE.
        context: T, tokens of a row.
        eval_tokens: measure on so many tokens of each domain, from all over its held-out text (of hub data, the first
            ones); None takes all.
        shard_tokens: size of the files that tokenised text is kept in; a document must fit one.
        root: folder that relative paths of domains start from.
        cache: folder for tokenised text; None takes `$CL_CACHE`, or cl-lab in the user's cache folder.
        download: fetch what is on the hub and not on this machine.

    Raises:
        UserError: a domain that cannot be had, is empty or lacks its field, or a value outside its range.
    """
    require_integer("stream.context", context)
    require_integer("stream.shard_tokens", shard_tokens, smallest=context + 1)
    if eval_tokens is not None:
        require_integer("stream.eval_tokens", eval_tokens, smallest=context + 1)
    if not isinstance(domains, Sequence) or isinstance(domains, str) or not domains:
        raise UserError(f"stream.domains is {domains!r}; it must be a list such as [{{name: news, path: news.jsonl}}]")
    require_order(order)
    known = [Domain.of(node, f"stream.domains[{number}]") for number, node in enumerate(domains)]
    extra = [] if general is None else [Domain.of(general, "stream.general")]
    folder = cache_folder(cache)
    # both parts of a domain, and its tokenizer, may be made of one file; for this stream only, as files may change
    hashed = lru_cache(maxsize=None)(digest)

    def sources(part: str, which: Sequence[Domain]) -> list[Source]:
        return [Source(domain, part, root, download, hashed) for domain in which]

    train, held_out = sources("train", known), sources("eval", [*known, *extra])
    has_own = extra and (extra[0].eval_path is not None or extra[0].eval_split is not None)
    if extra and not has_own and "eval_frac" not in (general or {}):
        held_out[-1].share = None  # nothing of it is trained on, so all of it can be measured
    anchored = sources("train", extra) if held_out[-1].share is not None or has_own else []
    require_apart([*train, *anchored], held_out)
    chosen = _chosen(tokenizer, vocabulary, known, train, order, folder, download)

    def corpus(source: Source, limit: int | None) -> Corpus:
        # of data that may be endless, no more is fetched than is used
        few = limit if source.domain.hub else None
        return corpus_of(source.domain.name, source.pieces(), chosen, folder, source.key(), few, shard_tokens)

    texts = [
        Text(d.name, corpus(ours, d.tokens), corpus(theirs, eval_tokens), d.tokens, d.passes, d.weight)
        for d, ours, theirs in zip(known, train, held_out, strict=False)
    ]
    for source in held_out[len(known) :]:
        anchors = corpus(anchored[0], extra[0].tokens) if anchored else None
        texts.append(Text(source.domain.name, None, corpus(source, eval_tokens), general=anchors))
    return language_stream(name, Setting.CONTINUAL_PRETRAINING, texts, order, chosen, context, eval_tokens)


def _chosen(
    wanted: str,
    vocabulary: int,
    domains: Sequence[Domain],
    sources: Sequence[Source],
    order: Sequence[Entry] | None,
    cache: Any,
    download: bool,
) -> Tokenizer:
    if wanted == "bytes":
        return Bytes()
    if wanted != "bpe":
        return read_tokenizer(wanted, download)
    require_integer("stream.vocabulary", vocabulary, smallest=258)
    first = order[0] if order else domains[0].name
    names = [first] if isinstance(first, str) else list(first)
    # a name that is none is refused later, with the names that are
    ours = next((source for source in sources if source.domain.name in names), sources[0])
    return trained_bpe(_texts(ours), vocabulary, cache, ours.key())


def _texts(source: Source) -> Iterator[str]:
    """The first part of a domain's training text."""
    chars = 0
    for text, _ in source.pieces():
        yield text
        chars += len(text)
        if chars >= BPE_CHARS:
            return
