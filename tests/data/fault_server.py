"""A file server on 127.0.0.1 that misbehaves on order: what real stores do on a bad day, one request at a time."""

from __future__ import annotations

import base64
import http.server
import threading
import time
from collections import Counter
from pathlib import Path


class FaultServer:
    """Serves a folder. `faults[name]`: what the next requests for that file meet, in order; afterwards all is well.

    "500" or any status; "drop N": the connection breaks after N bytes; "truncate N": N bytes and a Content-Length that agrees;
    "wrong": right length, wrong bytes; "longer": more bytes than the file has; "hang": no answer until the server closes;
    "drip N": N bytes a second.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[str]] = {}
        self.honours_range = True
        self.user: str | None = None  # "name:password" that it asks for
        self.requests: list[tuple[str, str]] = []  # (file, range)
        self.queries: list[str] = []
        self.closing = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer._answer(self)

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def gets(self) -> Counter[str]:
        return Counter(name for name, _ in self.requests)

    def _answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path, _, query = request.path.partition("?")
        name, wanted = path.rsplit("/", 1)[1], request.headers.get("Range", "")
        self.requests.append((name, wanted))
        self.queries.append(query)
        orders = self.faults.get(name, [])
        order, _, amount = (orders.pop(0) if orders else "").partition(" ")
        if (
            self.user
            and request.headers.get("Authorization") != "Basic " + base64.b64encode(self.user.encode()).decode()
        ):
            order = "401"
        file = self.folder / name
        if not file.is_file() and not order:
            order = "404"
        if order.isdigit():
            request.send_response(int(order))
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if order == "hang":
            self.closing.wait(60)
            request.close_connection = True
            return
        content = file.read_bytes()
        start = 0
        if wanted and self.honours_range:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        body = content[start:]
        if order == "wrong":
            body = bytes(byte ^ 1 for byte in body)
        if order == "longer":
            body += b"more" * 1000
        if order == "truncate":
            body = body[: int(amount)]
        request.send_response(206 if wanted and self.honours_range else 200)
        if wanted and self.honours_range:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        try:
            if order == "drop":
                request.wfile.write(body[: int(amount)])
                request.wfile.flush()
                self.closing.wait(0.1)  # aiohttp gives up bytes that it has not handed out when the connection breaks
                request.close_connection = True
            elif order == "drip":
                step = max(1, int(amount) // 20)
                for at in range(0, len(body), step):
                    request.wfile.write(body[at : at + step])
                    request.wfile.flush()
                    if self.closing.wait(step / int(amount)):
                        break
            else:
                request.wfile.write(body)
        except OSError:
            time.sleep(0)  # the reader went away
