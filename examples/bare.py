"""A training loop of one's own: two lines of earlybird. Run it again after a stop, and it goes on.

python examples/bare.py
"""

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import earlybird as eb
from earlybird.data import load

EPOCHS, CHECKPOINT = 4, Path("bare.pt")

torch.manual_seed(0)
data = load("digits")  # or "cifar10", with 3 channels and larger images
train = TensorDataset(data.train_images / 255, data.train_labels)
loader = DataLoader(train, batch_size=64, shuffle=True)

model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
    nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    nn.Linear(64, 10),
)  # fmt: skip
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))
bird = eb.EarlyBird(keep=0.5).attach(model, optimizer, steps_per_epoch=len(loader))

first = 0
if CHECKPOINT.exists():
    saved = torch.load(CHECKPOINT, weights_only=True)
    bird.load_state_dict(saved["bird"])  # before the others: it shrinks model and optimizer, so that they fit
    for name, part in (("model", model), ("optimizer", optimizer), ("scheduler", scheduler)):
        part.load_state_dict(saved[name])
    first = saved["epoch"]

for epoch in range(first, EPOCHS):
    model.train()
    for images, labels in loader:
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()  # the ticket is drawn, and the model shrinks, in here
        optimizer.zero_grad()
        scheduler.step()
    parts = {"bird": bird, "model": model, "optimizer": optimizer, "scheduler": scheduler}
    torch.save({"epoch": epoch + 1, **{name: part.state_dict() for name, part in parts.items()}}, CHECKPOINT)

model.eval()
with torch.no_grad():
    accuracy = (model(data.test_images / 255).argmax(1) == data.test_labels).float().mean()
print(f"accuracy {accuracy:.1%}, ticket drawn at step {bird.drawn_at}")
print(bird.change)
print(bird.bill())
