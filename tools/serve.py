"""The page behind `sample.py --serve`: tools/draw.html on 127.0.0.1, and the videos it asks for, made one at a time.

Who may ask: whoever knows the token, which the opened address holds behind its # where no log sees it, from a page of
exactly this host and origin. No path that a client sends is ever opened.
"""

import base64
import contextlib
import json
import os
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from torch import Tensor, nn

from core.codec import Codec
from core.config import ROOT, UserError, flags, reason
from core.files import alive

PORT = 7860  # or any free one where it is taken
MOST_BYTES, MOST_WAITING = 64 << 20, 16  # of a request; jobs in line
PATIENCE = 20  # seconds for a client to send its headers, or to go on with what it sends or reads
SAFE = {
    "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "frame-ancestors 'none'", "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}  # fmt: skip
# The options that the page sets, and their types.
ASKED = {"prompt": str, "seed": int, "steps": int, "size": str, "frames": int}
MOST_STEPS = 1000
# answer(request, folder, tell): does what the request says in an empty folder, and returns the files to send back.
# tell(step=1, of=4) sends the page a line, and raises Gone if it has closed or cancelled.
Answer = Callable[[dict, Path, Callable[..., None]], list[Path]]


def serve_page(
    cfg, usual: dict[str, object], steps: int, codec: Codec, networks: tuple[nn.Module, nn.Module],
    read_condition: Callable, make_video: Callable,
) -> None:  # fmt: skip
    """Draw, generate and watch in a page of this machine, until Ctrl+C or SIGTERM.

    `cfg`: sample.py's options, and `usual` those of the preset; `steps`: how many the sampler takes. `networks` are
    generator and adapter. `read_condition` and `make_video` are sample.py's.
    """
    device = next(networks[0].parameters()).device
    # Reading the text encoder takes longer than most videos.
    text_encoder = cache(codec.text_encoder) if cfg.memory == "high" else codec.text_encoder

    @lru_cache(16)
    def embed(prompt: str) -> Tensor:
        for network in networks if cfg.memory == "low" else ():
            network.to("cpu")  # the text encoder takes their place
        text = text_encoder()([prompt])
        for network in networks:
            network.to(device)
        return text

    def answer(request: dict, folder: Path, tell: Callable[..., None]) -> list[Path]:
        def stage(name: str) -> contextlib.AbstractContextManager:
            tell(says=name.capitalize())
            return contextlib.nullcontext()

        job = replace(cfg, **unpack(request, folder, steps))
        try:
            condition = read_condition(job, codec)
        except UserError as error:
            raise UserError(str(error).replace(f"{folder}{os.sep}", "")) from None
        with stage("encode prompt"):
            text, negative = embed(job.prompt), embed(codec.negative)
        make_video(job, condition, text, negative, stage, lambda step: tell(step=step, of=job.steps))
        return [folder / "video.mp4", folder / "video.boxes.mp4"]

    # The rest of the command is the page's. Its steps, if it gives any, come after these.
    pages = {*ASKED, "image", "traj", "out", "serve"} - {"steps"}
    others = {name: value for name, value in vars(cfg).items() if value != usual[name] and name not in pages}
    about = {"preset": cfg.preset, "size": cfg.size, "frames": cfg.frames, "fps": codec.fps, "steps": steps}
    serve(about | {"options": flags({name: shlex.quote(str(value)) for name, value in others.items()})}, answer)


def unpack(request: dict, folder: Path, steps: int) -> dict[str, object]:
    """The page's request as options. Its picture, masks and boxes.json are written to this folder, under our names.

    `steps`: how many there are if it asks for 0.
    """
    for name, kind in ASKED.items():
        if type(request.get(name)) is not kind:
            raise UserError(f"{name}: {request.get(name)!r:.60} is no {kind.__name__}; reload the page")
    if request["steps"] > MOST_STEPS:
        raise UserError(f"steps: {request['steps']:.5g} are more than {MOST_STEPS}; give fewer")

    def store(name: str, text: object) -> str:
        try:
            (folder / name).write_bytes(base64.b64decode(text, validate=True))
        except (TypeError, ValueError):
            raise UserError(f"{name}: is not in base64; reload the page") from None
        return name

    boxes, masks = request.get("boxes"), request.get("masks")
    try:
        for k, (item, mask) in enumerate(zip(boxes["objects"], masks, strict=True)):
            item.pop("mask", None)  # a path of theirs
            if mask:
                item["mask"] = store(f"mask_{k}.png", mask)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError("boxes: not a boxes.json with a mask, or none, for each object; reload the page") from None
    (folder / "boxes.json").write_text(json.dumps(boxes), encoding="utf-8")
    names = {"image": store("image", request.get("image")), "traj": "boxes.json", "out": "video.mp4"}
    options = {name: str(folder / file) for name, file in names.items()} | {name: request[name] for name in ASKED}
    return options | {"steps": request["steps"] or steps}


