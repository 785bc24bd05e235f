"""The Trainer of transformers: a callback. Run it again after a stop, and it goes on from the last checkpoint.

python examples/huggingface_trainer.py
"""

from pathlib import Path

from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

import earlybird as eb
from earlybird.data import load
from earlybird.integrations.huggingface import EarlyBirdCallback

FOLDER = Path("huggingface")


def rows(images, labels):
    return [{"pixel_values": image, "labels": label} for image, label in zip(images / 255, labels)]


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


set_seed(0)
data = load("digits")  # or "cifar10", with 3 channels
model = ResNetForImageClassification(
    ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic",
        num_labels=10,
    )
)  # fmt: skip
arguments = TrainingArguments(
    str(FOLDER), num_train_epochs=4, per_device_train_batch_size=64, learning_rate=3e-3, lr_scheduler_type="cosine",
    save_strategy="epoch", save_total_limit=2, report_to="none", disable_tqdm=True,
)  # fmt: skip
trainer = Trainer(
    model, arguments, train_dataset=rows(data.train_images, data.train_labels),
    eval_dataset=rows(data.test_images, data.test_labels), compute_metrics=accuracy,
)  # fmt: skip
bird = EarlyBirdCallback(eb.EarlyBird(keep=0.5)).attach(trainer)

trainer.train(resume_from_checkpoint=any(FOLDER.glob("checkpoint-*")))
print(f"accuracy {trainer.evaluate()['eval_accuracy']:.1%}")
print(bird.running.methods["EarlyBird"].change)
print(bird.bill())
