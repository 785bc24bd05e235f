"""Train a recipe at several keep ratios on a Ray cluster, and print the table.

    python recipes/cluster/sweep.py recipes/resnet20-cifar10.toml --keep 0.3 0.5 0.7 --out /shared/sweeps/resnet20
    python recipes/cluster/sweep.py recipes/digits.toml --keep 0.3 0.5 --address local      # this machine alone

Type the same again after any stop: finished trials stay, stopped ones go on from their checkpoints.
"""

import argparse
import sys
from pathlib import Path

import ray

from earlybird.errors import EarlybirdError
from earlybird.train.recipe import Recipe
from earlybird.train.sweep import sweep, table

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("recipe", type=Path)
parser.add_argument("--keep", type=float, nargs="+", required=True, help="ratios; dense is trained, too")
parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="a folder that all machines see")
parser.add_argument("--address", default="auto", help="of the cluster; 'local' starts one on this machine")
parser.add_argument("--cpus", type=float, default=1, help="cores of a trial")
parser.add_argument("--gpus", type=float, default=0, help="accelerators of a trial")
options = parser.parse_args()
try:
    recipe = Recipe.from_toml(options.recipe)
    ray.init(address=options.address, include_dashboard=False)
    rows = sweep(recipe, options.out, options.keep, cpus=options.cpus, gpus=options.gpus)
except EarlybirdError as error:
    sys.exit(f"error: {error}")
print(f"\n{table(rows)}\n\nruns: {options.out}   next: earlybird report {rows[0]['folder']} ...")
