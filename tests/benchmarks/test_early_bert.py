"""The EarlyBERT benchmark: batches and rules by hand, and a run of everything on a few sentences."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
import early_bert
from early_bert import CONTESTANTS, MASK, PAD, Task, Text, batches, drop_layers, fit, pooled, share_left

TINY = {"layers": 2, "hidden": 16, "heads": 4, "neurons": 32, "vocabulary": 60, "batch": 8, "length": 16}


@pytest.fixture
def sst2(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "sst2"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 48), ("dev", 16), ("test", 16)):
        lines = []
        for index in range(count):
            length = int(torch.randint(2, 9, (), generator=generator))
            lines.append(" ".join(["good" if index % 2 else "bad"] * length) + f"\t{index % 2}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("EARLYBIRD_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(early_bert, "WORK", tmp_path / "work")
    return folder


def text(lengths):
    sentences = [[2, *range(5, 3 + length), 3] for length in lengths]
    return Text(sentences, sentences, sentences, {"train": [0] * len(lengths), "dev": [0] * len(lengths)}, 40)


def test_batches_hold_every_sentence_once_with_little_padding():
    task = Task("", batch=4)
    own = text([3, 20, 4, 21, 5, 22, 6, 23])
    seen = []
    for inputs, _ in batches(task, own, "train", torch.Generator().manual_seed(0)):
        assert inputs["input_ids"].shape[1] % 8 == 0
        lengths = inputs["attention_mask"].sum(1)
        assert lengths.max() - lengths.min() <= 3
        assert ((inputs["input_ids"] == PAD) == (inputs["attention_mask"] == 0)).all()
        seen += lengths.tolist()
    assert sorted(seen) == sorted(map(len, own.train))


def test_masked_words_are_those_asked_for():
    task, own = Task("", objective="mlm", batch=4), text([20] * 8)
    total = hidden = 0
    for inputs, targets in batches(task, own, "train", torch.Generator().manual_seed(0)):
        whole = torch.tensor(own.train[0])
        assert torch.equal(targets, whole.expand(4, -1)[inputs["chosen"][:, : len(whole)]])
        kept = inputs["input_ids"][:, : len(whole)] == whole
        assert kept[~inputs["chosen"][:, : len(whole)]].all()
        total += len(targets)
        hidden += int((inputs["input_ids"] == MASK).sum())
    assert 0.5 < hidden / total <= 1
    one, two = (next(batches(task, own, "dev", None)) for _ in range(2))
    assert torch.equal(one[1], two[1])  # every evaluation asks the same


def test_a_dropped_layer_hands_its_input_on():
    task = Task("", **TINY)
    torch.manual_seed(0)
    own = text([6] * 8)
    model = early_bert.build(task, own, None)
    inputs, _ = next(batches(task, own, "dev", None))
    whole = model.eval()(**inputs)
    drop_layers(model, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(model.eval()(**inputs), whole)
    model.train()
    calls = []
    model.network.bert.encoder.layer[1].output.register_forward_hook(lambda *_: calls.append(1))
    model(**inputs)
    assert not calls


def test_the_schedule_rises_and_falls_and_stops_when_told():
    task, own = Task("", **TINY), text([6] * 24)
    model = early_bert.build(task, own, None)
    optimizer = early_bert.adamw(model, 1.0)
    rates = []
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    assert fit(model, optimizer, task, own, torch.Generator(), 20, 1e-3) == 20
    assert rates[:3] == pytest.approx([0.5e-3, 1e-3, 1e-3])
    assert rates[-1] == pytest.approx(1e-3 / 18)
    assert fit(model, optimizer, task, own, torch.Generator(), 20, 1e-3, lambda: len(rates) == 25) == 5


def test_what_the_ticket_leaves_and_how_accuracies_are_pooled():
    assert share_left() == pytest.approx((4 * 0.5 + 8 * 0.6) / 12)
    assert pooled({"dev": 1.0, "test": 0.0}, Task("")) == pytest.approx(100 * 872 / 2693)
    assert pooled({"dev": 1.0, "test": 0.0}, Task("", sentences=400)) == 50


def test_everything_runs_once_and_is_not_run_again(sst2, results, monkeypatch, capsys):
    monkeypatch.setattr(
        early_bert, "TASKS", {"tiny": Task("tiny", pretrained=1, epochs=2, ticket_epochs=1, **TINY)}
    )  # fmt: skip
    monkeypatch.setattr(early_bert, "yardstick", lambda threads: 0.01)
    words = ["--tasks", "tiny", "--seeds", "1", "--threads", "1"]
    early_bert.main(words)
    rows = [json.loads(line) for line in (results / "early_bert.jsonl").read_text().splitlines()]
    by = {row["contestant"]: row for row in rows}
    assert set(by) == set(CONTESTANTS)
    assert by["early_bert"]["macs"] == by["random"]["macs"] < by["full"]["macs"] == by["full"]["dense_macs"]
    assert by["random"]["widths"] == by["early_bert"]["widths"]
    assert by["early_bert"]["steps"] == 6 + by["early_bert"]["drawn_at"]
    assert by["early_bert"]["searched_steps"] == by["early_bert"]["drawn_at"] == 1
    assert {"search", "draw", "train"} <= set(by["early_bert"]["bill"]["phases"])
    each = by["full"]["seconds"] / by["full"]["steps"]
    assert by["fewer"]["steps"] == max(round(by["early_bert"]["seconds"] / each), 1)
    printed = capsys.readouterr().out
    assert "EarlyBERT" in printed
    early_bert.main(words)
    assert len((results / "early_bert.jsonl").read_text().splitlines()) == len(rows)
