"""Every model of the table: size as published, trainable, readable by pruner, compiler and export."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch_pruning
from torch import nn

from earlybird.cost.count import count
from earlybird.errors import InputError
from earlybird.models import MODELS, build
from earlybird.models.preact_resnet import PreActResNet
from earlybird.models.resnet_cifar import CifarResNet
from earlybird.models.vgg import VGG

# one small member of each family
FAMILIES = ["small_cnn", "vgg11", "resnet20", "preact_resnet29", "resnet18", "resnet50", "mobilenet_v2", "speedrun"]

# name, image size, classes, millions of parameters, GMACs. He et al. 2016 (CIFAR ResNets: table 6; ImageNet sizes as
# in torchvision, whose ResNet-50 is the v1.5 too), Sandler et al. 2018 (table 4), You et al. 2020 (VGG-16 on CIFAR).
PUBLISHED = [
    ("vgg16", 32, 10, 14.7, 0.314),
    ("resnet20", 32, 10, 0.27, 0.041),
    ("resnet110", 32, 10, 1.7, 0.253),
    ("preact_resnet164", 32, 10, 1.7, 0.25),
    ("resnet18", 224, 1000, 11.69, 1.82),
    ("resnet34", 224, 1000, 21.80, 3.66),
    ("resnet50", 224, 1000, 25.56, 4.09),
    ("mobilenet_v2", 224, 1000, 3.50, 0.301),
]


@pytest.mark.parametrize(("name", "image_size", "classes", "millions", "gmacs"), PUBLISHED)
def test_size_is_the_published_one(name: str, image_size: int, classes: int, millions: float, gmacs: float) -> None:
    cost = count(build(name, classes=classes, image_size=image_size), torch.zeros(1, 3, image_size, image_size))
    digits = len(str(millions).partition(".")[2])
    assert round(cost.parameters / 1e6, digits) == millions
    assert cost.forward_macs / 1e9 == pytest.approx(gmacs, rel=0.015)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_a_citation_with_link(name: str) -> None:
    assert MODELS[name].name == name
    assert "https://" in MODELS[name].citation


def test_table_is_readable_without_torch() -> None:
    code = "import sys, earlybird.models as m; assert m.MODELS; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("image_size", [8, 28, 32])
@pytest.mark.parametrize("name", FAMILIES)
def test_learns_on_small_images(name: str, image_size: int) -> None:
    model = build(name, classes=7, in_channels=1, image_size=image_size, width=0.25)
    logits = model(torch.randn(2, 1, image_size, image_size, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", FAMILIES)
def test_width_scales_every_layer_to_multiples_of_8(name: str) -> None:
    full = dict(build(name, classes=10).named_modules())
    half = dict(build(name, classes=10, width=0.5).named_modules())
    widths = [
        (layer.out_channels, half[path].out_channels) for path, layer in full.items() if isinstance(layer, nn.Conv2d)
    ]
    assert all(kept % 8 == 0 for _, kept in widths)
    scaled_layers = widths[:-1] if name == "mobilenet_v2" else widths  # its last layer never gets narrower
    assert all(kept <= before / 2 + 48 for before, kept in scaled_layers)
    assert sum(kept for _, kept in scaled_layers) == pytest.approx(0.5 * sum(n for n, _ in scaled_layers), rel=0.05)


def test_width_1_is_exact_and_nonsense_is_refused() -> None:
    assert build("vgg16", classes=10).classifier.in_features == 512
    for width in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="width"):
            build("vgg16", classes=10, width=width)


@pytest.mark.parametrize("family", [VGG, CifarResNet, PreActResNet])
def test_depth_that_does_not_exist_is_refused(family: type[nn.Module]) -> None:
    with pytest.raises(InputError, match="depth 17"):
        family(17)


def test_scales_start_at_1_or_as_the_pruning_papers_have_it() -> None:
    norms = [m for m in VGG(11).modules() if isinstance(m, nn.BatchNorm2d)]
    published = [m for m in VGG(11, gamma_init=0.5).modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)
    assert all((norm.weight == 0.5).all() for norm in published)


def test_convolutions_start_with_he_variance() -> None:
    layer = VGG(16).features[0]
    last = [m for m in VGG(16).modules() if isinstance(m, nn.Conv2d)][-1]
    assert isinstance(layer, nn.Conv2d)
    assert last.weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.02)


def test_stem_follows_the_image_size() -> None:
    large, small = build("resnet18", classes=10, image_size=96), build("resnet18", classes=10, image_size=64)
    assert large.stem[0].kernel_size == (7, 7)
    assert small.stem[0].kernel_size == (3, 3)
    assert large.eval().blocks(large.stem(torch.zeros(1, 3, 96, 96))).shape[-1] == 3
    assert small.eval().blocks(small.stem(torch.zeros(1, 3, 64, 64))).shape[-1] == 8


def test_mobilenet_halves_small_images_three_times_and_large_ones_five_times() -> None:
    for image_size, side in ((32, 4), (224, 7)):
        model = build("mobilenet_v2", classes=10, image_size=image_size, width=0.25).eval()
        assert model.features(torch.zeros(1, 3, image_size, image_size)).shape[-1] == side


@pytest.mark.parametrize("name", FAMILIES)
def test_pruner_can_follow_every_layer(name: str) -> None:
    model = build(name, classes=10, width=0.25)
    images = torch.zeros(2, 3, 32, 32)
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=images)
    before = count(model, images)
    for layer in [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]:
        group = graph.get_pruning_group(layer, torch_pruning.prune_conv_out_channels, idxs=[0])
        assert graph.check_pruning_group(group)
        group.prune()
    after = count(model, images)
    assert model(images).shape == (2, 10)
    assert after.forward_macs < before.forward_macs
    assert after.parameters < before.parameters


@pytest.mark.parametrize("name", FAMILIES)
def test_compiles_into_one_graph(name: str) -> None:
    torch._dynamo.reset()
    model = build(name, classes=10, width=0.25).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images), model(images))


@pytest.mark.parametrize("name", FAMILIES)
def test_exports_with_a_free_batch_size(name: str) -> None:
    model = build(name, classes=10, width=0.25).eval()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},))
    assert torch.allclose(program.module()(images), model(images), atol=1e-5)


@pytest.mark.parametrize("name", ["preact_resnet29", "mobilenet_v2"])
def test_onnx_gives_the_same_logits(name: str, tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = build(name, classes=10, width=0.25).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (images,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert torch.allclose(torch.from_numpy(logits), model(images), atol=1e-4)
