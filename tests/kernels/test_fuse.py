import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

import earlybird as eb
from earlybird.kernels import batch_norm, fuse
from earlybird.kernels.fuse import FusedBatchNorms, find_relus

pytestmark = pytest.mark.skipif(batch_norm._kernel() is None, reason="the kernel cannot be compiled here")


class Net(nn.Module):
    """One shared ReLU: after a batch norm, after a sum; a batch norm read twice, one by a sum, one by nobody else."""

    def __init__(self, inplace=False):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1) for i in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))
        self.relu = nn.ReLU(inplace)
        self.head = nn.Linear(6, 3)
        for norm in self.norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        x = self.relu(self.norms[0](self.convs[0](x)))
        y = self.relu(self.norms[1](self.convs[1](x)))
        y = self.norms[2](self.convs[2](y))
        y = self.relu(x + y)
        z = self.norms[3](self.convs[3](y))
        w = z * 2
        return self.head((self.relu(z) + w).mean((2, 3)))


class Sequence(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.block = nn.Sequential(*layers[:2])
        self.relu = layers[2]

    def forward(self, x):
        return self.relu(self.block(x))


def images(n=4, side=8, channels=3, dtype=torch.float32):
    x = torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(0))
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def made(kind=Net, *args, **kwargs):
    torch.manual_seed(0)
    return kind(*args, **kwargs).to(memory_format=torch.channels_last)


def small():
    return made(Sequence, nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace=True))


def step(model, x):
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]


def assert_close(found, expected, tolerance=1e-4):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            one, other, rtol=tolerance, atol=tolerance * max(1, float(other.detach().abs().max()))
        )


@pytest.fixture
def used(monkeypatch):
    """Every call of the kernel: whether it did the ReLU."""
    calls = []
    real = fuse.batch_norm
    monkeypatch.setattr(fuse, "batch_norm", lambda *args: calls.append(args[-1]) or real(*args))
    return calls


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_computes_what_it_did(inplace, used):
    model = made(Net, inplace)
    plain, x = copy.deepcopy(model), images()
    fused = FusedBatchNorms(model, x)
    assert fused.fused == ["norms.0", "norms.1"]
    assert used == []  # the pass that looks moves no statistics
    for _ in range(3):
        assert_close(step(model, x), step(plain, x))
    assert used == [True, True, False, False] * 3


