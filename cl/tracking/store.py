"""Where MLflow keeps runs: addresses, and the embedded store. mlflow is imported only to create a database."""

from __future__ import annotations

import logging
import os
import sqlite3
import uuid
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cl.core import UserError
from cl.tracking.base import first_line

DATABASE = "mlruns.db"
ARTIFACTS = "mlartifacts"

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
    # and one of a full disk or a file that cannot be written, without the statement in SQL and its traceback
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def default_uri(folder: str | Path = ".") -> str:
    """The embedded store of a folder, as an absolute address.

    Example:
        >>> default_uri("/data/results")
        'sqlite:////data/results/mlruns.db'
    """
    return f"sqlite:///{Path(folder).resolve() / DATABASE}"


def store_of(run_dir: Path, run_id: str) -> str:
    """The embedded store that holds a run, wherever a command is given: that of the working directory, or one above the
    run's folder; the former where none holds it."""
    folders = (Path(), *run_dir.resolve().parents)
    return default_uri(next((folder for folder in folders if _holds(folder / DATABASE, run_id)), "."))


def absolute_uri(uri: str) -> str:
    """The same store from any working directory; only SQLite addresses depend on it."""
    path = sqlite_path(uri)
    if path is None:
        return uri
    _, mark, options = uri.partition("?")
    return f"{uri.split('///', 1)[0]}///{path.resolve()}{mark}{options}"


def patient_uri(uri: str) -> str:
    """The same store, waiting a minute instead of five seconds while another process writes to its file."""
    return uri if sqlite_path(uri) is None or "?" in uri else f"{uri}?timeout=60"


def sqlite_path(uri: str) -> Path | None:
    """File of a SQLite address; None for other stores.

    Raises:
        UserError: what SQLAlchemy takes for options or decodes, depending on its version, would be another file.
    """
    if urlsplit(uri).scheme.split("+")[0] != "sqlite" or "///" not in uri:
        return None
    path, _, options = uri.split("///", 1)[1].partition("?")
    for mark in [mark for mark, is_held in (("?", "/" in options), ("%", "%" in path)) if is_held]:
        raise UserError(
            f"tracking.uri={uri!r} has {mark} in its path, which the address of a SQLite store cannot hold; "
            "work in another folder, or give tracking.uri=sqlite:////FOLDER/mlruns.db, or tracking=none"
        )
    return Path(path)


def artifact_location(uri: str) -> str | None:
    """Folder for artifacts beside a SQLite file; None leaves the choice to the server."""
    path = sqlite_path(uri)
    return None if path is None else str(path.resolve().parent / ARTIFACTS)


def check_file(path: Path) -> None:
    """Open the file of a store that exists, or look whether it can be made.

    Raises:
        OSError, sqlite3.Error: it is a folder, or no database, or nobody could write to it.
    """
    if path.is_dir():
        raise OSError(f"{path} is a folder")
    if path.exists():
        with closing(sqlite3.connect(path, timeout=1.0)) as connection:
            connection.execute("pragma schema_version")
        if not os.access(path, os.W_OK):
            raise OSError(f"{path} cannot be written")
    # the nearest folder that exists decides whether a file can be made: the store's, or SQLite's journal beside it
    folder = next(parent for parent in path.resolve().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OSError(f"{folder} is no folder that can be written")


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

    create: Callable[..., Any] = SqlAlchemyStore
    path = path.resolve()
    artifacts = str(path.parent / ARTIFACTS)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        # MLflow tries for two minutes to open what cannot be opened
        check_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            # an empty file or another program's tables: there is nothing to swap in
            create(uri, artifacts)
            return
        create(f"sqlite:///{draft}", artifacts).engine.dispose()
        _publish(draft, path)
    except Exception as error:  # sqlite, sqlalchemy and alembic each have errors of their own for a full disk
        raise UserError(f"tracking.uri={uri!r}: the store cannot be created ({first_line(error)})") from None
    finally:
        with suppress(OSError):
            draft.unlink()


def _publish(draft: Path, path: Path) -> None:
    try:
        os.link(draft, path)
    except FileExistsError:
        pass  # another process was faster, and its file is as good
    except OSError:
        # a file system without hard links
        if not path.exists():
            os.replace(draft, path)


def _holds(path: Path, run_id: str) -> bool:
    if not path.is_file():
        return False
    try:
        with closing(sqlite3.connect(path, timeout=5.0)) as connection:
            return connection.execute("select 1 from runs where run_uuid = ?", (run_id,)).fetchone() is not None
    except sqlite3.DatabaseError:
        return False


def _has_tables(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with closing(sqlite3.connect(path, timeout=5.0)) as connection:
            names = {row[0] for row in connection.execute("select name from sqlite_master where type = 'table'")}
    except sqlite3.DatabaseError:
        return False
    return {"experiments", "runs", "alembic_version"} <= names
