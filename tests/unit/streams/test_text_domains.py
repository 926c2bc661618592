"""Text domains from files: what is read, in which order it is trained on, and what is refused."""

import json
import math
import socket
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from cl.backbones.gpt import Gpt
from cl.config import TrainerConfig
from cl.core import UserError
from cl.testing import StreamContract, configs
from cl.tracking.points import points
from cl.trainer import Trainer
from strategies.cumulative import Cumulative
from strategies.joint import Joint
from strategies.naive import Naive
from strategies.replay import Replay
from streams import _documents
from streams._documents import Domain, Source
from streams._tokenizers import Bytes
from streams.text_domains import text_domains

CONTEXT = 16
NEWS = [f"news number {k} about the weather" for k in range(40)]


NEWS_DOMAIN = {"name": "news", "path": "news.jsonl", "eval_path": "held.jsonl"}
CODE_DOMAIN = {"name": "code", "path": "code.txt", "starts": "^def "}


def built(root, domains=(NEWS_DOMAIN, CODE_DOMAIN), **options):
    return text_domains(list(domains), root=str(root), context=CONTEXT, **options)


def texts_of(rows):
    """Documents that some rows hold, in order; the rows must follow each other."""
    tokens = [*rows.inputs.flatten().tolist(), rows.targets[-1, -1].item()]
    return Bytes().decode([10 if token == 256 else token for token in tokens]).strip().split("\n")


def all_rows(data):
    return data.rows(torch.arange(len(data)))


class TestTextDomains(StreamContract):
    make = staticmethod(text_domains)

    @pytest.fixture(autouse=True)
    def _files(self, text_root):
        domains = [NEWS_DOMAIN | {"tokens": 500}, CODE_DOMAIN | {"passes": 2}]
        self.arguments = {
            "domains": domains,
            "root": str(text_root),
            "context": CONTEXT,
            "order": ["code", "news", "code"],
        }


# what is read


def test_documents_of_every_format(text_root):
    wanted = texts_of(all_rows(built(text_root, [NEWS_DOMAIN]).experiences[0].load()))
    assert wanted[:-1] == NEWS[: len(wanted) - 1] and len(wanted) >= len(NEWS) - 1
    from datasets import Dataset

    Dataset.from_dict({"text": NEWS}).to_parquet(text_root / "news.parquet")
    for path in ("news.jsonl.gz", "news.parquet", ["news.jsonl"], str(text_root / "news.jsonl")):
        found = built(text_root, [NEWS_DOMAIN | {"path": path}]).experiences[0].load()
        assert texts_of(all_rows(found)) == wanted, path


def test_files_are_read_without_a_question_to_any_server(text_root, monkeypatch):
    """The library counts its readers on one, and hides that it could not."""
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *where, **how: asked.append(where) or [])
    assert len(built(text_root, [NEWS_DOMAIN]).experiences[0].load())
    assert asked == []


def test_a_folder_is_its_text_files_by_name(text_root):
    data = built(text_root, [{"name": "many", "path": "many", "eval_path": "code.txt"}]).experiences[0].load()
    rows = all_rows(data)
    assert texts_of(rows)[:4] == ["first file"] * 4
    assert (rows.inputs == 256).sum() == 2, "a txt file is one document"


def test_fields_are_joined(text_root):
    data = built(text_root, [{"name": "qa", "path": "qa.jsonl", "field": ["q", "a"]}]).experiences[0].load()
    assert texts_of(all_rows(data))[:4] == ["0+1?", "1!", "1+1?", "2!"]


def test_starts_cuts_a_txt_into_documents(text_root):
    stream = built(text_root, [CODE_DOMAIN])
    rows = all_rows(stream.experiences[0].load())
    firsts = rows.inputs.flatten()[:-3][(rows.inputs.flatten() == 256)[:-3]]
    assert len(firsts) == pytest.approx(57, abs=1), "every function but those held out"
    # every 20th document is held out: f19, f39, f59
    held_out = "\n".join(texts_of(all_rows(stream.eval_sets[0].load())))
    assert held_out.startswith("def f19(x):") and "def f39(x):" in held_out and "def f18" not in held_out
    assert "def f19" not in "\n".join(texts_of(rows))


