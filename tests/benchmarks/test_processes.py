import os
import time

import common
import processes
import pytest


def test_the_table_shows_the_newest_session_of_each_network(results, head):
    rows = [
        {"network": "vgg11", "width": 1.0, "batch": 128, "stage": stage, "processes": count, **shown, **head(**session)}
        for session in ({"session": "first"}, {"session": "second"})
        for stage, count, shown in (
            ("dense", 1, {"step_seconds": 0.4, "images_per_s": 320.0, "ratio": 1.0}),
            ("dense", 2, {"step_seconds": 0.25, "images_per_s": 512.0, "ratio": 1.65}),
        )
    ]
    lines = [line for line in processes.table(rows).splitlines() if line.startswith("| vgg11")]
    assert lines == [
        "| vgg11 | 128 | dense | 1 | 400 | 320 | 1.00x |",
        "| vgg11 | 128 | dense | 2 | 250 | 512 | 1.65x |",
    ]


def test_a_quick_look_is_half_as_wide_and_short():
    options = processes.read(["--quick", "--networks", "resnet20"])
    assert (options.width, options.rounds, options.networks) == (0.5, 3, "resnet20")


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="Linux tells what a process has used")
def test_the_time_of_a_process_is_that_of_its_cores():
    before, begun = processes.processor_s(os.getpid()), time.process_time()
    while time.process_time() - begun < 0.1:
        pass
    assert processes.processor_s(os.getpid()) - before == pytest.approx(time.process_time() - begun, abs=0.05)
    assert processes.processor_s(2**22 + 1) == 0.0  # no such process


def test_what_partners_do_does_not_disturb_a_round():
    used = iter(range(0, 10**6, 100))
    _, share = common.interleaved({"step": lambda: None}, 2, others=lambda: 0.0)
    assert share == 0.0
    _, share = common.interleaved({"step": lambda: None}, 2, others=lambda: next(used))
    assert share > common.DISTURBED
