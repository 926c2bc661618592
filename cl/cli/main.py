"""`cl COMMAND ...`: find the command, run it, turn what went wrong into one sentence and an exit code.

Exit codes: 0 done; 1 the run failed or was interrupted; 2 the request was wrong.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "run": "train one composition of strategies on a stream",
    "compare": "train several on the same seeds, in parallel, and report with intervals and tests",
    "resume": "go on with an interrupted run exactly where it stopped",
    "extend": "give a run more budget on the same plan",
    "rewarm": "go on from a run's checkpoint under a new learning-rate schedule",
    "fork_anneal": "measure an annealed copy of a run while the run goes on",
    "evaluate": "multiple-choice and generation tasks through lm-eval, offline",
    "export": "take the network out of a run: for transformers, or weights and what makes it again",
    "report": "write the HTML report and figures of a folder of runs",
    "list": "what exists: streams, strategies, backbones, ...; `cl list NAME`: one with its options",
    "explain": "look inside one batch: rows, loss terms, gradients, hooks, cost",
    "reproduce": "re-run a published result and say whether it holds",
    "ui": "open MLflow on the embedded store",
    "doctor": "versions, devices, kernels, data roots and store",
}

USAGE = """Continual learning: compare strategies against forgetting.

Usage: cl COMMAND [ARGUMENTS]

Commands:
{commands}

Options:
  --debug    show the traceback of an error
  --version  show the version
  --help     show this page; `cl COMMAND --help` shows a command's own

Start with:
  cl compare strategies=naive,joint,replay,derpp seeds=5
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    is_debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if words[:1] == ["help"] and words[1:]:
        words = [*words[1:], "--help"]
    if not words or words[0] in ("--help", "-h", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        from cl import __version__

        print(f"cl-lab {__version__}")
        return 0
    command, *rest = words
    if command not in COMMANDS:
        from difflib import get_close_matches

        near = "".join(f" (did you mean {name}?)" for name in get_close_matches(command.lower(), COMMANDS, 1))
        return _complain(f"{command!r} is no command{near}; the commands are {', '.join(COMMANDS)}")
    try:
        try:
            return _call(command, rest)
        finally:
            if "RANK" in os.environ:
                from cl.distributed import stop

                stop()
    except KeyboardInterrupt:
        return _complain("interrupted; `cl resume RUN_DIR`, or the same `cl compare`, goes on", code=1)
    except BrokenPipeError:
        # the reader of our output went away (`cl list | head`): nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if is_debug:
            traceback.print_exc()
        return _complain(said(error), _exit_code(error))


def usage() -> str:
    """The help page: every command with its line."""
    width = max(map(len, COMMANDS))
    return USAGE.format(commands="\n".join(f"  {name:{width}}  {line}" for name, line in COMMANDS.items()))


def _call(command: str, words: list[str]) -> int:
    module = import_module(f"cl.cli.{'listing' if command == 'list' else command}")
    if any(word in ("--help", "-h") for word in words):
        print((module.__doc__ or "").strip())
        return 0
    _require_each_once(words)
    code = module.main(words)
    return int(code or 0)


def _require_each_once(words: Sequence[str]) -> None:
    """Refuse two words for one setting, of which the first would be forgotten without a word.

    Not in a sweep, where `cl compare` lets what it has chosen follow what it was told.

    Example:
        >>> _require_each_once(["seed=0", "+suite=a", "+suite=b"])
        >>> _require_each_once(["-m", "seed=0,1", "seed=2"])
    """
    if {"-m", "--multirun"} & set(words):
        return
    given: dict[str, str] = {}
    for word in words:
        name, is_setting, _ = word.partition("=")
        if not is_setting or name.startswith(("-", "+", "~")):
            continue
        if name in given:
            from cl.core import UserError

            raise UserError(f"{given[name]!r} and {word!r} both set {name}; give one of them")
        given[name] = word


def said(error: Exception) -> str:
    """The sentence of an error; of one that nobody wrote a sentence for, also what it is and where it came from."""
    if "RANK" in os.environ:
        from cl.distributed import reason

        if (sentence := reason(error)) != str(error):
            return sentence
    if isinstance(error, ValueError | OSError) or type(error).__module__ != "builtins" or not error.__traceback__:
        return str(error) or type(error).__name__
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{place.name}, line {place.lineno} of {os.path.basename(place.filename)}"
    return f"{type(error).__name__}: {error} (in {where}; --debug and the log of the run show the way there)"


def _exit_code(error: Exception) -> int:
    from cl.core import UserError

    return 2 if isinstance(error, UserError) else 1


def _complain(sentence: str, code: int = 2) -> int:
    if _is_first_to_say(sentence):
        print(f"cl: {sentence}", file=sys.stderr)
    return code


def _is_first_to_say(sentence: str) -> bool:
    """Whether no other process of a run has said it: what all find wrong is heard once, and what one finds as well.

    Nobody waits for the others here: they may be gone, or wait for this one. Where torchrun keeps no store, all say it.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from datetime import timedelta

    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
        return store.add(f"cl said in attempt {attempt}: {sentence}", 1) == 1
    except RuntimeError:  # the store is gone
        return True


if __name__ == "__main__":
    sys.exit(main())
