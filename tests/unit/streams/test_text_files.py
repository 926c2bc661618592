"""Files of text, whatever they are called and however they are written: against what was put into them."""

import bz2
import gzip
import hashlib
import json
import lzma
from pathlib import Path

import pytest

from streams._documents import Domain, Source
from streams.text_domains import text_domains


@pytest.mark.parametrize("name", ["part[1]", "[abc]", "part*", "part?"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_name_is_no_pattern(text_root, name, kind):
    """A file with brackets in its name was left out without a word, and a star read its neighbours."""
    from datasets import Dataset

    folder = text_root / "named"
    for stem, text in ((name, "ours"), ("a", "not ours"), ("part1", "not ours"), ("part2", "not ours")):
        Dataset.from_dict({"text": [text]}).to_parquet(path := folder / f"{stem}.{kind}")
        if kind != "parquet":
            path.write_text(text if kind == "txt" else json.dumps({"text": text}) + "\n")
    domain = Domain("named", f"named/{name}.{kind}", eval_path="held.jsonl")
    assert list(Source(domain, "train", str(text_root), False).pieces()) == [("ours", True)]


def test_hidden_files_of_a_folder_are_no_text(text_root):
    """Such as the copy that a notebook saves, which would put held-out documents among those trained on."""
    many, domain = text_root / "many", Domain("many", "many")
    wanted = Source(domain, "train", str(text_root), False).places()
    (many / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/a-checkpoint.txt", "._a.txt"):
        (many / name).write_text("a copy\n")
    assert Source(domain, "train", str(text_root), False).places() == wanted


@pytest.mark.parametrize("packed", ["", ".gz", ".xz", ".bz2"])
def test_a_txt_is_its_lines_whatever_ends_them(text_root, packed):
    """Windows editors write a byte order mark and two letters at the end of a line; a page break ends none."""
    opened = {"": open, ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}[packed]
    with opened(text_root / f"odd.txt{packed}", "wb") as file:
        file.write("\ufeff# one\r\n\r\nna\u00efve\x0cpage\u2028\r# two\nlast \ufeff".encode())
    domain = Domain("odd", f"odd.txt{packed}", eval_path="held.jsonl", starts="^# ")
    found = list(Source(domain, "train", str(text_root), False).pieces())
    lines = [("# one\n", True), ("\n", False), ("na\u00efve\x0cpage\u2028\n", False), ("# two\n", True)]
    assert found == [*lines, ("last \ufeff", False)]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_file_is_hashed_once_for_a_stream(text_root, monkeypatch, tokenizer):
    """It was once for each part that is cut out of it, and once more for the tokenizer; yet a change is noticed."""
    hashed, whole = [], hashlib.file_digest

    def counted(file, kind):
        hashed.append(Path(file.name).name)
        return whole(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    domains = [{"name": "code", "path": "code.txt", "starts": "^def "}, {"name": "many", "path": "many"}]
    domains[1]["eval_path"] = "held.jsonl"

    def content():
        options = {"tokenizer": tokenizer, "vocabulary": 260, "context": 8, "root": str(text_root)}
        return text_domains(domains, **options).content

    first = content()
    assert sorted(hashed) == ["a.txt", "b.txt", "code.txt", "held.jsonl"]
    (text_root / "code.txt").write_text((text_root / "code.txt").read_text().replace("x + 3\n", "x + 4\n"))
    assert content() != first
