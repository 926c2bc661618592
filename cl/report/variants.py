"""Tell runs of one strategy with different settings apart, so that a sweep is not read as seeds of one run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cl.result import Result

CONFIG_FILE = "config.yaml"

# what may change a number; the rest (tracking, folders, progress) may differ between seeds of one comparison
GROUPS = ("strategy", "optimizer", "schedule", "backbone", "stream", "trainer")
NO_EFFECT = {
    *("trainer.device", "trainer.parallel", "trainer.compile"),
    *("trainer.checkpoint_every", "trainer.eval_batch_size", "trainer.eval_every"),
}
PLACES = {"root", "download", "cache"}
"""Where the data of a stream lie, which differs between machines."""


def name_variants(found: Sequence[tuple[Path, Result]]) -> list[Result]:
    """Add what differs to the strategy names, where runs of one strategy on one stream differ in their settings.

    Args:
        found: result files and their content. The settings are read from `config.yaml` beside the file; a run without
            one keeps its name.

    Returns:
        The results in the same order: ["derpp"] becomes ["derpp(alpha=0.2)"], and a setting outside the strategy is
        added to the last name, ["derpp", "refresh(optimizer.lr=0.1)"].
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, (_, result) in enumerate(found):
        key = (result.stream, result.setting, result.backbone, tuple(result.domains), result.label)
        groups.setdefault(key, []).append(index)
    named = [result for _, result in found]
    for indices in groups.values():
        if len(indices) < 2:
            continue
        settings = [_settings(found[index][0].with_name(CONFIG_FILE)) for index in indices]
        for index, differing in zip(indices, _differences(settings), strict=True):
            named[index] = replace(named[index], strategy=_named(named[index].strategy, differing))
    return named


def _differences(settings: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Of each run, the settings on which the runs that have a config disagree; a missing key is no difference."""
    keys = sorted({key for each in settings for key in each})
    varied = [key for key in keys if len({each[key] for each in settings if key in each}) > 1]
    return [{key: each[key] for key in varied if key in each} for each in settings]


def _named(strategy: Sequence[str], differing: Mapping[str, str]) -> list[str]:
    extra: dict[str, list[str]] = {name: [] for name in strategy}
    for key, value in differing.items():
        group, _, rest = key.partition(".")
        name, _, parameter = rest.partition(".")
        if group == "strategy" and name in extra and parameter:
            extra[name].append(f"{parameter}={value}")
        else:
            extra[strategy[-1]].append(f"{key}={value}")
    return [f"{name}({', '.join(extra[name])})" if extra[name] else name for name in strategy]


def _settings(path: Path) -> dict[str, str]:
    """The settings of a run that may change a number, flat; empty when its config cannot be read."""
    try:
        # comes with hydra; a machine that only trains may lack it, and then has no config.yaml to read either
        import yaml

        content = yaml.safe_load(path.read_text())
    except (ImportError, OSError, UnicodeDecodeError, ValueError):
        return {}
    except yaml.YAMLError:
        return {}
    if not isinstance(content, dict):
        return {}
    flat = dict(_flat({group: content[group] for group in GROUPS if group in content}))
    return {
        key: value
        for key, value in flat.items()
        if key not in NO_EFFECT and not key.endswith("seed") and key.rpartition(".")[2] not in PLACES
    }


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)
