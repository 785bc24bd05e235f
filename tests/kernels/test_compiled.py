import ctypes
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from earlybird.arithmetic import add_kernel
from earlybird.kernels import batch_norm, compiled
from earlybird.skipping import gather

SOURCES = [add_kernel.SOURCE, batch_norm.SOURCE, gather.SOURCE]
CACHES = [add_kernel._kernel, batch_norm._kernel, gather._kernel]


@pytest.mark.parametrize("kernel", CACHES)
def test_without_a_compiler_a_warning_says_why(kernel, monkeypatch, tmp_path):
    from torch.utils import cpp_extension

    def fail(*args, **kwargs):
        raise RuntimeError("Ninja is required to load C++ extensions\n(details)")

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "load", fail)
    with pytest.warns(UserWarning, match=r"slower \(Ninja is required to load C\+\+ extensions\)"):
        assert kernel.__wrapped__() is None
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("kernel", CACHES)
def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(kernel, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="without their compiled kernel"):
        assert kernel.__wrapped__() is None


@pytest.mark.parametrize("kernel", CACHES)
def test_a_compiler_that_fails_at_its_own_version_is_no_reason_to_stop(kernel, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.warns(UserWarning, match="without their compiled kernel"):
        assert kernel.__wrapped__() is None


@pytest.mark.parametrize(("source", "kernel"), list(zip(SOURCES, CACHES)))
def test_a_compiled_kernel_is_found_again(source, kernel, monkeypatch):
    from torch.utils import cpp_extension

    if kernel() is None:
        pytest.skip("the kernel cannot be compiled here")
    monkeypatch.setattr(cpp_extension, "load", lambda *args, **kwargs: pytest.fail("compiled again"))
    library = compiled.library(source)
    assert library.is_file()
    assert sorted(path.name for path in library.parent.iterdir()) == [library.name]
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", os.fspath(Path(library).parents[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel.__wrapped__() is not None


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what is loaded")
def test_kernels_bring_no_second_runtime_of_openmp():
    """Its threads would wait for work beside PyTorch's, on the same cores."""
    if None in (kernel() for kernel in CACHES):
        pytest.skip("the kernels cannot be compiled here")
    script = (
        "import torch\n"
        "from earlybird.arithmetic import add_kernel\n"
        "from earlybird.kernels import batch_norm\n"
        "loaded = lambda: {line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.split('/')[-1]}\n"
        "torch.ones(10**6).exp()\n"
        "before = loaded()\n"
        "assert add_kernel._kernel() and batch_norm._kernel()\n"
        "assert loaded() == before, (before, loaded())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_the_runtime_that_pytorch_has_brought_is_found(monkeypatch, tmp_path):
    for name in ("torch/lib/libgomp-0123abcd.so.1", "torch/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch/__init__.py"))
    assert compiled._openmp() == tmp_path / "torch/lib/libgomp-0123abcd.so.1"
    (tmp_path / "torch/lib/libgomp-0123abcd.so.1").unlink()
    assert compiled._openmp() is None


def test_a_library_is_loaded_by_ctypes():
    library = compiled.load(add_kernel.SOURCE, "add layers")
    assert library is None or isinstance(library, ctypes.CDLL)
