"""Tokenizers, shards and packed rows: against plain lists of tokens."""

import json
import math
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from cl.core import UserError
from streams._packing import Mixed, Packed, num_windows, pass_by_pass, text_bytes
from streams._shards import corpus_of
from streams._tokenizer_folder import _single_bytes
from streams._tokenizers import Bytes, Subwords, read_tokenizer, trained_bpe

TEXTS = ["the cat sat", "on the mat", "naïve café 漢字", "x" * 50, "the end"]


def written(tmp_path, texts, tokenizer=None, **options):
    pieces = ((text, True) for text in texts)
    return corpus_of("some", pieces, tokenizer or Bytes(), tmp_path, "key", **options)


def ids_of(corpus):
    return [corpus.tokens(number).tolist() for number in range(len(corpus.shards))]


def plain(texts):
    """The tokens that a corpus of these documents must hold."""
    return [token for text in texts for token in (256, *text.encode())] + [256]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return trained_bpe(["the cat sat on the mat, the end of the cat"] * 50, 300, tmp_path_factory.mktemp("bpe"), "key")


# tokenizers


def test_bytes_are_bytes():
    tokens = Bytes().encode(TEXTS)
    assert [bytes(each.tolist()) for each in tokens] == [text.encode() for text in TEXTS]
    assert [Bytes().decode(each) for each in tokens] == TEXTS
    assert Bytes().token_bytes.tolist() == [1] * 256 + [0]


def test_bpe_makes_fewer_tokens_and_loses_nothing(bpe):
    assert 256 < bpe.vocabulary <= 300
    assert bpe.separator == bpe.vocabulary - 1
    for text, tokens in zip(TEXTS, bpe.encode(TEXTS), strict=True):
        assert bpe.decode(tokens.tolist()) == text
        assert bpe.token_bytes[tokens].sum() == len(text.encode()), "a byte-level token says how many bytes it is"
    assert len(bpe.encode(["the cat sat on the mat"])[0]) < 12


def test_added_tokens_that_are_text_have_bytes(bpe, tmp_path):
    """As the runs of spaces in the tokenizers of GPT-NeoX, Pythia and OLMo."""
    library = Library.from_str(bpe._library.to_str())
    library.add_tokens([AddedToken("    ", normalized=False), AddedToken("\u00e9\u00e9", normalized=False)])
    library.add_special_tokens([AddedToken("<end>")])
    path = tmp_path / "tokenizer.json"
    library.save(str(path))
    tokenizer = Subwords(path.read_text())
    text = "def f():\n    return 'caf\u00e9\u00e9'"
    assert tokenizer.token_bytes[tokenizer.encode([text])[0]].sum() == len(text.encode())
    assert tokenizer.token_bytes[library.token_to_id("<end>")] == 0


