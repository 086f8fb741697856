"""The environment: what is imported is pinned, once, and the library stands without the floor above it."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

#: Import names that differ from the distribution's.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "cleanfid": "clean-fid",
    "torch_fidelity": "torch-fidelity",
}
OWN = {"drift", "pipeline", "tests"}


def pins() -> list[str]:
    lines = (ROOT / "envs" / "requirements.txt").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def pinned() -> dict[str, str]:
    return dict(pin.split("==") for pin in pins())


def imported(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
    return names


def third_party(folder: str) -> dict[str, list[str]]:
    """The distributions that a folder's files import, with the files that import each."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name in imported(path) - OWN - set(sys.stdlib_module_names):
            found.setdefault(DISTRIBUTIONS.get(name, name), []).append(str(path.relative_to(ROOT)))
    return found


def test_pip_and_conda_have_the_same_pins():
    conda = yaml.safe_load((ROOT / "envs" / "drift.yaml").read_text())["dependencies"]
    [from_pip] = [entry["pip"] for entry in conda if isinstance(entry, dict)]
    assert from_pip == pins()


def test_every_pin_is_exact_and_given_once():
    names = []
    for pin in pins():
        assert re.fullmatch(r"[a-z0-9-]+==\d+(\.\d+)*", pin), pin
        names.append(pin.partition("==")[0])
    assert len(names) == len(set(names))


@pytest.mark.parametrize("folder", ["drift", "pipeline", "tests"])
def test_every_third_party_import_is_pinned(folder: str):
    found = third_party(folder)
    assert "torch" in found
    assert {name: files for name, files in found.items() if name not in pinned()} == {}


def test_the_runners_and_the_tools_of_make_are_pinned():
    assert {"snakemake", "dvc", "mlflow", "pytest", "ruff", "snakefmt", "codespell", "pre-commit"} <= set(pinned())


def test_the_tests_run_with_the_pinned_versions():
    differing = {
        name: (version, importlib.metadata.version(name))
        for name, version in pinned().items()
        # A CPU or CUDA build of torch has a suffix of its own.
        if importlib.metadata.version(name).partition("+")[0] != version
    }
    assert differing == {}


def test_the_library_imports_nothing_of_the_floor_above():
    above = {"pipeline", "tests", "mlflow", "snakemake", "dvc", "pydantic", "yaml"}
    wrong = {str(path.relative_to(ROOT)): imported(path) & above for path in (ROOT / "drift").rglob("*.py")}
    assert len(wrong) > 15
    assert {path: names for path, names in wrong.items() if names} == {}


def test_only_one_file_of_the_pipeline_knows_mlflow():
    knowing = [path.name for path in (ROOT / "pipeline").glob("*.py") if "mlflow" in imported(path)]
    assert knowing == ["tracking.py"]


def test_the_declared_dependencies_cover_the_imports_of_the_library():
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[a-z0-9-]+", entry)[0] for entry in tables["dependencies"]}
    optional = {re.match(r"[a-z0-9-]+", e)[0] for extra in tables["optional-dependencies"].values() for e in extra}
    found = third_party("drift")
    assert {name: files for name, files in found.items() if name not in declared | optional} == {}
