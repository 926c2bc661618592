"""One thread and no surprises: what every test may rely on."""

import getpass
import os
import socket
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
# tokenised text is kept from one session to the next, but not in the user's own cache
os.environ.setdefault("CL_CACHE", os.path.join(tempfile.gettempdir(), f"cl-lab-tests-{getpass.getuser()}"))
# with a card: what a tuner finds at these sizes, while other tests use the card, is no choice for anyone
os.environ.setdefault("KERNELS_AUTOTUNE", "0")

import pytest
import torch

torch.set_num_threads(1)
# Triton reads this when it is imported, which whoever collects transformers does; with a card kernels are compiled
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

HERE = (None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", socket.gethostname())
LONGEST = ("reproduction/", "cli/test_install", "kernels/test_aot", "kernels/test_tools", "core/test_distributed")
"""Files of a few long tests. They go first, so that no worker is left alone with one when the others are done."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: next((k for k, name in enumerate(LONGEST) if name in item.nodeid), len(LONGEST)))


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """File of an MLflow store with its tables and nothing in them, to be copied; making them takes seconds."""
    from cl.tracking import prepare_store

    path = tmp_path_factory.mktemp("store") / "mlruns.db"
    prepare_store(f"sqlite:///{path}")
    return path


@pytest.fixture(autouse=True)
def without_network(request, monkeypatch):
    """A name that is looked up beyond this machine fails the test: libraries hide that they asked, and wait for it."""
    asked, real = [], socket.getaddrinfo

    def getaddrinfo(host, *where, **how):
        if host in HERE:
            return real(host, *where, **how)
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "tests have no network")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield
    assert not asked or request.node.get_closest_marker("network"), f"{asked} looked up"