@pytest.mark.parametrize("has_end", [True, False])
def test_a_vocabulary_that_leaves_numbers_out(tmp_path, has_end):
    """As that of GPT-4 does; its bytes could not be counted, and the separator took the number of a token."""
    content = json.loads(_single_bytes())
    content["model"] |= {"vocab": content["model"]["vocab"] | {"ab": 259}, "merges": [["a", "b"], ["ab", "c"]]}
    content["model"]["vocab"]["abc"] = 257
    if has_end:
        content["model"]["vocab"]["<|endoftext|>"] = 300
        content["added_tokens"] = [
            {"id": 300, "content": "<|endoftext|>", "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    own = read_tokenizer(str(tmp_path), download=False)
    assert (own.separator, own.vocabulary) == ((300, 301) if has_end else (260, 261))
    tokens = own.encode(["abcabd"])[0]
    assert tokens.tolist() == [257, 259, ord("d")]
    assert own.token_bytes[tokens].tolist() == [3, 2, 1] and own.token_bytes[own.separator] == 0


def test_bpe_is_trained_once_and_the_same_every_time(tmp_path):
    first = trained_bpe(["one two three"] * 9, 280, tmp_path / "a", "key")
    again = trained_bpe(["one two three"] * 9, 280, tmp_path / "b", "key")
    cached = trained_bpe(["other text that is not looked at"], 280, tmp_path / "a", "key")
    assert first.digest == again.digest == cached.digest


def test_text_cannot_spell_a_separator(tmp_path):
    """A document that quotes the end-of-text token must not be cut there."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(["a b c"], trainer)
    (tmp_path / "tokenizer.json").write_text(library.to_str())
    own = read_tokenizer(str(tmp_path), download=False)
    assert own.separator == 0, "a model's own end-of-text token separates documents"
    tokens = own.encode(["a <|endoftext|> b"])[0].tolist()
    assert own.separator not in tokens
    assert own.decode(tokens) == "a <|endoftext|> b"


def test_the_end_token_is_the_one_that_the_model_declares(tmp_path, bpe):
    (tmp_path / "tokenizer.json").write_text(bpe._library.to_str())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "t"}}))
    own = read_tokenizer(str(tmp_path), download=False)
    assert own.separator == bpe._library.token_to_id("t")
    assert own.vocabulary == bpe.vocabulary - 1
    assert own.digest != Subwords(bpe._library.to_str()).digest


@pytest.mark.parametrize(
    ("name", "words"),
    [("no/such-model", "data.download=true"), ("missing.json", "is not there"), ("broken", "cannot be read")],
)
def test_a_tokenizer_that_cannot_be_had_is_one_sentence(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=words) as error:
        read_tokenizer(name, download=False)
    assert name in str(error.value)


# shards


def test_corpus_holds_separated_documents(tmp_path):
    corpus = written(tmp_path, TEXTS)
    assert ids_of(corpus) == [plain(TEXTS)]
    assert (corpus.num_documents, corpus.num_bytes) == (5, sum(len(text.encode()) for text in TEXTS))
    assert corpus.num_tokens == len(plain(TEXTS))
    assert list(corpus.decoded(Bytes())) == TEXTS


def test_documents_given_in_pieces_are_put_together(tmp_path):
    pieces = [("the ", True), ("cat", False), ("on", True), ("", False), ("", True), ("end", True)]
    corpus = corpus_of("some", pieces, Bytes(), tmp_path, "key")
    assert ids_of(corpus) == [plain(["the cat", "on", "end"])], "an empty document is none"


def test_a_document_in_lines_has_the_tokens_of_the_whole(tmp_path, monkeypatch):
    """A tokenizer that begins every text with a blank, as SentencePiece does, once put one before each line."""
    library = Library(models.BPE(unk_token="<unk>"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>"], show_progress=False)
    library.train_from_iterator(["the cat\n\nsat on the mat\n"] * 9, trainer)
    tokenizer = Subwords(library.to_str())
    lines = ["the cat\n", "\n", "  sat on\n", "the mat"]
    pieces = [(line, number in (0, 3)) for number, line in enumerate(lines)]
    (found,) = ids_of(corpus_of("some", pieces, tokenizer, tmp_path, "key"))
    first, second = (tokens.tolist() for tokens in tokenizer.encode(["".join(lines[:3]), lines[3]]))
    end = tokenizer.separator
    assert found == [end, *first, end, *second, end]
    monkeypatch.setattr("streams._shards.BATCH_CHARS", 4)
    bytewise = corpus_of("long", pieces, Bytes(), tmp_path, "key")
    assert ids_of(bytewise) == [plain(["".join(lines[:3]), lines[3]])], "a long document in several pieces"


def test_shards_hold_whole_documents_and_each_begins_and_ends_with_the_separator(tmp_path):
    corpus = written(tmp_path, TEXTS, shard_tokens=58)
    assert [count for _, count in corpus.shards] == [len(part) for part in ids_of(corpus)]
    assert all(count <= 58 for _, count in corpus.shards)
    assert ids_of(corpus) == [plain(TEXTS[:3]), plain(TEXTS[3:4]), plain(TEXTS[4:])]


def test_limit_stops_at_the_end_of_a_document(tmp_path):
    assert list(written(tmp_path, TEXTS, limit=12).decoded(Bytes())) == TEXTS[:1]
    assert list(written(tmp_path, TEXTS, limit=13).decoded(Bytes())) == TEXTS[:2]


def test_found_again_without_reading_the_text(tmp_path):
    first = written(tmp_path, TEXTS)

    def nobody():
        raise AssertionError("the text was read again")
        yield

    assert corpus_of("some", nobody(), Bytes(), tmp_path, "key") == first
    assert written(tmp_path, TEXTS[:2], limit=10**9).content != first.content


@pytest.mark.parametrize("harm", ["cut", "lost", "manifest"])
def test_a_damaged_corpus_is_written_again(tmp_path, harm):
    first = written(tmp_path, TEXTS)
    (shard,) = (tmp_path / "corpora").glob("*/shard-*.bin")
    if harm == "cut":
        shard.write_bytes(shard.read_bytes()[:-3])
    elif harm == "lost":
        shard.unlink()
    else:
        shard.with_name("manifest.json").write_text('{"shards": []}')
    assert written(tmp_path, TEXTS) == first
    assert ids_of(first) == [plain(TEXTS)]


def test_what_another_process_wrote_meanwhile_stays(tmp_path):
    """It is mapped there by now, and was once deleted under its hands."""

    def slow():
        written(tmp_path, TEXTS)
        (folder,) = (tmp_path / "corpora").glob("some-*")
        places.append(folder.stat().st_ino)
        yield from ((text, True) for text in TEXTS)

    places: list[int] = []
    corpus = corpus_of("some", slow(), Bytes(), tmp_path, "key")
    (folder,) = (tmp_path / "corpora").iterdir()
    assert [folder.stat().st_ino] == places
    assert ids_of(corpus) == [plain(TEXTS)]


def test_a_failure_leaves_nothing_behind(tmp_path):
    def failing():
        yield "text", True
        raise RuntimeError("network")

    with pytest.raises(RuntimeError):
        corpus_of("some", failing(), Bytes(), tmp_path, "key")
    assert list((tmp_path / "corpora").iterdir()) == []


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [([], {}, "is empty"), (["", ""], {}, "is empty"), (["x" * 99], {"shard_tokens": 50}, "does not fit a shard")],
)
def test_what_cannot_be_a_corpus_is_one_sentence(tmp_path, texts, options, words):
    with pytest.raises(UserError, match=words) as error:
        written(tmp_path, texts, **options)
    assert "'some'" in str(error.value)


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"stream\.cache"):
        written(tmp_path / "file", TEXTS)
    with pytest.raises(UserError, match=r"stream\.cache"):
        trained_bpe(TEXTS, 300, tmp_path / "file", "key")


def test_memory_is_flat_over_a_text_of_any_length(tmp_path):
    """40 MB through the writer and the reader hold a few MB at a time."""
    line = "a line of some length that is written again and again, 64 bytes\n"
    pieces = ((line * 100, number % 3 == 0) for number in range(6500))
    tracemalloc.start()
    try:
        corpus = corpus_of("long", pieces, Bytes(), tmp_path, "key", shard_tokens=1 << 22)
        data = Packed(corpus, 128)
        for some in torch.arange(len(data)).split(10_000):
            data.rows(some[:64])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert corpus.num_tokens > 40e6 and len(corpus.shards) > 9
    assert peak < 16e6


# packing


def test_rows_are_windows_and_every_token_is_a_target_once(tmp_path):
    corpus, context = written(tmp_path, TEXTS), 8
    data, tokens = Packed(corpus, context, experience_id=3), plain(TEXTS)
    rows = data.rows(torch.arange(len(data)))
    assert len(data) == num_windows(corpus, context) == (len(tokens) - 1) // context
    assert rows.inputs.flatten().tolist() == tokens[: len(data) * context]
    assert rows.targets.flatten().tolist() == tokens[1 : len(data) * context + 1]
    assert rows.inputs.dtype == torch.int16 and rows.targets.dtype == torch.int64
    assert rows.experience_id.tolist() == [3] * len(data)
    back = torch.tensor([4, 0, 4])
    assert torch.equal(data.rows(back).targets, rows.targets[back])


def test_rows_do_not_cross_shards(tmp_path):
    corpus, context = written(tmp_path, TEXTS, shard_tokens=58), 6
    parts = [np.array(ids) for ids in ids_of(corpus)]
    wanted = [part[i : i + 7] for part in parts for i in range(0, len(part) - 6, 6)]
    rows = Packed(corpus, context).rows(torch.arange(len(wanted)))
    assert len(wanted) == num_windows(corpus, context)
    assert rows.inputs.tolist() == [row[:-1].tolist() for row in wanted]
    assert rows.targets.tolist() == [row[1:].tolist() for row in wanted]


def test_more_rows_than_there_are_come_again_pass_by_pass(tmp_path):
    corpus, context = written(tmp_path, TEXTS), 8
    count = num_windows(corpus, context)
    data = Packed(corpus, context, 2 * count + 3)
    order = pass_by_pass(count)(len(data), 0, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(2 * count + 3))
    for low in (0, count):
        assert sorted((order[low : low + count] % count).tolist()) == list(range(count)), "a pass has every window once"
    assert (order[:count] % count).tolist() != (order[count : 2 * count] % count).tolist()
    rows = data.rows(torch.tensor([0, count]))
    assert torch.equal(rows.targets[0], rows.targets[1])
    assert rows.sample_ids.tolist() == [0, count]


def test_few_rows_to_measure_on_come_from_all_over(tmp_path):
    corpus = written(tmp_path, [f"{number:05d}" for number in range(1000)])
    spread = Packed(corpus, 6, 10, spread_over=len(Packed(corpus, 6))).rows(torch.arange(10))
    firsts = [Bytes().decode(row) for row in spread.inputs.tolist()]
    assert firsts == [f"{number:05d}" for number in range(0, 1000, 100)]


def test_bytes_of_targets_are_counted(tmp_path, bpe):
    corpus, context = written(tmp_path, TEXTS), 8
    data = Packed(corpus, context)
    targets = data.rows(torch.arange(len(data))).targets
    assert text_bytes(data, corpus, Bytes()) == (targets < 256).sum()
    long = ["the cat sat on the mat"] * 40
    corpus = written(tmp_path / "bpe", long, bpe)
    data = Packed(corpus, context)
    targets = data.rows(torch.arange(len(data))).targets.flatten().tolist()
    assert text_bytes(data, corpus, bpe) == len(bpe.decode(targets).encode())
    bpe.token_bytes, known = None, bpe.token_bytes
    assert math.isclose(text_bytes(data, corpus, bpe), len(bpe.decode(targets).encode()), rel_tol=0.02)
    bpe.token_bytes = known


def test_mixed_rows_keep_where_they_come_from(tmp_path):
    left, right = (
        Packed(written(tmp_path / name, [name * 40]), 8, rows, experience_id=k)
        for k, (name, rows) in enumerate({"a": 4, "b": 7}.items())
    )
    data = Mixed([left, right])
    index = torch.tensor([10, 3, 4, 0])
    rows = data.rows(index)
    assert len(data) == 11
    assert rows.experience_id.tolist() == [1, 0, 1, 0]
    assert rows.sample_ids.tolist() == index.tolist()
    assert torch.equal(rows.targets[0], right.rows(torch.tensor([6])).targets[0])
    assert torch.equal(rows.targets[1], left.rows(torch.tensor([3])).targets[0])


def test_packed_rows_pickle_small(tmp_path):
    corpus = written(tmp_path, ["x" * 10_000])
    assert len(pickle.dumps(corpus)) < 1000
