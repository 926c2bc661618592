"""Addresses, signs of life and links; only `prepare_store` needs mlflow."""

import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

import cl
from cl.core import UserError
from cl.tracking import absolute_uri, chart_url, check_store, default_uri, points, prepare_store
from cl.tracking import check as check_module
from cl.tracking import store as store_module
from cl.tracking.charts import grouped_view, view_tag
from cl.tracking.points import train_points
from cl.tracking.store import artifact_location, patient_uri


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def closed_port():
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_default_store_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_uri() == f"sqlite:///{tmp_path}/mlruns.db"
    assert absolute_uri("sqlite:///mine/x.db") == f"sqlite:///{tmp_path}/mine/x.db"
    assert absolute_uri("sqlite:///x.db?timeout=1") == f"sqlite:///{tmp_path}/x.db?timeout=1"
    assert absolute_uri("http://host:1") == "http://host:1"
    assert artifact_location(default_uri()) == f"{tmp_path}/mlartifacts"
    assert artifact_location("http://host:1") is None
    assert absolute_uri("sqlite:////a#b & c/x.db") == "sqlite:////a#b & c/x.db"


def test_a_busy_file_is_waited_for():
    from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
    from sqlalchemy.engine import make_url

    path, options = SQLiteDialect_pysqlite().create_connect_args(make_url(patient_uri("sqlite:////x/y.db")))
    assert (path, options["timeout"]) == (["/x/y.db"], 60.0)
    assert patient_uri("sqlite:////x/y.db?timeout=1") == "sqlite:////x/y.db?timeout=1"
    assert patient_uri("http://host:1") == "http://host:1"


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("foo://x", "no known kind"),
        ("", "no known kind"),
        ("./mlruns", "no known kind"),
        ("file:///absent/mlruns", "no known kind"),
        ("sqlite:///", "names no file"),
        ("sqlite:///{folder}", "is a folder"),
        ("sqlite:///{folder}/text.db", "not a database"),
        ("sqlite:///{folder}/a?b/x.db", "has ? in its path"),
        ("sqlite:///{folder}/a?b=1/x.db?timeout=1", "has ? in its path"),
        ("sqlite:///{folder}/a%20b/x.db", "has % in its path"),
        ("sqlite:///{folder}/text.db/below.db", "no folder that can be written"),
        ("http://127.0.0.1:{port}", "GET http://127.0.0.1:{port}/health failed"),
        ("http://me:secret@127.0.0.1:{port}", "GET http://127.0.0.1:{port}/health failed"),
        ("oracle://me:secret@127.0.0.1:{port}/runs", "no known kind"),
        ("postgresql://me:secret@127.0.0.1:{port}/runs", "connecting to 127.0.0.1:{port} failed"),
    ],
)
def test_bad_addresses_get_one_sentence(tmp_path, closed_port, uri, says):
    (tmp_path / "text.db").write_text("no database\n" * 100)
    uri, says = (text.format(folder=tmp_path, port=closed_port) for text in (uri, says))
    with pytest.raises(UserError) as caught:
        check_store(uri)
    sentence = str(caught.value)
    assert says in sentence
    assert uri.replace("secret", "***") in sentence
    assert "secret" not in sentence
    assert "\n" not in sentence


def test_a_name_and_a_password_in_the_address_are_no_part_of_the_host():
    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/below/health" else 404)
            self.end_headers()

        def log_message(self, *details):
            pass

    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        check_store(f"http://me:secret@127.0.0.1:{server.server_port}/below/")
        server.shutdown()


