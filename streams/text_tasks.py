"""Text classification as questions and answers, task after task; answers are scored by likelihood or by generation.

Each task is a folder with `train.jsonl`, `test.jsonl` (fields text and label) and `labels.json`, the words to answer
with. `order=long` is the order of fifteen tasks of O-LoRA and GeRe, `order=order_1` to `order_3` are O-LoRA's of four;
of each the tasks that are there are taken.

Source: Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", 2023 (the fifteen tasks,
exact match of the generated label); likelihood over labels as in lm-evaluation-harness.
Differences: one template for all tasks, which lists the possible answers, where O-LoRA writes one per task.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cl.core import EvalSet, Experience, Setting, Stream, StreamInfo, UserError
from streams._answers import SCORES, Questions
from streams._documents import Domain, Source
from streams._language import general_rows
from streams._packing import as_ids
from streams._settings import require_choice, require_integer
from streams._shards import cache_folder, corpus_of
from streams._styles import Diversified, diversified, require_room
from streams._tokenizers import Bytes, Tokenizer, read_tokenizer, trained_bpe

ORDERS = {
    "long": (
        "yelp", "amazon", "mnli", "cb", "copa", "qqp", "rte", "imdb", "sst2", "dbpedia", "agnews", "yahoo", "multirc",
        "boolqa", "wic",
    ),
    "order_1": ("dbpedia", "amazon", "yahoo", "agnews"),
    "order_2": ("dbpedia", "amazon", "agnews", "yahoo"),
    "order_3": ("yahoo", "amazon", "agnews", "dbpedia"),
}  # fmt: skip
"""The sequences of O-LoRA's scripts, by name: fifteen tasks, and three orders of four."""
HOLD_OUT = 10
"""Every so many-th training row is measured on where settings are chosen."""
MANY_CUT = 0.1
"""A task of which a larger share is cut may lack what it asks, which often comes last, so a run says so."""
NO_LABEL = "-"
"""Rows on which those who were asked did not agree, as MNLI marks them; left out."""
TEMPLATE = "{text}\nOptions: {options}\nAnswer:"


@dataclass(frozen=True)
class Task:
    """Where a task is, and how much of it is used; its rows are read when they are asked for.

    Args:
        place: its folder.
        limits: rows to train and to measure on; None takes all.
        is_validated: every tenth row of train.jsonl is measured on, in place of test.jsonl.
    """

    name: str
    place: str
    labels: tuple[str, ...]
    limits: tuple[int | None, int | None]
    is_validated: bool = False

    def rows(self, is_train: bool) -> list[tuple[str, int]]:
        """Text and number of the right label.

        Raises:
            UserError: a row that is not as described, or none.
        """
        path = Path(self.place) / ("train.jsonl" if is_train or self.is_validated else "test.jsonl")
        every = _rows(path, self.labels)
        if self.is_validated:
            every = (row for number, row in enumerate(every) if (number % HOLD_OUT < HOLD_OUT - 1) == is_train)
        found = list(islice(every, self.limits[0 if is_train else 1]))
        if not found:
            raise UserError(f"task {self.name!r} is empty: {path} has no row")
        return found


