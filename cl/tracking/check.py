"""Does a tracking store answer? Asked before a run starts, while the address can still be corrected."""

from __future__ import annotations

import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from urllib.parse import urlsplit

from cl.core import UserError
from cl.tracking.base import first_line
from cl.tracking.store import check_file, default_uri, sqlite_path

ANSWER_WITHIN_S = 3.0

_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def check_store(uri: str) -> None:
    """Ask a store for a sign of life, within about three seconds.

    Raises:
        UserError: unknown kind of address, nothing answers, or something other than MLflow does.
    """
    scheme = urlsplit(uri).scheme.split("+")[0]
    if scheme == "sqlite":
        _within_time(uri, "opening the file", lambda: _check_sqlite(uri))
    elif scheme in ("http", "https"):
        # anybody may ask for it, and urllib takes a name and a password before the host for a part of the host
        host = urlsplit(uri).netloc.rpartition("@")[2]
        health = f"{urlsplit(uri)._replace(netloc=host).geturl().rstrip('/')}/health"
        _within_time(uri, f"GET {health}", lambda: _check_http(uri, health))
    elif scheme in _DATABASE_PORTS:
        address = urlsplit(uri)
        host, port = address.hostname or "localhost", address.port or _DATABASE_PORTS[scheme]
        connect = socket.create_connection
        _within_time(uri, f"connecting to {host}:{port}", lambda: connect((host, port), ANSWER_WITHIN_S).close())
    else:
        known = ", ".join(("sqlite", "http", "https", *_DATABASE_PORTS))
        raise UserError(
            f"tracking.uri={without_password(uri)!r} has no known kind of address; use {known}, "
            f"for example {default_uri()}, or tracking=none"
        )


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
        f"tracking.uri={without_password(uri)!r} does not answer: {tried} failed ({reason}); "
        "give the address of a running store, or tracking=none"
    )


def without_password(uri: str) -> str:
    """An address as it may be printed."""
    return hiding_password(uri, uri)


def hiding_password(sentence: str, uri: str) -> str:
    """A sentence on a store without the password that its address holds."""
    password = urlsplit(uri).password
    return sentence.replace(f":{password}@", ":***@") if password else sentence


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
    check_file(path)