def test_autocast_gives_it_bfloat16(used):
    model = made()
    plain, x = copy.deepcopy(model), images()
    FusedBatchNorms(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = step(model, x), step(plain, x)
    assert used == [True, True, False, False]
    assert_close(found[:1], expected[:1], 0.05)


def test_in_eval_mode_and_in_other_layouts_it_is_pytorch(used):
    model = made().eval()
    plain, x = copy.deepcopy(model), images()
    FusedBatchNorms(model, x)
    assert torch.equal(model(x), plain(x))
    model.train()
    plain.train()
    model.to(memory_format=torch.contiguous_format)
    plain.to(memory_format=torch.contiguous_format)
    assert all(torch.equal(a, b) for a, b in zip(step(model, x.contiguous()), step(plain, x.contiguous())))
    model.double()
    plain.double()
    assert torch.equal(model(x.double()), plain(x.double()))
    assert used == []


def test_without_a_kernel_it_is_pytorch(monkeypatch):
    monkeypatch.setattr(batch_norm, "_kernel", lambda: None)
    model = made()
    plain, x = copy.deepcopy(model), images()
    FusedBatchNorms(model, x)
    assert all(torch.equal(a, b) for a, b in zip(step(model, x), step(plain, x)))


def test_looking_leaves_everything_as_it_was():
    model = made()
    model.norms[1].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    FusedBatchNorms(model, images(1)).remove()
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all("forward" not in module.__dict__ and not module._forward_hooks for module in model.modules())


def test_a_batch_of_one_on_a_map_of_one_pixel_is_enough():
    model = made(nn.Sequential, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    assert len(find_relus(model, images(1, 3))) == 1


def test_removed_it_leaves_no_trace(used):
    model = made()
    modules, keys, x = list(model.modules()), list(model.state_dict()), images()
    plain = copy.deepcopy(model)
    fused = FusedBatchNorms(model, x)
    assert list(model.state_dict()) == keys
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
    fused.remove()
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(step(model, x), step(plain, x)))
    assert used == []


def test_copies_and_pickles_are_plain(used):
    model = made()
    x = images()
    FusedBatchNorms(model, x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        step(other, x)
        assert used == []
        assert list(other.state_dict()) == list(model.state_dict())
    step(model, x)
    assert used


@pytest.mark.parametrize("where", ["block", "block.1", "relu"])
def test_hooks_see_what_pytorch_would_show(where, used):
    model = small()
    plain, x = copy.deepcopy(model), images()
    fused = FusedBatchNorms(model, x)
    assert fused.fused == ["block.1"]
    seen = []
    for one in (plain, model):
        handle = one.get_submodule(where).register_forward_hook(
            lambda module, args, y: seen.append((args[0].clone(), y.clone()))
        )
        step(one, x)
    assert_close(seen[1], seen[0])
    assert bool((seen[0][1] < 0).any()) == (where != "relu")
    assert used == [False]
    handle.remove()
    step(model, x)
    assert used == [False, True]


def test_backward_hooks_see_what_pytorch_would_show(used):
    model = small()
    plain, x = copy.deepcopy(model), images()
    FusedBatchNorms(model, x)
    seen = []
    for one in (plain, model):
        one.block[1].register_full_backward_hook(lambda module, of_x, of_y: seen.append(of_y[0].clone()))
        one.relu.inplace = False  # autograd refuses the combination
        step(one, x)
    assert_close(seen[1:], seen[:1])
    assert used == [False]


def test_a_forward_that_others_wrap_is_left_alone(used):
    model = small()
    fused = FusedBatchNorms(model, images())
    norm = model.block[1]
    inner, seen = norm.forward, []
    norm.forward = lambda x: seen.append(inner(x)) or seen[-1]
    step(model, images())
    assert used == [False]
    del norm.forward
    fused.remove()
    other = small()
    other.block[1].forward = lambda x: x * 2
    FusedBatchNorms(other, images())
    assert torch.equal(other.block[1](images()), images() * 2)
    assert len(used) == 1


class Returns(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.norm, self.relu, self.kept = kind, nn.BatchNorm2d(3), nn.ReLU(kind == "inplace"), []

    def forward(self, x):
        y = self.norm(x)
        if self.kind == "functional":
            return torch.relu(y)
        if self.kind == "twice":
            return self.relu(y) + self.relu(y)
        if self.kind == "returned":
            return self.relu(y), y
        if self.kind == "kept":
            self.kept[:] = [y]
        if self.kind == "view":
            return self.relu(y.flatten(1))
        if self.kind == "in training" and self.training:
            return self.relu(y) + y
        if self.kind == "first":
            with torch.no_grad():
                mean = y.mean()
            return self.relu(y) + mean
        return self.relu(y)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("plain", 1), ("inplace", 1), ("functional", 0), ("twice", 0), ("returned", 0), ("kept", 0), ("view", 0),
     ("in training", 0), ("first", 0)],
)  # fmt: skip
def test_only_what_a_relu_alone_reads_is_clamped(kind, expected):
    model = Returns(kind)
    assert len(find_relus(model.eval(), images())) == expected


def test_a_norm_that_is_called_twice_must_be_read_so_both_times():
    norm, relu = nn.BatchNorm2d(3), nn.ReLU()
    twice = nn.Sequential(norm, relu, norm, relu)
    assert list(find_relus(twice, images())) == [norm]
    assert find_relus(nn.Sequential(norm, relu, norm, nn.Tanh()), images()) == {}


def test_a_relu_does_its_work_on_what_was_changed_since():
    model = Returns("plain")
    FusedBatchNorms(model, images())
    y = model.norm(images())
    assert bool((y >= 0).all())
    with torch.no_grad():
        y.sub_(1)
    assert bool((model.relu(y) >= 0).all())
    z = model.relu(-torch.ones(3))
    assert torch.equal(z, torch.zeros(3))


def test_a_model_that_reads_otherwise_than_in_the_example_is_found_out(used):
    model = Returns("plain")
    FusedBatchNorms(model, images())
    model(images())
    model.kind = "functional"
    model(images())
    with pytest.warns(UserWarning, match="batch norm norm did not get to a ReLU"):
        model(images())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images())
    assert used == [True, True, False, False]


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("tracks", [True, False])
def test_momentum_and_running_statistics_are_those_of_the_module(momentum, tracks, used):
    norm = nn.BatchNorm2d(3, momentum=momentum, track_running_stats=tracks)
    model = nn.Sequential(norm, nn.ReLU())
    plain, x = copy.deepcopy(model), images()
    FusedBatchNorms(model, x)
    for factor in (1, 2, 3):
        assert_close([model(factor * x)], [plain(factor * x)])
    assert used == [True] * 3
    assert_close(list(model.buffers()), list(plain.buffers()))
    no_weights = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.ReLU())
    FusedBatchNorms(no_weights, x)
    no_weights(x)
    assert len(used) == 3


