"""Two and four real processes with gloo, started once: each scenario runs on all ranks of a group of its own."""

import copy
import os
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import earlybird as eb
from earlybird.calls import processes
from earlybird.errors import InputError, ShrinkError
from earlybird.ranks import leave_group
from tests.tickets.test_early_bird import batch, sgd
from tests.tickets.topologies import conv, images, make, tail

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch has no torch.distributed")

QUICK = {"look_every": "2it", "skip": "2it", "deadline": "6it", "window": 2, "tolerance": 0.0, "round_to": 1}
STEPS = 9


def adamw(model):
    return torch.optim.AdamW(
        model.parameters(), lr=3e-3, weight_decay=0.01, eps=1e-3
    )  # a small eps would amplify rounding


def attach(model, optimizer, **settings):
    return eb.EarlyBird(**{**QUICK, "keep": 0.5, **settings}).attach(model, optimizer, example_inputs=images(2))


def train(call, optimizer, rank, steps=range(STEPS), to_none=True):
    """Train on this rank's batches, holding on to output and loss as an ordinary loop does; return the last loss."""
    alive = None
    for step in steps:
        inputs, labels = batch(processes() * step + rank)
        output = call(inputs)
        loss = functional.cross_entropy(output, labels)
        optimizer.zero_grad(set_to_none=to_none)
        loss.backward()
        optimizer.step()
        alive = output, loss
    return alive[1].detach()


def alone(world, make_optimizer=sgd, **settings):
    """Train one process on all ranks' batches, one after the other: batch norms see what they see on the ranks.

    Returns model, search, and the last step's loss over all batches.
    """
    model = make("residual")
    optimizer = make_optimizer(model)
    search = attach(model, optimizer, **settings)
    for step in range(STEPS):
        optimizer.zero_grad()
        total = torch.zeros(())
        for rank in range(world):
            inputs, labels = batch(world * step + rank)
            loss = functional.cross_entropy(model(inputs), labels) / world
            loss.backward()
            total += loss.detach()
        optimizer.step()
    return model, search, total


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def numbers(model, optimizer):
    """Everything that training has changed, whole, in one vector."""
    states = [
        value for p in model.parameters() for value in optimizer.state[p].values() if isinstance(value, torch.Tensor)
    ]
    return torch.cat([whole(t.detach()).flatten() for t in (*model.parameters(), *states)])


def on_all_ranks(vector):
    found = [torch.empty_like(vector) for _ in range(processes())]
    distributed.all_gather(found, vector)
    return found


def assert_agreed(model, optimizer):
    first, *others = on_all_ranks(numbers(model, optimizer))
    assert all(torch.equal(first, other) for other in others)