@pytest.mark.parametrize(("code", "is_taken"), [(200, True), (401, True), (403, True), (404, False), (500, False)])
def test_what_a_server_answers(code, is_taken):
    """One that asks for a name and a password is there; what knows no /health is no MLflow."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(code)
            self.end_headers()

        def log_message(self, *details):
            pass

    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        if is_taken:
            check_store(uri)
        else:
            with pytest.raises(UserError, match=rf"it answered {code}, so it is no MLflow server\)"):
                check_store(uri)


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("postgresql+psycopg2://me:secret@here/runs", ("here", 5432)),
        ("mysql://here/runs", ("here", 3306)),
        ("mssql://here/runs", ("here", 1433)),
        ("mysql://here:99/runs", ("here", 99)),
        ("postgresql:///runs", ("localhost", 5432)),
    ],
)
def test_a_database_is_asked_at_its_port(monkeypatch, uri, place):
    asked, closed = [], []

    def connect(where, within):
        asked.append((where, within))
        return SimpleNamespace(close=lambda: closed.append(where))

    monkeypatch.setattr(check_module.socket, "create_connection", connect)
    check_store(uri)
    assert (asked, closed) == ([(place, check_module.ANSWER_WITHIN_S)], [place])


def test_a_server_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(check_module, "ANSWER_WITHIN_S", 0.2)
    with closing(socket.socket()) as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        with pytest.raises(UserError, match=r"(no answer within 0.2 s|timed out)"):
            check_store(f"http://127.0.0.1:{deaf.getsockname()[1]}")


def test_checking_creates_nothing(tmp_path):
    check_store(default_uri(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


def test_prepared_store_is_found_again_without_mlflow(store):
    check_store(store)
    script = (
        "import sys\nfrom cl.tracking import prepare_store\n"
        f"prepare_store({store!r})\nassert 'mlflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(cl.__file__).parents[1])


def test_preparing_leaves_no_draft(store):
    folder = store_module.sqlite_path(store).parent
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_prepare_is_quick_when_the_tables_exist(store, monkeypatch):
    monkeypatch.setattr(store_module, "quiet", lambda: pytest.fail("it went on to create tables"))
    prepare_store(store)
    prepare_store("http://127.0.0.1:1")


def test_a_file_that_exists_gets_its_tables_and_keeps_what_it_holds(tmp_path):
    """One with a table of another program's."""
    pytest.importorskip("mlflow")
    with closing(sqlite3.connect(tmp_path / "mlruns.db")) as connection, connection:
        connection.execute("create table mine (number)")
        connection.execute("insert into mine values (7)")
    prepare_store(default_uri(tmp_path))
    with closing(sqlite3.connect(tmp_path / "mlruns.db")) as connection:
        assert connection.execute("select number from mine").fetchall() == [(7,)]
        assert connection.execute("select count(*) from runs").fetchone() == (0,)
        (location,) = connection.execute("select artifact_location from experiments").fetchone()
    assert location.endswith(f"{tmp_path}/mlartifacts/0")
    assert not list(tmp_path.glob(".mlruns.db.*"))


def test_a_store_that_cannot_be_made_is_a_bad_request(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be created"):
        prepare_store(f"sqlite:///{tmp_path}/file/x.db")


@pytest.mark.parametrize("name", ["mlruns.db", "text.db", "shut.db"])
def test_mlflow_is_not_asked_for_a_file_that_cannot_be_opened(tmp_path, monkeypatch, name):
    """A folder, no database, and a file that SQLite may not read: MLflow asks for two minutes."""
    sqlalchemy_store = pytest.importorskip("mlflow.store.tracking.sqlalchemy_store")
    (tmp_path / "mlruns.db").mkdir()
    (tmp_path / "text.db").write_text("no database\n" * 100)
    (tmp_path / "shut.db").touch()
    connect = sqlite3.connect

    def refused(path, **options):
        if Path(path).name == "shut.db":
            raise sqlite3.OperationalError("unable to open database file")
        return connect(path, **options)

    monkeypatch.setattr(sqlite3, "connect", refused)
    monkeypatch.setattr(sqlalchemy_store, "SqlAlchemyStore", lambda *where: pytest.fail("MLflow was asked"))
    with pytest.raises(UserError, match=r"cannot be created \((.*is a folder|.*not a database|unable to open .*)\)$"):
        prepare_store(f"sqlite:///{tmp_path}/{name}")


def test_a_store_in_a_folder_that_cannot_be_written_is_refused(store, monkeypatch):
    """SQLite writes its journal beside the file."""
    folder = store_module.sqlite_path(store).parent
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)
    with pytest.raises(UserError, match=f"{folder} is no folder that can be written"):
        check_store(store)


