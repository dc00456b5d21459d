"""Stores on 127.0.0.1 that can be made to fail: a web server, and a wire to cut before S3."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class WebStore(ThreadingHTTPServer):
    """Files over HTTP, with byte ranges or without.

    Attributes:
        files: content by path.
        headers: further headers by path.
        statuses: answers to the next requests instead of a file, 0 for the file.
        cut_after: bytes after which the connection of the next GETs is cut.
        pace_s: pause after each 16 KiB of a body.
        gets: (path, first byte asked for) of every GET that was answered with content.
        on_get: called before a GET is answered.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], *, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.ranges = ranges
        self.headers: dict[str, dict[str, str]] = {}
        self.statuses: list[int] = []
        self.cut_after: list[int] = []
        self.pace_s = 0.0
        self.gets: list[tuple[str, int]] = []
        self.on_get: Callable[[str], None] = lambda path: None
        self.modified = "Mon, 02 Nov 2026 10:00:00 GMT"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: WebStore

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        store, path = self.server, unquote(urlsplit(self.path).path)
        if with_body:
            store.on_get(path)
        status = store.statuses.pop(0) if store.statuses else 0
        data = store.files.get(path)
        if status or data is None:
            self.send_error(status or 404)
            return
        asked = self.headers.get("Range", "") if store.ranges else ""
        begin, end = 0, len(data)
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(end, int(last) + 1 if last else end)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(end - begin))
        self.send_header("Last-Modified", store.modified)
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        for name, value in store.headers.get(path, {}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self._send(path, data[begin:end], begin)

    def _send(self, path: str, body: bytes, begin: int) -> None:
        store = self.server
        store.gets.append((path, begin))
        if store.cut_after:
            body = body[: store.cut_after.pop(0)]
        for start in range(0, len(body), 16 << 10):
            self.wfile.write(body[start : start + (16 << 10)])
            time.sleep(store.pace_s)
        self.close_connection = True


class Wire:
    """A TCP proxy that can cut connections in the middle of a body, or flip a bit of it.

    Attributes:
        cut_after: the next connections whose answer is longer are reset after that many bytes.
        flip_at: in that many next long answers, the byte at 50,000 is changed.
        bodies: answers longer than 20,000 bytes.
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self.cut_after: list[int] = []
        self.flips = 0
        self.bodies = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.target))
            for job in ((client, server), (server, client)):
                is_answer = job[0] is server
                threading.Thread(target=self._pump, args=(*job, is_answer), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        sent = 0
        try:
            while data := source.recv(8192):
                if is_answer:
                    if sent <= 20_000 < sent + len(data):
                        self.bodies += 1
                    data = self._flipped(data, sent)
                    limit = self.cut_after[0] if self.cut_after else None
                    if limit is not None and sent + len(data) > limit:
                        self.cut_after.pop(0)
                        reset = struct.pack("ii", 1, 0)
                        sink.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                        break
                sink.sendall(data)
                sent += len(data)
        except OSError:
            pass
        for side in (source, sink) if is_answer else (sink,):
            try:
                side.shutdown(socket.SHUT_WR)
                if is_answer:
                    side.close()
            except OSError:
                pass

    def _flipped(self, data: bytes, sent: int) -> bytes:
        place = 50_000 - sent
        if not self.flips or not 0 <= place < len(data):
            return data
        self.flips -= 1
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
