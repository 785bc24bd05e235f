"""Meters tell the truth or None."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from earlybird.cost import meters
from earlybird.cost.meters import EnergyMeter, PeakMemory, energy_meter

MIB = 1 << 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the mark can be reset on Linux only")
def test_peak_falls_back_after_a_reset() -> None:
    meter = PeakMemory()
    if meter.name != "VmHWM":
        pytest.skip("this system does not let a process reset its high-water mark")
    before = meter.read()
    # not from malloc, which may keep what is freed (`earlybird.allocator`, if a run came before)
    block = mmap.mmap(-1, 128 * MIB)
    for page in range(0, 128 * MIB, mmap.PAGESIZE):
        block[page] = 1
    high = meter.read()
    assert before is not None
    assert high is not None
    assert high - before > 100 * MIB
    block.close()
    assert meter.read() == pytest.approx(high, abs=8 * MIB)  # a peak stays when the memory is given back
    meter.reset()
    low = meter.read()
    assert low is not None
    assert high - low > 100 * MIB


def test_without_a_reset_only_a_new_peak_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "_resets_high_water", lambda: False)
    peaks = iter([500, 500, 700])
    monkeypatch.setattr(meters, "_lifetime_peak", lambda: next(peaks))
    meter = PeakMemory()
    assert meter.name == "ru_maxrss"
    assert meter.read() is None
    assert meter.read() == 700


def test_energy_counters_add_up_over_a_wrap() -> None:
    first, second = iter([90.0, 95.0, 5.0, 20.0]), iter([0.0, 1.0, 2.0, 3.0])
    meter = EnergyMeter("test", [(lambda: next(first), 100.0), (lambda: next(second), 0.0)])
    assert [meter.read() for _ in range(3)] == [6.0, 17.0, 33.0]


def _zone(root: Path, zone: str, name: str, microjoules: int) -> Path:
    folder = root / zone
    folder.mkdir()
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text("262143328850\n")
    return folder


def test_processor_energy_is_packages_plus_memory(tmp_path: Path) -> None:
    package = _zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    memory = _zone(tmp_path, "intel-rapl:0:1", "dram", 5_000_000)
    core = _zone(tmp_path, "intel-rapl:0:0", "core", 0)
    platform = _zone(tmp_path, "intel-rapl:1", "psys", 0)
    meter = meters._processor_meter(tmp_path)
    assert meter is not None
    (package / "energy_uj").write_text("3000000\n")
    (memory / "energy_uj").write_text("5500000\n")
    (core / "energy_uj").write_text("1000000\n")  # part of the package already
    (platform / "energy_uj").write_text("9000000\n")  # the whole machine, the package in it
    assert meter.read() == pytest.approx(2.5)


def test_no_counter_means_no_meter(tmp_path: Path) -> None:
    assert meters._processor_meter(tmp_path) is None
    (tmp_path / "intel-rapl:0").mkdir()
    assert meters._processor_meter(tmp_path) is None


def test_gpu_without_zeus_has_no_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zeus", None)
    monkeypatch.setitem(sys.modules, "zeus.device", None)
    assert energy_meter("cuda:0") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_on_a_gpu_is_the_allocators() -> None:
    meter = PeakMemory("cuda")
    meter.reset()
    base = meter.read()
    block = torch.ones(64 * MIB, dtype=torch.uint8, device="cuda")
    del block
    assert base is not None
    assert meter.read() == base + 64 * MIB
