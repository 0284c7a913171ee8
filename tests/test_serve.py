"""sample.py --serve: it makes videos for its own page, one at a time, and nothing that is sent hurts it."""

import base64
import contextlib
import json
import os
import re
import shlex
import signal
import socket
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from browser import Hands, picture
from conftest import ROOT, start_in
from PIL import Image

import sample
from core import attention
from core.config import UserError, parse_config
from core.media import read_video
from tools import serve as page
from tools import server as serve
from toy.codec import ToyCodec

EXAMPLE = json.loads((ROOT / "examples/balloons.json").read_text())


def folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("flashmotion-*"))


class Work:
    """Pretended work: as many steps as the request says, each when it is let."""

    def __init__(self):
        self.let, self.made, self.faults = threading.Semaphore(0), [], []

    def __call__(self, request: dict, folder: Path, tell) -> list[Path]:
        if self.faults:
            raise self.faults.pop(0)
        for step in range(request.get("steps", 0)):
            tell(step=step + 1, of=request["steps"])
            assert self.let.acquire(timeout=20)
        (folder / "video.mp4").write_bytes(request.get("name", "").encode() + bytes(100_000))
        self.made.append(request.get("name"))
        return [folder / "video.mp4"]


@pytest.fixture
def server():
    found = serve.Server(ROOT / "tools/draw.html", lambda asked: {"preset": "small"} | asked, Work(), 0)
    threading.Thread(target=found.serve_forever).start()
    before = folders()
    yield found
    found.shutdown()  # waits until serve_forever has ended
    found.server_close()
    assert not found.turn.locked() and folders() <= before


def send(server, method: str = "POST", path: str = "/generate", body: object = None, **changes) -> HTTPConnection:
    """A request, whose answer is to be read. A header of None is left out."""
    host = server.hosts[0]
    data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
    headers = {"Host": host, "Origin": f"http://{host}", "X-Token": server.token, "Content-Length": str(len(data))}
    headers |= {name.replace("_", "-"): value for name, value in changes.items()}
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in headers.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(data if method == "POST" else None)
    return connection


def ask(server, method: str = "POST", path: str = "/generate", body: object = None, **changes) -> tuple:
    """-> status, headers, body of the answer."""
    with contextlib.closing(send(server, method, path, body, **changes)) as connection:
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def read(line: socket.socket, text: bytes) -> None:
    """Until the server has said it."""
    data = b""
    while text not in data:
        part = line.recv(65536)
        assert part, data[-300:]
        data += part


