"""Ways in which networks that we did not write tie, move and mix channels."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import earlybird as eb
from earlybird.calls import undisturbed
from earlybird.errors import InputError, ShrinkError
from earlybird.tickets.coupling import find_groups
from earlybird.tickets.labels import FREE, Labels
from earlybird.tickets.scores import batch_norms
from tests.tickets.test_shrink import assert_same_function, random_ticket
from tests.tickets.topologies import conv, images, masked, tail


class Net(nn.Module):
    """A stem of 8 channels, a part in the middle that subclasses write, a classifier of ``width`` channels."""

    width = 8

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv(3, 8), nn.BatchNorm2d(8)
        self.build()
        self.last, self.norm_last = conv(self.width, 6), nn.BatchNorm2d(6)
        self.tail = nn.Sequential(*tail(6))

    def build(self) -> None:
        raise NotImplementedError

    def middle(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(functional.relu(self.norm(self.stem(x))))
        return self.tail(functional.relu(self.norm_last(self.last(x))))


class ChannelsLast(Net):
    """A ConvNeXt block: depthwise with bias, layer norm over the last dimension, scale of the layer, residual."""

    def build(self):
        self.depthwise, self.norm_in = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.LayerNorm(8)
        self.grow, self.norm_hidden, self.back = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)

    def middle(self, x):
        y = self.grow(self.norm_in(self.depthwise(x).permute(0, 2, 3, 1)))
        y = self.back(functional.gelu(self.norm_hidden(y.flatten(0, 2)).view(y.shape)))
        return x + (self.scale * y).permute(0, 3, 1, 2)


class Excited(Net):
    """Squeeze-and-excite, with a hard sigmoid, by convolutions; the gate of a depthwise convolution with bias."""

    def build(self):
        self.depthwise, self.norm_d = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def middle(self, x):
        x = functional.hardswish(self.norm_d(self.depthwise(x)))
        return x * functional.hardsigmoid(self.up(functional.relu(self.down(functional.adaptive_avg_pool2d(x, 1)))))


class Shuffled(Net):
    """A ShuffleNet unit: half of the channels passes by, then both halves are shuffled."""

    def build(self):
        self.one, self.norm_one = conv(4, 4, 1), nn.BatchNorm2d(4)

    def middle(self, x):
        kept, changed = x.chunk(2, 1)
        x = torch.cat([kept, functional.relu(self.norm_one(self.one(changed)))], 1)
        return x.view(len(x), 2, x.shape[1] // 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


class Picked(Net):
    """PyTorch's own shuffle, and rows picked by numbers that are made on the way."""

    width = 4

    def build(self):
        self.a, self.norm_a = conv(8, 4), nn.BatchNorm2d(4)

    def middle(self, x):
        x = functional.relu(self.norm_a(self.a(functional.channel_shuffle(x, 2))))
        return x.gather(2, torch.arange(x.shape[2]).flip(0).view(1, 1, -1, 1).expand(x.shape))


class Tempered(Net):
    """Parameters with one value for all channels: a temperature, a map of positions, one for each image's row."""

    def build(self):
        self.temperature, self.positions = nn.Parameter(torch.rand(1) + 0.5), nn.Parameter(torch.rand(1, 1, 8, 8))
        self.rows, self.zero = nn.Parameter(torch.rand(8, 1)), nn.Parameter(torch.rand(()))

    def middle(self, x):
        return x * self.temperature * (1 + self.positions) * self.rows * self.zero


class Gated(Net):
    """Halves of one layer are multiplied: a gated linear unit, once in one operator and once by hand."""

    def build(self):
        self.a, self.norm_a, self.b, self.norm_b = conv(8, 16), nn.BatchNorm2d(16), conv(8, 16), nn.BatchNorm2d(16)

    def middle(self, x):
        value, gate = self.norm_b(self.b(functional.glu(self.norm_a(self.a(x)), 1))).chunk(2, 1)
        return value * functional.silu(gate)


class Unfolded(Net):
    """Channels become pixels, and pixels channels."""

    width = 16

    def build(self):
        self.a, self.norm_a = conv(2, 4), nn.BatchNorm2d(4)

    def middle(self, x):
        x = functional.pixel_shuffle(x, 2)
        return functional.pixel_unshuffle(functional.relu(self.norm_a(self.a(x))), 2)