def assert_like(model, loss, alone):
    """Compare with what one process has come to."""
    reference, _, its_loss = alone
    distributed.all_reduce(loss)
    torch.testing.assert_close(loss / processes(), its_loss, rtol=1e-4, atol=1e-5)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in reference.named_parameters()]
    for (name, one), two in zip(model.named_parameters(), reference.parameters()):
        torch.testing.assert_close(
            whole(one.detach()), two.detach(), rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---- scenarios: each takes its rank, and runs on all of them ----


def ddp_equals_one_process(rank, reference):
    model = make("residual")
    optimizer = sgd(model)
    wrapped = DistributedDataParallel(model)
    search = attach(wrapped, optimizer)
    parameters = list(model.parameters())
    train(wrapped, optimizer, rank, range(6))
    assert search.drawn
    assert search.change.parameters_after < search.change.parameters_before
    for buffer in model.buffers():  # in training, each rank writes its own
        assert torch.equal(*on_all_ranks(buffer.float())[:2])
    loss = train(wrapped, optimizer, rank, range(6, STEPS))
    assert all(one is two for one, two in zip(model.parameters(), parameters))
    assert_agreed(model, optimizer)
    _, its, _ = reference[processes(), sgd]
    assert search.ticket.masks.keys() == its.ticket.masks.keys()
    assert all(torch.equal(mask, its.ticket.masks[name]) for name, mask in search.ticket.masks.items())
    assert_like(model, loss, reference[processes(), sgd])
    assert search._ledger.phases["train"].train_images == 3 * 16 * processes()  # counted over all ranks
    search.detach()


def ddp_with_an_identity_ticket_is_plain_ddp(rank, reference):
    models = []
    for keep in (None, 1.0):
        model = make("residual")
        optimizer = sgd(model)
        wrapped = DistributedDataParallel(model)
        if keep is not None:
            attach(wrapped, optimizer, keep=keep)
        train(wrapped, optimizer, rank)
        models.append(model)
    for (name, one), two in zip(models[0].state_dict().items(), models[1].state_dict().values()):
        assert torch.equal(one, two), name


def ddp_searches_for_heads_and_neurons(rank, reference):
    ends = []
    for inside in (False, True):
        model = make("patches")
        optimizer = adamw(model)
        wrapped = DistributedDataParallel(model)
        method = eb.EarlyBert(draw_at="4it", unit_look_every="2it", keep_heads=0.5, keep_neurons=0.5)
        search = method.attach(model if inside else wrapped, optimizer, example_inputs=images(2))
        train(wrapped, optimizer, rank)
        assert search.drawn_at == 4
        assert search.change.parameters_after < search.change.parameters_before
        assert_agreed(model, optimizer)
        assert all(torch.equal(*on_all_ranks(mask.float())[:2]) for mask in search.ticket.masks.values())
        ends.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        search.detach()
    assert torch.equal(*ends)


def ddp_in_all_its_ways(rank, reference):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    for options, to_none, hook in (
        ({"gradient_as_bucket_view": True}, False, None),
        ({"static_graph": True, "bucket_cap_mb": 0.01}, True, None),
        ({"find_unused_parameters": True, "forward_sync_buffers": False}, True, fp16_compress_hook),
    ):
        model = make("residual")
        optimizer = adamw(model)
        search = attach(model, optimizer, score="bn_scale")  # it finds the wrapper by itself
        wrapped = DistributedDataParallel(model, **options)
        if hook is not None:
            wrapped.register_comm_hook(None, hook)
        before = sum(p.numel() for p in model.parameters())
        train(wrapped, optimizer, rank, to_none=to_none)
        assert search.drawn
        assert sum(p.numel() for p in model.parameters()) < before
        assert_agreed(model, optimizer)
        search.detach()


def gradients_reduced_by_hand(rank, reference):
    model = make("residual")
    optimizer = sgd(model)
    search = attach(model, optimizer)
    for step in range(STEPS):
        inputs, labels = batch(processes() * step + rank)
        loss = functional.cross_entropy(model(inputs), labels)
        loss.backward()
        for parameter in model.parameters():
            distributed.all_reduce(parameter.grad)
            parameter.grad /= processes()
        optimizer.step()
        optimizer.zero_grad()
    assert search.drawn
    assert_agreed(model, optimizer)
    assert_like(model, loss.detach(), reference[processes(), sgd])


def a_ddp_run_goes_on_from_its_state(rank, reference):
    def begin(attach_first):
        model = make("residual")
        optimizer = adamw(model)
        wrapped = DistributedDataParallel(model)
        return model, optimizer, wrapped, attach(wrapped if attach_first else model, optimizer)

    model, optimizer, wrapped, search = begin(True)
    train(wrapped, optimizer, rank, range(7))
    assert search.drawn
    saved = copy.deepcopy((search.state_dict(), model.state_dict(), optimizer.state_dict()))
    train(wrapped, optimizer, rank, range(7, STEPS))
    for attach_first in (True, False):
        again, its_optimizer, wrapped, search = begin(attach_first)
        state = copy.deepcopy(saved)
        search.load_state_dict(state[0])
        again.load_state_dict(state[1])
        its_optimizer.load_state_dict(state[2])
        train(wrapped, its_optimizer, rank, range(7, STEPS))
        assert torch.equal(numbers(again, its_optimizer), numbers(model, optimizer))


def both_ways_of_processes_cut_in_stages(rank, reference):
    for wrap in (DistributedDataParallel, shard):
        model = wrap(make("residual"))
        optimizer = sgd(model)
        search = attach(model, optimizer, stages=(0.75,))
        loss = train(model, optimizer, rank)
        assert search.drawn
        assert [search.tickets[share].provenance["step"] for share in (0.75, 0.5)] == [4, 6]
        assert_agreed(model, optimizer)
        _, its, _ = reference["in stages"]
        assert search.tickets == its.tickets
        assert_like(getattr(model, "module", model), loss, reference["in stages"])
        search.detach()


def residual():
    return make("residual")


def without_norms():
    torch.manual_seed(0)
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), *tail(8))


