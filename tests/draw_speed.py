"""How fast draw.html plays and drags with 20 objects, 121 frames and a 12-megapixel photo.

    python tests/draw_speed.py

Prints lines of JSON: frames a second while playing at 60 a second at most, milliseconds of the page's own work and of
all of the browser's for a frame, and milliseconds from the mouse's move to the next frame while a box is dragged.
"""

import contextlib
import json
import os
import statistics
import tempfile
from pathlib import Path

from browser import CHROMIUM, FLAGS, Hands, picture
from playwright.sync_api import sync_playwright

MANY = """(() => {
  change(() => {
    Object.assign(state, {preset: "wan5b", frames: 121});
    state.objects = PALETTE.map((color, k) => ({name: `thing ${k}`, color, interpolate: "smooth", visible: null,
      mask: "", wants: "", boxes: Object.fromEntries(Array.from({length: 12}, (_, i) => {
        const x = 300 + 150 * k + 40 * (i % 3), y = 300 + 100 * (k % 7) + 90 * i;
        return [i * 11, [x, y, x + 700, y + 600]];
      }))}));
  });
})()"""
PLAY = """new Promise(done => {
  PRESETS.wan5b.fps = 60;
  const work = [], show = showFrame, began = performance.now();
  let count = 0;
  showFrame = () => { const from = performance.now(); show(); work.push(performance.now() - from); count++; };
  play();
  setTimeout(() => {
    stop(); showFrame = show;
    done({fps: 1000 * count / (performance.now() - began), work});
  }, 4000);
})"""
DRAG = """(() => { window.waits = []; stage.addEventListener("pointermove", event => {
  if (drag?.moved) requestAnimationFrame(() => waits.push(performance.now() - event.timeStamp)); }); })()"""


def cpu_seconds() -> float:
    """Of all processes that descend from this one, which a busy machine does not change much."""
    parents, spent = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            pid = int(stat.parent.name)
            parents[pid], spent[pid] = int(fields[1]), int(fields[11]) + int(fields[12])

    def ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and ours(parents[pid]))

    return sum(seconds for pid, seconds in spent.items() if ours(pid)) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    with sync_playwright() as driver, tempfile.TemporaryDirectory() as folder:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        hands = Hands(browser, size=(1440, 900))
        hands.open(picture(Path(folder) / "photo.png", 4000, 3000))
        hands.see(MANY)
        for mode in ("masks of every object", "boxes alone")[::-1]:
            if mode != "boxes alone":
                for k in range(20):
                    hands.see(f"(chosen = {k}, ellipse())")
            spent, played = cpu_seconds(), hands.see(PLAY)
            spent = cpu_seconds() - spent
            hands.go(60)
            hands.see(DRAG)
            hands.see("choose(10)")
            left, top, right, bottom = hands.see("box(current(), 60)")
            x, y = hands.spot((left + right) / 2, (top + bottom) / 2)
            hands.page.mouse.move(x, y)
            hands.page.mouse.down()
            hands.page.mouse.move(x + 60, y + 60, steps=60)
            hands.page.mouse.up()
            moves, frames = hands.see("waits"), len(played["work"])
            found = {
                "masks": mode != "boxes alone", "frames_a_second": round(played["fps"], 1),
                "ms_of_work_a_frame": round(statistics.median(played["work"]), 2),
                "cpu_ms_a_frame_on_all_cores": round(1000 * spent / frames, 1),
                "ms_a_move_median": round(statistics.median(moves), 1), "ms_a_move_most": round(max(moves), 1),
                "load": os.getloadavg()[0],
            }  # fmt: skip
            print(json.dumps(found))
        hands.close()
        browser.close()


if __name__ == "__main__":
    main()
