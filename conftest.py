"""Run every Python block of the README and of the pages in docs/, and start every test from the same seeds."""

import random

import numpy as np
import pytest
import torch
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser

pytest_plugins = ["tests.compatibility"]
pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser()], patterns=["README.md", "docs/*.md"]).pytest()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Without it a test's numbers depend on which tests its worker process ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
