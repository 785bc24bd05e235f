"""The baseline that a user has today: a PyTorch training script as tutorials write it. Eager, fp32, a DataLoader.

Images are transformed one by one in two worker processes (pad, random crop, flip, to float, normalise), as the usual
transforms do. The network, batch size and optimizer are those of the other contestants.

    python benchmarks/plain_pytorch.py --width 0.5 --steps 60      # seconds a step, and a test epoch, as JSON
"""

from __future__ import annotations

import argparse
import json
import time

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40, help="timed steps, after 5 that are not")
    options = parser.parse_args()
    data = load("cifar10")
    train = Images(data.train_images, data.train_labels, data.mean, data.std, train=True)
    test = Images(data.test_images, data.test_labels, data.mean, data.std, train=False)
    train_loader = DataLoader(train, options.batch_size, shuffle=True, num_workers=2, drop_last=True)
    test_loader = DataLoader(test, 500, num_workers=2)
    model = build("vgg16", classes=10, width=options.width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.1)
    model.train()
    start = 0.0
    for step, (x, y) in enumerate(train_loader):
        if step == 5:
            start = time.perf_counter()
        loss = loss_function(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 4 + options.steps:
            break
    step_seconds = (time.perf_counter() - start) / options.steps
    model.eval()
    start = time.perf_counter()
    with torch.no_grad():
        correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in test_loader)
    result = {"step_seconds": step_seconds, "test_seconds": time.perf_counter() - start, "correct": correct}
    print(json.dumps({**result, "steps_per_epoch": len(train_loader), "steps": options.steps}))


if __name__ == "__main__":
    main()
