"""Question: how many more images a second do two processes train than one, dense and after the cut?

VGG-11 and ResNet-20 on CIFAR-10-shaped noise, one thread a process, bf16 and channels_last as `tune` sets them here,
under DistributedDataParallel with gloo. One process takes the whole batch, two take half of it each, so that they make
the same step; the ticket (keep 0.5) is drawn by both after a few steps, inside DDP's wrapper. Forward, backward,
reduction and optimizer step; no data loading. Every round times one step of each contestant in turn; medians count: of
the seconds, and of the ratios within a round. While one process is timed, the other waits without using its core.

    python benchmarks/processes.py
    python benchmarks/processes.py --quick       # a look at few rounds; nothing is recorded
    python benchmarks/processes.py --table       # the table of the newest rows
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import interleaved, machine, others_s, rows
from records import by_machine, newest, record
from tables import origin
from torch import distributed, multiprocessing, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import earlybird as eb
from earlybird.allocator import keep_freed
from earlybird.models import build

NAME = "processes"
NETWORKS = ("vgg11", "resnet20")
PROCESSES = 2


def network(name: str, width: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = build(name, classes=10, width=width).to(memory_format=torch.channels_last)
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)


def noise(batch: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(batch, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(0, 10, (batch,), generator=generator)


def stepper(
    call: Callable[[torch.Tensor], torch.Tensor], optimizer: torch.optim.Optimizer, batch: int, rank: int = 0
) -> Callable[[], None]:
    images, labels = noise(batch, rank)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = call(images)
        functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def contestants(name: str, width: float, batch: int, rank: int) -> dict[str, tuple[Callable, Callable]]:
    """Return for 'dense' and 'ticket' the steps of one process, and of this rank of several."""
    found = {}
    ticket = None
    for stage in ("dense", "ticket"):
        model, optimizer = network(name, width)
        wrapped = DistributedDataParallel(model)
        together = stepper(wrapped, optimizer, batch // PROCESSES, rank)
        alone, its_optimizer = network(name, width)
        if stage == "ticket":
            last = "4it"
            search = eb.EarlyBird(keep=0.5, look_every=last, skip=last, deadline=last).attach(wrapped, optimizer)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="no agreement by the deadline")
                while not search.drawn:
                    together()
            ticket = search.ticket
            search.detach()
            eb.shrink(alone, ticket, noise(1, 0)[0], optimizer=its_optimizer)
        found[stage] = (stepper(alone, its_optimizer, batch), together)
    return found


def processor_s(pid: int) -> float:
    """Return the processor seconds that a process has used so far, where Linux tells; else 0."""
    path = Path(f"/proc/{pid}/stat")
    if not path.exists():
        return 0.0
    fields = path.read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def work(rank: int, options: argparse.Namespace, rendezvous: str) -> None:
    """Run one rank: the first one times, and tells the others which step to take with it."""
    torch.set_num_threads(1)
    keep_freed()  # as `earlybird train` does
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES)
    pids = [torch.zeros(1, dtype=torch.int64) for _ in range(PROCESSES)]
    distributed.all_gather(pids, torch.tensor([os.getpid()]))
    for name in options.networks.split(","):
        steps = contestants(name, options.width, options.batch, rank)
        order = torch.zeros(1, dtype=torch.int64)
        if rank:
            while True:
                distributed.broadcast(order, 0)
                if int(order) < 0:
                    break
                list(steps.values())[int(order)][1]()
            continue

        def together(index: int, step: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                distributed.broadcast(torch.tensor([index]), 0)
                step()

            return run

        actions: dict[Any, Callable[[], None]] = {}
        for index, (stage, (alone, with_others)) in enumerate(steps.items()):
            actions[stage, 1], actions[stage, PROCESSES] = alone, together(index, with_others)
        head = machine(threads=1)
        times, others = interleaved(
            actions, options.rounds, others=lambda: others_s() - sum(processor_s(int(pid)) for pid in pids[1:])
        )
        distributed.broadcast(torch.tensor([-1]), 0)
        for (stage, count), taken in times.items():
            row = {
                "network": name, "width": options.width, "batch": options.batch, "stage": stage, "processes": count,
                "step_seconds": statistics.median(taken), "images_per_s": options.batch / statistics.median(taken),
                "ratio": statistics.median(one / this for one, this in zip(times[stage, 1], taken)),
                "spread": [min(taken), max(taken)], "rounds": options.rounds, "others": others, **head,
            }  # fmt: skip
            record(NAME, row, quick=options.quick)
            options.found.append(row)
    if not rank:
        print(table(options.found))
    distributed.destroy_process_group()


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return the newest session of each network and machine as Markdown."""
    parts = []
    for _, own in by_machine(found):
        mine = newest(own, "network", "width")
        lines = [
            f"A process: one thread. {origin(mine)}", "",
            "| network | batch | | processes | ms a step (median) | images a second | one / this |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        for row in mine:
            shown = row["network"] + (f", width {row['width']:g}" if row["width"] != 1 else "")
            lines.append(
                f"| {shown} | {row['batch']} | {row['stage']} | {row['processes']} | {1e3 * row['step_seconds']:.0f} "
                f"| {row['images_per_s']:,.0f} | {row['ratio']:.2f}x |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def read(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=128, help="images of a step, over all processes")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="a look at half width, few rounds; nothing is recorded")
    parser.add_argument("--table", action="store_true", help="print the table of the newest rows and stop")
    options = parser.parse_args(words)
    if options.quick:
        options.width, options.rounds = 0.5, 3
    return options


def main() -> None:
    options = read()
    if options.table:
        print(table(rows(NAME)))
        return
    options.found = []
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (options, str(Path(folder) / "rendezvous")), nprocs=PROCESSES)


if __name__ == "__main__":
    main()
