"""Questions and answers: rows by hand, both ways to score against models whose answers are known."""

import json
import math
import warnings
from functools import partial

import pytest
import torch

from cl.backbones.gpt import Gpt
from cl.config import TrainerConfig
from cl.core import IGNORED, Output, UserError
from cl.testing import StreamContract
from cl.tracking.points import points
from cl.trainer import Trainer
from strategies.naive import Naive
from strategies.replay import Replay
from streams._answers import by_generation, by_likelihood, written
from streams._tokenizers import Bytes
from streams.text_tasks import ORDERS, text_tasks

COLOURS = [("grass", "green"), ("snow", "white"), ("milk", "white"), ("leaf", "green")]
SIZES = [("mouse", "small"), ("whale", "very large")]


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("CL_CACHE", str(tmp_path / "cache"))
    for name, rows, labels in (("sst2", COLOURS, ["green", "white"]), ("amazon", SIZES, ["small", "very large"])):
        folder = tmp_path / "text" / "tasks" / name
        folder.mkdir(parents=True)
        (folder / "labels.json").write_text(json.dumps(labels))
        content = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
        (folder / "train.jsonl").write_text(content * 8)
        (folder / "test.jsonl").write_text(content)
    return tmp_path


def built(root, **options):
    return text_tasks(root=str(root), **({"context": 64} | options))


class TestTextTasks(StreamContract):
    make = staticmethod(text_tasks)

    @pytest.fixture(autouse=True)
    def _files(self, root):
        self.arguments = {"root": str(root), "context": 48, "order": ["sst2", "amazon"]}


def test_long_order_takes_the_tasks_that_are_there(root):
    assert [each.name for each in built(root).experiences] == ["amazon", "sst2"]
    assert [each.name for each in built(root, order=["sst2", "amazon"]).experiences] == ["sst2", "amazon"]
    long, *four = ORDERS.values()
    assert len(long) == 15 and long[:3] == ("yelp", "amazon", "mnli") and long[-1] == "wic"
    assert all(set(order) == {"dbpedia", "amazon", "yahoo", "agnews"} <= set(long) for order in four)
    assert [each.name for each in built(root, order="order_2").experiences] == ["amazon"]


def test_validation_rows_are_taken_from_training_and_leave_the_test_alone(root):
    lines = [json.dumps({"text": f"{number}", "label": "green"}) for number in range(25)]
    (root / "text" / "tasks" / "sst2" / "train.jsonl").write_text("\n".join(lines) + "\n")
    stream = built(root, order=["sst2"], eval_on="validation")
    asked = [
        [answered(data.rows(torch.arange(len(data))), row)[0].split("\n")[0].strip("|") for row in range(len(data))]
        for data in (stream.eval_sets[0].load(), stream.experiences[0].load())
    ]
    assert asked[0] == ["9", "19"]
    assert asked[1] == [str(number) for number in range(25) if number not in (9, 19)]


def answered(rows, row):
    """Question and answer of a row as text; the separator is shown as |."""
    learnt = rows.targets[row] >= 0
    first = int(learnt.nonzero()[0])
    shown = [124 if token == 256 else token for token in rows.inputs[row, : first + 1].tolist()]
    answer = [124 if token == 256 else token for token in rows.targets[row][learnt].tolist()]
    assert torch.equal(rows.inputs[row, first + 1 : first + len(answer)].long(), rows.targets[row][learnt][:-1])
    assert (rows.inputs[row, first + len(answer) :] == 256).all()
    return bytes(shown).decode(), bytes(answer).decode()


