"""What a page was made of, kept beside it: the settings and the result of every run, so that a study goes on elsewhere.

`runs.jsonl.gz` has one line for each folder of a study: its path, and its files as JSON. Places of the machine it was
made on are names there, so that a run put back into another folder is the same run to `cl compare`. Weights,
checkpoints and what only curves over steps need are left out.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from cl.result import replacing, write_text

RECORDS = "runs.jsonl.gz"
FILES = ("config.yaml", "result.json", "tuning.json")
CURVES = ("course", "within")
"""Parts of a result that grow with its steps and that no page of a study reads."""


def keep(out: Path, page: Path, places: Mapping[str, Path]) -> None:
    """Write down what was finished below `out`.

    Args:
        out: folder of all runs.
        page: folder of the page.
        places: folders of this machine by the names that stand for them.
    """
    lines = [json.dumps(record, sort_keys=True) for record in _records(out)]
    if lines:
        text = "".join(f"{line}\n" for line in lines)
        for name, place in places.items():
            text = text.replace(os.path.abspath(place), f"<{name}>")
        with replacing(page / RECORDS) as file:
            # without the time of writing: the same runs are the same file
            file.write(gzip.compress(text.encode(), mtime=0))


def restore(out: Path, page: Path, places: Mapping[str, Path]) -> None:
    """Put back what was written down and is not there; arguments as of `keep`."""
    if not (page / RECORDS).is_file():
        return
    text = gzip.decompress((page / RECORDS).read_bytes()).decode()
    for name, place in places.items():
        text = text.replace(f"<{name}>", os.path.abspath(place))
    for line in text.splitlines():
        record = json.loads(line)
        folder = out / record["folder"]
        if not any((folder / name).is_file() for name in record["files"]):
            for name, content in record["files"].items():
                write_text(folder / name, _text(name, content))


def _records(out: Path) -> Iterator[dict[str, Any]]:
    """Of each folder that holds a finished run or what tuning chose, in the order of their names."""
    folders = {path.parent for name in ("result.json", "tuning.json") for path in out.rglob(name)}
    for folder in sorted(folders):
        files = {name: _content(folder / name) for name in FILES if (folder / name).is_file()}
        result = files.get("result.json", {"status": "done"})
        if result["status"] == "done":
            result |= {name: [] for name in CURVES if name in result}
            yield {"folder": folder.relative_to(out).as_posix(), "files": files}


def _content(path: Path) -> Any:
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)


def _text(name: str, content: Any) -> str:
    return json.dumps(content, indent=1) if name.endswith(".json") else yaml.safe_dump(content, sort_keys=False)
