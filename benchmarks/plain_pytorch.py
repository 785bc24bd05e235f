"""The baseline that a user has today: a PyTorch training script as tutorials write it. Eager, fp32, a DataLoader.

Images are transformed one by one in two worker processes (pad, random crop, flip, to float, normalise), as the usual
transforms do. The network, batch size and optimizer are those of the other contestants. Some steps and a test epoch
are timed and stand for the whole run, whose accuracy is not measured; with `--complete` it is trained to the end.

    python benchmarks/plain_pytorch.py --width 0.5 --epochs 10 --steps 60 --out runs/plain
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from earlybird.data import load
from earlybird.models import build


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


def train(options: argparse.Namespace) -> dict[str, Any]:
    begun = time.perf_counter()
    torch.manual_seed(options.seed)
    data = load("cifar10")
    train_set = Images(data.train_images, data.train_labels, data.mean, data.std, train=True)
    test_set = Images(data.test_images, data.test_labels, data.mean, data.std, train=False)
    train_loader = DataLoader(train_set, 128, shuffle=True, num_workers=2, drop_last=True)
    test_loader = DataLoader(test_set, 500, num_workers=2)
    model = build(options.model, classes=10, width=options.width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    total = options.epochs * len(train_loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=total, pct_start=0.15, anneal_strategy="linear", cycle_momentum=False
    )
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.1)
    start, curve, accuracy, test_seconds = begun, [], 0.0, 0.0
    step = 0
    for _ in range(options.epochs if options.complete else 1):
        model.train()
        for x, y in train_loader:
            if step == 5 and not options.complete:
                start = time.perf_counter()
            loss = loss_function(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step == 5 + options.steps and not options.complete:
                break
        trained = time.perf_counter() - start
        model.eval()
        with torch.no_grad():
            right = sum(int((model(x).argmax(1) == y).sum()) for x, y in test_loader)
        test_seconds = time.perf_counter() - start - trained
        accuracy = right / len(test_set)
        curve.append([round(time.perf_counter() - begun, 1), accuracy])
    row: dict[str, Any] = {"epochs": options.epochs, "parameters": sum(p.numel() for p in model.parameters())}
    if options.complete:
        seconds = time.perf_counter() - begun
        return {**row, "accuracy": accuracy, "seconds": seconds, "seconds_kind": "measured", "curve": curve}
    step_seconds = trained / (step - 5)
    return {
        **row,
        "accuracy": None,
        "seconds": step_seconds * total + test_seconds * options.epochs,
        "seconds_kind": f"extrapolated from {step - 5} timed steps and one test epoch",
        "step_seconds": step_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vgg16")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30, help="timed steps, after 5 that are not")
    parser.add_argument("--complete", action="store_true", help="train to the end")
    parser.add_argument("--out", type=Path, required=True, help="folder for row.json")
    options = parser.parse_args()
    row = train(options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "row.json").write_text(json.dumps(row))
    print(json.dumps(row))


if __name__ == "__main__":
    main()
