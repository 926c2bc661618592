"""lm-eval (EleutherAI's evaluation harness) on a model of ours: local tasks, offline, and no task runs code.

A task is a YAML file as lm-eval reads it, with its data beside it. What would run code is refused or kept in:
`!function` tags, scripts as data sets or metrics, and templates, which are filled in a sandbox.

Shape legend: B requests, T tokens, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cl.core import UserError

EXTRA = "lm-eval is not installed; `pip install 'cl-lab[lm-eval]'` brings it"
FORMATS = ("json", "csv", "parquet", "text")
KINDS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")
SPLITS = {"training_split", "validation_split", "test_split", "fewshot_split"}
TEMPLATES = {"doc_to_text", "doc_to_target", "doc_to_choice", "doc_to_decontamination_query"}
SHOTS = {"num_fewshot", "description", "target_delimiter", "fewshot_delimiter"}
SCORING = {"output_type", "generation_kwargs", "metric_list", "filter_list", "repeats", "should_decontaminate"}
NAMES = {"task", "task_alias", "tag", "metadata", "dataset_path", "dataset_kwargs"}
KEYS = frozenset(NAMES | SPLITS | TEMPLATES | SHOTS | SCORING)
"""Keys of a task that say what it is; the others of lm-eval name code."""


class Codec(Protocol):
    """Text to tokens and back."""

    separator: int

    def encode(self, texts: Sequence[str]) -> Sequence[Any]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


def read_tasks(folder: Path) -> list[dict[str, Any]]:
    """The tasks of a folder, checked and with absolute paths to their data.

    Raises:
        UserError: no task, a file that is none, or one that would run code.
    """
    import yaml

    if not folder.is_dir():
        raise UserError(f"tasks is {str(folder)!r}, which is no folder; give one with lm-eval's YAML files")
    found = []
    for path in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")]):
        try:
            node = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.constructor.ConstructorError as error:
            tag = next((word for word in str(error.problem).split("'") if word.startswith("!")), "a tag")
            raise UserError(f"{path} has {tag}, which runs code; write the task with templates alone") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
        found.append(_checked(node, path))
    if not found:
        raise UserError(f"there is no YAML file in {folder}; give a folder with lm-eval's tasks")
    names = [node["task"] for node in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"two files in {folder} define the task {twice!r}; every task has its own name")
    return found


def _checked(node: Any, path: Path) -> dict[str, Any]:
    if not isinstance(node, dict) or not isinstance(node.get("task"), str):
        raise UserError(f"{path} is no task: it has no `task: NAME`")
    unknown = sorted(set(map(str, node)) - KEYS)
    if unknown:
        raise UserError(f"{path} has {unknown[0]!r}; allowed are {', '.join(sorted(KEYS))}")
    if node.get("dataset_path") not in FORMATS:
        raise UserError(
            f"dataset_path in {path} is {node.get('dataset_path')!r}; it must be one of {', '.join(FORMATS)}"
        )
    if node.get("output_type") not in KINDS:
        raise UserError(f"output_type in {path} is {node.get('output_type')!r}; it must be one of {', '.join(KINDS)}")
    options = node.get("dataset_kwargs") or {}
    if set(options) != {"data_files"} or not isinstance(options["data_files"], dict):
        raise UserError(f"dataset_kwargs in {path} must be {{data_files: {{SPLIT: FILE}}}}, with files beside the task")
    for metric in node.get("metric_list") or []:
        if not isinstance(metric, dict) or metric.get("hf_evaluate"):
            raise UserError(f"a metric in {path} is {metric!r}; it must be {{metric: NAME}}, one of lm-eval's own")
    return node | {"dataset_kwargs": {"data_files": {s: _data(f, path) for s, f in options["data_files"].items()}}}


def _data(name: Any, path: Path) -> str:
    file = (path.parent / str(name)).resolve()
    if not file.is_relative_to(path.parent.resolve()) or not file.is_file():
        raise UserError(f"{path} names the data {str(name)!r}; it must be a file beside the task")
    return str(file)


def evaluate(
    answer: Callable[[Tensor], Tensor],
    codec: Codec,
    context: int,
    tasks: Sequence[dict[str, Any]],
    batch_size: int = 32,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, dict[str, float]]:
    """Every metric of every task.

    Args:
        answer: tokens (B, T) -> logits (B, T, V).
        context: most tokens that the model reads.
        tasks: of `read_tasks`.
        limit: documents per task; None takes all.

    Raises:
        UserError: lm-eval is not installed, or a task that it cannot make.
    """
    try:
        import lm_eval
        from lm_eval import utils
        from lm_eval.api import registry
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(EXTRA) from None
    for task in tasks:
        _require_own_metrics(task, registry)
    utils.env = _sandboxed(utils.env)
    with tempfile.TemporaryDirectory() as cache:
        own = [task | {"dataset_kwargs": {**task["dataset_kwargs"], "cache_dir": cache}} for task in tasks]
        try:
            found = lm_eval.simple_evaluate(
                model=_model(answer, codec, context, batch_size),
                tasks=own,
                task_manager=TaskManager(include_defaults=False),
                limit=limit,
                num_fewshot=num_fewshot,
                bootstrap_iters=0,
                log_samples=False,
            )
        except UserError:
            raise
        except Exception as error:  # a task can be wrong in any way; lm-eval's sentence says in which
            raise UserError(f"lm-eval cannot run these tasks: {str(error).splitlines()[0]}") from error
    assert found is not None
    return {
        name: {
            key.partition(",")[0]: float(v) for key, v in values.items() if isinstance(v, float) and "stderr" not in key
        }
        for name, values in found["results"].items()
    }


def _require_own_metrics(task: dict[str, Any], registry: Any) -> None:
    """Whatever lm-eval does not have it looks for on the hub, where a metric is a script."""
    for metric in task.get("metric_list") or []:
        for key, known in (("metric", registry.metric_registry), ("aggregation", registry.aggregation_registry)):
            if key in metric and metric[key] not in known:
                raise UserError(f"{key} of task {task['task']} is {metric[key]!r}, which lm-eval does not have")


def _sandboxed(plain: Any) -> Any:
    """The same environment, in which a template reaches no attribute that leads out of it."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    made = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    made.filters.update({name: made_ for name, made_ in plain.filters.items() if name not in made.filters})
    return made


