"""A page of one's own machine: one HTML file served on 127.0.0.1, and the jobs that it sends, done one at a time.

    serve(Path("tools/draw.html"), about={"preset": "small"}, make=make, port=7860)

`make(request, folder, tell)` gets the request's JSON, an empty folder of its own, and `tell(step=1, of=4)`, which sends
the page a line; it returns the files to send back. `tell` raises Gone when the page has closed or cancelled: then the
work ends there. Who may ask: whoever knows the token, which the opened address holds behind its # where no log sees it,
from a page of exactly this host and origin. No path that a client sends is ever opened.
"""

import base64
import binascii
import contextlib
import json
import os
import secrets
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from core.config import UserError, reason
from core.files import alive

MOST_BYTES, MOST_WAITING, MOST_READING = 64 << 20, 16, 4  # of a request; jobs in line; bodies read at a time
PATIENCE = 20  # seconds for a client to send its headers, or to go on with what it sends or reads
SAFE = {
    "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "frame-ancestors 'none'", "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}  # fmt: skip
# What the page asks for: of these types, no others.
ASKED = {"prompt": str, "seed": int, "steps": int, "size": str, "frames": int}
MOST_STEPS = 1000
Make = Callable[[dict, Path, Callable[..., None]], list[Path]]


def unpack(request: dict, folder: Path) -> dict[str, object]:
    """The page's request as options, its picture, masks and boxes.json in this folder under names of ours."""
    for name, kind in ASKED.items():
        if type(request.get(name)) is not kind:
            raise UserError(f"{name}: {request.get(name)!r:.60} is no {kind.__name__}; reload the page")
    if request["steps"] > MOST_STEPS:
        raise UserError(f"steps: {request['steps']:.5g} are more than {MOST_STEPS}; give fewer")

    def store(name: str, text: object) -> str:
        try:
            (folder / name).write_bytes(base64.b64decode(text, validate=True))
        except (TypeError, ValueError, binascii.Error):
            raise UserError(f"{name}: is not in base64; reload the page") from None
        return name

    boxes, masks = request.get("boxes"), request.get("masks")
    objects = boxes.get("objects") if isinstance(boxes, dict) else None
    fine = isinstance(objects, list) and isinstance(masks, list) and len(masks) == len(objects)
    if not fine or not all(isinstance(item, dict) for item in objects):
        raise UserError("boxes: not a boxes.json with a mask, or none, for each object; reload the page")
    for k, (item, mask) in enumerate(zip(objects, masks, strict=True)):
        item.pop("mask", None)  # a path of theirs
        if mask:
            item["mask"] = store(f"mask_{k}.png", mask)
    (folder / "boxes.json").write_text(json.dumps(boxes), encoding="utf-8")
    image = str(folder / store("image", request.get("image")))
    traj, out = (str(folder / name) for name in ("boxes.json", "video.mp4"))
    return {"image": image, "traj": traj, "out": out} | {name: request[name] for name in ASKED}


class Gone(Exception):
    """Nobody waits for the answer any more."""