class Merged(Net):
    """Swin: four neighbours side by side, channels last, and back."""

    def build(self):
        self.merge, self.norm_merge = nn.Linear(32, 8), nn.BatchNorm2d(8)

    def middle(self, x):
        x = x.permute(0, 2, 3, 1)
        x = torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)
        return functional.relu(self.norm_merge(self.merge(x).permute(0, 3, 1, 2)))


class Windows(Net):
    """Swin: shifted windows, a layer inside them, and back."""

    def build(self):
        self.inside, self.norm_inside, self.out = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 8)

    def middle(self, x):
        n, c, h, w = x.shape
        x = x.permute(0, 2, 3, 1).roll((-2, -2), (1, 2)).view(n, h // 4, 4, w // 4, 4, c)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, c)
        x = self.out(functional.relu(self.norm_inside(self.inside(x))))
        x = x.view(n, h // 4, w // 4, 4, 4, -1).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, -1)
        return x.roll((2, 2), (1, 2)).permute(0, 3, 1, 2)


class Projected(Net):
    """A linear layer writes whole feature maps: every channel has 16 of its outputs."""

    def build(self):
        self.project, self.norm_p = nn.Linear(8, 128, bias=False), nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)

    def middle(self, x):
        x = self.project(x.mean((2, 3))).view(len(x), -1, 4, 4)
        return self.up(functional.relu(self.norm_p(x)))


class Pyramid(Net):
    """Pooled, padded, resized by interpolation, and laid side by side; a single channel weighs them all."""

    width = 16

    def build(self):
        self.a, self.norm_a, self.weigh = conv(8, 8), nn.BatchNorm2d(8), conv(8, 1)

    def middle(self, x):
        y = functional.max_pool2d(functional.pad(x, (1, 1, 1, 1)), 2)
        y = functional.relu(self.norm_a(self.a(y)))
        y = functional.interpolate(y, x.shape[2:], mode="bilinear")
        return torch.cat([x, y], 1) * torch.sigmoid(self.weigh(y))


class NonLocal(Net):
    """A product of two activations without heads: both sides go together."""

    def build(self):
        self.q, self.norm_q, self.k, self.norm_k = conv(8, 6), nn.BatchNorm2d(6), conv(8, 6), nn.BatchNorm2d(6)

    def middle(self, x):
        q, k = functional.relu(self.norm_q(self.q(x))).flatten(2), functional.relu(self.norm_k(self.k(x))).flatten(2)
        weights = torch.einsum("ncs,nct->nst", q, k).softmax(-1)
        return x + torch.einsum("nct,nst->ncs", x.flatten(2), weights).view_as(x)


def without(model: nn.Module, change: eb.Change) -> None:
    """Zero what removed units took with them: all that was cut or has fallen silent."""
    layers = dict(model.named_modules())
    with torch.no_grad():
        for name in {*change.kept, *change.silenced}:
            for parameter in layers[name].parameters() if name in layers else ():
                dim = 1 if isinstance(layers[name], nn.ConvTranspose2d) and parameter.dim() > 1 else 0
                gone = torch.full((parameter.shape[dim],), name in change.kept)
                gone[change.kept.get(name, [])] = False
                gone[change.silenced.get(name, [])] = True
                parameter.index_fill_(dim, gone.nonzero().flatten(), 0)


MECHANISMS = {
    kind.__name__: kind
    for kind in (
        ChannelsLast, Excited, Shuffled, Picked, Tempered, Gated, Unfolded, Merged, Windows, Projected, Pyramid,
        NonLocal,
    )
}  # fmt: skip


def make(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind()
        for norm in batch_norms(model).values():
            nn.init.uniform_(norm.weight, 0.2, 2.0)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
    return model


@pytest.mark.parametrize("name", MECHANISMS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000), keep=st.sampled_from([0.2, 0.5, 0.8]))
def test_any_ticket_shrinks_to_what_the_masked_model_computes(name, seed, keep):
    model = make(MECHANISMS[name], seed)
    ticket = random_ticket(model, seed, keep)
    before = copy.deepcopy(model.state_dict())
    reference = copy.deepcopy(model)
    try:
        change = eb.shrink(model, ticket, images(2))
    except (InputError, ShrinkError):  # a coupled group without any channel, or nothing that could go
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        return
    masked(reference, {layer: mask for layer, mask in ticket.masks.items() if layer not in change.whole})
    without(reference, change)
    if "norm_in" not in change.kept:  # layer norms work over what is left
        assert_same_function(model, reference)


@pytest.mark.parametrize("name", MECHANISMS)
def test_every_mechanism_gets_smaller_and_trains(name):
    model = make(MECHANISMS[name])
    optimizer = torch.optim.AdamW(model.parameters())
    model(images()).square().mean().backward()
    optimizer.step()
    ticket = eb.draw(model, 0.5, example_inputs=images(), scope="layer")
    reference = masked(copy.deepcopy(model), ticket.masks)
    change = eb.shrink(model, ticket, images(2), optimizer=optimizer)
    assert change.parameters_after < 0.8 * change.parameters_before
    assert not change.whole
    assert not change.silenced
    assert_same_function(model, reference)
    model.train()(images()).square().mean().backward()
    optimizer.step()


def test_halves_of_a_split_and_partners_of_a_shuffle_keep_equally_many():
    model = make(Shuffled)
    groups = {group.producers[0]: group for group in find_groups(model, images(1))}
    assert set(groups) == {"stem", "last", "tail.2"}  # the other half is tied to the stem's by the shuffle
    assert groups["stem"].size == 8
    assert [block.tolist() for block in groups["stem"].blocks]
    ticket = eb.draw(model, 0.6, example_inputs=images(1), coupled="group")
    kept = ticket.masks["norm"].view(2, 4).sum(1)
    assert kept[0] == kept[1]


def test_a_product_is_no_residual_sum():
    groups = {group.producers: group for group in find_groups(make(Excited), images(1))}
    assert not groups["stem", "up"].residual
    summed = next(group for group in find_groups(make(ChannelsLast), images(1)) if "back" in group.producers)
    assert summed.residual


class Frozen(nn.Module):
    """A batch norm of buffers alone, as detectors have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(width) + 0.5)
        self.register_buffer("shift", torch.randn(width))

    def forward(self, x):
        return x * self.scale.view(1, -1, 1, 1) + self.shift.view(1, -1, 1, 1)


@pytest.mark.parametrize("kind", ["buffers", "parameter"])
def test_tensors_of_no_layer_go_with_their_channels(kind):
    class Bare(Net):
        def build(self):
            self.frozen = Frozen(8)
            if kind == "parameter":
                self.frozen.shift = nn.Parameter(self.frozen._buffers.pop("shift"))
            self.norm = nn.Identity()

        def middle(self, x):
            return functional.relu(self.frozen(x))

    model = make(Bare)
    mask = torch.tensor([True, False, True, True, False, False, True, True])
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (reference.stem.weight, reference.frozen.scale, reference.frozen.shift):
            tensor[~mask] = 0
    before = model.frozen.shift
    optimizer = torch.optim.AdamW(model.parameters())
    model(images()).sum().backward()
    optimizer.step()
    model.load_state_dict(make(Bare).state_dict())
    change = eb.shrink(model, eb.Ticket({"stem": mask}), images(2), optimizer=optimizer)
    assert model.frozen.scale.shape == model.frozen.shift.shape == (5,)
    assert change.layers["frozen.scale"] == {"out": (8, 5)}
    assert (model.frozen.shift is before) == (kind == "parameter")
    assert_same_function(model, reference)
    model(images()).sum().backward()
    optimizer.step()


class Heads(nn.Module):
    """A convolution, attention by hand and with PyTorch's own, a recurrent layer, a head of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv(3, 8), nn.BatchNorm2d(8)
        self.embed, self.qkv, self.out = nn.Linear(8, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.recurrent = nn.GRU(16, 12, batch_first=True)
        self.grow, self.head = nn.Linear(12, 20), nn.Linear(20, 5)

    def forward(self, x):
        x = functional.relu(self.norm(self.stem(x))).flatten(2).transpose(1, 2)
        x = self.embed(x)
        q, k, v = self.qkv(x).view(len(x), -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        x = self.out(((q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = self.attention(x, x, x)[0]
        return self.head(functional.gelu(self.grow(self.recurrent(x)[0][:, -1])))


def test_attention_and_recurrent_layers_stay_whole_and_the_rest_is_cut():
    model = Heads()
    groups = {group.producers[0]: group for group in find_groups(model, images(1))}
    assert "bmm" in groups["qkv"].why
    assert groups["out"].why == "read by layer 'attention' (MultiheadAttention)"
    assert not groups["stem"].output
    layers = dict(model.named_modules())
    ticket = eb.Ticket(
        {name: torch.arange(layers[name].out_features) % 2 == 0 for name in ("embed", "qkv", "out", "grow")}
    )
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for name in ("embed", "grow"):
            layer = dict(reference.named_modules())[name]
            layer.weight[1::2], layer.bias[1::2] = 0, 0
    change = eb.shrink(model, ticket, images(2))
    assert set(change.whole) == {"qkv", "out"}
    assert (model.embed.out_features, model.qkv.out_features, model.grow.out_features) == (8, 48, 10)
    assert_same_function(model, reference)


def test_layers_that_only_fail_together_are_found_by_halving():
    """Widths written down in the code: each of two layers breaks the cut, the third does not."""

    class Written(Net):
        width = 16

        def build(self):
            self.a, self.norm_a = conv(8, 8), nn.BatchNorm2d(8)

        def middle(self, x):
            y = functional.relu(self.norm_a(self.a(x)))
            return torch.cat([x.view(-1, 8, *x.shape[2:]), y.view(-1, 8, *y.shape[2:])], 1)

    model = make(Written)
    ticket = eb.draw(model, 0.5, scope="layer")
    reference = masked(copy.deepcopy(model), {"norm_last": ticket.masks["norm_last"]})
    change = eb.shrink(model, ticket, images(2))
    assert set(change.whole) == {"norm", "norm_a"}
    assert "does not run after the cut" in change.whole["norm"]
    assert change.layers == {
        "last": {"out": (6, 3)}, "norm_last": {"out": (6, 3)}, "tail.2": {"in": (6, 3)},
    }  # fmt: skip
    assert_same_function(model, reference)


def test_norms_over_channels_are_compared_over_what_is_left():
    class Grouped(Net):
        def build(self):
            self.a, self.norm_a = conv(8, 8), nn.GroupNorm(2, 8)

        def middle(self, x):
            return functional.relu(self.norm_a(self.a(x)))

    model = make(Grouped)
    reference = copy.deepcopy(model)
    mask = torch.tensor([True, False, True, True, False, True, True, True])
    eb.shrink(model, eb.Ticket({"norm_a": mask}), images(2))
    with torch.no_grad():  # by hand: the group norm of the kept channels alone
        x = functional.relu(reference.eval().norm(reference.stem(images(5, seed=7))))
        y = functional.group_norm(
            reference.a(x)[:, mask], 2, reference.norm_a.weight[mask], reference.norm_a.bias[mask]
        )
        y = functional.conv2d(functional.relu(y), reference.last.weight[:, mask], padding=1)
        wanted = reference.tail(functional.relu(reference.norm_last(y)))
        torch.testing.assert_close(model.eval()(images(5, seed=7)), wanted, rtol=1e-4, atol=1e-5)


MOVES = {
    "permute": lambda x: x.permute(0, 2, 1, 3),
    "shuffle": lambda x: x.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2),
    "roll": lambda x: x.roll((1, 2), (1, 3)),
    "flip": lambda x: x.flip(1),
    "windows": lambda x: x.unflatten(3, (2, 2)).permute(0, 3, 1, 2, 4).flatten(0, 1),
    "halves": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "every other": lambda x: x[:, ::2],
    "index": lambda x: x[:, torch.tensor([3, 1, 1])],
    "flatten": lambda x: x.flatten(1).view(len(x), -1, 2, 1),
    "stack": lambda x: torch.stack([x, x], 1).flatten(0, 1),
}


@settings(max_examples=40, deadline=None)
@given(names=st.lists(st.sampled_from(sorted(MOVES)), max_size=4))
def test_labels_move_with_what_they_belong_to(names):
    """Whatever is done to a tensor of its own positions is done to its labels."""
    labels = Labels({})
    x = torch.arange(2 * 6 * 4 * 4).view(2, 6, 4, 4).double()
    units = labels.new(x.numel()).view(x.shape)
    labels.put(x, units)
    y = x
    for name in names:
        if y.dim() == 4 and y.shape[1] in (6, 3, 4) and y.shape[1] % 2 == 0 and y.shape[3] == 4:
            if name == "shuffle" and y.shape[1] != 6:
                continue
            with labels:
                y = MOVES[name](y)
    assert torch.equal(labels.of(y), units.flatten()[y.long()])


def test_tensors_made_on_the_way_take_the_size_of_what_they_meet():
    labels = Labels({})
    x = torch.randn(2, 4, 3)
    labels.put(x, labels.new(4).view(1, 4, 1))
    with labels:
        y = x + torch.zeros(2, 4, 3)
        made = torch.ones(2, 4, 3)
        z = x.new_zeros(5, 4, 3).index_add_(0, torch.tensor([1, 4]), x)
    assert not labels.fixed()
    assert torch.equal(labels.of(y)[0, :, 0], labels.of(z)[3, :, 0])
    assert bool((labels.of(made) == FREE).all())
    fixed = torch.randn(1, 4, 1)
    with labels:
        x * fixed[:, :1]
    assert not labels.fixed()
    with labels:
        x * fixed
    assert set(labels.fixed().values()) == {"'mul', which meets a fixed size"}


def test_hooks_that_models_hang_on_themselves_stay():
    """Models of transformers collect hidden states by hooks, which their first call installs."""
    model = make(Excited)
    seen = []

    def collect(module, args, output):
        seen.append("model")

    collect.__module__ = "transformers.utils.output_capturing"
    model.stem.register_forward_hook(lambda *_: seen.append("loop"))
    with undisturbed(model):
        model.last.register_forward_hook(collect)
        model(images(1))
    assert seen == ["model"]
    with undisturbed(model):
        model(images(1))
    assert seen == ["model"] * 2
    model(images(1))
    assert seen == ["model"] * 2 + ["loop", "model"]


class TestOfTransformers:
    """Real code of others, small."""

    def build(self, name: str, config: str, **settings) -> nn.Module:
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        model = getattr(transformers, name)(getattr(transformers, config)(**settings))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
        return model.eval()

    def check(self, model: nn.Module, share: float, **options) -> eb.Change:
        x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        reference, optimizer = copy.deepcopy(model), torch.optim.AdamW(model.parameters())
        ticket = eb.draw(model, 0.5, example_inputs=x, **options)
        change = eb.shrink(model, ticket, x, optimizer=optimizer)
        assert change.parameters_after < share * change.parameters_before
        without(reference, change)
        with torch.no_grad():
            wanted = reference(x).logits
            torch.testing.assert_close(model(x).logits, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        model.train()(x).logits.square().mean().backward()
        optimizer.step()
        return change

    def test_regnet_with_grouped_convolutions_and_squeeze_and_excite(self):
        model = self.build(
            "RegNetForImageClassification", "RegNetConfig", hidden_sizes=[16, 32], depths=[1, 1], embedding_size=8,
            groups_width=8,
        )  # fmt: skip
        assert not self.check(model, 0.8).whole

    def test_convnext_with_layer_scale_and_norms_over_either_dimension(self):
        model = self.build(
            "ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2,
            layer_scale_init_value=0.5,
        )  # fmt: skip
        assert not self.check(model, 0.8, score="magnitude").whole

    def test_segformer_whose_reduced_attention_has_its_widths_written_down(self):
        model = self.build(
            "SegformerForImageClassification", "SegformerConfig", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1],
            hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[4, 4],
            num_labels=5,
        )  # fmt: skip
        change = self.check(model, 0.95, score="magnitude")
        assert any("sequence_reduction" in name for name in change.whole)
        assert any("fc1" in name for name in change.kept)
