"""A page on 127.0.0.1 and the files it asks for, made one at a time by whoever gives the answers.

Who may ask: whoever knows the token, which the opened address holds behind its # where no log sees it, from a page of
exactly this host and origin. No path that a client sends is ever opened.
"""

import contextlib
import ctypes
import json
import os
import re
import secrets
import select
import signal
import socket
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from core.config import UserError, reason, warn

PORT = 7860  # or any free one where it is taken
MOST_BYTES = 64 << 20  # of a request
PATIENCE = 20  # seconds for a client to go on with what it sends or reads
SAFE = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
        "Content-Security-Policy": "frame-ancestors 'none'", "Cross-Origin-Resource-Policy": "same-origin"}  # fmt: skip
# answer(request, folder, tell): does what the request says in an empty folder, and returns the files to send back.
Answer = Callable[[dict, Path, Callable[..., None]], list[Path]]


class Gone(BaseException):
    """The page has closed or cancelled: nobody waits for the answer. No Exception, as asyncio's CancelledError."""


class Refused(Exception):
    """(status, one line): what is wrong with a request."""


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 256

    def __init__(self, page: Path, about: Callable[[dict], dict], answer: Answer, port: int):
        super().__init__(("127.0.0.1", port), Handler)
        self.page, self.about, self.answer = page.read_bytes(), about, answer
        self.token = secrets.token_urlsafe(32)
        self.hosts = [f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")]
        self.turn, self.closing = threading.Lock(), False  # held by the job at work


class Handler(BaseHTTPRequestHandler):
    timeout, server_version, sys_version = PATIENCE, "FlashMotion", ""

    def handle(self) -> None:
        with contextlib.suppress(Gone, OSError):  # a client that leaves is no error of ours
            try:
                super().handle()
            except Refused as error:
                self.send_error(*error.args)

    def log_message(self, *args) -> None:
        pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self.reply(code, json.dumps({"error": message or self.responses[code][0]}).encode())

    def reply(self, code: int, data: bytes = b"", kind: str = "application/json") -> None:
        self.send_response(code)
        for name, value in {**SAFE, "Content-Type": kind, "Connection": "close"}.items():
            self.send_header(name, value)
        if data:  # else lines follow until the connection ends
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def check(self, *paths: str) -> None:
        """Refused, unless our own page asks for one of these paths, and for all but / with the token of this run."""
        hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        token = self.headers.get("X-Token", "").encode()
        if len(hosts) != 1 or hosts[0] not in self.server.hosts:
            raise Refused(421, f"open this page as http://{self.server.hosts[0]}, with the same port on both machines")
        if origins not in ([f"http://{hosts[0]}"], [] if self.command == "GET" else None):
            raise Refused(403, "another site's page can't ask this server")
        if self.path != "/" and not secrets.compare_digest(token, self.server.token.encode()):
            raise Refused(403, "this page is of another run: open the address that was printed last")
        if self.path not in paths:
            raise Refused(404, "no such page")

    def do_GET(self) -> None:
        self.check("/")
        self.reply(200, self.server.page, "text/html; charset=utf-8")

    def do_POST(self) -> None:
        self.check("/generate", "/about")
        request, server = self.read_request(), self.server
        if self.path == "/about":
            try:
                told = server.about(request)
            except (UserError, KeyError, TypeError) as error:
                told = {"error": reason(error)}
            return self.reply(200, json.dumps(told).encode())
        self.reply(200, kind="application/x-ndjson")
        while not server.turn.acquire(timeout=0.5):
            self.tell(says="Another video is made first")
        try:
            files = self.work(request)
        finally:
            server.turn.release()
        if files:
            self.tell(files=[[name, len(data)] for name, data in files.items()])
            self.wfile.write(b"".join(files.values()))

    def read_request(self) -> dict:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,99}", length) or self.headers.get("Transfer-Encoding"):
            raise Refused(411, "Content-Length is missing")
        if int(length) > MOST_BYTES:
            raise Refused(413, f"more than {MOST_BYTES >> 20} MiB; give a smaller picture")
        try:
            request = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"not JSON: {reason(error)}") from None
        if not isinstance(request, dict):
            raise Refused(400, "not a JSON object")
        return request

    def work(self, request: dict) -> dict[str, bytes]:
        """Do the job, and return its files by name. Where it fails the page is told, and there are none."""
        self.done, self.lock = threading.Event(), threading.Lock()
        try:
            with tempfile.TemporaryDirectory(prefix="flashmotion-", ignore_cleanup_errors=True) as folder:
                threading.Thread(target=self.watch, args=[threading.get_ident()], daemon=True).start()
                try:
                    return {f.name: f.read_bytes() for f in self.server.answer(request, Path(folder), self.tell)}
                finally:
                    with self.lock:
                        self.done.set()
        except Exception as error:  # whatever it is, the server goes on with the next request
            if not isinstance(error, UserError):
                warn(f"serve: {type(error).__name__}: {reason(error)}")
            self.tell(error=reason(error))
            return {}

    def watch(self, worker: int) -> None:
        """Raise Gone in the thread at work when its page has gone: between any two steps of Python, so within seconds.

        No argument of the networks or the codec could do that amid attention, decoding and writing.
        """
        while not self.done.wait(0.1) and not self.gone():
            pass
        with self.lock:
            if not self.done.is_set():
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker), ctypes.py_object(Gone))

    def gone(self) -> bool:
        """Has the page closed or cancelled, or does the server end?"""
        try:
            readable = select.select([self.connection], [], [], 0)[0]
            return self.server.closing or bool(readable and not self.connection.recv(1, socket.MSG_PEEK))
        except OSError:
            return True

    def tell(self, **event: object) -> None:
        """Send the page a line, as `tell(share=0.5)`. Gone if it has closed or cancelled."""
        if self.gone():
            raise Gone
        try:
            self.wfile.write(json.dumps(event).encode() + b"\n")
        except OSError:
            raise Gone from None


def serve(page: Path, about: Callable[[dict], dict], answer: Answer) -> None:
    """Serve until SIGTERM, or Ctrl+C, which is a KeyboardInterrupt. `about(asked)`: what the page is told."""
    try:
        server = Server(page, about, answer, PORT)
    except OSError:
        server = Server(page, about, answer, 0)
    address = f"http://{server.hosts[0]}/#{server.token}"
    print(f"Open {address}\nCtrl+C ends it.", flush=True)
    if sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(address)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    try:
        server.serve_forever()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        server.closing = True  # the job at work ends, and takes its folder with it
        server.turn.acquire(timeout=PATIENCE)
        server.server_close()
