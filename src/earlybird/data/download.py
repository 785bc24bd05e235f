"""Fetch the files of a data set: over https, size and SHA-256 checked, resumed after a break, atomic.

A download grows in ``NAME.part`` and is renamed to ``NAME`` only when size and SHA-256 are right. What is there of the
part is kept over breaks, interrupts and reboots, and the next attempt asks the server for the rest with an HTTP range
request; a server that ignores ranges sends everything again. Two processes that want the same file (ranks of one run)
wait for each other instead of downloading it twice.

``$EARLYBIRD_MIRROR`` names another server, for networks without access to the publishers: ``NAME/FILE`` is appended,
e.g. ``https://mirror.example.org/data`` + ``/cifar10/cifar-10-binary.tar.gz``.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import os
import re
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from earlybird.data.catalogue import DataInfo
from earlybird.errors import DataError, EarlybirdError, InputError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

_CHUNK_BYTES = 1 << 20
_ATTEMPTS = 4  # in a row that bring no new byte
_TIMEOUT_S = 30.0
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_NETWORK_ERRORS = (
    http.client.HTTPException,
    urllib.error.URLError,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)


class _Unusable(Exception):
    """The server answers, but with something else than the file."""


def download(info: DataInfo, folder: Path, *, progress: Progress | None = None) -> None:
    """Fetch all files of ``info`` that are not yet in ``folder``.

    Args:
        info: Entry of the catalogue; its mirrors are tried in order.
        folder: Where the files go; made if needed.
        progress: Called with (file name, bytes there, bytes in all).

    Raises:
        DataError: No mirror gave the right file; says where to put it by hand.
        EarlybirdError: The disk is full.
    """
    mirror = os.environ.get("EARLYBIRD_MIRROR", "")
    bases = (f"{mirror.rstrip('/')}/{info.name}/",) if mirror else info.mirrors
    for file in info.files:
        fetch(
            [base + file.name for base in bases],
            folder / file.name,
            size=file.bytes,
            sha256=file.sha256,
            progress=progress,
        )


def fetch(
    urls: Sequence[str],
    path: Path,
    *,
    size: int,
    sha256: str,
    progress: Progress | None = None,
    retry_s: float = 1.0,
) -> Path:
    """Fetch one file into ``path`` unless it is there already.

    Args:
        urls: Addresses of the same file, tried in order; https, or http on this machine.
        path: Where it goes. ``path`` with ``.part`` appended holds what has arrived so far.
        size: In bytes.
        sha256: Of the whole file, in hexadecimal.
        progress: Called with (file name, bytes there, bytes in all).
        retry_s: Wait before the first retry of a broken transfer; doubled each time.

    Returns:
        ``path``.

    Raises:
        DataError: No address gave a file of this size and SHA-256.
        EarlybirdError: The disk is full or the folder cannot be written.
        InputError: An address is neither https nor on this machine.
    """
    for url in urls:
        if not _allowed(url):
            raise InputError(f"address {url} is not https", hint="data is downloaded over https only")
    with _disk_errors(path), _alone(path):
        if path.is_file() and path.stat().st_size == size:
            return path
        part = path.with_name(path.name + ".part")
        _check_space(path, size - (part.stat().st_size if part.exists() else 0))
        failures = []
        for url in urls:
            host = urllib.parse.urlsplit(url).netloc
            while True:
                resumed = part.exists()
                try:
                    _transfer(url, part, size, progress, retry_s)
                except (_Unusable, *_NETWORK_ERRORS) as error:
                    failures.append(f"{host}: {_reason(error)}")
                    break
                digest = file_sha256(part)
                if digest == sha256:
                    _commit(part, path)
                    return path
                part.unlink()
                # a part left by an earlier attempt may be what is damaged, so the file gets one chance from its start
                if not resumed:
                    failures.append(f"{host}: SHA-256 {digest[:12]}... instead of {sha256[:12]}...")
                    break
    raise DataError(
        f"{path.name} could not be downloaded ({'; '.join(failures)})",
        needed=f"a file of {size:,} bytes with SHA-256 {sha256}",
        hint=f"run the same command again to go on from where it stopped, or put the file at {path}",
    )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _transfer(url: str, part: Path, size: int, progress: Progress | None, retry_s: float) -> None:
    """Bring ``part`` to ``size`` bytes, over as many connections as it takes while each brings something."""
    idle = 0
    while True:
        have = part.stat().st_size if part.exists() else 0
        if have > size:
            part.unlink()
            have = 0
        if have == size:
            return
        try:
            _receive(url, part, have, size, progress)
        except urllib.error.HTTPError as error:
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                raise
            failure: Exception = error
        except _NETWORK_ERRORS as error:
            failure = error
        else:
            continue
        now = part.stat().st_size if part.exists() else 0
        idle = 0 if now > have else idle + 1
        if idle == _ATTEMPTS:
            raise failure
        time.sleep(retry_s * 2 ** max(idle - 1, 0))


def _receive(url: str, part: Path, have: int, size: int, progress: Progress | None) -> None:
    """Append what one connection brings to ``part``, which holds ``have`` bytes already."""
    request = urllib.request.Request(url, headers={"User-Agent": "earlybird"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
        if not _allowed(response.geturl()):
            raise _Unusable(f"leads to {response.geturl()}, which is not https")
        if response.status == http.HTTPStatus.PARTIAL_CONTENT:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != have or match[2] not in (str(size), "*"):
                raise _Unusable(f"answered range {response.headers.get('Content-Range')!r} for bytes from {have}")
        else:
            have = 0  # ranges are not supported there: the file comes from its start
            length = response.headers.get("Content-Length")
            if length is not None and int(length) != size:
                raise _Unusable(f"serves {int(length):,} bytes instead of {size:,}")
        with open(part, "ab" if have else "wb") as file:
            while chunk := response.read(_CHUNK_BYTES):
                have += len(chunk)
                if have > size:
                    raise _Unusable(f"sends more than {size:,} bytes")
                file.write(chunk)
                if progress is not None:
                    progress(part.name.removesuffix(".part"), have, size)
    if have < size:
        raise ConnectionError(f"connection ended after {have:,} of {size:,} bytes")


def _allowed(url: str) -> bool:
    address = urllib.parse.urlsplit(url)
    return address.scheme == "https" or (address.scheme == "http" and address.hostname in _LOCAL_HOSTS)


def _check_space(path: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needed_bytes:
        raise EarlybirdError(
            f"{path.name} needs {needed_bytes:,} more bytes, but the disk of {path.parent} has {free:,} left",
            hint="free some space, or set XDG_CACHE_HOME to a folder on a larger disk",
        )


def _commit(part: Path, path: Path) -> None:
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) or type(error).__name__


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of the local disk into sentences; those of the network never get here."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EarlybirdError(
                f"no space left on the disk of {path.parent}",
                needed=f"what has arrived of {path.name} is kept",
                hint="free some space and run the same command again, or set XDG_CACHE_HOME to a larger disk",
            ) from error
        raise EarlybirdError(
            f"cannot write {path} ({error.strerror or error})",
            hint="set XDG_CACHE_HOME to a folder that can be written, or EARLYBIRD_DATA to one that holds the data",
        ) from error


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock of ``path`` against other processes; it ends with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