def text_tasks(
    order: str | Sequence[str] = "long",
    folder: str = "text/tasks",
    score: str = "likelihood",
    tokenizer: str = "bytes",
    vocabulary: int = 4096,
    context: int = 256,
    train_rows: int | None = None,
    eval_rows: int | None = None,
    template: str = TEMPLATE,
    diversify: float = 0.0,
    general: Mapping[str, Any] | None = None,
    eval_on: str = "test",
    root: str | None = None,
    cache: str | None = None,
    download: bool = False,
) -> Stream:
    """Build the stream.

    Args:
        order: names of tasks, or a name of `ORDERS` for those of its tasks that are in the folder.
        folder: of the tasks; relative to `root`.
        score: "likelihood", or "generation", which also measures the share of well-formed answers (`format_valid`).
        tokenizer, vocabulary: as in `text_domains`; a BPE is trained on the first task.
        context: T, tokens of a row; the text of a longer question is cut at its end.
        train_rows, eval_rows: of each task, the first ones; None takes all.
        template: of a question; {text} and {options} are filled in. The answer follows after a blank.
        diversify: share of each task's training rows that are asked for another form of answer (SEFE takes 0.2).
        general: text that no task trains on, for strategies that anchor on it; keys as of a domain of `text_domains`.
        eval_on: "test"; or "validation", which measures on every tenth training row and trains on the others: for
            choosing settings.
        root: folder that a relative `folder` starts from.
        cache: folder for trained tokenizers; None takes `$CL_CACHE`, or cl-lab in the user's cache folder.
        download: fetch a tokenizer that is on the hub and not on this machine.

    Raises:
        UserError: a task that is not there or not as described, or a value outside its range.
    """
    require_choice("stream.score", score, tuple(SCORES))
    require_choice("stream.eval_on", eval_on, ("test", "validation"))
    require_integer("stream.context", context, smallest=8)
    for name, value in (("train_rows", train_rows), ("eval_rows", eval_rows)):
        if value is not None:
            require_integer(f"stream.{name}", value)
    if not isinstance(template, str) or "{text}" not in template:
        raise UserError(f"stream.template is {template!r}; it must hold {{text}}, and may hold {{options}}")
    if not isinstance(diversify, int | float) or isinstance(diversify, bool) or not 0 <= diversify <= 1:
        raise UserError(f"stream.diversify is {diversify!r}; it must be a number from 0 to 1")
    place = Path(folder).expanduser()
    if not place.is_absolute() and root is not None:
        place = Path(root).expanduser() / place
    limits, is_validated = (train_rows, eval_rows), eval_on == "validation"
    tasks = [_read(place, name, limits, is_validated) for name in _names(order, place, root)]
    first = [text for text, _ in tasks[0].rows(is_train=True)]
    chosen = _tokenizer(tokenizer, vocabulary, [*first, *map(_options, tasks)], cache, download)
    experiences, eval_sets, digest = [], [], hashlib.sha256()
    digest.update(f"{diversify}".encode() if diversify else b"")
    for number, task in enumerate(tasks):
        _room(task, chosen, context, template)
        if diversify > 0:
            require_room(task.labels, chosen, context)
        load = partial(_load, task, chosen, context, template, number, diversify)
        parts = [task.rows(is_train) for is_train in (True, False)]
        digest.update(json.dumps([task.labels, parts]).encode())
        experiences.append(Experience(number, task.name, task.name, partial(load, True), len(parts[0])))
        eval_sets.append(EvalSet(task.name, partial(load, False), len(parts[1]), score=SCORES[score]))
    info = StreamInfo(
        "text_tasks",
        Setting.CONTINUAL_PRETRAINING,
        (context,),
        chosen.vocabulary,
        len(tasks),
        separator=chosen.separator,
        tokenizer=chosen.digest,
    )
    anchors = None
    if general is not None:
        source = Source(Domain.of(general, "stream.general"), "train", root, download)
        source.share = None  # no task measures on it
        name = source.domain.name
        corpus = corpus_of(name, source.pieces(), chosen, cache_folder(cache), source.key(), source.domain.tokens)
        digest.update(corpus.content.encode())
        anchors = general_rows(name, corpus, context)
    return Stream(info, experiences, eval_sets, as_ids, content=digest.hexdigest(), general=anchors, codec=chosen)


def _names(order: str | Sequence[str], place: Path, root: str | None) -> list[str]:
    there = sorted(path.parent.name for path in place.glob("*/labels.json"))
    if not there:
        hint = "" if root else "; data.root is not set, so it is looked for from the working directory"
        raise UserError(f"no task in {place}: a task is a folder with train.jsonl, test.jsonl and labels.json{hint}")
    if isinstance(order, str) and order in ORDERS:
        found = [name for name in ORDERS[order] if name in there]
        if not found:
            raise UserError(f"none of the tasks {', '.join(ORDERS[order])} is in {place}; there are {', '.join(there)}")
        return found
    if isinstance(order, str) or not isinstance(order, Sequence) or not order:
        known = ", ".join(ORDERS)
        raise UserError(f"stream.order is {order!r}; it must be one of {known}, or a list such as [sst2,agnews]")
    for name in order:
        if name not in there:
            raise UserError(f"stream.order names {name!r}, which is not in {place}; there are {', '.join(there)}")
    if len(set(order)) != len(order):
        raise UserError(f"stream.order is {list(order)}; every task comes once")
    return list(order)