class Gone(BaseException):
    """The page has closed or cancelled: nobody waits for the answer. No Exception, as asyncio's CancelledError."""


class Refused(Exception):
    """(status, one line): what is wrong with a request."""


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 256

    def __init__(self, about: dict, answer: Answer, port: int):
        super().__init__(("127.0.0.1", port), Handler)
        self.page, self.about, self.answer = (ROOT / "tools/draw.html").read_bytes(), about, answer
        self.token = secrets.token_urlsafe(32)
        self.hosts = [f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")]
        self.line, self.turn, self.closing = [], threading.Condition(), False  # the first in line is at work


class Handler(BaseHTTPRequestHandler):
    timeout, server_version, sys_version = PATIENCE, "FlashMotion", ""

    def handle(self) -> None:
        # Each header may come late, but not all of them: this ends a client that trickles.
        self.alarm = threading.Timer(PATIENCE, self.connection.shutdown, [socket.SHUT_RDWR])
        self.alarm.daemon = True
        self.alarm.start()
        try:
            super().handle()
        except Refused as error:
            self.send_error(*error.args)
        except (Gone, OSError):  # a client that leaves is no error of ours
            pass
        finally:
            self.alarm.cancel()

    def log_message(self, *args) -> None:
        pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self.reply(code, json.dumps({"error": message or self.responses[code][0]}).encode())

    def reply(self, code: int, data: bytes = b"", kind: str = "application/json") -> None:
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
        self.check(private=self.path != "/")
        if self.path == "/":
            self.reply(200, self.server.page, "text/html; charset=utf-8")
        elif self.path == "/about":
            self.reply(200, json.dumps(self.server.about).encode())
        else:
            raise Refused(404, "no such page")

    def do_POST(self) -> None:
        self.check(private=True)
        if self.path != "/generate":
            raise Refused(404, "no such page")
        request, server = self.read_request(), self.server
        with server.turn:
            if len(server.line) > MOST_WAITING:
                raise Refused(503, f"{MOST_WAITING} videos wait already; try again later")
            server.line.append(self)
        try:
            self.reply(200, kind="application/x-ndjson")
            while place := server.line.index(self):
                self.tell(place=place)
                with server.turn:
                    server.turn.wait_for(lambda: server.line.index(self) != place, timeout=0.5)
            files = self.work(request)
        finally:
            with server.turn:
                server.line.remove(self)
                server.turn.notify_all()
        if files:
            self.tell(files=[[name, len(data)] for name, data in files.items()])
            self.wfile.write(b"".join(files.values()))

    def read_request(self) -> dict:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,99}", length) or self.headers.get("Transfer-Encoding"):
            raise Refused(411, "Content-Length is missing")
        if int(length) > MOST_BYTES:
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

    def work(self, request: dict) -> dict[str, bytes]:
        """Do the job, and return its files by name. Where it fails the page is told, and there are none."""
        try:
            with tempfile.TemporaryDirectory(prefix=f".tmp{os.getpid()}-page-", ignore_cleanup_errors=True) as folder:
                return {file.name: file.read_bytes() for file in self.server.answer(request, Path(folder), self.tell)}
        except Exception as error:  # whatever it is, the server goes on with the next request
            if not isinstance(error, UserError):
                print(f"serve: {type(error).__name__}: {reason(error)}", file=sys.stderr)
            self.tell(error=reason(error))
            return {}

    def tell(self, **event: object) -> None:
        """Send the page a line, if it is still there."""
        try:
            readable = select.select([self.connection], [], [], 0)[0]
            if self.server.closing or (readable and not self.connection.recv(1, socket.MSG_PEEK)):
                raise Gone
            self.wfile.write(json.dumps(event).encode() + b"\n")
        except OSError:
            raise Gone from None


def sweep() -> None:
    """Remove the folders of servers that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(".tmp*-page-*"):
        if not alive(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def serve(about: dict[str, object], answer: Answer) -> None:
    """Serve until Ctrl+C or SIGTERM."""
    sweep()
    try:
        server = Server(about, answer, PORT)
    except OSError:
        server = Server(about, answer, 0)
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
