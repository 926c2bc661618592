"""What text streams refuse, and how fast: one sentence each, and nothing lost."""

import time

import pytest
import torch

from cl.core import UserError
from streams import _documents
from streams.text_domains import text_domains

CONTEXT = 16
NEWS_DOMAIN = {"name": "news", "path": "news.jsonl", "eval_path": "held.jsonl"}
CODE_DOMAIN = {"name": "code", "path": "code.txt", "starts": "^def "}


def built(root, domains, **options):
    return text_domains(list(domains), root=str(root), context=CONTEXT, **options)


def first_text(data):
    return bytes(token for token in data.rows(torch.arange(2)).inputs.flatten().tolist() if token < 256).decode()


BAD = [
    ({"domains": []}, "stream.domains is []"),
    ({"domains": "news"}, "it must be a list"),
    ({"domains": ["news"]}, "stream.domains[0] is 'news'"),
    ({"domains": [{"path": "news.jsonl"}]}, "has no name"),
    ({"domains": [{"name": "news", "pth": "news.jsonl"}]}, "has no key 'pth'; its keys are name, path"),
    ({"domains": [{"name": "news"}]}, "needs either `path`"),
    ({"domains": [NEWS_DOMAIN | {"hub": "a/b"}]}, "not both of them"),
    ({"domains": [NEWS_DOMAIN | {"split": "test"}]}, "has split 'test', which local files do not have; leave it out"),
    ({"domains": [NEWS_DOMAIN | {"revision": "main"}]}, "has revision 'main', which local files do not have"),
    ({"domains": [NEWS_DOMAIN | {"config": "en"}]}, "has config 'en', which local files do not have"),
    ({"domains": [NEWS_DOMAIN | {"path": "lost.jsonl"}]}, "lost.jsonl"),
    ({"domains": [NEWS_DOMAIN | {"path": "many/readme.pdf"}]}, "it must end in .txt"),
    ({"domains": [NEWS_DOMAIN | {"field": "body"}]}, "has no field 'body'"),
    ({"domains": [NEWS_DOMAIN | {"field": "body"}]}, "its fields are text, id"),
    ({"domains": [NEWS_DOMAIN | {"field": "id"}]}, "are no text in id"),
    ({"domains": [NEWS_DOMAIN | {"tokens": 0}]}, "tokens of domain 'news' is 0"),
    ({"domains": [NEWS_DOMAIN | {"passes": 1.5}]}, "passes of domain 'news' is 1.5"),
    ({"domains": [NEWS_DOMAIN | {"weight": -1}]}, "weight -1"),
    ({"domains": [NEWS_DOMAIN | {"weight": float("inf")}]}, "weight inf; it must be a number above 0"),
    ({"domains": [NEWS_DOMAIN | {"path": []}]}, "has path []; it must be a string, or a list of them"),
    ({"domains": [NEWS_DOMAIN | {"path": 2024}]}, "has path 2024"),
    ({"domains": [NEWS_DOMAIN | {"eval_path": ["held.jsonl", 1]}]}, "has eval_path ['held.jsonl', 1]"),
    ({"domains": [NEWS_DOMAIN | {"field": None}]}, "has field None"),
    ({"domains": [NEWS_DOMAIN | {"starts": 1}]}, "has starts 1, no regular expression"),
    ({"domains": [NEWS_DOMAIN | {"path": "nothing.jsonl"}]}, "is empty"),
    ({"domains": [NEWS_DOMAIN | {"eval_path": "nothing.jsonl"}]}, "is empty"),
    ({"order": 3}, "stream.order is 3; it must be a list"),
    ({"order": [3]}, "stream.order holds 3; an experience is a domain, a list"),
    ({"order": [{"news": float("inf"), "code": 1}]}, "gives 'news' the weight inf"),
    ({"tokenizer": None}, "stream.tokenizer is None"),
    ({"domains": [NEWS_DOMAIN | {"starts": "("}]}, "no regular expression"),
    ({"domains": [NEWS_DOMAIN | {"eval_path": None, "eval_frac": 2}]}, "eval_frac 2"),
    ({"domains": [{"name": "code", "path": "code.txt"}]}, "too few to hold out"),
    ({"domains": [NEWS_DOMAIN, NEWS_DOMAIN]}, "names 'news' twice"),
    ({"domains": [NEWS_DOMAIN | {"path": "empty.jsonl"}]}, "is empty"),
    ({"domains": [NEWS_DOMAIN | {"path": "broken.jsonl"}]}, "cannot be read as json"),
    (
        {"domains": [NEWS_DOMAIN | {"path": "latin.txt"}]},
        "cannot be read as text: 'utf-8' codec can't decode byte 0xe9",
    ),
    ({"domains": [NEWS_DOMAIN | {"path": "plain.txt.gz"}]}, "cannot be read as text: Not a gzipped file"),
    ({"order": []}, "stream.order"),
    ({"order": "news"}, "stream.order is 'news'"),
    ({"order": ["sports"]}, "stream.order names 'sports'"),
    ({"order": [{"news": 0}]}, "the weight 0"),
    ({"order": [[]]}, "an experience without domains"),
    ({"tokenizer": "bpe", "vocabulary": 100}, "stream.vocabulary is 100"),
    ({"tokenizer": "no/such-model"}, "stream.tokenizer is 'no/such-model'"),
    ({"context": 100_000}, "fewer than a row of stream.context=100000"),
    (
        {"shard_tokens": 40, "domains": [CODE_DOMAIN | {"starts": None, "eval_path": "held.jsonl"}]},
        "does not fit a shard",
    ),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=[words[:40] for _, words in BAD])
