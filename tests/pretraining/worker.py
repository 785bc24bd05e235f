"""What torchrun starts: the losses of two processes against those of one, and a queue that both share."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from earlybird import ranks
from earlybird.pretraining.moco import MoCo
from earlybird.pretraining.simclr import SimClr, nt_xent
from tests.processes import leave_group


def gradients(weight: Tensor, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.clone().requires_grad_()
    loss = nt_xent(z1 @ weight, z2 @ weight, 0.3)
    loss.backward()
    assert weight.grad is not None
    return loss.detach(), weight.grad


def train(method: SimClr | MoCo, z1: Tensor, z2: Tensor, rank: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    running = method.attach(model, optimizer, example_inputs=torch.randn(2, 6))
    wrapped = nn.parallel.DistributedDataParallel(model)
    for _ in range(3):
        running.loss(wrapped, torch.cat((z1[rank::2], z2[rank::2]))).backward()
        optimizer.step()
        optimizer.zero_grad()
    told = [*model.parameters(), *running.encoder.projector.parameters(), getattr(running, "queue", torch.zeros(1))]
    flat = torch.cat([tensor.detach().flatten() for tensor in told])
    other = [torch.empty_like(flat) for _ in range(2)]
    torch.distributed.all_gather(other, flat)
    assert torch.equal(*other)


def main(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    z1, z2, weight = (torch.randn(*shape, generator=generator) for shape in ((8, 6), (8, 6), (6, 4)))
    alone = gradients(weight, z1, z2)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    own = gradients(weight, z1[rank::2], z2[rank::2])
    for one, other in zip(own, alone):
        assert torch.allclose(ranks.mean(one), other, atol=1e-6)
    for method in (SimClr(simclr_width=4), MoCo(moco_width=4, moco_queue=12)):
        train(method, z1, z2, rank)
    (folder / f"rank{rank}").write_text("fine")
    leave_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
