"""Answers in several styles: some questions of a task are put so that they are answered in another form.

A model that is asked for one form only, experience after experience, unlearns the others (superficial forgetting); a
share of every task in other forms keeps them.

Source: answer style diversification of Chen et al., "SEFE", ICML 2025, with a fifth of every task. Differences: the
forms here are those that a classification has: yes or no, the letter of a choice, a sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from string import ascii_uppercase

import numpy as np
import torch
from torch import Tensor

from cl.core import IGNORED, Batch, UserError
from streams._answers import Questions
from streams._tokenizers import Tokenizer

Form = tuple[str, str]
"""What follows the text of a question, and the answer."""


def _yes_or_no(labels: Sequence[str], right: int, turn: int) -> Form:
    """Every other time another label than the right one is asked about."""
    asked = right if turn % 2 == 0 else (right + 1 + turn // 2 % (len(labels) - 1)) % len(labels)
    return f"\nIs it {labels[asked]}? Yes or no:", "yes" if asked == right else "no"


def _letter(labels: Sequence[str], right: int, turn: int) -> Form:
    """The order of the choices goes round."""
    order = [(turn + place) % len(labels) for place in range(len(labels))]
    choices = " ".join(f"{ascii_uppercase[place % 26]}. {labels[which]}" for place, which in enumerate(order))
    return f"\nChoices: {choices}\nLetter:", ascii_uppercase[order.index(right) % 26]


def _sentence(labels: Sequence[str], right: int, turn: int) -> Form:
    return f"\nOptions: {', '.join(labels)}\nIn a sentence:", f"The answer is {labels[right]}."


STYLES: Sequence[Callable[[Sequence[str], int, int], Form]] = (_yes_or_no, _letter, _sentence)


def changed_rows(num_rows: int, share: float) -> list[int]:
    """Rows that are put in another form, from all over a task.

    Example:
        >>> changed_rows(10, 0.2)
        [4, 9]
    """
    return [row for row in range(num_rows) if int((row + 1) * share + 1e-9) > int(row * share + 1e-9)]


@dataclass(frozen=True)
class Diversified:
    """The rows of a task, some of them in other forms, which come in turn.

    Args:
        questions: the task as it is measured.
        forms: of the changed rows, the tokens of the question and those of the answer, its end included.
    """

    questions: Questions
    forms: dict[int, tuple[np.ndarray, np.ndarray]]

    def __len__(self) -> int:
        return len(self.questions)

    def rows(self, index: Tensor) -> Batch:
        batch = self.questions.rows(index)
        for place, number in enumerate(index.tolist()):
            if number in self.forms:
                prompt, answer = self.forms[number]
                tokens = torch.from_numpy(np.concatenate((prompt, answer)))
                batch.inputs[place] = self.questions.tokenizer.separator
                batch.inputs[place, : len(tokens) - 1] = tokens[:-1]
                batch.targets[place] = IGNORED
                batch.targets[place, len(prompt) - 1 : len(tokens) - 1] = tokens[len(prompt) :].long()
        return batch


def diversified(
    questions: Questions, rows: Sequence[tuple[str, int]], share: float, tokenizer: Tokenizer, context: int
) -> Diversified:
    """Questions with a share of them in other forms.

    Args:
        rows: text and number of the right label of each question.
    """
    end, forms = np.array([tokenizer.separator]), {}
    for count, number in enumerate(changed_rows(len(rows), share)):
        text, label = rows[number]
        turn, which = divmod(count, len(STYLES))
        asked, answered = STYLES[which](questions.names, label, turn)
        body, tail, answer = tokenizer.encode([text.strip(), asked, f" {answered}"])
        room = _room(context, tail, answer)
        prompt = np.concatenate((end, body[:room], tail)).astype(np.int32)
        forms[number] = (prompt, np.concatenate((answer, end)).astype(np.int32))
    return Diversified(questions, forms)


def require_room(labels: Sequence[str], tokenizer: Tokenizer, context: int) -> None:
    """Whether every form of a question with these labels fits a row.

    Raises:
        UserError: one does not.
    """
    cases = [style(labels, right, turn) for style in STYLES for right in range(len(labels)) for turn in (0, 1)]
    room = min(_room(context, *tokenizer.encode([asked, f" {answered}"])) for asked, answered in cases)
    if room < 1:
        raise UserError(
            f"stream.context is {context}, too short for a question of stream.diversify with the options "
            f"{', '.join(labels)[:80]}; it must be at least {context + 1 - room}"
        )


def _room(context: int, tail: Sized, answer: Sized) -> int:
    """Tokens left for the text of a question, beside the separators at both ends."""
    return context + 1 - len(tail) - len(answer) - 2
