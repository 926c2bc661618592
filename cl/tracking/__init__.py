"""Where the numbers of a run go: a list in memory, a journal on disk, MLflow.

    observers = [Journal(run_dir), MLflowTracker(uri, run_dir=run_dir)]

mlflow is imported at first use. `points` has the names and steps of everything that is logged.
"""

from cl.tracking.base import Memory, Recorder
from cl.tracking.charts import chart_url, experiment_links
from cl.tracking.check import check_store
from cl.tracking.journal import Journal, has_ended, read_journal
from cl.tracking.mlflow import MLflowTracker, sync
from cl.tracking.points import Point, config_hash, points
from cl.tracking.store import absolute_uri, default_uri, prepare_store, quiet

__all__ = [
    "Journal",
    "MLflowTracker",
    "Memory",
    "Point",
    "Recorder",
    "absolute_uri",
    "chart_url",
    "check_store",
    "config_hash",
    "default_uri",
    "experiment_links",
    "has_ended",
    "points",
    "prepare_store",
    "quiet",
    "read_journal",
    "sync",
]
