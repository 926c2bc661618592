"""Questions with a set of possible answers: rows to train on, and two ways to measure whether a model knows.

likelihood: every possible answer is appended to the question, and the one with the largest probability counts.
generation: the model writes, greedily, until it ends its answer; what it wrote must be the answer, letter by letter.
A model that has only forgotten how to answer (superficial forgetting) keeps its accuracy by likelihood and loses its
share of well-formed answers (`format_valid`); one that has forgotten what the answer is (essential) loses both.

A row is `s question answer s s ... s`: the separator s begins it, ends the answer and fills the rest; only the answer
and the separator that ends it are learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cl.core import IGNORED, Answer, Batch, Data
from streams._tokenizers import Tokenizer


@dataclass(frozen=True)
class Questions:
    """Rows of one task.

    Args:
        prompts: tokens of each question, the separator in front included, cut so that every answer fits.
        labels: number of the right answer to each.
        answers: tokens of each possible answer, the separator that ends it included.
        names: the possible answers as text.
        context: T, tokens of a row.
        tokenizer: turns what a model writes into text.
    """

    prompts: Sequence[np.ndarray]
    labels: np.ndarray
    answers: Sequence[np.ndarray]
    names: Sequence[str]
    context: int
    tokenizer: Tokenizer
    experience_id: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Tensor) -> Batch:
        numbers = index.tolist()
        return self.answered(numbers, [int(self.labels[number]) for number in numbers])

    def answered(self, numbers: Sequence[int], answers: Sequence[int]) -> Batch:
        """Questions, each with the answer given."""
        inputs = np.full((len(numbers), self.context), self.tokenizer.separator, np.int32)
        targets = np.full((len(numbers), self.context), IGNORED, np.int64)
        for row, (number, answer) in enumerate(zip(numbers, answers, strict=True)):
            start = len(self.prompts[number])
            tokens = np.concatenate((self.prompts[number], self.answers[answer]))
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            targets[row, start - 1 : len(tokens) - 1] = tokens[start:]
        return Batch(
            torch.from_numpy(inputs),
            torch.from_numpy(targets),
            torch.full((len(numbers),), self.experience_id),
            torch.tensor(numbers, dtype=torch.int64),
        )


def shortened(rows: Batch) -> Batch:
    """The same rows without the tokens behind their last one to learn, which no model that reads forward looks at."""
    length = int((rows.targets != IGNORED).any(0).nonzero()[-1]) + 1
    rows.inputs, rows.targets = rows.inputs[:, :length], rows.targets[:, :length]
    return rows


def by_likelihood(data: Data, answer: Answer, num_rows: int, batch_size: int) -> dict[str, float]:
    """Share of questions whose right answer has the largest probability of all answers.

    log p(answer | question) = sum_t log p(token_t | question, tokens before t), the end of the answer included.
    """
    assert isinstance(data, Questions)
    num_answers, right = len(data.answers), 0
    # questions of like length together, so that few read far beyond their end
    order = sorted(range(num_rows), key=lambda number: len(data.prompts[number]))
    step = max(1, batch_size // num_answers)
    for low in range(0, num_rows, step):
        numbers = order[low : low + step]
        pairs = [(number, which) for number in numbers for which in range(num_answers)]
        rows = shortened(data.answered([number for number, _ in pairs], [which for _, which in pairs]))
        logits = answer(rows).logits
        # a row's own loss, tokens that are not asked for left out
        losses = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), rows.targets.to(logits.device), reduction="none", ignore_index=IGNORED
        )
        best = losses.double().sum(1).view(-1, num_answers).argmin(1).cpu().numpy()
        right += int((best == data.labels[numbers]).sum())
    return {"accuracy": right / num_rows}


def by_generation(data: Data, answer: Answer, num_rows: int, batch_size: int) -> dict[str, float]:
    """Share of questions answered letter by letter, and the share of answers that are any of the possible ones."""
    assert isinstance(data, Questions)
    right = valid = 0
    for low in range(0, num_rows, batch_size):
        numbers = list(range(low, min(low + batch_size, num_rows)))
        for number, text in zip(numbers, written(data, answer, numbers), strict=True):
            right += text == data.names[int(data.labels[number])]
            valid += text in data.names
    return {"accuracy": right / num_rows, "format_valid": valid / num_rows}


def written(data: Questions, answer: Answer, numbers: Sequence[int]) -> list[str]:
    """What a model answers, greedily, to each question; cut after as many tokens as the longest answer has."""
    separator = data.tokenizer.separator
    batch = data.answered(numbers, [0] * len(numbers))
    tokens = torch.full_like(batch.inputs, separator)
    ends = torch.tensor([len(data.prompts[number]) for number in numbers])
    for row, number in enumerate(numbers):
        tokens[row, : ends[row]] = torch.from_numpy(data.prompts[number].astype(np.int32))
    each = torch.arange(len(numbers))
    is_done = torch.zeros(len(numbers), dtype=torch.bool)
    texts: list[list[int]] = [[] for _ in numbers]
    for _ in range(max(map(len, data.answers))):
        logits = answer(Batch(tokens, batch.targets, batch.experience_id, batch.sample_ids)).logits
        following = logits[each.to(logits.device), (ends - 1).to(logits.device)].argmax(-1).cpu()
        is_done |= following == separator
        for row in (~is_done).nonzero().flatten().tolist():
            texts[row].append(int(following[row]))
            if ends[row] < data.context:
                tokens[row, ends[row]] = following[row]
                ends[row] += 1
            else:
                is_done[row] = True
        if bool(is_done.all()):
            break
    return [data.tokenizer.decode(tokens_of).strip() for tokens_of in texts]


SCORES = {"likelihood": by_likelihood, "generation": by_generation}