def test_bad_requests_are_one_sentence(text_root, options, words):
    (text_root / "empty.jsonl").write_text('{"text": ""}\n')
    (text_root / "broken.jsonl").write_text('{"text": "a"\nnot json\n')
    (text_root / "latin.txt").write_bytes("r\u00e9sum\u00e9".encode("latin1"))
    (text_root / "plain.txt.gz").write_text("text")
    (text_root / "nothing.jsonl").write_text("")
    arguments = {"domains": [NEWS_DOMAIN, CODE_DOMAIN], "root": str(text_root), "context": CONTEXT} | options
    if arguments["context"] > 1000:
        arguments["shard_tokens"] = 1 << 20
    with pytest.raises(UserError) as error:
        text_domains(**arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("domain", "words"),
    [
        ({"name": "news", "path": "news.jsonl", "eval_split": "validation"}, "eval_split 'validation', and would be"),
        ({"name": "news", "hub": "a/b", "split": "test", "eval_split": "test"}, "eval_split 'test', and would be"),
        (
            {"name": "news", "path": "many", "eval_path": "many/b.txt"},
            "is measured on .*b.txt, which domain 'news' trains",
        ),
        (NEWS_DOMAIN | {"eval_path": "many/../news.jsonl"}, "is measured on .*news.jsonl, which domain 'news' trains"),
    ],
)
def test_no_domain_is_measured_on_what_it_trains_on(text_root, domain, words):
    """Local files have no splits: `eval_split` once measured all of the training text."""
    with pytest.raises(UserError, match=words):
        built(text_root, [domain])


def test_nothing_is_measured_on_what_another_domain_trains_on(text_root):
    general = {"name": "general", "path": "code.txt"}
    with pytest.raises(UserError, match=r"'general' is measured on .*code\.txt, which domain 'code' trains on"):
        built(text_root, [NEWS_DOMAIN, CODE_DOMAIN], general=general)
    held = {"name": "held", "path": "held.jsonl", "eval_path": "many"}
    with pytest.raises(UserError, match=r"'news' is measured on .*held\.jsonl, which domain 'held' trains on"):
        built(text_root, [NEWS_DOMAIN, held])
    built(text_root, [NEWS_DOMAIN], general=general | {"starts": "^def ", "eval_frac": 0.5})


@pytest.mark.parametrize(
    "change", [{"eval_frac": 0.25}, {"starts": "^"}, {"path": ["news.jsonl", "code.txt"]}, {"eval_path": "held.jsonl"}]
)
def test_domains_on_one_file_hold_out_the_same_documents(text_root, change):
    """A share of 0.2 is documents 4, 9, ..., one of 0.25 is 3, 7, ...: each would train on what the other measures."""
    first = {"name": "first", "path": "news.jsonl", "eval_frac": 0.2}
    other = first | {"name": "other", "path": "many/../news.jsonl"}
    words = r"is measured on documents of .*news\.jsonl, which domain '(first|other)' trains on; give one of them other"
    with pytest.raises(UserError, match=words):
        built(text_root, [first, other | change])
    built(text_root, [first, other])


