"""Open MLflow on the embedded store of this folder, or on another one.

Usage: cl ui [port=5000] [uri=sqlite:///...]

Prints a link that opens the chart view in model-training mode; stop it with Ctrl-C.
"""

from __future__ import annotations

import os
import sys

from cl.core import UserError


def main(words: list[str]) -> int:
    """Replace this process by MLflow's server."""
    from cl.tracking import check_store, default_uri, prepare_store
    from cl.tracking.charts import experiment_links
    from cl.tracking.store import artifact_location, sqlite_path

    options = {"port": "5000", "uri": default_uri()}
    for word in words:
        name, _, value = word.partition("=")
        if name not in options or not value:
            raise UserError(f"{word!r} is no option of `cl ui`; its options are port=NUMBER and uri=ADDRESS")
        options[name] = value
    if not options["port"].isdigit() or not 0 < int(options["port"]) < 65536:
        raise UserError(f"port is {options['port']!r}; it must be a number from 1 to 65535")
    path = sqlite_path(options["uri"])
    if path is not None and not path.exists():
        raise UserError(f"there is no store at {path}; `cl run` and `cl compare` make one where they are called")
    check_store(options["uri"])
    prepare_store(options["uri"])
    base = f"http://127.0.0.1:{options['port']}"
    for name, link in experiment_links(options["uri"], base).items():
        print(f"{name}: {link}")
    sys.stdout.flush()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", options["port"]]
    command += ["--backend-store-uri", options["uri"]]
    location = artifact_location(options["uri"])
    if location is not None:
        command += ["--default-artifact-root", location]
    os.execv(sys.executable, command)
