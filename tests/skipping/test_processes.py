"""Two processes that train together: what leaves blocks out on one of them must not hang or part them."""

import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from earlybird.errors import InputError
from earlybird.precision.fractional import FractionalPrecision
from earlybird.skipping.layers import LayerSkipping
from earlybird.skipping.stochastic_depth import StochasticDepth
from tests.processes import leave_group
from tests.tickets.test_early_bird import batch, sgd
from tests.tickets.topologies import images, make

METHODS = (
    LayerSkipping(layer_share=0.4),
    LayerSkipping(layer_share=0.95, layer_cost="seconds"),
    StochasticDepth(depth_survival=0.2),
    StochasticDepth(depth_survival=0.2, depth_by="sample"),
    FractionalPrecision(fractional_bits=(0, 8), fractional_gradient_bits=(0, 8), fractional_target=0.02),
)


def work(rank, rendezvous):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for method in METHODS:
        model = make("residual")
        optimizer = sgd(model)
        running = method.attach(model, optimizer, example_inputs=images(2))
        wrapped = DistributedDataParallel(model)
        for step in range(6):
            inputs, labels = batch(2 * step + rank)
            if rank and step == 3:  # of which blocks that count seconds are timed again, on both
                inputs = functional.pad(inputs, (1, 1, 1, 1))
            functional.cross_entropy(wrapped(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        gates = [] if isinstance(method, StochasticDepth) else list(running._gate.network.parameters())
        ours = torch.cat([p.detach().flatten() for p in (*model.parameters(), *gates)])
        both = [torch.empty_like(ours) for _ in range(2)]
        distributed.all_gather(both, ours)
        assert torch.equal(*both), type(method).__name__
        assert running._ledger.phases["train"].train_images == 2 * 6 * 16
    model = make("residual")
    with pytest.raises(InputError, match="rank 0 has seed = 0, rank 1 has seed = 1"):
        StochasticDepth().attach(model, sgd(model), example_inputs=images(2), seed=rank)
    leave_group()


@pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes_keep_the_same_network_and_the_same_gates(tmp_path):
    multiprocessing.spawn(work, (str(tmp_path / "rendezvous"),), nprocs=2)
