"""The benchmarks are scripts beside each other; here they are imported as such."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Let rows be read and written in a folder of the test."""
    import common

    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def head():
    """Return a function that makes what every row has of its machine; by keyword, other values."""

    def made(**values):
        known = {"device": "big", "threads": 2, "torch": "2", "date": "2026-01-01", "revision": "abc"}
        return {**known, "session": "first", **values}

    return made
