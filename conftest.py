"""Run every Python block of the README and of the pages in docs/; start every test from the same seeds and log.

Long files come first, so that no process is left alone with one at the end; pytest-xdist would begin with those of many
tests.
"""

import logging
import random

import numpy as np
import pytest
import torch
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser

pytest_plugins = ["tests.compatibility"]
pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser()], patterns=["README.md", "docs/*.md"]).pytest()


LONG = ("test_benchmarks.py", "test_demo.py", "test_survival.py", "test_ccm_cli.py", "test_cli.py", "test_kvzip_cli.py")


def pytest_configure(config):
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Without it a test's numbers and output depend on which tests its worker process ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    logging.root.setLevel(logging.WARNING)  # timm's script lowers it
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in tuple(getattr(logger, "handlers", ())):
            if getattr(getattr(handler, "stream", None), "closed", False):  # of the test that first made it
                logger.removeHandler(handler)
