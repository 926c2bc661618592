"""Where MLflow keeps runs: addresses, the embedded store, whether a store answers, and the link to its charts.

Nothing here imports mlflow, except the one-time creation of a database.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sqlite3
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from urllib.parse import quote, urlsplit

from cl.core import UserError
from cl.tracking.base import first_line

DATABASE = "mlruns.db"
ARTIFACTS = "mlartifacts"
ANSWER_WITHIN_S = 3.0

VIEW = "cl-by-strategy"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
"""Experiment tag that holds the view which `chart_url` opens: the chart page reads its grouping from nowhere else."""

_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}

_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_AGENT_HINT": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # a lost server must cost seconds, not the four minutes of the default seven retries
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
}


def quiet() -> None:
    """No telemetry, no chatter and short waits from mlflow, here and in child processes; what the user set stays."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # one warning of ours tells of a lost server; without this there is one more for every retry
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


def default_uri(folder: str | Path = ".") -> str:
    """The embedded store of a folder, as an absolute address.

    Example:
        >>> default_uri("/data/results")
        'sqlite:////data/results/mlruns.db'
    """
    return f"sqlite:///{Path(folder).resolve() / DATABASE}"


def absolute_uri(uri: str) -> str:
    """The same store from any working directory; only SQLite addresses depend on it."""
    path = sqlite_path(uri)
    return uri if path is None else f"{uri.split('///', 1)[0]}///{path.resolve()}"


def sqlite_path(uri: str) -> Path | None:
    """File of a SQLite address; None for other stores."""
    if urlsplit(uri).scheme.split("+")[0] != "sqlite" or "///" not in uri:
        return None
    return Path(uri.split("///", 1)[1])


def artifact_location(uri: str) -> str | None:
    """Folder for artifacts beside a SQLite file; None leaves the choice to the server."""
    path = sqlite_path(uri)
    return None if path is None else str(path.resolve().parent / ARTIFACTS)


def check_store(uri: str) -> None:
    """Ask a store for a sign of life, within about three seconds.

    Raises:
        UserError: unknown kind of address, nothing answers, or something other than MLflow does.
    """
    scheme = urlsplit(uri).scheme.split("+")[0]
    if scheme == "sqlite":
        _within_time(uri, "opening the file", lambda: _check_sqlite(uri))
    elif scheme in ("http", "https"):
        health = f"{uri.rstrip('/')}/health"
        _within_time(uri, f"GET {health}", lambda: _check_http(uri, health))
    elif scheme in _DATABASE_PORTS:
        address = urlsplit(uri)
        host, port = address.hostname or "localhost", address.port or _DATABASE_PORTS[scheme]
        connect = socket.create_connection
        _within_time(uri, f"connecting to {host}:{port}", lambda: connect((host, port), ANSWER_WITHIN_S).close())
    else:
        known = ", ".join(("sqlite", "http", "https", *_DATABASE_PORTS))
        raise UserError(
            f"tracking.uri={uri!r} has no known kind of address; use {known}, for example {default_uri()}, "
            "or tracking=none"
        )


def prepare_store(uri: str) -> None:
    """Create the tables of a SQLite store once, before several processes use it; milliseconds when they exist.

    The file appears complete or not at all, also when two processes prepare it or one is killed.

    Raises:
        UserError: the file cannot be made.
    """
    path = sqlite_path(uri)
    if path is None or _has_tables(path):
        return
    quiet()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path = path.resolve()
    artifacts = str(path.parent / ARTIFACTS)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            # an empty file or another program's tables: there is nothing to swap in
            SqlAlchemyStore(uri, artifacts)
            return
        SqlAlchemyStore(f"sqlite:///{draft}", artifacts).engine.dispose()
        os.link(draft, path)
    except FileExistsError:
        pass  # another process was faster, and its file is as good
    except Exception as error:  # sqlite, sqlalchemy and alembic each have errors of their own for a full disk
        raise UserError(f"tracking.uri={uri!r}: the store cannot be created ({first_line(error)})") from None
    finally:
        draft.unlink(missing_ok=True)


