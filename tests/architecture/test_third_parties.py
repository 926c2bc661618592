"""Every heavy package has one home, and is imported at first use there (DESIGN, section 3)."""

import os
import re
import subprocess
import sys

HOMES = {
    "hydra": r"cl\.cli(\..*)?",
    "omegaconf": r"cl\.cli(\..*)?",
    "mlflow": r"cl\.tracking(\..*)?",
    "avalanche": r"cl\.interop(\..*)?",
    "triton": r"kernels\.\w+\.triton\w*|kernels\.(common|aot)(\..*)?",
    "numba": r"kernels\.\w+\.numba\w*",
    "datasets": r"streams(\..*)?",
    "torchvision": r"streams(\..*)?",
    "lm_eval": r"cl\.interop\.harness",
    "transformers": r"cl\.backbones\._hf_models|strategies\._?\w*lora\w*",
    "peft": r"cl\.backbones\.(hf|_lora)|strategies\._?\w*lora\w*",
}
FIRST_USE = (set(HOMES) - {"hydra", "omegaconf"}) | {"sklearn", "matplotlib"}
"""Imported inside functions, or in files that are themselves imported inside functions."""
MAY_BE_HEAVY = (
    r"cl\.(report|tracking|interop|cli)\.(?!main$|listing$)\w+|cl\.backbones\.hf|kernels\.\w+\.(triton|numba)\w*"
)

LIGHT = ("cl", "cl.cli.main", "cl.cli.listing")
"""What answers `cl --help` and `cl list` in half a second."""
HEAVY = ("torch", "hydra", "omegaconf", "mlflow", "avalanche", "matplotlib", "numpy", "rich.console")

BARE_BOX = '''
import sys

class Without:
    """A finder that does not see some packages, as if they were not installed."""
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        absent = ("mlflow", "hydra", "omegaconf", "avalanche", "triton", "numba", "datasets", "peft")
        return None if name.split(".")[0] in absent else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from importlib import import_module
from cl.core import Setting
from cl.testing.plugins import configs, discover
from cl.testing.probe import train

strategies = [plugin.load() for plugin in discover("strategies")]
for group in ("stream", "backbone", "schedule"):
    for config in configs(group):
        config.target()
for name in ("delta_rule", "linear_scan", "gated_linear_attention"):
    import_module(f"kernels.{name}")
setting = Setting.DOMAIN_INCREMENTAL
for strategy in strategies:
    if setting in strategy.settings:
        record = train(setting, [strategy(**strategy.contract.toy)], max_steps=1, epochs=None)
        assert record.result.status == "done"
print("trained", len(strategies))
'''


def top(module):
    return module.split(".")[0]


def test_each_package_stays_at_home(sources):
    strays = [
        f"{source.where(found.line)} imports {found.module}"
        for source in sources
        for found in source.imports
        if top(found.module) in HOMES and not re.fullmatch(HOMES[top(found.module)], source.module)
    ]
    assert not strays, "\n".join(strays)


def test_heavy_packages_are_imported_at_first_use(sources):
    """Whoever imports a heavy file at module level is heavy too; packages, the trainer and the plug-ins never are."""
    modules = {source.module for source in sources}
    at_once = {source: [found for found in source.imports if not found.is_lazy] for source in sources}
    heavy: dict[str, str] = {}
    grows = True
    while grows:
        grows = False
        for source, imports in at_once.items():
            for found in imports if source.module not in heavy else ():
                inside = found.module if found.module in modules else found.module.rpartition(".")[0]
                if top(found.module) in FIRST_USE or inside in heavy:
                    heavy[source.module] = f"{source.where(found.line)} imports {found.module}"
                    grows = True
    early = [line for module, line in heavy.items() if not re.fullmatch(MAY_BE_HEAVY, module)]
    assert not early, "\n".join(early)


def test_help_imports_nothing_heavy(root):
    code = f"import sys\n{chr(10).join(f'import {name}' for name in LIGHT)}\nprint(*sys.modules, sep=chr(10))"
    loaded = set(python(code, root).split())
    assert not loaded & set(HEAVY), f"`cl --help` would import {sorted(loaded & set(HEAVY))}"


def test_everything_trains_on_a_bare_box(root):
    """The trainer, the strategies and the kernels run where what is heavy, triton and numba too, is not installed."""
    assert "trained" in python(BARE_BOX, root)


def python(code, root):
    """Standard output of a fresh interpreter."""
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=root)
    assert done.returncode == 0, done.stderr
    return done.stdout