def test_a_share_of_the_rows_is_answered_in_other_forms(root):
    plain, mixed = (built(root, order=["amazon"], context=96, diversify=share) for share in (0.0, 0.5))
    data, usual = mixed.experiences[0].load(), plain.experiences[0].load()
    assert len(data) == len(usual) == mixed.experiences[0].num_samples
    rows, before = (each.rows(torch.arange(len(each))) for each in (data, usual))
    same = [torch.equal(rows.inputs[n], before.inputs[n]) for n in range(len(data))]
    assert same == [n % 2 == 0 for n in range(len(data))]
    texts = [text for text, _ in SIZES * 8]
    right = [label for _, label in SIZES * 8]
    other = {"small": "very large", "very large": "small"}
    for count, n in enumerate(range(1, len(data), 2)):
        question, answer = answered(rows, n)
        turn, label = count // 3, right[n]
        if count % 3 == 0:
            asked = label if turn % 2 == 0 else other[label]
            wanted = (f"Is it {asked}? Yes or no:", "yes" if asked == label else "no")
        elif count % 3 == 1:
            first, second = ("small", "very large") if turn % 2 == 0 else ("very large", "small")
            wanted = (f"Choices: A. {first} B. {second}\nLetter:", "A" if label == first else "B")
        else:
            wanted = ("Options: small, very large\nIn a sentence:", f"The answer is {label}.")
        assert question == f"|{texts[n].strip()}\n{wanted[0]}"
        assert answer == f" {wanted[1]}|"
    measured = [each.eval_sets[0].load().rows(torch.arange(2)).inputs for each in (mixed, plain)]
    assert torch.equal(*measured), "what is measured keeps its form"
    assert mixed.content != plain.content


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"diversify": 2}, "stream.diversify is 2"),
        ({"diversify": 0.5, "context": 60}, "60, too short for a question of stream.diversify with the options small,"),
    ],
)
def test_bad_diversity_is_one_sentence(root, options, words):
    with pytest.raises(UserError, match=words):
        built(root, order=["amazon"], **options)


def test_general_text_is_there_to_anchor_on(root):
    (root / "web.txt").write_text("some words from the web, and then some more\n" * 40)
    with_text, without = built(root, general={"name": "web", "path": "web.txt"}), built(root)
    rows = with_text.general().rows(torch.tensor([0]))
    assert rows.inputs.shape == rows.targets.shape == (1, *with_text.info.input_shape)
    assert (rows.targets >= 0).all() and torch.equal(rows.inputs[0, 1:].long(), rows.targets[0, :-1])
    assert without.general is None and with_text.content != without.content


def test_a_row_is_question_answer_and_the_answer_alone_is_learnt(root):
    rows = built(root, order=["sst2"]).experiences[0].load().rows(torch.tensor([1]))
    question, answer = b"snow\nOptions: green, white\nAnswer:", b" white"
    tokens = [256, *question, *answer]
    assert rows.inputs[0].tolist() == tokens + [256] * (64 - len(tokens))
    start = len(question)
    wanted = [IGNORED] * start + [*answer, 256]
    assert rows.targets[0].tolist() == wanted + [IGNORED] * (64 - len(wanted))


def test_a_long_question_is_cut_so_that_every_answer_fits(root):
    path = root / "text" / "tasks" / "sst2" / "train.jsonl"
    path.write_text(json.dumps({"text": "x" * 500, "label": "white"}) + "\n")
    rows = built(root, order=["sst2"], context=50).experiences[0].load().rows(torch.tensor([0]))
    text = Bytes().decode(rows.inputs[0].tolist())
    assert text.endswith("x\nOptions: green, white\nAnswer: white")
    assert rows.targets[0, -1] == 256, "not one token is wasted"


class Knows:
    """Answers in place of a model: the next token of `says(question)`, with some of the probability elsewhere."""

    def __init__(self, says, sure=6.0):
        self.says, self.sure = says, sure

    def __call__(self, batch):
        logits = torch.zeros(*batch.inputs.shape, 257)
        for row, tokens in enumerate(batch.inputs.tolist()):
            text = bytes(token for token in tokens if token < 256)
            question, _, _ = text.partition(b"Answer:")
            start = len(question) + len(b"Answer:")
            said = [*self.says(question.decode()).encode(), 256]
            for place, token in enumerate(said):
                if start + place < len(tokens):
                    logits[row, start + place, token] = self.sure
        return Output(logits)


def right(question):
    facts = dict(COLOURS + SIZES)
    return " " + facts[question.split("\n")[0]]


@pytest.mark.parametrize("task", ["sst2", "amazon"])
def test_both_scores_know_who_knows(root, task):
    data = built(root, order=[task]).eval_sets[0].load()
    for says, likelihood, accuracy, valid in (
        (right, 1.0, 1.0, 1.0),
        (
            lambda q: " green",
            {"sst2": 0.5}.get(task),
            {"sst2": 0.5, "amazon": 0.0}[task],
            {"sst2": 1.0, "amazon": 0.0}[task],
        ),
        (lambda q: right(q) + "!", 1.0, 0.0, 0.0),
    ):
        if likelihood is not None:
            assert by_likelihood(data, Knows(says), len(data), 3) == {"accuracy": likelihood}
        assert by_generation(data, Knows(says), len(data), 3) == {"accuracy": accuracy, "format_valid": valid}