def test_it_follows_a_network_that_is_cut_in_mid_training(used):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    layers += [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = images()
    fused = FusedBatchNorms(model, x)
    norms = [model[1], model[4]]
    search = eb.EarlyBird(keep=0.5, look_every="1it", skip="0it", window=2, tolerance=1.0, deadline="3it")
    search.attach(model, optimizer, example_inputs=x, steps_per_epoch=10)
    for _ in range(6):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert [model[1], model[4]] == norms
    assert sum(norm.num_features for norm in norms) < 32
    assert used[-2:] == [True, True]
    plain = copy.deepcopy(model)
    count = len(used)
    assert_close(step(model, x), step(plain, x))
    assert len(used) == count + 2
    fused.remove()


class ByName(Sequence):
    def forward(self, x):
        return self.relu(input=self.block[1](input=self.block[0](x)))


def test_layers_may_be_called_with_their_argument_by_name(used):
    model = made(ByName, nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU())
    plain = copy.deepcopy(model)
    FusedBatchNorms(model, images())
    assert_close(step(model, images()), step(plain, images()))
    assert used == [True]


class Twins(Sequence):
    """Both pass the batch norm before the first one gets to the ReLU."""

    def forward(self, x):
        first, second = self.block(x), self.block(2 * x)
        return self.relu(first) + self.relu(second)


def test_an_output_that_waits_for_its_relu_is_no_reason_to_warn(used):
    model = made(Twins, nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU())
    plain = copy.deepcopy(model)
    FusedBatchNorms(model, images())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert_close(step(model, images()), step(plain, images()))
    assert used == [False] * 4


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_what_a_backward_pass_computes_again_is_no_reason_to_warn(parts, reentrant, used):
    """In a part of its own, the batch norm that is computed again is not followed by its ReLU."""
    model = made(nn.Sequential, nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 3))
    plain, x = copy.deepcopy(model), images().requires_grad_()
    FusedBatchNorms(model, images())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            pair = [step(Checkpointed(own, parts, reentrant), x) for own in (model, plain)]
            assert_close(*pair)
    assert all(used)


class Checkpointed(nn.Module):
    def __init__(self, model, parts, reentrant):
        super().__init__()
        self.model, self.parts, self.reentrant = model, parts, reentrant

    def forward(self, x):
        return checkpoint_sequential(self.model, self.parts, x, use_reentrant=self.reentrant)
