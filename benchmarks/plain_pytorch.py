"""The baseline that a user has today: a PyTorch training script as tutorials write it. Eager, fp32, a DataLoader.

Images are transformed one by one in two worker processes (pad, random crop, flip, to float, normalise), as the usual
transforms do. Network, batch size and optimizer are those of the recipe, one with SGD and a one-cycle schedule. Some
steps and a test epoch are timed and stand for the whole run, whose accuracy is not measured; with `--complete` it is
trained to the end.

    python benchmarks/plain_pytorch.py --recipe recipes/vgg16-cifar10.toml --width 0.5 --steps 60 --out runs/plain
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from earlybird.models import build
from earlybird.train.parts import read_data
from earlybird.train.recipe import Recipe

OVERRIDES = ("model", "width", "epochs", "seed", "accelerator", "threads", "train_images", "evaluate_every")
WARM_UP = 5


class Images(Dataset):
    def __init__(self, images, labels, mean, std, train):
        self.images, self.labels, self.train = images, labels, train
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        if self.train:
            image = nn.functional.pad(image, (4, 4, 4, 4))
            top, left = torch.randint(0, 9, (2,)).tolist()
            image = image[:, top : top + 32, left : left + 32]
            if torch.rand(()) < 0.5:
                image = image.flip(-1)
        return (image.float() / 255 - self.mean) / self.std, self.labels[index]


def train(recipe: Recipe, steps: int, complete: bool) -> dict[str, Any]:
    begun = time.perf_counter()
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    device = torch.device("cuda" if recipe.accelerator == "cuda" else "cpu")
    data = read_data(recipe)
    train_set = Images(data.train_images, data.train_labels, data.mean, data.std, train=True)
    test_set = Images(data.test_images, data.test_labels, data.mean, data.std, train=False)
    train_loader = DataLoader(train_set, recipe.batch_size, shuffle=True, num_workers=2, drop_last=True)
    test_loader = DataLoader(test_set, 500, num_workers=2)
    model = build(recipe.model, classes=len(data.classes), width=recipe.width).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )  # fmt: skip
    total = recipe.epochs * len(train_loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=total, pct_start=0.15, anneal_strategy="linear", cycle_momentum=False
    )
    loss_function = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    start, curve, accuracy, trained, step = begun, [], 0.0, 0.0, 0
    for _ in range(recipe.epochs if complete else 1):
        model.train()
        for x, y in train_loader:
            if step == WARM_UP and not complete:
                start = time.perf_counter()
            loss = loss_function(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step == WARM_UP + steps and not complete:
                float(loss)  # a GPU has done it all when it has this
                trained = time.perf_counter() - start  # before the loader's workers are sent home
                break
        tested = time.perf_counter()
        model.eval()
        with torch.no_grad():
            right = sum(int((model(x.to(device)).argmax(1) == y.to(device)).sum()) for x, y in test_loader)
        test_seconds = time.perf_counter() - tested
        accuracy = right / len(test_set)
        curve.append([round(time.perf_counter() - begun, 1), accuracy])
    row: dict[str, Any] = {"epochs": recipe.epochs, "parameters": sum(p.numel() for p in model.parameters())}
    if complete:
        seconds = time.perf_counter() - begun
        return {**row, "accuracy": accuracy, "seconds": seconds, "seconds_kind": "measured", "curve": curve}
    step_seconds = trained / steps
    tests = math.ceil(total / max(recipe.evaluate_every.in_iterations(len(train_loader), total), 1))
    return {
        **row,
        "accuracy": None,
        "seconds": step_seconds * total + test_seconds * tests,
        "seconds_kind": f"extrapolated from {steps} timed steps and one test epoch",
        "step_seconds": step_seconds,
        "test_seconds": test_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True, help="file of the product")
    for name in OVERRIDES:
        parser.add_argument(f"--{name.replace('_', '-')}", help="default: the recipe's")
    parser.add_argument("--steps", type=int, default=30, help=f"timed steps, after {WARM_UP} that are not")
    parser.add_argument("--complete", action="store_true", help="train to the end")
    parser.add_argument("--out", type=Path, required=True, help="folder for row.json")
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in OVERRIDES if getattr(options, name) is not None}
    row = train(Recipe.from_toml(options.recipe, {**given, "dense": True}), options.steps, options.complete)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "row.json").write_text(json.dumps(row))
    print(json.dumps(row))


if __name__ == "__main__":
    main()
