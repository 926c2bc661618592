"""A hand-made run, a way to tell it to observers, and one prepared MLflow store for all tests."""

from types import SimpleNamespace

import pytest

from cl.metrics import EvalTable, summary
from cl.result import Result
from cl.tracking import default_uri, prepare_store

ROWS = [[0.9, 0.2, None], [0.6, 0.8, 0.1], [0.7, 0.5, 0.95]]
SETTINGS = {"seed": 7, "optimizer.lr": 0.1, "stream.num_experiences": 3, "long": "x" * 700}


@pytest.fixture
def settings():
    return dict(SETTINGS)


@pytest.fixture
def make_result():
    def make(**changes):
        names = ["a", "b", "c"]
        fields = {
            "stream": "permuted_digits",
            "strategy": ["derpp", "refresh"],
            "backbone": "mlp",
            "setting": "domain_incremental",
            "seed": 7,
            "experiences": names,
            "domains": names,
            "trained": [0, 1, 2],
            "measure": "accuracy",
        }
        return Result(**(fields | changes))

    return make


@pytest.fixture
def tell():
    """Play the part of the trainer: `num_steps` steps per experience, whose loss is the number of the step."""

    def play(observers, result, *, first=0, last=3, steps_done=0, num_steps=10, stop_at=None, status="done"):
        def say(event, *details):
            for observer in observers:
                getattr(observer, event)(*details)

        say("on_start", result, SETTINGS)
        for k in range(first, last):
            step = k * num_steps + (steps_done if k == first else 0)
            say("on_experience_start", SimpleNamespace(step=step), num_steps)
            while step < (k + 1) * num_steps:
                if step == stop_at:
                    return
                step += 1
                # the trainer may be ahead of the losses that it tells, so the state says nothing useful here
                say("on_step", SimpleNamespace(step=-1), {"loss": float(step), "ewc": 0.5}, 0.1)
            result.R.append(ROWS[k])
            say("on_evaluation", SimpleNamespace(step=step), result)
        result.status = status
        if status == "done":
            result.metrics = summary(EvalTable.from_result(vars(result)))
            result.cost = {"wall_s": 3.0, "peak_memory_bytes": 5e8, "forwards": 100}
        say("on_end", result)

    return play


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """Address of a store whose tables exist; making them takes seconds."""
    uri = default_uri(tmp_path_factory.mktemp("store"))
    prepare_store(uri)
    return uri


@pytest.fixture
def client(store):
    from mlflow import MlflowClient

    return MlflowClient(store)


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 7\n")
    return tmp_path