def test_starts_glues_rows_too(text_root):
    lines = [" = One = \n", "text one\n", "", " = Two = ", "text two", " = Three = "]
    (text_root / "wiki.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines * 9))
    domain = {"name": "wiki", "path": "wiki.jsonl", "starts": "^ = .* = $", "eval_path": "held.jsonl"}
    rows = all_rows(built(text_root, [domain]).experiences[0].load())
    text = Bytes().decode([124 if token == 256 else token for token in rows.inputs.flatten().tolist()])
    assert text.startswith("| = One = \ntext one\n| = Two = \ntext two| = Three = | = One = ")


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.4, 0.45, 0.5])
def test_the_share_that_is_asked_for_is_held_out(text_root, share):
    """0.4 once held out every other document."""
    domain = Domain("news", "news.jsonl", eval_frac=share)
    train, held_out = (list(Source(domain, part, str(text_root), False).pieces()) for part in ("train", "eval"))
    assert len(held_out) == int(40 * share)
    assert sorted([*train, *held_out]) == sorted((text, True) for text in NEWS)


def test_a_file_that_gets_another_kind_is_read_again(text_root):
    """The cache once knew a file by its bytes alone."""
    (text_root / "news.jsonl").rename(text_root / "news.txt")
    as_lines = built(text_root, [NEWS_DOMAIN | {"path": "news.txt"}]).experiences[0].load()
    assert texts_of(all_rows(as_lines))[0].startswith('{"text": "news number 0')
    (text_root / "news.txt").rename(text_root / "news.jsonl")
    assert texts_of(all_rows(built(text_root, [NEWS_DOMAIN]).experiences[0].load()))[0] == NEWS[0]


def test_bpe_is_trained_on_the_first_domain_of_the_order(text_root):
    first, other = (built(text_root, order=order, tokenizer="bpe", vocabulary=300) for order in (["news"], ["code"]))
    assert first.info.num_outputs <= 300 and first.info.tokenizer != other.info.tokenizer
    held_out = [each.eval_sets[0] for each in (first, other)]
    fitting, foreign = (each.num_bytes / (each.num_samples * CONTEXT) for each in held_out)
    assert fitting > 2 * foreign >= 2, "bytes per token of the news"


def test_a_general_set_is_measured_and_never_trained_on(text_root):
    stream = built(text_root, [NEWS_DOMAIN], general={"name": "general", "path": "many"})
    assert [each.domain for each in stream.eval_sets] == ["news", "general"]
    assert len(stream.experiences) == 1
    assert texts_of(all_rows(stream.eval_sets[1].load()))[0] == "first file"
    assert stream.general is None, "all of it is measured, so nothing is left to anchor on"


def test_the_rest_of_a_general_set_is_there_to_anchor_on(text_root):
    with_path = {"name": "general", "path": "news.jsonl", "eval_path": "held.jsonl"}
    stream = built(text_root, [CODE_DOMAIN], general=with_path)
    assert [each.domain for each in stream.eval_sets] == ["code", "general"]
    assert len(stream.experiences) == 1
    assert texts_of(all_rows(stream.general()))[0] == NEWS[0]
    plain = built(text_root, [CODE_DOMAIN], general={"name": "general", "path": "held.jsonl"})
    assert plain.content != stream.content, "a run goes on with the anchors that it began with only"
    shared = built(text_root, [CODE_DOMAIN], general={"name": "general", "path": "news.jsonl", "eval_frac": 0.25})
    anchors, measured = (texts_of(all_rows(each())) for each in (shared.general, shared.eval_sets[1].load))
    assert anchors[0] == NEWS[0] and measured[0] == NEWS[3]
    assert not set(anchors[1:-1]) & set(measured[1:-1])


# which rows are trained on, and when


def test_budget_in_tokens_repeats_or_cuts(text_root):
    whole = built(text_root).experiences[0].num_samples
    cut = built(text_root, [NEWS_DOMAIN | {"tokens": 100}]).experiences[0]
    assert cut.num_samples == 7, "the fewest rows of 16 that reach 100 tokens"
    assert texts_of(all_rows(cut.load()))[0] == NEWS[0]
    with pytest.warns(UserWarning, match=r"5\.\d times on the text of news"):
        longer = built(text_root, [NEWS_DOMAIN | {"tokens": 16 * (5 * whole + 1)}]).experiences[0]
    rows = all_rows(longer.load())
    assert len(rows) == 5 * whole + 1
    assert torch.equal(rows.inputs[:whole], rows.inputs[whole : 2 * whole])


def test_any_order_and_revisits(text_root):
    stream = built(text_root, order=["code", "news", "code"])
    assert [each.name for each in stream.experiences] == ["code", "news", "code (2)"]
    assert stream.trained_domains == [1, 0, 1]
    first = [all_rows(each.load()).experience_id.unique().tolist() for each in stream.experiences]
    assert first == [[0], [1], [0]], "rows of a revisit were first seen before"