@pytest.mark.parametrize("has_hard_links", [True, False])
def test_another_process_may_be_faster(tmp_path, monkeypatch, has_hard_links):
    """The tables of the one that came first stay, and no draft is left."""
    sqlalchemy_store = pytest.importorskip("mlflow.store.tracking.sqlalchemy_store")

    class SlowStore:
        def __init__(self, uri, artifacts):
            store_module.sqlite_path(uri).write_text("mine")
            (tmp_path / "mlruns.db").write_text("theirs")
            self.engine = SimpleNamespace(dispose=lambda: None)

    monkeypatch.setattr(sqlalchemy_store, "SqlAlchemyStore", SlowStore)
    if not has_hard_links:
        monkeypatch.setattr(os, "link", lambda *paths: os.stat("/no such file"))
    prepare_store(default_uri(tmp_path))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"mlruns.db": "theirs"}


@pytest.mark.parametrize("has_hard_links", [True, False])
def test_what_was_prepared_takes_its_place(tmp_path, monkeypatch, has_hard_links):
    """Also on a file system without hard links, and at an address that depends on the working directory."""
    sqlalchemy_store = pytest.importorskip("mlflow.store.tracking.sqlalchemy_store")
    places = []

    class Store:
        def __init__(self, uri, artifacts):
            places.append(artifacts)
            store_module.sqlite_path(uri).write_text("mine")
            self.engine = SimpleNamespace(dispose=lambda: None)

    monkeypatch.setattr(sqlalchemy_store, "SqlAlchemyStore", Store)
    if not has_hard_links:
        monkeypatch.setattr(os, "link", lambda *paths: os.stat("/no such file"))
    monkeypatch.chdir(tmp_path)
    prepare_store("sqlite:///below/mlruns.db")
    assert {path.name: path.read_text() for path in (tmp_path / "below").iterdir()} == {"mlruns.db": "mine"}
    assert places == [f"{tmp_path}/below/mlartifacts"]


def test_default_experiment_keeps_its_artifacts_beside_the_store(store):
    with closing(sqlite3.connect(store_module.sqlite_path(store))) as connection:
        (location,) = connection.execute("select artifact_location from experiments where name = 'Default'").fetchone()
    assert location.startswith((artifact_location(store), f"file://{artifact_location(store)}"))


def test_link_opens_the_grouped_charts():
    url = chart_url("http://127.0.0.1:5000/", "3")
    assert url == (
        "http://127.0.0.1:5000/#/experiments/3/runs"
        "?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey=cl-by-strategy"
    )
    assert view_tag() == "mlflow.sharedViewState.cl-by-strategy"
    state = json.loads(json.loads(grouped_view())["state"])
    assert state["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "cl.strategy"}]
    assert "searchFilter" not in state
    assert "metrics.`final/accuracy_avg`" in state["selectedColumns"]


def test_the_table_of_a_text_stream_lists_the_measure_that_it_has():
    columns = json.loads(json.loads(grouped_view(measure="loss"))["state"])["selectedColumns"]
    assert "metrics.`final/loss_avg`" in columns and "metrics.`final/accuracy_avg`" not in columns


@pytest.mark.parametrize("measure", ["accuracy", "loss"])
def test_forgetting_is_read_before_what_it_cost(measure, make_result):
    state = json.loads(json.loads(grouped_view(measure=measure))["state"])
    named = [section["name"] for section in state["compareRunSections"]]
    assert named[:3] == [measure, "forgetting", "summary"] and named[-2:] == ["final", "cost"]
    # a section without charts would stand empty: every run fills all of them
    R = [[0.5, 0.1, 0.1], [0.4, 0.5, 0.1], [0.3, 0.4, 0.5]]
    result = make_result(R=R, measure=measure, cost={"wall_s": 1.0}, status="done", metrics={"final": 0.5})
    result.course = [[i, 10 * i, 1000 * i, 0.1] for i in range(3)]
    logged = [*points(result), *train_points({"loss": 1.0}, 0.1, 1)]
    assert set(named) <= {point.name.split("/")[0] for point in logged}


def test_link_to_one_comparison():
    key = "cl-by-strategy-split_digits_1a2b"
    assert chart_url("http://h", "3", suite="split_digits/1a2b").endswith(f"viewStateShareKey={key}")
    assert view_tag("split_digits/1a2b") == f"mlflow.sharedViewState.{key}"
    state = json.loads(json.loads(grouped_view("split_digits/1a2b"))["state"])
    assert state["searchFilter"] == 'tags.`cl.suite` = "split_digits/1a2b"'
