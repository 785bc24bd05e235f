import errno
import hashlib
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest

from earlybird.data import download as module
from earlybird.data.download import fetch
from earlybird.errors import DataError, EarlybirdError, InputError

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
SIZE = len(CONTENT)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``server.files``, in the ways in which servers misbehave."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        content = self.server.files.get(self.path)
        if self.path in self.server.moved:
            self.send_response(302)
            self.send_header("Location", self.server.moved[self.path])
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if content is None:
            return self.send_error(404, "no such file")
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and self.server.ranges else 0
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if self.server.breaks:
            body = body[: self.server.breaks.pop(0)]
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Say nothing about clients that went away: some tests do."""


@pytest.fixture
def server():
    serving = Server(("127.0.0.1", 0), Handler)
    serving.files, serving.requests, serving.breaks, serving.moved, serving.ranges = {"/x": CONTENT}, [], [], {}, True
    serving.address = f"http://127.0.0.1:{serving.server_port}"
    serving.url = f"{serving.address}/x"
    thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield serving
    serving.shutdown()
    serving.server_close()
    thread.join()


def get(server, path, **changes):
    arguments = {"urls": [server.url], "size": SIZE, "sha256": SHA256, "retry_s": 0.0} | changes
    return fetch(arguments.pop("urls"), path, **arguments)


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_fetches_once_and_reports_progress(server, tmp_path):
    seen = []
    path = get(server, tmp_path / "new/x", progress=lambda *what: seen.append(what))
    assert path.read_bytes() == CONTENT
    assert leftovers(path.parent) == ["x"]
    assert seen[-1] == ("x", SIZE, SIZE)
    get(server, path)
    assert len(server.requests) == 1


def test_goes_on_from_the_part_that_is_there(server, tmp_path):
    (tmp_path / "x.part").write_bytes(CONTENT[:700_000])
    assert get(server, tmp_path / "x").read_bytes() == CONTENT
    assert server.requests == [("/x", "bytes=700000-")]


def test_a_connection_that_breaks_again_and_again_still_arrives(server, tmp_path):
    server.breaks = [100_000] * 8  # more often than attempts without progress are allowed
    assert get(server, tmp_path / "x").read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None] + [f"bytes={n}00000-" for n in range(1, 9)]


def test_a_server_that_ignores_ranges_sends_everything_again(server, tmp_path):
    server.ranges = False
    (tmp_path / "x.part").write_bytes(b"#" * 700_000)
    assert get(server, tmp_path / "x").read_bytes() == CONTENT
    assert server.requests == [("/x", "bytes=700000-")]


def test_a_part_that_is_damaged_is_fetched_again_from_the_start(server, tmp_path):
    (tmp_path / "x.part").write_bytes(b"#" * 700_000)
    assert get(server, tmp_path / "x").read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == ["bytes=700000-", None]


def test_a_part_that_is_longer_than_the_file_is_thrown_away(server, tmp_path):
    (tmp_path / "x.part").write_bytes(CONTENT + b"more")
    assert get(server, tmp_path / "x").read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None]


def test_a_complete_part_needs_no_server(server, tmp_path):
    (tmp_path / "x.part").write_bytes(CONTENT)
    assert get(server, tmp_path / "x").read_bytes() == CONTENT
    assert server.requests == []


def test_a_refused_range_starts_anew(server, tmp_path):
    server.files["/x"] = CONTENT[:1000]
    (tmp_path / "x.part").write_bytes(CONTENT[:2000])
    with pytest.raises(DataError, match="serves 1,000 bytes instead of"):
        get(server, tmp_path / "x")


def test_what_arrived_is_kept_when_the_network_fails(server, tmp_path):
    server.breaks = [300_000] + [0] * 20
    with pytest.raises(
        DataError, match=r"connection ended after 300,000 of 1,048,576 bytes.*go on from where"
    ) as caught:
        get(server, tmp_path / "x")
    assert str(tmp_path / "x") in str(caught.value)
    assert SHA256 in str(caught.value)
    assert leftovers(tmp_path) == ["x.part"]
    server.breaks = []
    assert get(server, tmp_path / "x").read_bytes() == CONTENT
    assert server.requests[-1] == ("/x", "bytes=300000-")


def test_another_content_of_the_same_size_is_refused(server, tmp_path):
    server.files["/x"] = CONTENT[::-1]
    with pytest.raises(DataError, match="SHA-256"):
        get(server, tmp_path / "x")
    assert leftovers(tmp_path) == []


def test_another_size_is_refused_before_it_is_read(server, tmp_path):
    server.files["/x"] = CONTENT + b"more"
    with pytest.raises(DataError, match="1,048,580 bytes instead of 1,048,576"):
        get(server, tmp_path / "x")
    assert leftovers(tmp_path) == []


def test_the_next_mirror_is_asked(server, tmp_path):
    urls = [f"{server.address}/nowhere", "http://localhost:9/x", server.url]
    assert get(server, tmp_path / "x", urls=urls).read_bytes() == CONTENT


def test_all_failures_are_told(server, tmp_path):
    with pytest.raises(DataError, match=r"HTTP 404 .*localhost:9: .*refused"):
        get(server, tmp_path / "x", urls=[f"{server.address}/nowhere", "http://localhost:9/x"])


@pytest.mark.parametrize("url", ["http://example.org/x", "ftp://localhost/x", "file:///etc/passwd"])
def test_only_https_leaves_the_machine(server, tmp_path, url):
    with pytest.raises(InputError, match="https"):
        get(server, tmp_path / "x", urls=[url])
    assert leftovers(tmp_path) == []


def test_a_redirect_away_from_https_is_not_read(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LOCAL_HOSTS", ("localhost",))  # 127.0.0.1 stands for a host elsewhere
    server.moved["/moved"] = server.url
    with pytest.raises(DataError, match=r"leads to http://127\.0\.0\.1.*not https"):
        get(server, tmp_path / "x", urls=[f"http://localhost:{server.server_port}/moved"])
    assert leftovers(tmp_path) == []


def test_a_disk_that_is_too_small_is_said_before_anything_is_asked(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(EarlybirdError, match="needs 1,048,576 more bytes"):
        get(server, tmp_path / "x")
    assert server.requests == []


@pytest.mark.parametrize(("code", "message"), [(errno.ENOSPC, "no space left"), (errno.EACCES, "cannot write")])
def test_a_disk_that_fails_on_the_way_keeps_what_is_there(server, tmp_path, code, message):
    def fail(name, done, total):
        raise OSError(code, os.strerror(code))

    with pytest.raises(EarlybirdError, match=message):
        get(server, tmp_path / "x", progress=fail)
    assert leftovers(tmp_path) == ["x.part"]


def test_a_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EarlybirdError, match="XDG_CACHE_HOME"):
        get(server, tmp_path / "file/x")


def test_two_at_once_fetch_it_once(server, tmp_path):
    threads = [threading.Thread(target=get, args=(server, tmp_path / "x")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_a_process_killed_on_the_way_leaves_a_part_to_go_on_from(server, tmp_path):
    code = f"""
import os, pathlib, signal
from earlybird.data import download
download._CHUNK_BYTES = 1 << 16
def progress(name, done, total):
    if done >= total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
path = pathlib.Path({str(tmp_path / "x")!r})
download.fetch([{server.url!r}], path, size={SIZE}, sha256={SHA256!r}, progress=progress)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert leftovers(tmp_path) == ["x.part"]
    held = (tmp_path / "x.part").stat().st_size
    assert get(server, tmp_path / "x").read_bytes() == CONTENT
    assert server.requests[-1] == ("/x", f"bytes={held}-" if held else None)


def test_module_waits_longer_after_each_break(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    server.breaks = [0] * 20
    with pytest.raises(DataError):
        get(server, tmp_path / "x", retry_s=1.0)
    assert waits == [1.0, 2.0, 4.0]