def shard(model, **options):
    from torch.distributed.fsdp import fully_shard

    for block in (child for child in model.children() if list(child.parameters())):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def fsdp_equals_one_process(rank, reference):
    from torch.distributed.device_mesh import init_device_mesh

    ways = [(sgd, {}), (adamw, {"reshard_after_forward": False})]
    if processes() == 4:  # two copies, each in two shards
        ways = [(sgd, {}), (sgd, {"mesh": init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))})]
    for make_optimizer, options in ways:
        model = shard(make("residual"), **options)
        optimizer = make_optimizer(model)
        parameters = list(model.parameters())
        search = attach(model, optimizer)
        loss = train(model, optimizer, rank)
        assert search.drawn
        assert all(one is two for one, two in zip(model.parameters(), parameters))
        for parameter in parameters:
            assert parameter.to_local().shape[0] <= -(-parameter.shape[0] // 2)  # each rank holds its part
            for value in optimizer.state[parameter].values():
                assert value.dim() == 0 or value.shape == parameter.shape
        assert_agreed(model, optimizer)
        assert_like(model, loss, reference[processes(), make_optimizer])
        assert search._ledger.cost.forward_macs == reference[processes(), make_optimizer][1]._ledger.cost.forward_macs
        search.detach()


def fsdp_with_other_scores_and_settings(rank, reference):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    bf16 = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
    for settings, make_model, options in (
        ({"score": "bn_scale", "sparsity": 1e-3}, residual, {}),
        ({"score": "magnitude", "refit": "none", "optimizer_state": "reset"}, residual, {}),
        ({"weights": "reinitialise"}, residual, {}),
        ({"score": "magnitude"}, without_norms, bf16),
    ):
        model = shard(make_model(), **options)
        optimizer = sgd(model)
        search = attach(model, optimizer, **settings)
        before = sum(p.numel() for p in model.parameters())
        loss = train(model, optimizer, rank)
        assert search.drawn
        assert sum(p.numel() for p in model.parameters()) < before
        assert torch.isfinite(loss)
        assert_agreed(model, optimizer)
        search.detach()


def an_fsdp_run_goes_on_from_its_state(rank, reference):
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def begin():
        model = shard(make("residual"))
        optimizer = adamw(model)
        return model, optimizer, attach(model, optimizer)

    model, optimizer, search = begin()
    train(model, optimizer, rank, range(7))
    assert search.drawn
    saved = copy.deepcopy((search.state_dict(), *get_state_dict(model, optimizer)))
    train(model, optimizer, rank, range(7, STEPS))
    again, its_optimizer, search = begin()
    search.load_state_dict(saved[0])
    set_state_dict(again, its_optimizer, model_state_dict=saved[1], optim_state_dict=saved[2])
    train(again, its_optimizer, rank, range(7, STEPS))
    assert torch.equal(numbers(again, its_optimizer), numbers(model, optimizer))


def what_cannot_be_cut_is_left_as_it_was(rank, reference):
    from torch.distributed.tensor import Shard

    ticket = eb.draw(make("residual"), 0.5, score="bn_scale", example_inputs=images(2), coupled="group")
    model = shard(
        make("residual"), shard_placement_fn=lambda p: Shard(1) if p.dim() == 4 and not p.shape[1] % 2 else None
    )
    names = [name for name, p in model.named_parameters() if p.placements[0].dim == 1]
    masks = {name: mask.clone() for name, mask in ticket.masks.items()}
    for mask in masks.values():
        mask[:] = True
        mask[0] = False  # an odd number stays
    before = [whole(p.detach()).clone() for p in model.parameters()]
    with pytest.raises(ShrinkError, match="along dimension 1, of which") as caught:
        eb.shrink(model, eb.Ticket(masks), images(2))
    assert any(f"'{name}'" in str(caught.value) for name in names)
    assert all(torch.equal(whole(p.detach()), b) for p, b in zip(model.parameters(), before))

    # a rank whose optimizer holds what nobody can slice stops all
    model = make("residual")
    optimizer = sgd(model)
    wrapped = DistributedDataParallel(model)
    before = copy.deepcopy(model.state_dict())
    if rank == 1:
        for parameter in model.parameters():
            optimizer.state[parameter]["rows"] = torch.zeros(3)
    with pytest.raises(
        ShrinkError, match="keeps state 'rows'" if rank == 1 else "rank 1 failed: SGD keeps state 'rows'"
    ):
        eb.shrink(wrapped, ticket, images(2), optimizer=optimizer)
    assert all(torch.equal(one, two) for one, two in zip(model.state_dict().values(), before.values()))


def ranks_that_differ_are_refused_on_all(rank, reference):
    def refused(needle, make_model=lambda: make("residual"), steps_per_epoch=None, **settings):
        model = make_model()
        with pytest.raises(InputError, match=needle):
            eb.EarlyBird(**{**QUICK, **settings}).attach(model, sgd(model), steps_per_epoch=steps_per_epoch)

    width = 8 + 4 * (rank == 1)
    refused(
        r"rank 0 has '0.weight' of shape \(8, 3, 3, 3\), float32, rank 1 has '0.weight' of shape \(12, 3, 3, 3\)",
        lambda: nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)),
    )
    refused(
        "rank 0 has '1.running_mean' .* rank 1 has '2.weight'",
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), *([nn.BatchNorm2d(8)] if rank == 1 else [])),
    )
    refused(r"rank 0 has keep = 0\.5, rank 1 has keep = 0\.25", keep=0.5 / (1 + (rank == 1)))
    refused("steps_per_epoch = 10, rank 1 has steps_per_epoch = 11", steps_per_epoch=10 + (rank == 1))
    model = make("residual")
    with pytest.raises(InputError, match="rank 0 has seed = 0, rank 1 has seed = 1"):
        eb.BatchDropping(drop=0.5).attach(model, sgd(model), seed=int(rank == 1))
    dropping = eb.BatchDropping(drop=0.5).attach(model, sgd(model))
    with pytest.raises(InputError, match="rank 0 has 4 batches, rank 1 has 5 batches"):
        dropping.wrap([batch(number) for number in range(4 + (rank == 1))])

    model = make("residual")
    search = attach(model, sgd(model))
    masks = {name: torch.ones(size, dtype=torch.bool) for name, size in search._sizes.items()}
    name, mask = next(iter(masks.items()))
    mask[int(rank == 1)] = False
    with pytest.raises(InputError, match=f"rank 0 has a ticket that keeps .* units of '{name}'.*rank 1 has a ticket"):
        search._draw(eb.Ticket(masks))
    assert not search.drawn


