"""An early ticket in a loop of your own on several processes: DistributedDataParallel, checkpoints, restarts.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1    # restarts need it, see docs/processes.md
    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/torchrun.py --out runs/torchrun

When a rank is killed, torchrun starts all of them again: they go on from the newest checkpoint, to the same bits.
"""

import argparse
from pathlib import Path

import torch
from torch import distributed
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import earlybird as eb
from earlybird.data import Loader, load
from earlybird.models import build
from earlybird.train import checkpoint


def train(out: Path, epochs: int, save_every: int = 10) -> None:
    rank, world = distributed.get_rank(), distributed.get_world_size()
    data = load("digits")
    part = {"mean": data.mean, "std": data.std, "rank": rank, "world_size": world}
    loader = Loader(data.train_images, data.train_labels, batch_size=64, **part)
    torch.manual_seed(0)
    model = build("small_cnn", classes=10, in_channels=1, image_size=8, width=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    bird = eb.EarlyBird(keep=0.5).attach(model, optimizer, steps_per_epoch=len(loader))
    step, saved = checkpoint.load_newest(out, "torchrun", print) or (0, None)
    if saved is not None:
        bird.load_state_dict(saved["bird"])  # shrinks model and optimizer where the ticket had been drawn
        checkpoint.restore(model, optimizer, saved["model"])
    ddp = DistributedDataParallel(model)
    for epoch in range(step // len(loader), epochs):
        for images, labels in loader.epoch(epoch, start=step % len(loader)):
            functional.cross_entropy(ddp(images), labels).backward()
            optimizer.step()  # all ranks draw the same ticket in here; the model shrinks inside its wrapper
            optimizer.zero_grad()
            step += 1
            if step % save_every == 0 or step == epochs * len(loader):
                state = {"bird": bird.state_dict(), "model": checkpoint.capture(model, optimizer)}
                if rank == 0:
                    checkpoint.save(out, step, "torchrun", state)
    if rank == 0:
        print(bird.bill())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/torchrun"))
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    distributed.init_process_group("gloo")  # on GPUs: "nccl", and .to("cuda") for model and loader
    train(options.out, options.epochs)
    distributed.destroy_process_group()
