"""Names, sizes, docstrings, and what must not be in any file."""

import ast
import re
import subprocess
import warnings

LARGEST, LARGE = 400, 350
"""Lines: refused above the first, mentioned above the second."""
REGISTRY = re.compile(
    r"--(extra-)?index[-]url|\bindex[-]url\s*=|https?://[\w.-]*(pypi|artifactory|nexus|proxy)[\w.-]*[:/]"
)
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".cfg", ".ini", ".js", ".css", ".html", ".json", ".sh", ""}


def tracked_text(root):
    """Text files that would be committed; all of the tree where there is no git."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True, text=True
    )
    paths = [root / line for line in listed.stdout.splitlines()] or [
        path for path in root.rglob("*") if ".git" not in path.parts
    ]
    return [path for path in paths if path.is_file() and path.suffix in TEXT]


def test_file_names_are_lower_case_words(sources):
    odd = [s.module for s in sources if not re.fullmatch(r"_{0,2}[a-z][a-z0-9_]*", s.path.stem)]
    assert not odd


def test_strategy_files_define_the_class_they_are_named_after(sources):
    for source in sources:
        if source.path.stem == "__init__":
            continue
        if re.fullmatch(r"(strategies|cl\.backbones(\.(mixers|mlps|memory_rules))?)\.[a-z]\w*", source.module):
            wanted = "".join(word.capitalize() for word in source.path.stem.split("_"))
            classes = {node.name for node in source.tree.body if isinstance(node, ast.ClassDef)}
            assert wanted in classes, f"{source.module} defines {sorted(classes)}, not {wanted}"


def test_public_things_have_docstrings(sources):
    """Public means that no part of its dotted name begins with an underscore."""
    silent = []
    for source in sources:
        if "._" in source.module:
            continue
        if not ast.get_docstring(source.tree):
            silent.append(source.where(1))
        for node in source.tree.body:
            is_public = isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
            if is_public and not ast.get_docstring(node):
                silent.append(f"{source.where(node.lineno)} {node.name}")
    assert not silent, "no docstring: " + ", ".join(silent)


def test_files_fit_the_head(sources, root):
    files = [source.path for source in sources] + sorted((root / "tests").rglob("*.py"))
    lengths = {path.relative_to(root).as_posix(): len(path.read_text().splitlines()) for path in files}
    long = {name: length for name, length in lengths.items() if length > LARGE}
    if long:
        warnings.warn(f"aim at 80 to 250 lines a file: {long}", stacklevel=1)
    assert not {name: length for name, length in long.items() if length > LARGEST}


def test_packages_are_what_imports_need(root):
    assert not (root / "kernels" / "__init__.py").exists(), "a regular `kernels` package would hide the published one"
    assert not list((root / "tests").rglob("__init__.py")), "avalanche installs a top-level package `tests`"
    assert (root / "configs" / "__init__.py").is_file(), "pkg://configs must be found in an installed wheel"


def test_no_registry_address(root):
    found = [str(path.relative_to(root)) for path in tracked_text(root) if REGISTRY.search(_read(path))]
    assert not found, f"addresses of package registries in {found}"


def test_no_path_of_this_machine(root):
    home = str(root.parent)
    if len(root.parts) < 3:
        return
    found = [str(path.relative_to(root)) for path in tracked_text(root) if f"{home}/" in _read(path)]
    assert not found, f"{home}/ occurs in {found}"


def _read(path):
    return path.read_text(errors="replace")
