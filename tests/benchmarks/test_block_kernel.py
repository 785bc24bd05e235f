import block_kernel
import pytest
import torch
from block_kernel import SPARSITIES, check, crossover, dense, line, random_mask, random_ticket, tables, ways

from earlybird.models import build
from earlybird.sparse.blocks import find_blocks


def operands(dtype=torch.float32, side=5):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, side, side, generator=generator)
    weight = 0.1 * torch.randn(64, 8, 3, 3, generator=generator)
    mask = random_mask(weight.shape, 0.7, generator)
    return x.to(dtype).contiguous(memory_format=torch.channels_last), weight.to(dtype), mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_is_the_masked_convolution(dtype):
    x, weight, mask = operands(dtype)
    found = ways(x, weight, mask, others=True)
    assert {"gather", "bmm"} <= set(found)
    assert ("CSR" in found) == (dtype == torch.float32)
    check(found, dense(x, weight * mask))
    assert [*ways(x, weight, mask, others=False)] in (["kernel"], [])


def test_a_way_that_computes_something_else_is_found_out():
    x, weight, mask = operands()
    found = {"other": lambda: dense(x, weight)}
    with pytest.raises(RuntimeError, match="other computes another convolution"):
        check(found, dense(x, weight * mask))


def test_masks_are_blocks_of_the_sparsity_that_was_asked_for():
    mask = random_mask((128, 16, 3, 3), 0.75, torch.Generator().manual_seed(0))
    assert [len(block.rows) for block in find_blocks(mask)] == [32] * 4
    assert float(mask.float().mean()) == 0.25
    model = build("vgg11", classes=10, width=0.25)
    ticket = random_ticket(model, 0.75, torch.Generator().manual_seed(0))
    assert len(ticket.masks) == 7  # of eight convolutions and a head
    assert ticket.keep == pytest.approx(0.25, abs=1e-3)


def test_the_crossover_is_the_least_sparsity_from_which_on_it_stays_faster():
    assert crossover({"0.3": 1.1, "0.5": 0.9, "0.7": 1.2, "0.9": 2.0}) == "0.7"
    assert crossover({"0.3": 1.1, "0.9": 2.0}) == "0.3"
    assert crossover({"0.3": 1.1, "0.9": 0.8}) == ""


def test_the_table_shows_the_newest_session_of_each_machine(head):
    row = {"side": 4, "inputs": 8, "outputs": 16, "batch": 64, "type": "float32", "dense_seconds": 2e-3}
    found = []
    for device, session, ratio in (("big", "1", 9.0), ("big", "2", 0.5), ("small", "1", 3.0)):
        ratios = {"kernel": {str(s): ratio for s in SPARSITIES}, "bmm": {"0.5": 0.25}}
        found.append({**row, "ratios": ratios, **head(device=device), "session": session})
    network = {"network": "vgg16", "batch": 1, "sparsity": 0.8, "replaced": [9, 12], "dense_seconds": 0.08, "ratio": 2}
    text = tables([*found, {**network, **head(device="big"), "session": "2", "others": 0.5}])
    assert "Other processes took up to 50% of the processors.\n" in text[: text.index("small")]
    assert "Other processes" not in text[text.index("small") :]
    assert "| 4 | 8 to 16 | 64 | float32 | 2.000 | 0.50x |" in text
    assert "| nowhere |  | 0.25x |" in text
    assert "| vgg16 | 1 | 80% | 9 of 12 | 80.0 | 2.00x |" in text
    assert "9.00x" not in text
    assert text.index("0.50x") < text.index("small, 2 threads") < text.index("3.00x")


def test_a_quick_look_records_nothing(monkeypatch, capsys):
    monkeypatch.setattr(block_kernel, "SHAPES", ((4, 8, 32),))
    monkeypatch.setattr(block_kernel, "BATCHES", (2,))
    monkeypatch.setattr(block_kernel, "TYPES", {"float32": torch.float32})
    monkeypatch.setattr(block_kernel, "NETWORKS", ("vgg11",))
    monkeypatch.setattr(block_kernel, "LEAST_S", 0.0)
    recorded = []
    monkeypatch.setattr(block_kernel, "record", lambda name, row, quick: recorded.append((row, quick)))
    with torch.no_grad():
        options = block_kernel.read(["--quick"])
        block_kernel.convolutions(options)
        block_kernel.networks(options)
    assert all(quick for _, quick in recorded)
    assert [row.get("network") for row, _ in recorded] == [None, "vgg11", "vgg11", "vgg11"]
    said = capsys.readouterr().out
    assert all(line(row) in said for row, _ in recorded)
