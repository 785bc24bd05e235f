"""Lightning: one callback. Run it again after a stop, and it goes on from the last checkpoint.

python examples/lightning_loop.py
"""

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import earlybird as eb
from earlybird.data import load
from earlybird.integrations.lightning import EarlyBirdCallback
from earlybird.models import build

FOLDER = Path("lightning")


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = build("small_cnn", classes=10, in_channels=1, image_size=8, width=0.25)

    def training_step(self, batch, index):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def test_step(self, batch, index):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


pl.seed_everything(0)
data = load("digits")  # or "cifar10", with 3 channels and images of 32 x 32
train = TensorDataset(data.train_images / 255, data.train_labels)
test = TensorDataset(data.test_images / 255, data.test_labels)

bird = EarlyBirdCallback(eb.EarlyBird(keep=0.5))
trainer = pl.Trainer(
    max_epochs=4, callbacks=[bird, ModelCheckpoint(FOLDER, save_last=True)], logger=False, enable_progress_bar=False,
)  # fmt: skip
last = FOLDER / "last.ckpt"
model = Classifier()
loader = DataLoader(train, batch_size=64, shuffle=True)
trainer.fit(model, loader, ckpt_path=last if last.exists() else None)
trainer.test(model, DataLoader(test, batch_size=len(test)), verbose=False)
print(f"accuracy {trainer.callback_metrics['accuracy']:.1%}")
print(bird.running.methods["EarlyBird"].change)
print(bird.bill())