def _model(answer: Callable[[Tensor], Tensor], codec: Codec, context: int, batch_size: int) -> Any:
    """Our model as lm-eval's; its class is made here, since its base is theirs."""
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    def tokens(text: str) -> list[int]:
        return [int(token) for token in codec.encode([text])[0]]

    class Ours(LM):
        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            texts = [request.args for request in requests]
            return self._scored([_pair(prompt, said, tokens, codec.separator) for prompt, said in texts])

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            totals = []
            for request in requests:
                windows = get_rolling_token_windows(tokens(request.args[0]), codec.separator, context, 1)
                pairs = [make_disjoint_window(window) for window in windows]
                totals.append(sum(score for score, _ in self._scored(pairs)))
            return totals

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return [self._written(*request.args) for request in requests]

        def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
            order = sorted(range(len(pairs)), key=lambda k: len(pairs[k][0]) + len(pairs[k][1]))
            found: dict[int, tuple[float, bool]] = {}
            for low in range(0, len(order), batch_size):
                some = order[low : low + batch_size]
                rows = [[*pairs[k][0], *pairs[k][1]][-context - 1 :] for k in some]
                logits = answer(_padded([row[:-1] for row in rows], codec.separator))
                for k, row, own in zip(some, rows, logits.float().log_softmax(-1).cpu(), strict=True):
                    count = min(len(pairs[k][1]), len(row) - 1)
                    said, wanted = own[len(row) - 1 - count : len(row) - 1], torch.tensor(row[-count:])
                    score = said.gather(1, wanted[:, None]).double().sum().item()
                    found[k] = (score, bool((said.argmax(-1) == wanted).all()))
            return [found[k] for k in range(len(pairs))]

        def _written(self, prompt: str, options: dict[str, Any]) -> str:
            until, most = options.get("until") or [], int(options.get("max_gen_toks", 64))
            if options.get("do_sample"):
                raise UserError("a task asks for sampled answers (do_sample); they are written greedily here")
            stops = [until] if isinstance(until, str) else list(until)
            read, text = [codec.separator, *tokens(prompt)], ""
            written: list[int] = []
            for _ in range(most):
                row = read[-context:]
                following = int(answer(torch.tensor([row]))[0, len(row) - 1].argmax())
                if following == codec.separator:
                    break
                read.append(following)
                written.append(following)
                text = codec.decode(written)
                if any(stop in text for stop in stops):
                    break
            return text[: min([len(text), *(text.find(stop) for stop in stops if stop in text)])]

    return Ours()


def _pair(
    prompt: str, continuation: str, tokens: Callable[[str], list[int]], separator: int
) -> tuple[list[int], list[int]]:
    """Tokens before and of a continuation; a blank between the two belongs to the latter, as in running text."""
    kept = prompt.rstrip(" ")
    continuation = prompt[len(kept) :] + continuation
    whole, before = tokens(kept + continuation), tokens(kept)
    return [separator, *whole[: len(before)]], whole[len(before) :]


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """(B, T) rows filled up at their ends, which no token before them sees."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])