def test_splits_of_one_hub_set_are_apart():
    def sources(part, **keys):
        return [_documents.Source(_documents.Domain(hub="a/b", **keys), part, None, False)]

    trained = sources("train", name="first", split="train")
    for keys in ({"eval_split": "train", "split": "test"}, {"eval_frac": 0.3}):
        with pytest.raises(UserError, match=r"measured on (documents of )?a/b, no config, train, which domain 'first'"):
            _documents.require_apart(trained, sources("eval", name="other", **keys))
    _documents.require_apart(trained, sources("eval", name="other", split="validation", eval_split="test"))


def test_rows_without_text_are_told_of(text_root):
    lines = ['{"text": "a row of text", "id": 0}'] * 9 + ['{"id": 1}', '{"text": null}']
    (text_root / "gaps.jsonl").write_text("\n".join(lines * 3) + "\n")
    with pytest.warns(UserWarning, match=r"domain 'news' has 6 rows without text in .*gaps\.jsonl, which are left out"):
        stream = built(text_root, [NEWS_DOMAIN | {"path": "gaps.jsonl"}])
    assert (stream.experiences[0].load().rows(torch.arange(20)).inputs == 256).sum() > 20


def test_the_library_writes_no_line_of_its_own(text_root, caplog):
    (text_root / "scalars.jsonl").write_text('"one"\n"two"\n')
    with pytest.raises(UserError, match="cannot be read as json"):
        built(text_root, [NEWS_DOMAIN | {"path": "scalars.jsonl"}])
    assert not caplog.records


def test_what_a_packed_file_needs_is_said(text_root, monkeypatch):
    monkeypatch.setattr(_documents, "find_spec", lambda name: None)
    (text_root / "news.jsonl.zst").write_bytes(b"")
    with pytest.raises(UserError, match=r"news\.jsonl\.zst is read by the package zstandard; `pip install"):
        built(text_root, [NEWS_DOMAIN | {"path": "news.jsonl.zst"}])


HUB = {"name": "math", "hub": "nobody/nothing", "eval_split": "test"}


def test_no_network_is_said_at_once(text_root, monkeypatch):
    """The id, the local way and the flag; not after 23 seconds of retries."""
    monkeypatch.setattr(_documents, "hub_answers", lambda: False)
    monkeypatch.setenv("HF_HOME", str(text_root / "hub"))
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)  # whoever asks again waits first
    for download, words in ((False, "data.download=true"), (True, "does not answer")):
        with pytest.raises(UserError) as error:
            built(text_root, [NEWS_DOMAIN, HUB], download=download)
        assert not naps
        for word in ("nobody/nothing", "'math'", "`path`", "data.root", words):
            assert word in str(error.value)


def test_a_hub_set_is_streamed_no_further_than_it_is_used(text_root, monkeypatch):
    """The loading path itself, with rows that never end in the hub's place."""
    taken = []

    def load_dataset(name, config, *, split, revision, streaming):
        if not streaming:
            raise ConnectionError("not in the cache")

        def rows():
            for number in range(10**9):
                taken.append(split)
                yield {"text": f"row {number} of {split}"}

        assert (name, config, revision) == ("nobody/nothing", None, None)
        return rows()

    monkeypatch.setattr(_documents, "hub_answers", lambda: True)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    domain = HUB | {"tokens": 2000}
    stream = built(text_root, [domain], download=True, eval_tokens=200)
    assert 16 * stream.experiences[0].num_samples == 2000
    assert first_text(stream.experiences[0].load()).startswith("row 0 of train")
    assert first_text(stream.eval_sets[0].load()).startswith("row 0 of test")
    # a megabyte of text is tokenised at a time
    assert len(taken) < 2 * 1.2e6 / len("row 10000 of test")
    monkeypatch.setattr(_documents, "hub_answers", lambda: False)
    assert built(text_root, [domain], eval_tokens=200).content == stream.content, "what is prepared needs no network"
