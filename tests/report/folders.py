"""Run folders as a run writes them, without the run."""

import json
from pathlib import Path

import torch

from earlybird.cost.bill import Bill, Counted, Estimated, Measured, Modelled, Spending
from earlybird.tickets.ticket import Ticket

STEPS = [2, 4, 6, 8, 10, 12]


def spending(seconds: float, macs: float, *, estimated: bool = False, peak: float = 2**29) -> Spending:
    return Spending(
        seconds=Estimated(seconds, "s", "the search") if estimated else Measured(seconds, "s", "clock"),
        steps=Counted(10, "steps"),
        images=Counted(640, "images"),
        macs=Counted(macs, "MAC"),
        bit_macs=Counted(macs / 4, "MAC"),
        moved_bytes=Counted(1e9, "B"),
        peak_bytes=Measured(peak, "B", "VmHWM"),
        joules=None,
        modelled_joules=Modelled(macs * 3e-12, macs * 5e-12, "J", "Horowitz, ISSCC 2014, 45 nm"),
    )


def dense_bill(seconds: float, *, estimated: bool = False) -> Bill:
    train = spending(seconds * 0.9, 9e11, estimated=estimated)
    return Bill(
        phases={"train": train, "evaluate": spending(seconds * 0.1, 1e11, estimated=estimated)}, parameters=500_000
    )


def ticket_bill(seconds: float) -> Bill:
    shares = {"setup": 0.05, "search": 0.2, "draw": 0.02, "train": 0.63, "evaluate": 0.1}
    phases = {name: spending(seconds * share, 4e11 * share) for name, share in shares.items()}
    return Bill(phases=phases, parameters=140_000, dense=dense_bill(100.0, estimated=True))


def write_run(
    path: Path, *, dense: bool = False, keep: float = 0.5, seed: int = 0, seconds: float = 100.0, accuracy: float = 0.9
) -> Path:
    """Write a finished run of 20 steps, 5 an epoch; its ticket is drawn at step 12 by agreement."""
    path.mkdir(parents=True)
    recipe = {
        "model": '"small_cnn"', "data": '"digits"', "dense": str(dense).lower(), "keep": keep, "seed": seed,
        "tolerance": 0.1, "window": 5, "out": f'"{path.name}"',
    }  # fmt: skip
    (path / "recipe.toml").write_text("".join(f"{key} = {value}\n" for key, value in recipe.items()))
    rows = [
        {"step": 5 * i, "epoch": i, "seconds": seconds * i / 4, "accuracy": accuracy * (0.7 + 0.075 * i)}
        for i in range(1, 5)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bill = dense_bill(seconds) if dense else ticket_bill(seconds)
    (path / "bill.json").write_text(json.dumps(bill.to_json()))
    (path / "tune.json").write_text(json.dumps(TUNE))
    (path / "environment.json").write_text(json.dumps({"torch": "2.13.0", "processor": "a processor", "cores": 2}))
    if not dense:
        write_ticket(path, keep)
    return path


def write_ticket(path: Path, keep: float) -> None:
    masks = {f"features.{i}": torch.arange(width) < keep * width for i, width in enumerate((16, 32, 32, 64))}
    provenance = {"method": "early_bird", "keep": keep, "step": 12, "reason": "agreement"}
    Ticket(masks, provenance=provenance).save(path / "ticket.safetensors")
    matrix = [[abs(a - b) / 60 for b in STEPS] for a in STEPS]
    history = [
        {
            "step": step,
            "epoch": step / 5,
            "keep": keep,
            "distances": [abs(step - s) / 60 for s in STEPS if s < step][-4:],
        }
        for step in STEPS
    ]
    (path / "history.json").write_text(json.dumps({"history": history, "steps": STEPS, "matrix": matrix}))
    change = {"parameters_before": 500_000, "parameters_after": 140_000, "rounded": {"features.1": [3, 4]}}
    (path / "change.json").write_text(json.dumps(change))


TUNE = {
    "choice": {"device": "cpu", "precision": "bf16", "channels_last": True, "compile": False, "threads": 2},
    "reason": "bf16 is 1.9 times faster",
    "candidates": [
        {"precision": "fp32", "channels_last": False, "compile": False, "step_s": 0.2, "steps_timed": 3},
        {"precision": "bf16", "channels_last": True, "compile": False, "step_s": 0.1, "steps_timed": 3},
    ],
    "seconds": 1.2,
}