def test_mixtures_have_the_tokens_of_their_domains_in_the_given_shares(text_root):
    stream = built(text_root, order=["news", {"news": 1, "code": 3}, {"news": 1, "code": 3}, ["news", "code"]])
    news, code = (built(text_root, order=[name]).experiences[0].num_samples for name in ("news", "code"))
    mixed, again, joint = stream.experiences[1:]
    counts = all_rows(mixed.load()).experience_id.bincount().tolist()
    assert counts == [round(code / 4), round(code * 3 / 4)], "as many as the new domain has"
    counts = all_rows(again.load()).experience_id.bincount().tolist()
    assert counts == [round((news + code) / 4), round((news + code) * 3 / 4)], "none is new"
    assert all_rows(joint.load()).experience_id.bincount().tolist() == [news, code]
    assert mixed.domain == "code" and set(mixed.practises) == {"news", "code"}
    weighted = built(
        text_root, [NEWS_DOMAIN | {"weight": 1}, CODE_DOMAIN | {"weight": 3}], order=["news", ["news", "code"]]
    )
    assert all_rows(weighted.experiences[1].load()).experience_id.bincount().tolist() == counts


def test_a_share_is_whole_rows_and_one_at_least(text_root):
    """A thousandth of fewer than 500 rows rounds to none, and the rest to all of them."""
    stream = built(text_root, order=["news", {"news": 0.001, "code": 0.999}])
    code = built(text_root, order=["code"]).experiences[0].num_samples
    counts = all_rows(stream.experiences[1].load()).experience_id.bincount().tolist()
    assert code < 500
    assert counts == [1, code]


def test_an_old_domain_in_a_mixture_shows_other_rows_each_time_from_all_over_what_was_trained(text_root):
    order = ["news", {"news": 0.05, "code": 0.95}, {"news": 0.05, "code": 0.95}]
    stream = built(text_root, order=order)
    first = all_rows(stream.experiences[0].load()).inputs.tolist()
    seen = []
    for experience in stream.experiences[1:]:
        rows = all_rows(experience.load())
        seen.append([first.index(row) for row in rows.inputs[rows.experience_id == 0].tolist()])
    assert not set(seen[0]) & set(seen[1])
    for places in seen:
        steps = [b - a for a, b in pairwise(places)]
        assert max(steps) - min(steps) <= 1 and max(places) >= len(first) - 2 * max(steps)


def test_joint_and_cumulative_references_see_the_same_text(text_root):
    stream = built(text_root)
    sizes = [each.num_samples for each in stream.experiences]
    (whole,) = Joint().plan(stream).experiences
    grown = Cumulative().plan(stream).experiences
    assert whole.num_samples == sum(sizes) == grown[1].num_samples
    ids = all_rows(whole.load()).inputs.sort(0).values
    assert torch.equal(
        ids, all_rows(built(text_root, order=[["news", "code"]]).experiences[0].load()).inputs.sort(0).values
    )


def run(stream, strategy=None, **config):
    steps = []

    class Spy(Naive):
        def on_batch(self, state, batch):
            steps.append((batch.inputs.clone(), batch.targets.clone()))
            return batch

    trainer = Trainer(
        stream,
        partial(Gpt, width=16, num_layers=1, num_heads=2),
        [Spy(), *([strategy] if strategy else [])],
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        config=TrainerConfig(**{"batch_size": 4, "device": "cpu", **config}),
        run_dir=config.pop("run_dir", None),
    )
    return trainer, trainer.run(), steps


