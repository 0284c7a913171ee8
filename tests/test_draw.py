"""draw.html in a headless Chromium: boxes drawn by hand reach sample.py as the page showed them."""

import base64
import json
import re
import shutil
import subprocess

import imageio.v3 as iio
import numpy as np
import pytest
from conftest import ROOT

from trajectory import PALETTE, _interpolate, load_trajectory

# A machine of one's own may lack it; .ci/run installs it, or fails.
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")

HANDS = """
<pre id="result"></pre><script>
const picture = async () => {
  const paper = Object.assign(document.createElement("canvas"), {width: 96, height: 64});
  const pen = paper.getContext("2d");
  pen.fillStyle = "teal";
  pen.fillRect(0, 0, 96, 64);
  const bytes = Uint8Array.from(atob(paper.toDataURL().split(",")[1]), c => c.charCodeAt(0));
  await openImage(new File([bytes], "my image.png", {type: "image/png"}));
};
const pointer = (type, [x, y]) => {
  const area = stage.getBoundingClientRect();
  stage.dispatchEvent(new PointerEvent(type, {bubbles: true, pointerId: 1, button: 0, buttons: 1,
    clientX: area.left + x * area.width / state.width, clientY: area.top + y * area.height / state.height}));
};
const pull = (from, to) => {
  pointer("pointerdown", from);
  for (const s of [0.5, 1]) pointer("pointermove", from.map((v, i) => v + s * (to[i] - v)));
  pointer("pointerup", to);
};
const go = t => { $("frame").value = t; $("frame").oninput(); };
const press = (key, more = {}) =>
  document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, ...more}));
const type = (id, value) => {
  $(id).value = value;
  for (const name of ["change", "input"]) $(id).dispatchEvent(new Event(name));
};
const out = () => ({boxes: exportBoxes(), tracks: state.objects.map(track), masks: state.objects.map(o => o.mask),
                    command: command(), note: $("note").textContent, undo: past.length, problem: problems()});
const hands_at_work = async () => { %s };
addEventListener("load", async () => {
  const found = await hands_at_work().catch(error => ({error: String(error.stack)}));
  $("result").textContent = JSON.stringify(found);
  document.title = "done";
});
</script>
"""


