"""The charts of a store: which view an experiment opens with, and the links to it.

mlflow is imported only to ask a store for its experiments.
"""

from __future__ import annotations

import json
import re
import time
from typing import Any
from urllib.parse import quote

from cl.tracking.store import absolute_uri, quiet

_VIEW = "cl-by-strategy"
_VIEW_TAG = "mlflow.sharedViewState."
# of those that every run fills, in the order in which a reader wants them
_SECTIONS = {
    "accuracy": ("accuracy", "forgetting", "summary", "train", "final", "cost"),
    "loss": ("loss", "forgetting", "summary", "tokens", "perplexity", "train", "final", "cost"),
}


def chart_url(base: str, experiment_id: str, suite: str = "") -> str:
    """Link to an experiment's charts: one line per strategy, the mean over its seeds with a band.

    Any other link opens in MLflow's GenAI mode, ungrouped.

    Args:
        base: of the server that shows the store, such as "http://127.0.0.1:5000".
        suite: shows the runs of this comparison only; it must have been logged to the experiment.

    Example:
        >>> chart_url("http://127.0.0.1:5000/", "1").split("?")[0]
        'http://127.0.0.1:5000/#/experiments/1/runs'
    """
    return _link(base, experiment_id, _view_key(suite))


def view_tag(suite: str = "") -> str:
    """Experiment tag that holds the view which `chart_url` opens."""
    return _VIEW_TAG + _view_key(suite)


def grouped_view(suite: str = "", measure: str = "accuracy") -> str:
    """Content of `view_tag`: grouped by `cl.strategy`, twenty strategies visible instead of ten, last values listed.

    Sections are ordered for who reads forgetting curves; by name, `cost` and `final` would come first.

    Source: what "Save view" of MLflow 3.17.2 writes; an MLflow that does not know it shows the charts ungrouped.
    """
    columns = (f"final/{measure}_avg", "final/forgetting_avg", "final/bwt", "cost/seconds")
    state: dict[str, Any] = {
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "cl.strategy"}]},
        "useGroupedValuesInCharts": True,
        "runsHiddenMode": "FIRST_20_RUNS",
        "selectedColumns": [f"metrics.`{name}`" for name in columns],
        # the page puts a chart of every metric into its section, and sections that are not named here to the end
        "compareRunCharts": [],
        "compareRunSections": [
            {"uuid": name, "name": name, "display": True, "isReordered": True, "deleted": False, "isGenerated": True}
            for name in _SECTIONS[measure]
        ],
        "isAccordionReordered": True,
    }
    if suite:
        state["searchFilter"] = f'tags.`cl.suite` = "{suite}"'
    now = int(time.time() * 1000)
    return json.dumps({"name": suite or "By strategy", "createdAt": now, "updatedAt": now, "state": json.dumps(state)})


def experiment_links(uri: str, base: str) -> dict[str, str]:
    """Name -> `chart_url` of each experiment with runs of ours, the latest first, each followed by its comparisons.

    Args:
        base: as for `chart_url`.
    """
    quiet()
    from mlflow import MlflowClient

    links: dict[str, str] = {}
    client = MlflowClient(tracking_uri=absolute_uri(uri))
    for experiment in client.search_experiments(order_by=["last_update_time DESC"]):
        views = sorted(tag for tag in experiment.tags if tag.startswith(view_tag()))
        for tag in views:
            name = (
                experiment.name
                if tag == view_tag()
                else f"{experiment.name}, {json.loads(experiment.tags[tag])['name']}"
            )
            links[name] = _link(base, experiment.experiment_id, tag.removeprefix(_VIEW_TAG))
    return links


def _view_key(suite: str) -> str:
    return f"{_VIEW}-{re.sub('[^A-Za-z0-9_.-]', '_', suite)}" if suite else _VIEW


def _link(base: str, experiment_id: str, view_key: str) -> str:
    # the page reads its grouping from nowhere but a saved view, and any filter written into the link turns that off
    query = f"workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={view_key}"
    return f"{base.rstrip('/')}/#/experiments/{quote(experiment_id)}/runs?{query}"