def what_cannot_be_distributed_is_refused(rank, reference):
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = make("residual")
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(InputError, match="ZeroRedundancyOptimizer"):
        attach(DistributedDataParallel(model), optimizer)

    model = make("residual")
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(PowerSGDState(None, start_powerSGD_iter=2, matrix_approximation_rank=1), powerSGD_hook)
    optimizer = sgd(model)
    search = attach(wrapped, optimizer)
    with pytest.raises(InputError, match=r"hook powerSGD_hook keeps tensors .* PowerSGDState.*register it after"):
        train(wrapped, optimizer, rank)
    assert not search.drawn

    model = make("residual")
    optimizer = sgd(model)
    attach(model, optimizer)
    shard(model)  # its parameters are others now
    with pytest.raises(InputError, match=r"parameters were replaced .*shard"):
        train(model, optimizer, rank, range(1))

    model = FullyShardedDataParallel(make("residual"), device_id=torch.device("cpu"))
    with pytest.raises(InputError, match=r"FullyShardedDataParallel.*fully_shard"):
        attach(model, sgd(model))


def fabric(rank, reference):
    from lightning_fabric import Fabric

    launched = Fabric(accelerator="cpu", devices=processes(), strategy="ddp")
    launched.launch()
    model = make("residual")
    wrapped, optimizer = launched.setup(model, sgd(model))
    search = attach(wrapped, optimizer)
    for step in range(STEPS):
        inputs, labels = batch(processes() * step + rank)
        loss = functional.cross_entropy(wrapped(inputs), labels)
        launched.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert search.drawn
    assert_agreed(model, optimizer.optimizer)
    assert_like(model, loss.detach(), reference[processes(), sgd])


