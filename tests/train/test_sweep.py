"""A sweep on a local Ray cluster: real trials in Ray's own processes."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest

from earlybird.errors import InputError
from earlybird.train.recipe import Recipe
from earlybird.train.sweep import sweep, table
from tests.train.conftest import SMALL

ROOT = Path(__file__).parents[2]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra 'sweep')")
asked_for = pytest.mark.skipif(
    "EARLYBIRD_TEST_CLUSTER" not in os.environ,
    reason="a local Ray cluster takes half a minute of both cores: set EARLYBIRD_TEST_CLUSTER=1 to run it",
)


@pytest.fixture
def cluster():
    import ray

    path = os.pathsep.join(str(ROOT / name) for name in ("src", "."))
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )  # fmt: skip
    yield
    ray.shutdown()


@asked_for
@needs_ray
def test_a_sweep_trains_every_ratio_and_goes_on_where_it_was_stopped(cluster, tmp_path):
    recipe = Recipe.from_values({**SMALL, "model": "small_cnn", "width": 0.25, "epochs": 1, "evaluate_every": "1ep"})
    rows = sweep(recipe, tmp_path, [0.5])
    assert [row["trial"] for row in rows] == ["dense", "keep0.5"]
    assert rows[1]["parameters"] < rows[0]["parameters"]
    assert rows[1]["drawn_at"] is not None
    assert rows[0]["drawn_at"] is None
    assert json.loads((tmp_path / "sweep.json").read_text())["trials"] == rows
    assert (tmp_path / "sweep.md").read_text().splitlines()[2:] == table(rows).splitlines()[2:]

    # what has no result goes on, what has one is not touched
    (tmp_path / "keep0.5" / "result.json").unlink()
    before = (tmp_path / "dense" / "result.json").stat().st_mtime_ns
    again = sweep(recipe, tmp_path, [0.5])
    assert (tmp_path / "dense" / "result.json").stat().st_mtime_ns == before
    assert {**again[1], "seconds": 0, "resumed": False} == {**rows[1], "seconds": 0, "resumed": False}


@needs_ray
def test_a_sweep_names_what_does_not_fit_before_it_begins(tmp_path):
    recipe = Recipe.from_values(SMALL)
    with pytest.raises(InputError, match="no keep ratios"):
        sweep(recipe, tmp_path / "none", [])
    with pytest.raises(InputError, match=r"keep is 1\.5"):
        sweep(recipe, tmp_path / "none", [0.5, 1.5])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("shell", "script"), [("sh", "torchrun.sh"), ("bash", "slurm.sbatch")])
def test_the_scripts_for_clusters_are_read_by_a_shell(shell, script):
    subprocess.run([shell, "-n", str(ROOT / "recipes" / "cluster" / script)], check=True)


def test_the_table_sets_times_against_dense():
    dense = {"trial": "dense", "accuracy": 0.9, "seconds": 20.0, "macs": 2e9, "parameters": 1000}
    ticket = {"trial": "keep0.3", "accuracy": 0.895, "seconds": 8.0, "macs": None, "parameters": 300}
    lines = table([dense, ticket]).splitlines()
    assert lines[2] == "| dense | 90.00% | 20.0 | 1.00x | 2e+09 | 1,000 |"
    assert lines[3] == "| keep0.3 | 89.50% | 8.0 | 2.50x | not counted | 300 |"
