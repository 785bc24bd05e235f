"""Accelerate: one line after prepare. Run it again after a stop, and it goes on from the last checkpoint.

accelerate launch examples/accelerate_loop.py        (or python examples/accelerate_loop.py)
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import earlybird as eb
from earlybird.data import load
from earlybird.integrations.accelerate import attach
from earlybird.models import build

EPOCHS, FOLDER = 4, Path("accelerate")

torch.manual_seed(0)
data = load("digits")  # or "cifar10", with 3 channels and images of 32 x 32
loader = DataLoader(TensorDataset(data.train_images / 255, data.train_labels), batch_size=64, shuffle=True)
model = build("small_cnn", classes=10, in_channels=1, image_size=8, width=0.25)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))

accelerator = Accelerator()
model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
bird = attach(accelerator, eb.EarlyBird(keep=0.5), model, optimizer, steps_per_epoch=len(loader))

done = sorted(int(path.name) for path in FOLDER.glob("*"))
if done:
    accelerator.load_state(str(FOLDER / str(done[-1])))  # shrinks model and optimizer first

for epoch in range(done[-1] if done else 0, EPOCHS):
    model.train()
    for images, labels in loader:
        loss = nn.functional.cross_entropy(model(images), labels)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()  # the ticket is drawn, and the model shrinks, in here
        scheduler.step()
        optimizer.zero_grad()
    accelerator.save_state(str(FOLDER / str(epoch + 1)))

model.eval()
with torch.no_grad():
    predicted = model((data.test_images / 255).to(accelerator.device)).argmax(1).cpu()
accelerator.print(f"accuracy {(predicted == data.test_labels).float().mean():.1%}")
accelerator.print(bird.methods["EarlyBird"].change)
accelerator.print(bird.bill())
