import os
import platform
import subprocess
import sys

import pytest

from earlybird import allocator

FAULTS = """
import resource, sys, torch
from earlybird import allocator
if sys.argv[1] == "keep":
    assert allocator.keep_freed()
x = torch.ones(16 << 20)
for _ in range(20):  # until freed blocks have merged into some that fit
    x + 1
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    x + 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
allocator.give_back()
"""

glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or "LD_PRELOAD" in os.environ, reason="the malloc of this process is not glibc's"
)


def _faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@glibc
def test_memory_that_is_kept_is_not_faulted_in_again() -> None:
    assert _faults("keep") < 100 < _faults("leave")


@glibc
def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "0")
    assert not allocator.keep_freed()