def _read(place: Path, name: str, limits: tuple[int | None, int | None], is_validated: bool) -> Task:
    try:
        labels = json.loads((place / name / "labels.json").read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{place / name / 'labels.json'} cannot be read: {error}") from None
    is_named = isinstance(labels, list) and all(isinstance(each, str) and each for each in labels)
    if not is_named or len(set(labels)) < max(2, len(labels)):
        raise UserError(f"{place / name / 'labels.json'} is no list of at least two different words")
    return Task(name, str(place / name), tuple(labels), limits, is_validated)


def _rows(path: Path, labels: Sequence[str]) -> Iterator[tuple[str, int]]:
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, label = row["text"], row["label"]
        except (ValueError, TypeError):
            raise UserError(f"{path}, line {number}, is no JSON object") from None
        except KeyError as error:
            raise UserError(f"{path}, line {number}, has no field {error}; it needs text and label") from None
        if not isinstance(text, str):
            raise UserError(f"{path}, line {number}, has the text {repr(text)[:80]}, which is no string")
        if label == NO_LABEL:
            continue
        if label not in labels:
            raise UserError(f"{path}, line {number}, has the label {label!r}; it must be one of {', '.join(labels)}")
        yield text, labels.index(label)


def _options(task: Task) -> str:
    return ", ".join(task.labels)


def _tokenizer(wanted: str, vocabulary: int, texts: Sequence[str], cache: str | None, download: bool) -> Tokenizer:
    if wanted == "bytes":
        return Bytes()
    if wanted != "bpe":
        return read_tokenizer(wanted, download)
    require_integer("stream.vocabulary", vocabulary, smallest=258)
    key = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:20]
    return trained_bpe(texts, vocabulary, cache_folder(cache), key)


def _load(
    task: Task,
    tokenizer: Tokenizer,
    context: int,
    template: str,
    experience_id: int,
    diversify: float,
    is_train: bool,
) -> Questions | Diversified:
    """The rows of a task, as tokens."""
    rows = task.rows(is_train)
    head, tail, answers, room = _room(task, tokenizer, context, template)
    texts = tokenizer.encode([text.strip() for text, _ in rows])
    num_cut = sum(len(tokens) > room for tokens in texts)
    if is_train and num_cut > MANY_CUT * len(texts):
        warnings.warn(
            f"task {task.name!r} has {num_cut} of {len(texts)} texts longer than stream.context={context} has room "
            "for; what stands at their end is not read",
            stacklevel=2,
        )
    end = np.array([tokenizer.separator])
    prompts = [np.concatenate((end, head, tokens[:room], tail)).astype(np.int32) for tokens in texts]
    labels = np.array([label for _, label in rows])
    found = Questions(prompts, labels, answers, task.labels, context, tokenizer, experience_id)
    return diversified(found, rows, diversify, tokenizer, context) if is_train and diversify > 0 else found


def _room(
    task: Task, tokenizer: Tokenizer, context: int, template: str
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], int]:
    """Tokens before and after the text of a question, those of the answers, and how many are left for the text.

    Raises:
        UserError: none are left.
    """
    before, after = template.replace("{options}", _options(task)).split("{text}", 1)
    head, tail = tokenizer.encode([before])[0], tokenizer.encode([after])[0]
    end = np.array([tokenizer.separator])
    answers = [np.concatenate((tokens, end)) for tokens in tokenizer.encode([f" {label}" for label in task.labels])]
    room = context + 1 - max(map(len, answers)) - len(head) - len(tail) - 1
    if room < 1:
        raise UserError(
            f"stream.context is {context}, too short for the options and the longest answer of task {task.name!r}; it "
            f"must be at least {context + 1 - room}"
        )
    return head, tail, answers, room