def test_likelihood_is_the_sum_over_the_answer_and_its_end(root):
    """Two answers of unequal length, by hand: a longer answer pays for every letter."""
    data = built(root, order=["amazon"]).eval_sets[0].load()
    uniform = lambda batch: Output(torch.zeros(*batch.inputs.shape, 257))  # noqa: E731
    # -6 log 257 for " small" against -11 log 257 for " very large", the end of each included
    assert by_likelihood(data, uniform, 2, 8) == {"accuracy": 0.5}
    rows = data.answered([0, 0], [0, 1])
    assert (rows.targets != IGNORED).sum(1).tolist() == [7, 12]
    assert math.isclose(7 * math.log(257), 7 * -torch.zeros(257).log_softmax(0)[0].item(), rel_tol=1e-6)


def test_likelihood_reads_no_further_than_the_longest_answer(root):
    """Shorter rows, questions in another order: the numbers are those of whole rows, one question at a time."""
    data = built(root, order=["amazon"], context=200).eval_sets[0].load()
    torch.manual_seed(0)
    model = Gpt(built(root, order=["amazon"], context=200).info, width=16, num_layers=1, num_heads=2)
    seen = []

    def answer(batch):
        seen.append(batch.inputs.shape[1])
        return model(batch)

    with torch.no_grad():
        found = by_likelihood(data, answer, len(data), 4)
        right = 0
        for number in range(len(data)):
            rows = data.answered([number, number], [0, 1])
            said = model(rows).logits.log_softmax(-1).gather(2, rows.targets.clamp(min=0)[..., None])[..., 0]
            right += int((said * (rows.targets != IGNORED)).sum(1).argmax()) == int(data.labels[number])
    assert found == {"accuracy": right / len(data)} and max(seen) < 100


def test_generation_stops_at_the_end_token_and_at_the_longest_answer(root):
    data = built(root, order=["sst2"]).eval_sets[0].load()
    assert written(data, Knows(lambda q: " white"), [0]) == ["white"]
    assert written(data, Knows(lambda q: " " + "w" * 90), [0, 1]) == ["w" * 6] * 2


def test_rows_to_measure_on_can_be_limited(root):
    data = built(root, order=["sst2"]).eval_sets[0].load()
    assert by_likelihood(data, Knows(lambda q: " green"), 1, 8) == {"accuracy": 1.0}
    assert built(root, order=["sst2"], train_rows=3, eval_rows=2).eval_sets[0].num_samples == 2


@pytest.mark.parametrize("score", ["likelihood", "generation"])
def test_a_decoder_learns_the_answers_and_forgets_them(root, score):
    """End to end: R holds accuracies, and the share of well-formed answers stands beside it."""
    stream = built(root, order=["sst2", "amazon"], score=score, context=48)
    run = Trainer(
        stream,
        partial(Gpt, width=32, num_layers=2, num_heads=2),
        [Naive()],
        optimizer=partial(torch.optim.AdamW, lr=0.005),
        config=TrainerConfig(batch_size=8, max_steps=100, clip_norm=1.0, device="cpu"),
    ).run()
    assert run.R[0][0] == 1.0 and run.R[1][1] == 1.0
    assert run.measure == "accuracy" and not run.num_bytes
    beside = {(name, i, j): value for name, i, j, value in run.extra}
    if score == "likelihood":
        assert not beside
        return
    assert beside["format_valid", -1, 0] == 0.0 and beside["format_valid", 0, 0] == 1.0
    assert run.R[1][0] < 0.5 and beside["format_valid", 1, 0] < 0.5, "it answers with sizes what it is asked of colours"
    logged = {point.name for point in points(run, 1)}
    assert {"accuracy/task_00", "format_valid/task_00"} <= logged


def test_accumulation_weighs_tokens_and_not_rows(root):
    """Answers are of unequal length: two micro-batches must give the gradient of one batch."""
    weights = []
    for size, accumulation in ((8, 1), (2, 4)):
        trainer = Trainer(
            built(root, order=["amazon"], context=48),
            partial(Gpt, width=16, num_layers=1, num_heads=2),
            [Naive()],
            optimizer=partial(torch.optim.SGD, lr=0.5),
            config=TrainerConfig(batch_size=size, accumulation=accumulation, max_steps=3, device="cpu"),
        )
        trainer.run()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.state.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=1e-4)