def test_order_is_a_pure_function_of_seed_stream_and_step(text_root):
    """Two runs see the same rows; what came before an experience does not matter."""
    stream = built(text_root)
    first, again = (run(stream)[2] for _ in range(2))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    short = run(stream, max_tokens=200)[2]
    per_domain = -(-200 // (4 * CONTEXT))
    assert len(short) == 2 * per_domain
    news_steps = -(-stream.experiences[0].num_samples // 4)
    for step in range(per_domain):
        assert torch.equal(short[step][0], first[step][0])
        assert torch.equal(short[per_domain + step][0], first[news_steps + step][0])


@pytest.mark.parametrize("strategy", [None, "replay"])
def test_a_stopped_run_goes_on_with_the_same_rows(text_root, tmp_path, strategy):
    """Token budgets, repeated text, accumulation and replay: the position is one integer."""
    domains = [NEWS_DOMAIN | {"tokens": 1200}, CODE_DOMAIN]

    def trainer(folder):
        return Trainer(
            built(text_root, domains),
            partial(Gpt, width=16, num_layers=1, num_heads=2),
            [Replay(20) if strategy else Naive()],
            optimizer=partial(torch.optim.AdamW, lr=0.01),
            config=TrainerConfig(batch_size=2, accumulation=2, max_tokens=1500, checkpoint_every=7, device="cpu"),
            run_dir=folder,
        )

    whole = trainer(tmp_path / "whole").run()
    stopped = trainer(tmp_path / "stopped")
    plain = stopped._step

    def step(*arguments):
        plain(*arguments)
        if stopped.state.step == 30:
            stopped.request_stop()

    stopped._step = step
    assert stopped.run().status == "interrupted"
    gone_on = trainer(tmp_path / "stopped").run(resume=True)
    assert gone_on.R == whole.R
    assert gone_on.status == "done"


def test_resume_refuses_other_data(text_root, tmp_path):
    def trainer():
        return Trainer(
            built(text_root),
            partial(Gpt, width=16, num_layers=1, num_heads=2),
            [Naive()],
            optimizer=partial(torch.optim.SGD, lr=0.1),
            config=TrainerConfig(batch_size=4, max_steps=3, device="cpu"),
            run_dir=tmp_path / "run",
        )

    trainer().run()
    assert trainer().run(resume=True).status == "done"
    content = (text_root / "news.jsonl").read_text()
    (text_root / "news.jsonl").write_text(content.replace("weather", "climate"))
    with pytest.raises(UserError, match=r"data of stream text_domains changed since .* put the old data back"):
        trainer().run(resume=True)
    (text_root / "news.jsonl").write_text(content)
    assert trainer().run(resume=True).status == "done", "the refused attempt lost nothing"


def test_replayed_rows_have_the_weight_that_they_are_given(text_root):
    """The loss of a mixed batch is the sum of the parts' own means times their weights."""
    terms = []

    class Check(Naive):
        name = "check"

        def penalty(self, state, batch, output):
            means = [
                torch.nn.functional.cross_entropy(output.logits[p.rows].flatten(0, 1), batch.targets[p.rows].flatten())
                for p in batch.parts
            ]
            wanted = sum(part.weight * mean for part, mean in zip(batch.parts, means, strict=True))
            terms.append((len(batch.parts), wanted.item(), state.label_loss(output, batch).item()))

    trainer = Trainer(
        built(text_root),
        partial(Gpt, width=16, num_layers=1, num_heads=2),
        [Replay(50, replay_batch_size=2, weight=0.25), Check()],
        optimizer=partial(torch.optim.SGD, lr=0.1),
        config=TrainerConfig(batch_size=4, max_steps=5, device="cpu"),
    )
    trainer.run()
    assert [parts for parts, _, _ in terms] == [1, *[2] * 9]
    assert [wanted for _, wanted, _ in terms] == pytest.approx([found for _, _, found in terms])


def test_bits_per_byte_are_in_the_result_and_among_what_is_logged(text_root):
    _, result, _ = run(built(text_root), max_steps=2)
    tokens = [each.num_samples * CONTEXT for each in built(text_root).eval_sets]
    assert result.num_tokens == tokens
    assert all(0.9 * t < b < t for t, b in zip(tokens, result.num_bytes, strict=True))
    bits = [
        loss * t / (b * math.log(2))
        for loss, t, b in zip(result.R[-1], result.num_tokens, result.num_bytes, strict=True)
    ]
    assert result.metrics["bits_per_byte"] == pytest.approx(sum(bits) / 2)
    logged = {point.name: point.value for point in points(result, 1)}
    assert [logged["bpb/task_00"], logged["bpb/task_01"]] == pytest.approx(bits)
    assert logged["perplexity/task_00"] == pytest.approx(math.exp(result.R[-1][0]))


# what is ready


@pytest.mark.parametrize("config", [c for c in configs("stream") if c.module == "streams.text_domains"], ids=str)
def test_ready_streams_are_well_formed(config):
    for number, node in enumerate(config.node["domains"]):
        _documents.Domain.of(node, str(number))


@pytest.mark.slow
def test_development_files(real_text, tmp_path):
    """The local stand-ins of TRC2: sizes by hand, held-out text of the right files."""
    (config,) = (c for c in configs("stream") if c.name == "text_domains")
    node = {key: value for key, value in config.node.items() if key not in ("_target_", "root", "download")}
    stream = text_domains(**node, root=real_text, cache=str(tmp_path))
    assert [each.name for each in stream.experiences] == ["c4", "wikitext", "gsm8k"]
    text = "".join(
        json.loads(line)["text"] for line in Path(f"{real_text}/text/c4/train.jsonl").read_text().split("\n")[:-1]
    )
    assert stream.experiences[0].num_samples == (len(text.encode()) + 850) // 256
    gsm = stream.experiences[2].load().rows(torch.arange(1)).inputs[0].tolist()
    assert Bytes().decode(gsm).startswith("Natalia sold clips to 48 of her friends in April")
    assert [each.num_samples for each in stream.eval_sets] == [256] * 3