TWO = (
    ddp_equals_one_process,
    ddp_with_an_identity_ticket_is_plain_ddp,
    ddp_in_all_its_ways,
    ddp_searches_for_heads_and_neurons,
    gradients_reduced_by_hand,
    a_ddp_run_goes_on_from_its_state,
    both_ways_of_processes_cut_in_stages,
    fsdp_equals_one_process,
    fsdp_with_other_scores_and_settings,
    an_fsdp_run_goes_on_from_its_state,
    what_cannot_be_cut_is_left_as_it_was,
    ranks_that_differ_are_refused_on_all,
    what_cannot_be_distributed_is_refused,
    fabric,
)
FOUR = (ddp_equals_one_process, fsdp_equals_one_process)
SCENARIOS = [(4, scenario) for scenario in FOUR] + [(2, scenario) for scenario in TWO]


def work(rank, folder):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="no agreement by the deadline")
    reference = {(world, sgd): alone(world, sgd) for world in ((2, 4) if rank < 2 else (4,))}
    if rank < 2:
        reference[2, adamw] = alone(2, adamw)
        reference["in stages"] = alone(2, sgd, stages=(0.75,))
    for world, scenario in SCENARIOS:
        if rank >= world:
            continue
        # as torchrun does, for Fabric
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), GROUP_RANK="0",
            TORCHELASTIC_RUN_ID="tests", MASTER_ADDR="localhost", MASTER_PORT="0",
        )  # fmt: skip
        name = f"{world}-{scenario.__name__}"
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        try:
            scenario(rank, reference)
            told = "passed"
        except BaseException:
            told = traceback.format_exc()
        (folder / f"{name}-{rank}.txt").write_text(told)
        leave_group()


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Run all scenarios; return a function that reads what a rank says of one."""
    folder = Path(tmp_path_factory.mktemp("ranks"))
    multiprocessing.spawn(work, (folder,), nprocs=4)
    return lambda name, rank: (folder / f"{name}-{rank}.txt").read_text()


@pytest.mark.parametrize(("world", "scenario"), [(world, scenario.__name__) for world, scenario in SCENARIOS])
def test_processes(world, scenario, told):
    for rank in range(world):
        assert told(f"{world}-{scenario}", rank) == "passed", f"rank {rank}: {told(f'{world}-{scenario}', rank)}"