def browse(folder, hands: str) -> dict:
    """Open the page in this folder's browser, let these hands work, and return what they return."""
    page = folder / "draw.html"  # the same address each time: what it keeps is kept by address
    page.write_text((ROOT / "tools/draw.html").read_text().replace("</html>", HANDS % hands + "</html>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    command = [CHROMIUM, *flags, "--virtual-time-budget=20000", "--window-size=1200,800", page.as_uri()]
    for _ in range(3):  # the virtual clock can run ahead of a busy machine's image decoder
        job = subprocess.run(command, capture_output=True, text=True, timeout=120)
        found = re.search(r'<pre id="result">(.+?)</pre>', job.stdout, flags=re.DOTALL)
        if found:
            break
    assert found, job.stderr[-2000:]
    text = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    result = json.loads(text)
    assert "error" not in result, result["error"]
    return result


DRAW = """
  await picture();
  pull([10, 10], [30, 28]);                                   // draws the first object
  go(4); pull([20, 20], [50, 30]);                            // moves it
  go(8); pull([60, 38], [80, 50]);                            // drags its lower right corner
  press("n");
  go(0); pull([60, 40], [90, 60]);                            // a second object,
  go(6); press("ArrowUp", {altKey: true});                    // moved by a key,
  type("visible", "0-3, 6");
  $("brush").value = 80; $("paint").click(); pull([70, 50], [76, 50]); $("paint").click();  // with a painted mask
  press("n"); go(0); pull([1, 1], [9, 9]); go(5); pull([5, 5], [40, 40]); $("pin").click();
  type("prompt", "it's a disc");
"""


def test_what_is_drawn_is_what_is_read(tmp_path):
    """Draw, set keyframes, paint a mask, export: trajectory.py's boxes are the page's, to a pixel."""
    found = browse(tmp_path, DRAW + "return out();")
    boxes = found["boxes"]
    assert found["problem"] == "" and [boxes[n] for n in ("num_frames", "width", "height")] == [9, 96, 64]
    first, second, pinned = boxes["objects"]
    assert first["boxes"] == {"0": [10, 10, 30, 28], "4": [40, 20, 60, 38], "8": [40, 20, 80, 50]}
    assert second["boxes"] == {"0": [60, 40, 90, 60], "6": [60, 39, 90, 59]} and second["visible"] == [[0, 3], [6, 6]]
    assert list(pinned["boxes"]) == ["0"]
    assert found["command"] == "python sample.py --image 'my image.png' --traj boxes.json --prompt 'it'\\''s a disc'"

    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    (tmp_path / second["mask"]).write_bytes(base64.b64decode(found["masks"][1].split(",")[1]))
    trajectory = load_trajectory(tmp_path / "boxes.json", (64, 96), 9)
    shown = np.array(found["tracks"], dtype=float)
    drawn = np.isfinite(trajectory.boxes)
    assert np.abs(shown - trajectory.boxes)[drawn].max() < 1e-9
    assert drawn[[0, 2]].all() and drawn[1, :, 0].tolist() == [True] * 4 + [False, False, True, False, False]
    assert trajectory.masks[1].sum() > 100 and trajectory.masks[1][50, 73] and not trajectory.masks[1][5, 5]
    for k, t in ((0, 2), (0, 8), (1, 6), (2, 5)):  # and the maps painted from them
        lit = (trajectory.maps("box")[:, t] - trajectory.colors[k][:, None, None] / 127.5 + 1).abs().sum(0) < 1e-5
        ys, xs = np.nonzero(lit.numpy())
        assert np.abs(np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) - shown[k, t]).max() <= 1


def test_undo_redo_and_a_reload(tmp_path):
    before = browse(tmp_path, DRAW + "return out();")
    after = browse(
        tmp_path, "await new Promise(done => setTimeout(done, 500)); return {...out(), wide: image?.naturalWidth};"
    )
    assert after["wide"] == 96  # the image is back too
    assert {n: after[n] for n in before} == before
    steps = browse(
        tmp_path,
        "const n = past.length; const last = JSON.stringify(state);"
        "while (past.length) press('z', {ctrlKey: true}); const empty = state.objects.length;"
        "while (future.length) press('z', {ctrlKey: true, shiftKey: true});"
        "return {n, empty, same: JSON.stringify(state) === last};",
    )
    assert steps == {"n": before["undo"], "empty": 0, "same": True} and before["undo"] > 10


def test_paths_are_those_of_trajectory_py(tmp_path):
    """The same numbers for random keyframes of every kind."""
    rng, cases = np.random.default_rng(0), []
    for kind in ("smooth", "linear", "none") * 20:
        frames = np.sort(rng.choice(121, rng.integers(1, 12), replace=False))
        keys = rng.integers(0, 1280, (len(frames), 4))
        cases.append((kind, frames, keys))
    given = [[kind, dict(zip(map(int, f), k.tolist(), strict=True))] for kind, f, k in cases]
    found = browse(tmp_path, f"return {json.dumps(given)}.map(([kind, boxes]) => interpolate(boxes, 121, kind));")
    for track, (kind, frames, keys) in zip(found, cases, strict=True):
        want = _interpolate(frames, keys.astype(float), 121, kind)
        got = np.array([[np.nan] * 4 if box is None else box for box in track], dtype=float)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)


def test_files_come_back_and_broken_ones_are_named(tmp_path):
    example = json.loads((ROOT / "examples/boxes.json").read_text())
    found = browse(
        tmp_path,
        f"importBoxes({json.dumps(json.dumps(example))}); const back = out();"
        'const bad = new File([\'{"objects": [{"boxes": {"0": [5, 5, 2, 9]}}]}\'], \'bad.json\');'
        "await openBoxes(bad); return {...back, bad: $('note').textContent, kept: state.objects.length};",
    )
    for object_, want in zip(found["boxes"]["objects"], example["objects"], strict=True):
        assert object_["boxes"] == want["boxes"] and object_["mask"] == want["mask"] and object_["name"] == want["name"]
    assert found["note"] == "Load the masks again: mask_0.png, mask_1.png."
    assert found["bad"].startswith("bad.json: ") and found["kept"] == 2