def chart_url(base: str, experiment_id: str) -> str:
    """Link to an experiment's charts, one line with a band over seeds per strategy.

    MLflow opens any other link in its GenAI mode, ungrouped.

    Args:
        base: of the server that shows the store, such as "http://127.0.0.1:5000".

    Example:
        >>> chart_url("http://127.0.0.1:5000/", "1").split("?")[0]
        'http://127.0.0.1:5000/#/experiments/1/runs'
    """
    query = f"workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={VIEW}"
    return f"{base.rstrip('/')}/#/experiments/{quote(experiment_id)}/runs?{query}"


def grouped_view() -> str:
    """Content of `VIEW_TAG`: a saved view, grouped by `cl.strategy`, that shows twenty strategies instead of ten.

    Source: what "Save view" of MLflow 3.17.2 writes; an MLflow that does not know it shows the charts ungrouped.
    """
    columns = ("final/accuracy_avg", "final/forgetting_avg", "final/bwt", "cost/seconds")
    state = {
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "cl.strategy"}]},
        "useGroupedValuesInCharts": True,
        "runsHiddenMode": "FIRST_20_RUNS",
        "selectedColumns": [f"metrics.`{name}`" for name in columns],
    }
    now = int(time.time() * 1000)
    return json.dumps({"name": "By strategy", "createdAt": now, "updatedAt": now, "state": json.dumps(state)})


def _within_time(uri: str, tried: str, attempt: Callable[[], None]) -> None:
    """Run `attempt` in a thread that is left behind when it hangs: a name server may take minutes to say no."""
    failures: list[Exception] = []

    def run() -> None:
        try:
            attempt()
        except Exception as error:  # told to the user below, whatever it is
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(ANSWER_WITHIN_S)
    if thread.is_alive():
        raise UserError(_no_answer(uri, tried, f"no answer within {ANSWER_WITHIN_S:g} s"))
    if failures:
        raise UserError(_no_answer(uri, tried, first_line(failures[0])))


def _no_answer(uri: str, tried: str, reason: str) -> str:
    return (
        f"tracking.uri={_without_password(uri)!r} does not answer: {tried} failed ({reason}); "
        "give the address of a running store, or tracking=none"
    )


def _without_password(uri: str) -> str:
    password = urlsplit(uri).password
    return uri.replace(f":{password}@", ":***@") if password else uri


def _check_http(uri: str, health: str) -> None:
    try:
        with urllib.request.urlopen(health, timeout=ANSWER_WITHIN_S) as answer:
            answer.read(1)
    except urllib.error.HTTPError as error:
        # asked to log in: something is there, and the tracker will say whether the credentials are right
        if error.code not in (401, 403):
            raise OSError(f"it answered {error.code}, so it is no MLflow server") from None
    except urllib.error.URLError as error:
        raise OSError(str(error.reason)) from None


def _check_sqlite(uri: str) -> None:
    path = sqlite_path(uri)
    if path is None or not path.name:
        raise OSError("the address names no file; write sqlite:///FILE")
    if path.is_dir():
        raise OSError(f"{path} is a folder")
    if path.exists():
        with closing(sqlite3.connect(path, timeout=1.0)) as connection:
            connection.execute("pragma schema_version")
        if not os.access(path, os.W_OK):
            raise OSError(f"{path} cannot be written")
        return
    # the nearest folder that exists decides whether the file can be made
    folder = next(parent for parent in path.resolve().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OSError(f"{folder} is no folder that can be written")


def _has_tables(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with closing(sqlite3.connect(path, timeout=5.0)) as connection:
            names = {row[0] for row in connection.execute("select name from sqlite_master where type = 'table'")}
    except sqlite3.DatabaseError:
        return False
    return {"experiments", "runs", "alembic_version"} <= names
