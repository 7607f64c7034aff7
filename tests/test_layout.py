"""The rules of CONTRIBUTING.md that a machine can check."""

import ast
import doctest
import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import dataopt
import pytest
import yaml

ROOT = Path(__file__).parent.parent
FOLDERS = {"dataopt": "src/dataopt", "dataopt.core": "core", "dataopt.integrations": "integrations"}
HOSTS = {"timm", "transformers", "accelerate", "lightning", "datasets", "peft", "huggingface_hub"}


def sources() -> Iterator[tuple[str, Path]]:
    """Every module of the packages: dotted name of its package, path."""
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.parent.relative_to(ROOT / folder).parts
            yield ".".join([package, *inner]), path


def imports(package: str, path: Path) -> set[str]:
    """Dotted names of all that a module imports, wherever in it, relative ones resolved."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            found.add(".".join([*base, node.module or ""]).rstrip("."))
    return found


def module(package: str, path: Path) -> str:
    return package if path.stem == "__init__" else f"{package}.{path.stem}"


def top(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_packages_in_pyproject_are_the_packages_in_the_tree():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setup["package-dir"] == FOLDERS
    assert sorted(setup["packages"]) == sorted({package for package, path in sources() if path.name == "__init__.py"})
    for package, path in sources():
        assert (path.parent / "__init__.py").exists(), f"{path} is in no package"
        assert package in setup["packages"]


def test_no_folder_hides_the_package():
    assert not (ROOT / "dataopt").exists() and not (ROOT / "dataopt.py").exists()


def test_version_is_stated_once():
    assert importlib.metadata.version("dataopt") == dataopt.__version__


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == dataopt.__version__ and cited["license"] == "Apache-2.0"
    assert len(cited["references"]) == 6 and all(entry["authors"] for entry in cited["references"])


def test_relative_imports_are_resolved(tmp_path):
    path = tmp_path / "m.py"
    path.write_text("from . import a\nfrom ..b import c\nimport d.e\ndef f():\n    from ...g.h import i\n")
    assert imports("x.y.z", path) == {"x.y.z", "x.y.b", "d.e", "x.g.h"}


def test_core_knows_no_host_and_nothing_of_ours_outside_core():
    for package, path in sources():
        if package.startswith("dataopt.core"):
            names = imports(package, path)
            assert not top(names) & HOSTS, path
            outside = {n for n in names if top({n}) == {"dataopt"} and not (n + ".").startswith("dataopt.core.")}
            assert not outside, path


def test_numba_and_matplotlib_stay_in_their_rooms():
    seen = set()
    for package, path in sources():
        found = top(imports(package, path))
        if "numba" in found:
            assert package in ("dataopt.core.mixup", "dataopt.core.relation", "dataopt.core.kvzip"), path
        if "matplotlib" in found:
            assert path == ROOT / "src/dataopt/plots.py"
        seen |= found
    assert {"numba", "matplotlib", "timm"} <= seen  # or the walk has missed the files


@pytest.mark.parametrize("command", ["import dataopt", "import dataopt.cli", "import dataopt.doctor"])
def test_import_is_light(command):
    heavy = HOSTS | {"torch", "torchvision", "matplotlib", "numba", "numpy", "scipy", "sklearn"}
    code = f"import sys; {command}; print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_core_imports_without_numba_and_hosts():
    code = (
        "import sys; import dataopt.core.mixup, dataopt.core.condense; "
        f"print(sorted({HOSTS | {'numba', 'torchvision'}!r} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("name", [module(*s) for s in sources() if ">>>" in s[1].read_text()])
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0


@pytest.fixture(scope="module")
def wheel_target(tmp_path_factory) -> Path:
    """The source distribution, built and installed from its archive, without dependencies, into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    # a copy: setuptools leaves build/ behind, and would take old files from it
    for part in ("src", "core", "integrations"):
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, tree)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, folder], cwd=tree, check=True, capture_output=True)
    (archive,) = folder.glob("dataopt-*.tar.gz")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", folder / "target", archive], check=True)
    return folder / "target"


def test_wheel_holds_every_module_and_no_other(wheel_target):
    built = {p.relative_to(wheel_target / "dataopt") for p in (wheel_target / "dataopt").rglob("*.py")}
    ours = set()
    for package, path in sources():
        ours.add(Path(*package.split(".")[1:]) / path.name)
    assert built == ours
    for name in ("py.typed", "clean_report.html", "demo/handbook.txt", "demo/report.html", "review/page.html"):
        assert (wheel_target / "dataopt" / name).exists()
    assert {p.name for p in wheel_target.iterdir() if p.suffix != ".dist-info"} == {"dataopt", "bin"}


def test_train_runs_from_the_wheel_in_the_repository_root(wheel_target):
    env = {k: v for k, v in os.environ.items() if k != "TIMM_TRAIN_SCRIPT"} | {"PYTHONPATH": str(wheel_target)}
    run = subprocess.run(
        [sys.executable, "-v", "-m", "dataopt.integrations.timm.train", "--help"],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert "--puzzle-alpha" in run.stdout
    # -v names the file behind every module
    assert str(wheel_target / "dataopt/integrations/timm/options.py") in run.stderr
    for folder in FOLDERS.values():
        assert f"{ROOT / folder}/" not in run.stderr
