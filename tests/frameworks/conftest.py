"""What the tests of Lightning share."""

import importlib

import pytest

from processes import skip_without


@pytest.fixture
def runs():
    """Return tests/support/lightning_runs.py."""
    skip_without("torch")
    skip_without("lightning")
    return importlib.import_module("lightning_runs")
