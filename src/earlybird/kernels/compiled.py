"""C++ kernels of ours, compiled at their first use, once for a machine and release.

They go into the folder of PyTorch's extensions (``TORCH_EXTENSIONS_DIR``, else ``~/.cache/torch_extensions``), which
takes some seconds, a compiler (GCC or Clang) and ninja. A library is plain C functions that `ctypes` calls: it needs
neither Python's headers nor PyTorch's.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

__all__ = ["library", "load"]

_FLAGS = ("-O3", "-march=native", "-fopenmp")


def load(source: Path, what: str, loss: str = "several times slower") -> ctypes.CDLL | None:
    """Return the library of a source, compiled if this machine has not done so before; None where that fails.

    Then a warning says why.

    Args:
        source: C++.
        what: Runs slower without it, in the plural, for the warning.
        loss: How much slower, for the warning.
    """
    try:
        return ctypes.CDLL(str(library(source)))
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"{what} run without their compiled kernel, {loss} ({reason}); it needs a C++ compiler and ninja",
            stacklevel=3,
        )
        return None


def library(source: Path) -> Path:
    """Return the library of this source, release of PyTorch and processor."""
    from torch.utils import cpp_extension  # takes a while to import

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    runtime = _openmp()
    # a home folder may be shared by machines of which some lack the instructions of others
    parts = (
        source.read_text("utf-8"), *_FLAGS, runtime.name if runtime else "", torch.__version__, platform.machine(),
        _instructions(),
    )  # fmt: skip
    folder = Path(root) / f"earlybird_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"
    found = folder / f"{source.stem}{cpp_extension.LIB_EXT}"
    if not found.exists():
        linked = str(runtime) if runtime and _is_gcc(cpp_extension.get_cxx_compiler()) else "-fopenmp"
        folder.mkdir(parents=True, exist_ok=True)
        # in a folder of its own, and then put in place at once: no lock that a killed process would leave behind
        with tempfile.TemporaryDirectory(dir=folder) as build:
            built = cpp_extension.load(
                source.stem, [str(source)], extra_cflags=list(_FLAGS), extra_ldflags=[linked],
                build_directory=build, is_python_module=False,
            )  # fmt: skip
            os.replace(built, found)
    return found


def _openmp() -> Path | None:
    """Return GCC's OpenMP runtime that PyTorch has brought with it, if it has.

    The system's, under another name, would be a second pool of threads, which wait for work at the cost of the first.
    """
    package = Path(torch.__file__).parent
    folders = (package / "lib", package.with_name("torch.libs"))
    return next((path for folder in folders for path in sorted(folder.glob("libgomp*.so*"))), None)


def _is_gcc(compiler: str) -> bool:
    """Tell whether it is GCC, whose code Clang's OpenMP runtime can serve, but not the other way round."""
    words = [compiler, "-dM", "-E", "-x", "c++", os.devnull]
    return "__clang__" not in subprocess.run(words, capture_output=True, text=True, check=False).stdout


def _instructions() -> str:
    """Return what instructions the processor has, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