class Refused(Exception):
    """(status, one line): what is wrong with a request."""


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 256

    def __init__(self, page: Path, about: dict, make: Make, port: int):
        super().__init__(("127.0.0.1", port), Handler)
        self.page, self.about, self.make = page.read_bytes(), about, make
        self.token = secrets.token_urlsafe(32)
        self.hosts = [f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")]
        self.line, self.turn, self.closing = [], threading.Condition(), False  # the first in line is at work
        self.reading = threading.Semaphore(MOST_READING)

    def handle_error(self, request, client_address) -> None:
        """A client that leaves is no error of ours."""
        error = sys.exception()
        if not isinstance(error, (OSError, ValueError)):  # ValueError: a file that was closed under the reader
            print(f"serve: {type(error).__name__}: {reason(error)}", file=sys.stderr)


class Handler(BaseHTTPRequestHandler):
    timeout, server_version, sys_version = PATIENCE, "FlashMotion", ""

    def handle(self) -> None:
        # Each header may come late, but not all of them: this ends a client that trickles.
        self.alarm = threading.Timer(PATIENCE, self.hang_up)
        self.alarm.daemon = True
        self.alarm.start()
        try:
            super().handle()
        finally:
            self.alarm.cancel()

    def hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args) -> None:
        pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self.answer(code, json.dumps({"error": message or self.responses[code][0]}).encode())

    def answer(self, code: int, data: bytes = b"", kind: str = "application/json") -> None:
        self.send_response(code)
        for name, value in {**SAFE, "Content-Type": kind, "Connection": "close"}.items():
            self.send_header(name, value)
        if code != 200 or data:  # else lines follow until the connection ends
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def check(self, private: bool) -> None:
        """Refused, unless this comes from our own page, and if `private`, with the token of this run."""
        self.alarm.cancel()
        hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        if len(hosts) != 1 or hosts[0] not in self.server.hosts:
            raise Refused(421, f"open this page as http://{self.server.hosts[0]}, with the same port on both machines")
        if origins not in ([f"http://{hosts[0]}"], [] if self.command == "GET" else None):
            raise Refused(403, "another site's page can't ask this server")
        if private and not secrets.compare_digest(self.headers.get("X-Token", "").encode(), self.server.token.encode()):
            raise Refused(403, "this page is of another run: open the address that sample.py --serve has printed")

    def do_GET(self) -> None:
        try:
            self.check(private=self.path != "/")
            if self.path == "/":
                self.answer(200, self.server.page, "text/html; charset=utf-8")
            elif self.path == "/about":
                self.answer(200, json.dumps(self.server.about).encode())
            else:
                raise Refused(404, "no such page")
        except Refused as error:
            self.send_error(*error.args)

    def do_POST(self) -> None:
        try:
            self.check(private=True)
            if self.path != "/generate":
                raise Refused(404, "no such page")
            with self.server.reading:
                request = self.read_request()
            with self.server.turn:
                if len(self.server.line) > MOST_WAITING:
                    raise Refused(503, f"{MOST_WAITING} videos wait already; try again later")
                self.server.line.append(self)
        except Refused as error:
            return self.send_error(*error.args)
        with contextlib.suppress(Gone):
            self.work(request)

    def read_request(self) -> dict:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()) or self.headers.get("Transfer-Encoding"):
            raise Refused(411, "Content-Length is missing")
        if len(length) > 12 or int(length) > MOST_BYTES:
            raise Refused(413, f"more than {MOST_BYTES >> 20} MiB; give a smaller picture")
        data = self.rfile.read(int(length))
        if len(data) < int(length):
            raise Refused(400, f"broke off after {len(data)} of {length} bytes")
        try:
            request = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"not JSON: {reason(error)}") from None
        if not isinstance(request, dict):
            raise Refused(400, "not a JSON object")
        return request

    def work(self, request: dict) -> None:
        """Wait for our turn, do the job, and send its files after the last line."""
        server, found = self.server, {}
        try:
            self.send_head()
            while place := server.line.index(self):
                self.tell(place=place)
                with server.turn:
                    server.turn.wait_for(lambda: server.line.index(self) != place, timeout=0.5)
            with tempfile.TemporaryDirectory(prefix=f".tmp{os.getpid()}-page-", ignore_cleanup_errors=True) as folder:
                found = {file.name: file.read_bytes() for file in server.make(request, Path(folder), self.tell)}
        except (Gone, UserError) as error:
            if isinstance(error, Gone):
                raise
            return self.tell(error=str(error))
        except Exception as error:  # whatever it is: the next request finds the server at work
            print(f"serve: {type(error).__name__}: {reason(error)}", file=sys.stderr)
            return self.tell(error=reason(error))
        finally:
            with server.turn:
                server.line.remove(self)
                server.turn.notify_all()
        self.tell(files=[[name, len(data)] for name, data in found.items()])
        with contextlib.suppress(OSError):
            self.wfile.write(b"".join(found.values()))

    def send_head(self) -> None:
        try:
            self.answer(200, kind="application/x-ndjson")
        except OSError:
            raise Gone from None

    def tell(self, **event: object) -> None:
        """Send the page a line, if it is still there."""
        try:
            with selectors.DefaultSelector() as ears:
                ears.register(self.connection, selectors.EVENT_READ)
                left = ears.select(0) and not self.connection.recv(1, socket.MSG_PEEK)
            if left or self.server.closing:
                raise Gone
            self.wfile.write(json.dumps(event).encode() + b"\n")
        except OSError:
            raise Gone from None


def sweep() -> None:
    """Remove the folders of servers that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(".tmp*-page-*"):
        if not alive(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def serve(page: Path, about: dict, make: Make, port: int) -> None:
    """Serve until Ctrl+C or SIGTERM. UserError if the port is taken."""
    sweep()
    try:
        server = Server(page, about, make, port)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port}: can't be opened ({reason(error)}); give another") from None
    address = f"http://{server.hosts[0]}/#{server.token}"
    print(f"Open {address}\nCtrl+C ends it.", flush=True)
    if sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(address)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    with server.turn:  # the job at work ends at its next step, and takes its folder with it
        server.closing = True
        server.turn.wait_for(lambda: not server.line, timeout=PATIENCE)
    server.server_close()
