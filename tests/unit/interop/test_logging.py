"""Our metrics and trackers inside Avalanche: the numbers are those of `cl.metrics`, the names those of our runs."""

import shutil

import pytest
import torch
from torch import nn

pytest.importorskip("avalanche")
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive

from cl.core import Setting
from cl.interop._quiet import quiet
from cl.interop.avalanche import ContinualMetrics, MLflowLogger, TrackerLogger, as_benchmark
from cl.metrics import EvalTable, summary
from cl.testing import toy_stream
from cl.tracking import Memory


def trained(evaluator, measure_first=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 6))
    with quiet():
        strategy = Naive(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=16,
            eval_mb_size=100,
            evaluator=evaluator,
        )
        benchmark = as_benchmark(toy_stream(Setting.CLASS_INCREMENTAL))
        if measure_first:
            strategy.eval(benchmark.test_stream)
        for experience in benchmark.train_stream:
            strategy.train(experience, eval_streams=[])
            strategy.eval(benchmark.test_stream)
    return strategy


def evaluator_with(*metrics, loggers=None):
    with quiet():
        return EvaluationPlugin(*metrics, loggers=loggers)


def test_metrics_are_those_of_the_matrix_that_avalanche_measures():
    ours = ContinualMetrics()
    strategy = trained(evaluator_with(accuracy_metrics(experience=True), ours), measure_first=True)
    theirs = strategy.evaluator.get_all_metrics()
    names = [f"Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp00{j}" for j in range(3)]
    R = [[theirs[name][1][i] for name in names] for i in range(4)]
    assert [ours.matrix.R_init, *ours.matrix.R] == R
    wanted = summary(EvalTable.from_rows(R[1:], R[0]))
    last = strategy.evaluator.get_last_metrics()
    assert last["cl/final"] == pytest.approx(wanted["final"]) and last["cl/bwt"] == pytest.approx(wanted["bwt"])
    assert wanted["forgetting_max"] > 0.3, "there is something to measure"


def test_tracker_gets_the_names_and_steps_of_a_run_of_ours():
    memory = Memory(every_steps=5)
    logger = TrackerLogger(memory, stream="toy", name="naive", settings={"lr": 0.1})
    strategy = trained(evaluator_with(accuracy_metrics(stream=True), loggers=[logger]))
    logger.close()
    result = logger.result
    assert (result.stream, result.strategy, result.status, len(result.R)) == ("toy", ["naive"], "done", 3)
    assert memory.curve("accuracy/task_00") == [(i + 1, row[0]) for i, row in enumerate(result.R)]
    assert [step for step, _ in memory.curve("train/loss")] == [5, 10, 12, 15, 20, 24, 25, 30, 35, 36]
    assert memory.curve("final/accuracy_avg")[0][1] == pytest.approx(result.metrics["final"])
    theirs = memory.curve("avalanche/Top1_Acc_Stream/eval_phase/test_stream/Task000")
    assert theirs[-1][1] == pytest.approx(result.metrics["final"])
    assert strategy.clock.train_iterations == 36


def test_mlflow(empty_store, tmp_path):
    from mlflow import MlflowClient

    uri = f"sqlite:///{shutil.copy(empty_store, tmp_path)}"
    with MLflowLogger(uri, experiment="from avalanche", name="naive", stream="toy") as logger:
        trained(evaluator_with(accuracy_metrics(stream=True), loggers=[logger]))
    client = MlflowClient(uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "from avalanche"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.tags["cl.strategy"] == "naive"
    history = client.get_metric_history(run.info.run_id, "accuracy/task_00")
    assert [(m.step, m.value) for m in history] == [(i + 1, row[0]) for i, row in enumerate(logger.result.R)]


def test_a_lost_store_does_not_end_the_training(tmp_path):
    class Broken(Memory):
        def write(self, batch):
            raise OSError("gone")

    strategy = trained(evaluator_with(accuracy_metrics(stream=True), loggers=[TrackerLogger(Broken())]))
    assert strategy.clock.train_iterations == 36