def test_replay_keeps_what_was_learnt(root):
    accuracy = {}
    for strategy in (Naive(), Replay(30)):
        run = Trainer(
            built(root, order=["sst2", "amazon"], context=48, score="generation"),
            partial(Gpt, width=32, num_layers=2, num_heads=2),
            [strategy],
            optimizer=partial(torch.optim.AdamW, lr=0.005),
            config=TrainerConfig(batch_size=8, max_steps=100, clip_norm=1.0, device="cpu"),
        ).run()
        accuracy[strategy.name] = run.R[1][0]
    assert accuracy["replay"] == 1.0 > accuracy["naive"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"order": ["yelp"]}, "names 'yelp', which is not in"),
        ({"order": "short"}, "it must be one of long, order_1, order_2, order_3, or a list"),
        ({"order": ["sst2", "sst2"]}, "every task comes once"),
        ({"folder": "nowhere"}, "no task in"),
        ({"score": "guess"}, "one of likelihood, generation"),
        ({"template": "{question}"}, "must hold {text}"),
        ({"context": 20}, "it must be at least 48"),
        ({"tokenizer": "no/such"}, "data.download=true"),
        ({"eval_rows": 0}, "stream.eval_rows is 0"),
    ],
)
def test_bad_requests_are_one_sentence(root, options, words):
    with pytest.raises(UserError) as error:
        built(root, **options)
    assert words in str(error.value)


def test_a_line_without_anything_is_passed_over(root):
    path = root / "text" / "tasks" / "sst2" / "train.jsonl"
    wanted = built(root).experiences[0].num_samples
    path.write_text(path.read_text().replace("\n", "\n\n", 3))
    assert built(root).experiences[0].num_samples == wanted


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "a", "label": "blue"}', "line 1, has the label 'blue'; it must be one of green, white"),
        ('{"text": "a"}', "has no field 'label'"),
        ("text", "is no JSON object"),
        ('\n\n{"text": "a", "label": "green"}\ntext', "line 4, is no JSON object"),
        ('{"text": 3, "label": "green"}', "line 1, has the text 3, which is no string"),
        ('{"text": null, "label": "green"}', "line 1, has the text None, which is no string"),
        ('{"text": "a", "label": "-"}', "is empty"),
        ("", "is empty"),
    ],
)
def test_bad_files_are_one_sentence(root, content, words):
    (root / "text" / "tasks" / "sst2" / "train.jsonl").write_text(content)
    with pytest.raises(UserError, match=words):
        built(root)


def test_a_byte_order_mark_and_a_line_of_blanks_are_no_rows(root):
    path = root / "text" / "tasks" / "sst2" / "train.jsonl"
    wanted = built(root).experiences[0].num_samples
    path.write_text("\ufeff" + path.read_text() + "  \n", encoding="utf-8")
    labels = path.with_name("labels.json")
    labels.write_text("\ufeff" + labels.read_text(), encoding="utf-8")
    assert built(root).experiences[0].num_samples == wanted


def test_a_task_that_is_mostly_cut_is_told_of(root):
    """Of MultiRC, 945 of 1,000 questions stood behind what 256 tokens hold."""
    path = root / "text" / "tasks" / "sst2" / "train.jsonl"
    rows, long = path.read_text().splitlines(), json.dumps({"text": "a long story " * 9, "label": "green"})
    path.write_text("\n".join([*rows[:9], long]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built(root, order=["sst2"]).experiences[0].load()
    path.write_text("\n".join([*rows[:8], long, long]))
    with pytest.warns(UserWarning, match=r"task 'sst2' has 2 of 10 texts longer than stream\.context=64 has room for"):
        built(root, order=["sst2"]).experiences[0].load()


def test_labels_are_different_words(root):
    (root / "text" / "tasks" / "sst2" / "labels.json").write_text('["green", "white", "green"]')
    with pytest.raises(UserError, match="at least two different words"):
        built(root)


@pytest.mark.slow
def test_the_twelve_local_tasks(real_text):
    stream = text_tasks(root=real_text, context=256, tokenizer="bpe", vocabulary=1024)
    assert [each.name for each in stream.experiences] == [
        name for name in ORDERS["long"] if name not in ("yelp", "imdb", "yahoo")
    ]
    assert sum(each.num_samples for each in stream.experiences) == 10_650
    for experience, eval_set in zip(stream.experiences, stream.eval_sets, strict=True):
        for data in (experience.load(), eval_set.load()):
            rows = data.rows(torch.arange(len(data)))
            assert (rows.targets != IGNORED).any(1).all()