def until(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def told(data: bytes) -> tuple[list[dict], dict[str, bytes]]:
    """The lines of an answer, and the files after them."""
    lines, files = [], {}
    while data and (not lines or "files" not in lines[-1]):
        line, _, data = data.partition(b"\n")
        lines.append(json.loads(line))
    for name, size in lines[-1].get("files", ()):
        files[name], data = data[:size], data[size:]
    return lines, files


def works(server) -> None:
    status, _, data = ask(server, body={"name": "next"})
    lines, files = told(data)
    assert status == 200 and len(lines) == 1 and files == {"video.mp4": b"next" + bytes(100_000)}


def test_only_its_own_page_may_ask(server):
    host, port = server.hosts[0], server.server_port
    for status, header, wrong in (
        (421, "Host", (f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", "127.0.0.1", "127.0.0.1:1", None)),
        (403, "Origin", ("http://evil.example", "null", "http://127.0.0.1:1", f"https://{host}", None)),
        (403, "X_Token", (None, server.token[:-1] + "?", "\xe9")),
    ):
        for value in wrong:
            got, sent, data = ask(server, body={"name": "x"}, **{header: value})
            assert got == status and json.loads(data)["error"], (header, value)
            assert not [name for name in sent if name.lower().startswith("access-control")], (header, value)
    assert not server.answer.made
    assert ask(server, path="/about", X_Token=None)[0] == 403
    assert ask(server, path="/about", Origin="http://evil.example")[0] == 403
    assert ask(server, path="/about", Host=server.hosts[1], Origin=f"http://{server.hosts[1]}")[0] == 200
    for path in ("/../../etc/passwd", "/sample.py", "/%2e%2e/sample.py", "//etc/passwd", "/?token=x", "/video.mp4"):
        assert ask(server, "GET", path)[0] == 404 and ask(server, path=path)[0] == 404
    for method in ("OPTIONS", "PUT", "DELETE", "HEAD"):
        assert ask(server, method, "/")[0] == 501
    status, sent, data = ask(server, "GET", "/", X_Token=None, Origin=None)
    assert status == 200 and data == (ROOT / "tools/draw.html").read_bytes() and server.token.encode() not in data
    for name, value in serve.SAFE.items():
        assert sent[name] == value
    works(server)


def test_what_is_no_request_is_answered_and_forgotten(server):
    assert ask(server, body=b"", Content_Length="1000000000000")[0] == 413  # 1 TB
    assert ask(server, body=b"", Content_Length=str(serve.MOST_BYTES + 1))[0] == 413
    for length in (None, "-1", "1e3", "\xb2", "+5", ""):
        assert ask(server, body=b"", Content_Length=length)[0] in (400, 411), length
    assert ask(server, body=b"{}", Content_Length=None, Transfer_Encoding="chunked")[0] == 411
    for data in (b"", b"{", b"[]", b"7", b"\xff\xfe", b"[" * 100_000, b'{"a": NaN'):
        status, _, answer = ask(server, body=data)
        assert status == 400 and "\n" not in json.loads(answer)["error"], data[:9]
    with send(server, body=b'{"name":', Content_Length="1000").sock as line:  # it hangs up half way
        line.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: line.recv(4096), b""))
        assert b" 400 " in answer and b"not JSON" in answer
    for text in (b"\0" * 300, b"GET", b"GET / HTTP/9.9", b"GET /" + b"x" * 70_000 + b" HTTP/1.1"):
        with socket.create_connection(("127.0.0.1", server.server_port)) as line:
            line.sendall(text + b"\r\n\r\n")
            line.settimeout(10)
            with contextlib.suppress(ConnectionError):
                while line.recv(4096):
                    pass
    works(server)


def test_200_requests_at_once_are_made_in_turn(server):
    server.answer.let.release(10_000)
    with ThreadPoolExecutor(200) as pool:
        found = list(pool.map(lambda k: ask(server, body={"name": f"{k}", "steps": 1}), range(200)))
    assert len(server.answer.made) == 200 and all(status == 200 for status, _, _ in found)
    made = {f"{k}": told(data)[1]["video.mp4"] for k, (_, _, data) in enumerate(found)}
    assert made == {name: name.encode() + bytes(100_000) for name in server.answer.made}  # everyone gets their own
    works(server)


def test_one_at_a_time_the_next_waits_and_who_leaves_is_passed_over(server):
    first = send(server, body={"name": "first", "steps": 3}).sock
    read(first, b'{"step": 1, "of": 3}')
    second, third = (send(server, body={"name": name, "steps": 1}).sock for name in ("second", "third"))
    for waiting in (second, third):
        read(waiting, b'{"says": "Another video is made first"}')
    second.close()  # a closed tab
    server.answer.let.release()
    read(first, b'{"step": 2, "of": 3}')
    first.close()  # cancelled between two steps
    server.answer.let.release()
    read(third, b'{"step": 1, "of": 1}')
    server.answer.let.release(10)
    read(third, b"third")
    third.close()
    until(lambda: not server.turn.locked())
    assert server.answer.made == ["third"]
    works(server)


def test_a_job_that_fails_says_why_in_a_line_and_the_next_works(server, capsys):
    server.answer.faults = [UserError("boxes: wrong; mend them"), RuntimeError("out of memory\nlong story")]
    for error in ("boxes: wrong; mend them", "out of memory"):
        assert told(ask(server)[2]) == ([{"error": error}], {})
    assert capsys.readouterr().err == "serve: RuntimeError: out of memory\n"
    works(server)


class Served:
    """sample.py --serve in a process of its own."""

    def __init__(self, folder: Path, *flags: object):
        self.job = start_in(folder)("sample.py", "--serve", *flags, wait=False)
        until(lambda: self.job.poll() is not None or "#" in self.job.read("out"), 120)
        found = re.search(r"Open (http://(127.0.0.1:(\d+))/#(\S+))", self.job.read("out"))
        assert found, self.job.read("err")
        self.address, host, port, self.token = found.groups()
        self.hosts, self.server_port = [host], int(port)


@pytest.fixture
def hands(browser, served, tmp_path):
    """The page of sample.py, with a small picture and a box."""
    found = Hands(browser, served.address)
    found.open(picture(tmp_path / "small.png", 96, 64))
    found.page.select_option("#size", "48x64")
    found.drag((10, 10), (30, 30))
    yield found
    found.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    before = folders()
    found = Served(tmp_path_factory.mktemp("served"), "--size", "48x64")
    yield found
    found.job.forks[0].terminate()
    assert found.job.wait().returncode == 0 and folders() <= before


def mask(k: int) -> bytes:
    """The upper half of the example's box, as a PNG."""
    x0, y0, x1, y1 = EXAMPLE["objects"][k]["boxes"]["0"]
    pixels = np.zeros((192, 240), np.uint8)
    pixels[y0 : (y0 + y1) // 2, x0:x1] = 255
    return iio.imwrite("<bytes>", pixels, extension=".png")


def request(frames: int = 9, **changes) -> dict:
    files = (ROOT / "examples/balloons.jpg").read_bytes(), mask(0), mask(1)
    image, *masks = (base64.b64encode(data).decode() for data in files)
    usual = {"image": image, "boxes": EXAMPLE | {"num_frames": frames}, "masks": masks, "prompt": "a red blob"}
    return {**usual, "seed": 0, "steps": 0, "size": "48x64", "frames": frames, **changes}


def test_the_video_is_that_of_the_command_line(served, run, tmp_path):
    status, _, data = ask(served, body=request(seed=3))
    lines, files = told(data)
    shares = [line["share"] for line in lines if "share" in line]
    assert status == 200 and len(shares) == 4 * 6 and shares == sorted(shares) and shares[-1] == 1  # all blocks
    assert list(files) == ["video.mp4", "video.boxes.mp4"]
    (tmp_path / "got.mp4").write_bytes(files["video.mp4"])
    boxes = json.loads(json.dumps(EXAMPLE))
    for k, item in enumerate(boxes["objects"]):
        item["mask"] = f"mask_{k}.png"
        (tmp_path / item["mask"]).write_bytes(mask(k))
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    flags = ("--traj", "boxes.json", "--prompt", "a red blob", "--size", "48x64", "--seed", 3, "--out", "want.mp4")
    assert run("sample.py", *flags).returncode == 0
    got, want = (np.stack(list(read_video(tmp_path / f"{name}.mp4"))) for name in ("got", "want"))
    assert got.shape == (9, 180, 240, 3) and np.array_equal(got, want)


def test_what_is_wrong_in_a_request_is_named(served, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(mask(0))
    other = json.loads(json.dumps(EXAMPLE))
    other["objects"][0]["mask"] = str(secret)
    no_picture, turned = base64.b64encode(b"no").decode(), {"objects": [{"boxes": {"0": [9, 9, 1, 1]}}]}
    wrong = {
        "prompt: 7": {"prompt": 7},
        "seed: True": {"seed": True},
        "seed -1": {"seed": -1},
        "steps: 5 are more than the 4 of these networks": {"steps": 5},
        "--frames 1:": {"frames": 1},
        "--frames 9000": {"frames": 9_000_000},
        "num_frames is 9": {"frames": 11, "boxes": EXAMPLE},
        "--size 7x7": {"size": "7x7"},
        "--size ../x": {"size": "../x"},
        "image: is not in base64": {"image": "!"},
        "image: is not": {"image": None},
        "image: not a readable image": {"image": no_picture},
        "boxes: not": {"boxes": []},
        "boxes: not a boxes.json": {"masks": [""]},
        "boxes.json: objects[0]": {"boxes": turned, "masks": [""]},
        "mask_0.png is not an image": {"masks": [no_picture, ""]},
    }
    for text, changes in wrong.items():
        status, _, data = ask(served, body=request(**changes))
        error = told(data)[0][-1]["error"]
        assert status == 200 and text.rstrip(":") in error and "/" not in error.replace("../x", ""), (text, error)
    seen = [told(ask(served, body=request(boxes=boxes, masks=["", ""]))[2])[1] for boxes in (other, EXAMPLE)]
    assert seen[0] == seen[1] != {}  # a path of theirs is as none at all


def test_options_of_the_server_are_in_the_page_s_command(monkeypatch):
    about = {}
    monkeypatch.setattr(sample, "load_networks", lambda *_: [torch.nn.Linear(1, 1)] * 2)
    monkeypatch.setattr(sample, "find_networks", lambda cfg: ("", ""))
    monkeypatch.setattr(sample, "read_maps", lambda *_: "outline")
    monkeypatch.setattr(page, "serve", lambda _, told, answer: about.update(told({})))
    words = shlex.split("--serve --speed slow --weights 'a b' --guidance 2 --frames 5 --steps 8 --dtype float32")
    cfg = parse_config(sample.Config, words, {"wan5b": sample.WAN5B})
    sample.main(cfg)
    assert about["frames"] == 5 and about["steps"] == 8 and about["fps"] == 8
    again = parse_config(sample.Config, shlex.split(about["options"]), {"wan5b": sample.WAN5B})
    assert (again.speed, again.weights, again.guidance, again.dtype) == ("slow", "a b", 2.0, "float32")
    assert not again.serve and again.frames == 9 and again.steps == 8


def test_where_its_port_is_taken_it_takes_another(server, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "PORT", server.server_port)
    monkeypatch.setattr(serve.Server, "serve_forever", lambda other: ports.append(other.server_port))
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    ports = []
    serve.serve(ROOT / "tools/draw.html", dict, server.answer)
    assert ports and ports[0] not in (0, server.server_port)


def test_ended_while_generating_it_leaves_nothing(tmp_path):
    before = folders()
    for number, status in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        server = Served(tmp_path)
        with contextlib.closing(send(server, body=request(frames=240))):
            until(lambda: folders() - before, 60)
            time.sleep(1)
            began = time.monotonic()
            os.kill(server.job.forks[0].pid, number)
            job = server.job.wait()
        assert job.returncode == status and time.monotonic() - began < 5
        assert folders() <= before
        assert job.stderr == ("sample.py: stopped\n" if number == signal.SIGINT else "")


def test_240_frames_end_within_2_seconds_wherever_they_are(served):
    for size, text in (("128x176", b"Encode image"), ("128x176", b"Denoise"), ("48x64", b"share"), ("16x16", b"Decode"),
                       ("16x16", b"Write")):  # fmt: skip
        with send(served, body=request(frames=240, size=size, steps=1)).sock as line:
            read(line, text)
        began = time.monotonic()
        with send(served, body=request(steps=1, size="16x16")).sock as line:
            read(line, b"Encode prompt")  # its turn has come
            assert time.monotonic() - began < 2, text
            read(line, b"files")
    until(lambda: not folders())


def test_what_a_video_takes_is_told_from_the_last_one_and_what_does_not_fit_is_refused(monkeypatch):
    pace = page.Pace(sample.Config(), sample.sampling(sample.Config()), ToyCodec(), torch.device("cpu"))
    shape, twice = ((48, 64), (96, 128), 9), ((48, 64), (96, 128), 18)
    pace.learn(*shape, 4, 2.0, 1.0)
    assert pace.seconds(*shape, 4) == 3 and pace.seconds(*shape, 2) == 2
    assert 2 * 3 < pace.seconds(*twice, 4) < 2 * 3.5  # attention grows faster than the video
    need = pace.check_memory(*shape)
    monkeypatch.setattr(page, "free_memory", lambda _: need + 1)
    assert pace.check_memory(*shape) == need
    with pytest.raises(UserError, match=r"--frames 18: takes about 0.1 GB.* are free; give fewer frames or a smaller"):
        pace.check_memory(*twice)


def test_long_work_goes_in_parts_with_the_same_result(monkeypatch):
    q, k, v = torch.randn(3, 1, 2, 50, 8)
    want = attention.attend(q, k, v)
    monkeypatch.setattr(attention, "LONG", 7 * 50)
    assert (attention.attend(q, k, v) - want).abs().max() < 1e-5
    for name, value in (("AMX", False), ("torch.compiler.is_compiling", lambda: True)):  # then bfloat16 goes in chunks
        monkeypatch.setattr(f"core.attention.{name}", value)
    chunks = attention.attend(*(x.bfloat16() for x in (q, k, v)))
    assert chunks.dtype == torch.bfloat16 and 0 < (chunks - want).abs().max() < 0.03
    codec = ToyCodec()
    latents = torch.randn(1, codec.channels, 9, 4, 6)
    parts = list(codec.pieces(latents, length=4))
    assert [part.shape[2] for part in parts] == [4, 4, 1]
    assert (torch.cat(parts, 2) - codec.decode_video(latents)).abs().max() < 1e-5


def test_the_walk(browser, served, tmp_path):
    """A portrait photo; two objects, one leaves, one is late; a mask, undo, a reload; play, generate, watch, save."""
    hands = Hands(browser, served.address)
    assert "#" not in hands.page.url and hands.see("page.server.preset") == "small"
    hands.open(picture(tmp_path / "portrait.jpg", 600, 800))
    hands.drag((100, 100), (250, 260))
    hands.drag((175, 180), (560, 400), frame=8)  # half out of the frame
    hands.press("o")
    hands.go(6)
    hands.press("o")
    hands.drag((100, 500), (300, 700))
    hands.press("Home", "ArrowRight", "ArrowRight", "i", "[")
    hands.paint((120, 180), (230, 180))
    hands.press("Alt+ArrowDown", "Control+z")
    hands.page.select_option("#size", "48x64")
    hands.page.fill("#prompt", "a yellow blob")
    drawn = hands.see("JSON.stringify(exportBoxes())")
    hands.reload()  # the token stays with the tab
    assert hands.see("page.server.preset") == "small" and hands.see("JSON.stringify(exportBoxes())") == drawn
    hands.press("Space")
    hands.wait("page.playing && page.now > 1")
    hands.press("Space")
    assert hands.see("problem()") == ""
    hands.make()
    assert hands.note.startswith("Done in "), hands.note
    hands.page.fill("#seed", "5")
    hands.make(2)
    hands.wait("document.querySelector('#screens video').currentTime > 0.1")
    assert hands.see("document.querySelector('#screens video').videoWidth") > 0
    plain = hands.page.get_attribute("#screens video", "src")
    hands.page.click("#withBoxes")
    assert hands.page.get_attribute("#screens video", "src") != plain
    hands.page.click("#pinResult")
    hands.page.click("#history button:last-child")
    titles = hands.page.locator("#screens figcaption").all_text_contents()
    assert titles == [f"Video {n}: portrait.jpg, seed {seed}, 4 steps, 64 x 48" for n, seed in ((2, 5), (1, 0))]
    folder = hands.save(tmp_path, "#zipResult")
    names = "image.jpg boxes.json mask_0.png prompt.txt settings.json command.txt video.mp4 video.boxes.mp4"
    assert {path.name for path in folder.iterdir()} == set(names.split())
    first = np.stack(list(read_video(folder / "video.mp4")))
    (folder / "video.mp4").unlink()
    words = shlex.split((folder / "command.txt").read_text())
    assert words[:2] == ["python", "sample.py"]
    job = start_in(tmp_path)("sample.py", *words[2:])  # as printed
    assert job.returncode == 0, job.stderr
    assert np.array_equal(np.stack(list(read_video(folder / "video.mp4"))), first)
    hands.close()


def test_two_tabs_wait_for_one_another_and_cancel_or_close(browser, served):
    hands = Hands(browser, served.address)
    hands.example()
    hands.fill("#frames", "240")
    first = hands.page
    hands.page.click("#generate")
    hands.wait("$('note').textContent.startsWith('Denoise')", 60)
    second = hands.new_page()
    hands.example()
    hands.page.select_option("#size", "48x64")
    hands.page.click("#generate")
    hands.wait("$('note').textContent.startsWith('Another video is made first')")
    first.click("#cancel")  # amid a step: the other's turn
    hands.wait("$('note').textContent.startsWith('Denoise') || page.videos.length === 1", 2)
    assert first.text_content("#note") == "Cancelled."
    hands.wait("!page.job && page.videos.length === 1", 60)
    first.click("#generate")
    hands.page = first
    hands.wait("$('note').textContent.startsWith('Denoise')", 60)
    first.close()  # a closed tab cancels
    hands.page = second
    hands.make(2)
    hands.close()


def test_a_server_started_anew_and_what_is_wrong_is_told_as_it_is(browser, server, tmp_path):
    """The old page takes the new address, of which only what stands behind the # has changed."""
    facts = {"preset": "small", "size": "auto", "frames": 9, "fps": 8, "steps": 4, "most_steps": 4, "options": ""}
    server.about = lambda asked: {} if asked else facts
    hands = Hands(browser, f"http://{server.hosts[0]}/#{server.token}")
    hands.example()
    hands.make()
    server.shutdown()
    server.server_close()
    hands.page.click("#generate")
    hands.wait("$('note').textContent.startsWith('The server does not answer: is sample.py --serve still running?')")
    server.__init__(ROOT / "tools/draw.html", server.about, server.answer, server.server_port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hands.page.click("#generate")
    hands.wait("$('note').textContent.startsWith('this page is of another run')")
    hands.page.goto(f"http://{server.hosts[0]}/#{server.token}")
    hands.wait("$('note').textContent === ''")
    hands.make(2)
    hands.see("void (exportBoxes = () => null.x)")
    hands.page.click("#generate")
    hands.wait("$('note').textContent.startsWith('A fault of this page: TypeError')")
    hands.close()


def test_videos_are_told_of_kept_exported_and_removed(hands, tmp_path):
    hands.drag((20, 20), (85, 20))  # across the edge
    hands.see("void (page.live = false)")
    hands.fill("#steps", "1")
    hands.wait("/^9 frames of 84 x 64, made at 64 x 48, about .* s, 0.. GB$/.test($('comes').textContent)")
    for number in range(1, 11):
        if number == 10:
            hands.page.check("#random")
        hands.make(number)
    assert "boxes cross the video's edge and are cut there: object 0 in frame 0" in hands.page.text_content("#warns")
    assert "/" not in hands.page.text_content("#warns")
    seed = hands.see("page.drawing.seed")
    assert seed > 9 and hands.see("page.videos.map(video => video.seed)") == [seed] + [0] * 9
    hands.see("page.saving")
    hands.reload()
    assert hands.page.locator("#history button").count() == 10
    assert hands.page.text_content("#screens figcaption") == f"Video 10: small.png, seed {seed}, 1 step, 64 x 48"
    hands.wait("document.querySelector('#screens video').videoWidth === 84")
    with Image.open(hands.download("#gifResult")) as gif:
        assert (gif.n_frames, gif.size) == (9, (84, 64))
    frames = [iio.imread(file) for file in sorted(hands.save(tmp_path, "#pngResult").iterdir())]
    assert np.array_equal(frames, list(read_video(hands.save(tmp_path, "#zipResult") / "video.mp4")))
    hands.page.click("#closeResults")
    assert hands.page.is_hidden("#results")
    hands.page.click("#reopen")
    hands.page.click("#dropResult")
    hands.settle()
    hands.reload()
    assert hands.page.locator("#history button").count() == 9


def test_live_makes_the_newest_drawing_by_itself(hands):
    assert not hands.page.is_checked("#live")
    hands.make()
    hands.see("void (page.took = 2.9, show())")  # as on a quiet machine
    assert hands.page.is_checked("#live")
    hands.page.click("#live")
    hands.page.click("#live")  # now by choice, however long a job takes
    hands.go(8)
    for x in (40, 50, 60):
        hands.drag((x - 20, 20), (x - 10, 20))
    hands.wait("page.videos.length === 2 && !page.job", 60)
    boxes = "JSON.stringify([...Object.entries(page.videos[0].files)].find(([name]) => name.endsWith('boxes.json'))[1])"
    assert json.loads(json.loads(hands.see(boxes)))["objects"][0]["boxes"] == hands.objects[0]["boxes"]
    hands.drag((55, 20), (45, 20))
    hands.wait("page.job", 5)
    hands.wait("!page.job", 60)
    assert hands.see("page.videos.map(video => video.live)") == [True, False]  # in the place of the one before
    hands.wait("document.querySelector('#screens video').currentTime > 0")
    hands.page.uncheck("#live")
    hands.drag((45, 20), (40, 20))
    hands.page.wait_for_timeout(500)
    assert not hands.see("page.job")


def test_generate_its_progress_and_the_video_are_seen_together(hands):
    for number, (width, height) in enumerate([(390, 844), (720, 450)], 1):  # a phone; 1440x900 at 200%
        hands.page.set_viewport_size({"width": width, "height": height})
        hands.make(number)
        hands.page.wait_for_timeout(300)
        for name in ("#generate", "#progress", "#note", "#screens video", "#screens input"):
            box = hands.page.locator(name).bounding_box()
            assert box["y"] >= 0 and box["y"] + box["height"] <= height and box["height"] > 4, (name, box)
        video = hands.page.locator("#screens video").bounding_box()
        assert video["height"] > 120
        for share in (0.05, 0.5, 0.95):  # nothing lies over it
            x, y = video["x"] + video["width"] / 2, video["y"] + share * video["height"]
            assert hands.see(f"document.elementFromPoint({x}, {y}).tagName") == "VIDEO"
        assert hands.see("document.documentElement.scrollWidth <= innerWidth")
        hands.page.click("#screens button")
        assert hands.see("document.querySelector('#screens video').paused")