def test_many_objects_and_frames_do_not_lag(tmp_path):
    """20 objects, 121 frames, 12 keyframes each: a redraw takes a fraction of a video frame's time."""
    found = browse(
        tmp_path,
        "await picture(); type('preset', 'wan5b');"
        "for (let k = 0; k < 20; k++) { if (k) press('n'); for (let i = 0; i < 12; i++) {"
        "go(i * 11); if (i) pull([12 + k, 20], [12 + k, i % 2 ? 24 : 16]); else pull([2 + k, 5], [22 + k, 35]); } }"
        "go(0); const began = performance.now(); for (let i = 0; i < 20; i++) { now = i; show(); }"
        "return {...out(), each: (performance.now() - began) / 20, rows: $('timeline').height, palette: PALETTE};",
    )
    assert found["each"] < 40 and found["rows"] == 360 and found["palette"] == [list(c) for c in PALETTE]
    assert found["problem"] == "" and all(len(o["boxes"]) == 12 for o in found["boxes"]["objects"])
    (tmp_path / "boxes.json").write_text(json.dumps(found["boxes"]))
    trajectory = load_trajectory(tmp_path / "boxes.json", (64, 96), 121)
    assert np.abs(np.array(found["tracks"], dtype=float) - trajectory.boxes).max() < 1e-9


def test_what_does_not_fit_into_storage_is_said_and_undo_goes_first(tmp_path):
    found = browse(
        tmp_path,
        "await picture(); pull([10, 10], [30, 28]); state.prompt = 'x'.repeat(300000);"
        "for (let i = 0; i < 30; i++) change(() => { state.frames = 10 + i; });"
        "const few = JSON.parse(localStorage.getItem(KEY)).past.length, first = out().note;"
        "state.prompt = 'x'.repeat(9000000); change(() => { state.frames = 50; });"
        "return {few, first, second: out().note, held: localStorage.getItem(KEY), all: past.length};",
    )
    assert found["few"] < 11 and found["first"] == "" and found["held"] is None
    assert found["second"].startswith("Too large") and found["all"] > 30


def test_every_mask_has_a_file_of_its_own_and_the_size_of_the_image(tmp_path):
    """A loaded mask_1.png stays its object's when another is painted; opening a larger image enlarges both."""
    objects = [{"name": name, "mask": f"mask_{k}.png", "boxes": {"0": [1, 1, 30, 30]}} for k, name in enumerate("ab")]
    text = json.dumps({"num_frames": 9, "width": 96, "height": 64, "objects": objects})
    hands = """
      await picture();
      importBoxes(TEXT);
      chosen = 0; actions.remove();
      press("n"); go(0); pull([40, 10], [60, 30]);
      $("brush").value = 80; $("paint").click(); pull([50, 20], [52, 20]); $("paint").click();
      const before = out();
      const large = Object.assign(document.createElement("canvas"), {width: 192, height: 128});
      const bytes = Uint8Array.from(atob(large.toDataURL().split(",")[1]), c => c.charCodeAt(0));
      await openImage(new File([bytes], "large.png", {type: "image/png"}));
      return {before, after: out()};
    """
    found = browse(tmp_path, hands.replace("TEXT", json.dumps(text)))
    assert [one["mask"] for one in found["before"]["boxes"]["objects"]] == ["mask_1.png", "mask_0.png"]
    small, large = (
        iio.imread(base64.b64decode(found[when]["masks"][1].split(",")[1]), extension=".png")
        for when in ("before", "after")
    )
    assert small.shape[:2] == (64, 96) and small[..., 3].any()
    assert np.array_equal(small.repeat(2, 0).repeat(2, 1), large)
    assert found["after"]["command"].endswith("--traj boxes.json --prompt ''")
