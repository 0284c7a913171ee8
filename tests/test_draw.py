"""draw.html under real hands: what is drawn reaches sample.py as the page showed it, and nothing is lost on the way."""

import json
import random
import re
import shlex

import numpy as np
import pytest
from browser import Hands, picture
from conftest import ROOT
from PIL import Image

import sample
from core.boxes import place
from core.codec import Codec, best_size
from core.config import UserError, parse_config
from core.media import load_image, read_mask
from toy.codec import ToyCodec
from trajectory import PALETTE, load_trajectory
from wan.codec import WanCodec


def test_what_is_drawn_is_what_is_read(hands, one_box, tmp_path):
    """Draw, set keyframes, paint a mask, save: trajectory.py's boxes are the page's, to a pixel."""
    hands.drag((20, 20), (50, 30), frame=4)
    hands.drag((60, 40), (80, 50), frame=8)  # its lower right corner
    hands.drag((60, 40), (90, 60), frame=0)  # on empty ground: another object
    hands.go(6)
    hands.press("Alt+ArrowUp")
    hands.fill("#visible", "0-3, 6")
    hands.paint((70, 50), (76, 50), width=60)
    hands.page.fill("#prompt", "it's a disc")
    folder = hands.save(tmp_path)
    boxes = json.loads((folder / "boxes.json").read_text())
    assert [boxes[name] for name in ("num_frames", "width", "height")] == [9, 96, 64]
    first, second = boxes["objects"]
    assert first["boxes"] == {"0": [10, 10, 30, 30], "4": [40, 20, 60, 40], "8": [40, 20, 80, 50]}
    assert second["boxes"] == {"0": [60, 40, 90, 60], "6": [60, 39, 90, 59]} and second["visible"] == [[0, 3], [6, 6]]
    assert "mask" not in first and second["mask"] == "mask_1.png"

    trajectory = load_trajectory(folder / "boxes.json", (64, 96), 9)
    shown = np.array(hands.see("page.drawing.objects.map(track)"), dtype=float)
    drawn = np.isfinite(trajectory.boxes)
    assert np.abs(shown - trajectory.boxes)[drawn].max() < 1e-9
    assert drawn[0].all() and drawn[1, :, 0].tolist() == [True] * 4 + [False, False, True, False, False]
    assert trajectory.masks[1].sum() > 100 and trajectory.masks[1][50, 73] and not trajectory.masks[1][5, 5]
    assert (folder / "command.txt").read_text() == (
        f"python sample.py --image {folder.name}/image.png --traj {folder.name}/boxes.json --prompt='it'\\''s a disc'"
        f" --out {folder.name}/video.mp4\n"
    )
    assert hands.asked == [hands.address]  # no network


def test_a_drag_on_empty_ground_makes_an_object_and_a_jitter_nothing(hands, one_box):
    hands.drag((50, 10), (80, 30))
    for x, y, dx, dy in ((70, 50, 0, 0), (70, 50, 1, 0), (70, 50, 2, 2), (20, 20, 2, -2)):  # the last starts in a box
        x, y = hands.spot(x, y)
        hands.drag_on_screen((x, y), (x + dx, y + dy))
    assert hands.see("[page.chosen, page.past.length]") == [0, 3]  # the first is chosen
    assert [one["boxes"] for one in hands.objects] == [{"0": [10, 10, 30, 30]}, {"0": [50, 10, 80, 30]}]
    x, y = hands.spot(40, 50)
    hands.drag_on_screen((x, y), (x + 60, y + 2))  # a line is no box
    assert len(hands.objects) == 2 and hands.note.startswith("Too small")
    hands.page.focus("#stage")
    hands.press("Enter")
    assert len(hands.objects) == 3 and hands.see("page.chosen") == 2
    x0, y0, x1, y1 = hands.boxes(2)["0"]
    assert (x1 - x0, y1 - y0) == (24, 16)  # a quarter of what the video keeps, 152x104 of 156x104
    hands.page.mouse.move(*hands.spot(85, 55))  # Escape takes back what is dragged
    hands.page.mouse.down()
    hands.page.mouse.move(*hands.spot(60, 45), steps=3)
    hands.press("Escape")
    hands.page.mouse.up()
    assert len(hands.objects) == 3


def test_small_boxes_and_handles_of_the_chosen_object_can_be_held(hands, tmp_path):
    hands.open(picture(tmp_path / "wide.png", 3000, 2000))
    hands.drag((100, 100), (130, 130))
    hands.drag((115, 115), (1115, 615))  # its middle: it moves, however small it is
    assert hands.boxes()["0"] == [1100, 600, 1130, 630]


def test_a_fast_stroke_leaves_no_gap_and_masks_have_the_colours_of_their_objects(hands, photo):
    hands.open(photo)
    for k, (y0, y1) in enumerate(((5, 28), (36, 60))):
        hands.drag((5, y0), (90, y1))
        hands.paint((10, y0 + 10), (85, y0 + 10))
        assert hands.mask(k)[y0 + 10, 10:86].all()
    colors = np.array([hands.look("stage", 40, y) for y in (15, 46)])
    assert colors[:, 3].min() > 100 and np.linalg.norm(colors[0, :3] - colors[1, :3]) > 60
    hands.paint((5, 48), (91, 48), width=100, key="e")
    assert hands.objects[1]["mask"] == ""  # nothing of it is left


def test_pictures_of_any_size_open_at_once_and_one_after_another(hands, tmp_path):
    sizes = [(16, 16), (1, 1), (700, 500), (16, 12), (3, 900), (16, 16), (1300, 900), (8, 16)]
    for number, (width, height) in enumerate(sizes):
        hands.open(picture(tmp_path / f"{number}.png", width, height))
        shown = hands.see("[page.drawing.width, page.drawing.height, things.get(page.drawing.picture).name]")
        assert shown == [width, height, f"{number}.png"]
        assert hands.page.is_hidden("#welcome")
    large, small = picture(tmp_path / "large.png", 1600, 1200, noise=True), tmp_path / "0.png"
    hands.page.locator("#files").set_input_files(large)  # still decodes when the next is opened: the later one stays
    hands.page.locator("#files").set_input_files(small)
    hands.wait("!$('pane').ariaBusy")
    hands.page.wait_for_timeout(600)
    assert hands.see("[page.drawing.width, things.get(page.drawing.picture).name]") == [16, "0.png"]
    (tmp_path / "no.png").write_bytes(b"no picture")
    hands.open(tmp_path / "no.png")
    assert "no.png is no picture" in hands.note and hands.see("page.drawing.width") == 16


def test_no_shape_of_picture_covers_what_is_beside_it(hands, tmp_path):
    for width, height in ((900, 1600), (1000, 1000), (1200, 900), (3000, 300), (100, 2000)):
        hands.open(picture(tmp_path / f"{width}x{height}.png", width, height))
        for screen in ((1440, 900), (1024, 768), (390, 844)):
            hands.page.set_viewport_size(dict(zip(("width", "height"), screen, strict=True)))
            hands.wait("view.w === $('pane').clientWidth && view.h === $('pane').clientHeight")
            left, top, right, bottom = hands.see("onScreen(whole())")
            pane = hands.page.locator("#pane").bounding_box()
            assert left >= 0 and top >= 0 and right <= pane["width"] + 0.5 and bottom <= pane["height"] + 0.5
            assert abs((right - left) / (bottom - top) / (width / height) - 1) < 0.01
            for other in ("header", "footer", "aside"):
                box = hands.page.locator(other).bounding_box()
                pairs = ((box, pane), (pane, box))
                apart = (a["x"] >= b["x"] + b["width"] or a["y"] >= b["y"] + b["height"] for a, b in pairs)
                assert any(apart), (other, box, pane)
            assert hands.see("document.documentElement.scrollWidth <= innerWidth")


def test_what_the_video_cuts_is_dimmed_and_no_box_can_be_lost_there(hands, tmp_path):
    hands.open(picture(tmp_path / "tall.png", 300, 900))
    hands.page.select_option("#size", "168x168")  # the middle 300x300
    assert hands.see("kept()") == [0, 300, 300, 600]
    light = [max(hands.look("photo", 150, y)[:3]) for y in (100, 450, 700)]
    assert light[0] < 60 and light[1] > 120 and light[2] < 60
    hands.drag((100, 20), (200, 120))  # drawn where nothing is kept: a pixel of it stays in the frame
    assert hands.boxes()["0"] == [100, 20, 200, 301] and hands.see("problem()") == ""
    hands.drag((150, 200), (150, 890))
    assert hands.boxes()["0"][1] == 599


# What may not stand in a file, nor in one of its objects.
BROKEN = [
    "{", "[1, 2]", {"num_frames": 300_000_000}, {"num_frames": "9"}, {"num_frames": 8.5}, {"width": None},
    {"height": 0}, {"more": 1}, {"objects": []}, {"objects": {"0": 1}}, {"objects": [7]},
]  # fmt: skip
BROKEN_OBJECTS = [
    {"color": [1, 2]}, {"color": [0, 0, 0]}, {"color": "red"}, {"color": [1, 2, 300]}, {"name": 7},
    {"interpolate": "bent"}, {"box": 1}, {"visible": []}, {"visible": [[3, 1]]}, {"visible": [[3, 9]]}, {"mask": 7},
    {"boxes": {}}, {"boxes": [[1, 2, 3, 4]]}, {"boxes": {"-1": [1, 2, 3, 4]}}, {"boxes": {"1.5": [1, 2, 3, 4]}},
    {"boxes": {"9": [1, 2, 3, 4]}}, {"boxes": {"0": [5, 5, 2, 9]}}, {"boxes": {"0": [5, 5, 5, 9]}},
    {"boxes": {"0": [5, 5, 9]}}, {"boxes": {"0": [5, 5, 9, "9"]}}, {"boxes": {"0": [500, 5, 509, 9]}},
]  # fmt: skip


def test_a_damaged_boxes_json_is_named_and_leaves_all_as_it_was(hands, one_box, tmp_path):
    """The page refuses what trajectory.py refuses, at once, and a reload shows the old drawing."""
    before, file = hands.state, tmp_path / "damaged.json"
    item = {"boxes": {"0": [1, 1, 30, 30]}}
    good = {"num_frames": 9, "width": 96, "height": 64, "objects": [item]}
    for broken in (*BROKEN, *({"objects": [item | other]} for other in BROKEN_OBJECTS)):
        file.write_text(broken if isinstance(broken, str) else json.dumps(good | broken))
        with pytest.raises(UserError):
            load_trajectory(file, (64, 96), 9)
        hands.open(file)
        assert hands.note.startswith("damaged.json: ") and hands.state == before, broken
    hands.reload()
    assert hands.state == before and hands.note == ""


def test_boxes_of_another_size_are_scaled_aloud_and_of_another_shape_refused(hands, photo, tmp_path):
    example, mask = (tmp_path / "boxes.json", tmp_path / "mask.png"), np.zeros((48, 48), np.uint8)
    mask[8:23, 31:45] = 255
    Image.fromarray(mask).save(example[1])
    tracks = [{"0": [31, 6, 48, 23], "4": [18, 11, 38, 31], "8": [25, 8, 47, 30]}, {"0": [3, 33, 18, 48]}]
    objects = [{"mask": "mask.png", "boxes": track} for track in tracks]
    example[0].write_text(json.dumps({"num_frames": 9, "width": 48, "height": 48, "objects": objects}))
    hands.open(photo)
    hands.open(*example)
    assert "48 x 48" in hands.note and "96 x 64" in hands.note and not hands.objects  # nothing is squashed
    hands.open(picture(tmp_path / "square.png", 480, 480))
    hands.open(*example)
    assert hands.note == "Boxes of 48 x 48 scaled to 480 x 480."
    assert hands.boxes() == {"0": [310, 60, 480, 230], "4": [180, 110, 380, 310], "8": [250, 80, 470, 300]}
    assert all(one["mask"] for one in hands.objects) and hands.see("problem()") == ""
    back = hands.save(tmp_path)  # and what was saved opens again, masks and all
    assert np.array_equal(read_mask(back / "mask_0.png"), mask.repeat(10, 0).repeat(10, 1) > 0)
    hands.page.click("#clear")
    hands.open(back / "image.png", back / "boxes.json", back / "mask_0.png")
    assert hands.note == "Open the masks too: mask_1.png." and "mask_1.png" in hands.see("problem()")
    hands.open(back / "mask_1.png")
    assert hands.see("problem()") == "" and hands.see("page.drawing.width") == 480


def test_the_same_file_opens_again_after_starting_anew_and_all_of_it_can_be_undone(hands, one_box, photo):
    hands.page.click("#clear")
    assert hands.see("page.drawing.width") == 0 and hands.page.is_visible("#welcome")
    hands.open(photo, button="#openFirst")
    assert hands.see("page.drawing.width") == 96 and not hands.objects
    hands.press("Control+z", "Control+z")
    assert hands.see("page.drawing.width") == 96 and hands.boxes() == {"0": [10, 10, 30, 30]}


def test_a_picture_is_pasted(hands):
    hands.context.grant_permissions(["clipboard-read", "clipboard-write"])
    hands.see("""(async () => {
      const blob = await new Promise(done => newPen(40, 30).canvas.toBlob(done));
      await navigator.clipboard.write([new ClipboardItem({"image/png": blob})]);
    })()""")
    hands.press("Control+v")
    hands.wait("page.drawing.width === 40 && page.drawing.height === 30")


def test_undo_redo_and_a_reload(hands, tmp_path):
    large = picture(tmp_path / "phone.png", 1400, 1250, noise=True)
    assert large.stat().st_size > 5_000_000
    hands.open(large)
    hands.drag((100, 100), (500, 500))
    hands.drag((300, 300), (600, 400), frame=4)
    hands.paint((200, 200), (300, 300))
    before, painted = hands.state, hands.mask(0)
    hands.reload()
    assert hands.state == before and np.array_equal(hands.mask(0), painted) and hands.note == ""
    assert hands.see("things.get(page.drawing.picture).blob.size") == large.stat().st_size
    hands.press(*["Control+z"] * 3)
    assert hands.see("[page.drawing.objects.length, page.past.length, page.future.length]") == [0, 1, 3]
    hands.press(*["Control+Shift+z"] * 3)
    assert hands.state == before and np.array_equal(hands.mask(0), painted)


def test_a_prompt_is_one_step_of_undo_and_a_rename_survives(hands, one_box):
    steps = hands.see("page.past.length")
    hands.page.click("#prompt")
    hands.page.keyboard.type("a sentence that ends")
    assert len(hands.see("page.drawing.prompt")) == 20 and hands.see("page.past.length") == steps + 1
    hands.page.click("#name", click_count=3)
    hands.page.keyboard.type("the cat")
    assert hands.see("page.past.length") == steps + 2
    for button, name in (("#undo", "object 0"), ("#redo", "the cat")):  # with the field just left
        hands.page.click(button)
        assert hands.page.input_value("#name") == hands.page.text_content("#names button") == name
    hands.drag((50, 10), (80, 30))
    hands.press("Control+z")
    assert hands.page.text_content("#names button") == hands.objects[0]["name"] == "the cat"
    hands.press("Control+z", "Control+z", "Control+z")
    assert not hands.objects and hands.see("page.drawing.prompt") == ""


def test_a_browser_that_can_keep_nothing_says_so(hands, photo):
    hands.see("database.then(open => open.close())")
    hands.open(photo)
    hands.settle()
    assert "can't keep the drawing through a reload" in hands.note and hands.see("page.drawing.width") == 96


def row(hands: Hands, k: int, frame: float, bar: bool = False) -> tuple[float, float]:
    """Where on the screen a frame is in a row of the timeline."""
    area = hands.page.locator("#tracks").bounding_box()
    return area["x"] + hands.see(f"xOf({frame})"), area["y"] + k * 30 + (22 if bar else 10)


def test_the_timeline_moves_keyframes_and_ends_of_bars(hands, one_box):
    def drag(k: int, start: float, end: float, bar: bool = False) -> None:
        hands.drag_on_screen(row(hands, k, start, bar), row(hands, k, end, bar))

    hands.drag((20, 20), (50, 30), frame=4)
    hands.drag((60, 40), (90, 60), frame=0)
    drag(0, 4, 7)
    assert list(hands.boxes()) == ["0", "7"] and hands.see("[page.chosen, page.now]") == [0, 7]
    drag(0, 7, 0)  # not onto another: it stops before it
    assert list(hands.boxes()) == ["0", "1"]
    drag(1, 8.4, 5, bar=True)
    drag(1, -0.4, 2, bar=True)
    assert hands.objects[1]["visible"] == [[2, 5]] and hands.see("page.chosen") == 1
    drag(1, 1.6, 0, bar=True)
    drag(1, 5.4, 8, bar=True)
    assert hands.objects[1]["visible"] is None
    ruler, tracks = (hands.page.locator(f"#{name}").bounding_box() for name in ("ruler", "tracks"))
    assert (ruler["x"], ruler["width"]) == (tracks["x"], tracks["width"])
    for frame in (0, 3, 8):  # the cursor stands where the frame is, through all rows
        hands.go(frame)
        cursor = hands.page.locator("#cursor").bounding_box()
        assert abs(cursor["x"] + cursor["width"] / 2 - row(hands, 0, frame)[0]) < 1.5
        assert cursor["y"] <= ruler["y"] + 4 and cursor["y"] + cursor["height"] >= tracks["y"] + tracks["height"] - 2


def test_duplicate_and_onion_skin(hands, one_box):
    hands.drag((20, 20), (60, 40), frame=8)
    hands.press("Control+d")
    first, second = hands.objects
    assert second["boxes"] == {t: [v + 5 for v in box] for t, box in first["boxes"].items()}
    assert second["name"] == "object 0 copy" and second["color"] != first["color"]
    hands.press("[")
    bare = hands.look("stage", 19, 19)
    hands.press("g")
    assert hands.see("page.onion") and hands.look("stage", 19, 19)[3] > bare[3]  # the thing of frame 0 shows through


def test_a_motion_is_recorded_with_its_timing_and_thinned(hands, photo):
    """R held: the box follows the mouse, frame by frame, and keyframes within a pixel of that remain."""
    hands.open(photo)
    hands.fill("#frames", "200")
    hands.drag((10, 10), (20, 20))
    hands.see("void (thin = (thin => (boxes, ...more) => thin(window.recorded = boxes, ...more))(thin))")  # to look at
    hands.page.keyboard.down("r")
    hands.page.mouse.move(*hands.spot(15, 15))
    hands.page.mouse.down()
    for x in range(15, 80, 4):
        hands.page.mouse.move(*hands.spot(x, 15 + (x % 20)))
        hands.page.wait_for_timeout(600 if x == 47 else 60)  # a rest, of which two keyframes are enough
    hands.page.mouse.up()
    raw = hands.see("recorded")
    hands.page.keyboard.up("r")
    boxes = hands.boxes()
    assert 8 < len(raw) < 200 and 2 <= len(boxes) < len(raw)
    path = hands.see("track(page.drawing.objects[0])")
    assert max(np.abs(np.array(path[int(t)]) - box).max() for t, box in raw.items()) <= 1
    starts = [raw[t][0] for t in sorted(raw, key=int)]
    assert starts == sorted(starts) and starts[-1] > 30
    assert hands.see("page.past.length") == 4  # picture, frames, box, motion
    hands.press("Control+z")
    assert list(hands.boxes()) == ["0"]


def test_the_camera_is_an_object_that_moves_the_whole_picture(hands, one_box, tmp_path):
    """Objects stay in the scene, where what leaves is hidden, or in the frame. A later frame's camera is dragged."""
    hands.drag((70, 10), (90, 30))
    hands.page.click("summary:has-text('Camera')")
    hands.fill("#amount", "50")
    hands.page.select_option("#camera", "right")
    hands.page.click("#shoot")
    camera, first, second = hands.objects
    assert camera["name"] == "camera" and camera["boxes"] == {"0": [0, 0, 96, 64], "8": [-48, 0, 48, 64]}
    assert second["boxes"]["8"] == [22, 10, 42, 30] and second["visible"] is None
    assert first["visible"] == [[0, 4]] and max(map(int, first["boxes"])) == 4  # 6 pixels a frame: gone in frame 5
    trajectory = load_trajectory(hands.save(tmp_path) / "boxes.json", (64, 96), 9)
    assert trajectory.masks[0].all() and trajectory.boxes[0, 4].tolist() == [-24, 0, 72, 64]
    hands.press("Control+z")
    hands.page.select_option("#camera", "in")
    hands.page.select_option("#place", "frame")
    hands.page.click("#shoot")
    hands.page.select_option("#camera", "left")
    hands.page.click("#shoot")  # one camera, whose moves add up
    camera, first, second = hands.objects
    assert camera["boxes"]["8"] == [24, -16, 168, 80] and list(second["boxes"]) == ["0"]
    hands.drag((50, 40), (60, 55))  # in frame 0 it is in nobody's way
    assert len(hands.objects) == 4 and hands.boxes(3) == {"0": [50, 40, 60, 55]}
    hands.page.click("#names button:first-child")
    hands.drag((50, 50), (45, 50), frame=4)
    assert hands.boxes()["4"] == [7, -8, 127, 72] and hands.see("problem()") == ""


def test_play_moves_the_cut_out_and_says_what_it_is(hands, tmp_path):
    pixels = np.full((64, 96, 3), 40, np.uint8)
    pixels[10:30, 10:30] = (250, 200, 20)
    Image.fromarray(pixels).save(tmp_path / "square.png")
    hands.open(tmp_path / "square.png")
    hands.drag((10, 10), (30, 30))
    hands.page.click("#ellipse")
    hands.drag((20, 20), (70, 40), frame=8)
    hands.go(0)
    assert hands.page.is_hidden("#badge")
    hands.press("Space")
    assert hands.page.inner_text("#badge") == "Sketch of the motion, not generated"  # which is visible
    hands.wait("page.now === 8")
    hands.press("Space")
    hands.see("(page.playing = {}, page.now = 8, drawStage())")
    assert np.abs(np.array(hands.look("stage", 70, 40)) - [250, 200, 20, 255]).max() < 12  # the thing itself
    assert hands.look("stage", 62, 32)[3] == 0  # a corner of its box, outside the mask
    hole = hands.look("stage", 14, 20)
    assert 100 < hole[3] < 255 and max(hole[:3]) < 40


def test_lengths_are_those_that_the_networks_make(hands, photo):
    hands.open(photo)
    hands.page.select_option("#preset", "wan5b")
    for asked, taken in (("50", 49), ("52", 53), ("1", 5), ("100000", 997), ("81", 81)):
        hands.fill("#frames", asked)
        assert hands.see("page.drawing.frames") == taken and (str(taken) in hands.note) == (asked != str(taken))
        WanCodec.video_size(WanCodec, "auto", taken)
    hands.page.select_option("#preset", "small")
    hands.fill("#frames", "1")
    assert hands.see("page.drawing.frames") == 2


def test_another_length_stretches_the_motion_or_keeps_it(hands, one_box):
    hands.drag((20, 20), (50, 30), frame=8)
    hands.fill("#visible", "0-4, 7-8")
    for name, last, visible in (("wan5b", 120, [[0, 60], [105, 120]]), ("small", 8, [[0, 4], [7, 8]])):
        hands.page.select_option("#preset", name)
        assert hands.see("page.drawing.frames") == last + 1 and list(hands.boxes()) == ["0", str(last)]
        assert hands.objects[0]["visible"] == visible
    hands.page.click("#stretch")
    hands.fill("#frames", "17")
    assert list(hands.boxes()) == ["0", "8"] and hands.see("page.drawing.frames") == 17
    hands.press("Home", "Delete")
    hands.fill("#frames", "5")
    assert hands.note == "1 keyframe beyond frame 4 removed; Undo brings them back." and list(hands.boxes()) == ["4"]
    hands.press("Control+z")
    assert list(hands.boxes()) == ["8"] and hands.see("page.drawing.frames") == 17


def test_the_command_for_wan5b_finds_what_it_needs(hands, one_box, tmp_path, monkeypatch):
    """Its networks are those that the stages leave, and all its options are taken."""
    hands.page.select_option("#preset", "wan5b")
    hands.page.fill("#prompt", "--a 'strange' $prompt")
    hands.page.fill("#steps", "3")
    hands.page.fill("#seed", "7")
    folder = hands.save(tmp_path)
    words = shlex.split((folder / "command.txt").read_text())
    assert words[:2] == ["python", "sample.py"]
    cfg = parse_config(sample.Config, words[2:], {"wan5b": sample.WAN5B})
    assert (cfg.prompt, cfg.steps, cfg.seed, cfg.frames, cfg.size) == ("--a 'strange' $prompt", 3, 7, 121, "auto")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        sample.find_networks(cfg)
    for name in ("fast_generator", "fast_adapter"):  # as stages 2 and 3 name them
        file = tmp_path / "runs" / name / f"{name}.safetensors"
        file.parent.mkdir(parents=True)
        file.touch()
    assert [str(path) for path in sample.find_networks(cfg)] == [cfg.generator, cfg.adapter]
    size = best_size((64, 96), WanCodec.area, 32)
    load_trajectory(cfg.traj, size, cfg.frames, (64, 96))
    assert load_image(cfg.image).shape == (64, 96, 3)


def test_the_example_is_the_shipped_one_and_the_page_says_what_networks_know(hands, tmp_path):
    hands.example()
    assert "any picture" in hands.page.text_content("#knows")
    hands.page.select_option("#preset", "wan5b")
    assert "on a GPU" in hands.page.text_content("#knows")
    hands.page.select_option("#preset", "small")
    folder = hands.save(tmp_path)
    given, want = (json.loads(path.read_text()) for path in (folder / "boxes.json", ROOT / "examples/balloons.json"))
    for one, other in zip(given["objects"], want["objects"], strict=True):
        assert one["boxes"] == other["boxes"] and one["name"] == other["name"]
    assert (folder / "image.jpg").read_bytes() == (ROOT / "examples/balloons.jpg").read_bytes()


def random_drawing(rng: random.Random) -> dict:
    """A picture of any shape, and boxes anywhere near it."""
    preset = rng.choice(("small", "small", "wan5b"))
    sides = (64, 4000) if preset == "wan5b" else (8, 400)
    width, height = rng.randint(*sides), rng.randint(*sides)
    frames = rng.choice((5, 49, 121)) if preset == "wan5b" else rng.choice((2, 9, 13))
    objects = []
    for k in range(rng.randint(1, 4)):
        boxes = {}
        for t in rng.sample(range(frames), rng.randint(1, min(frames, 8))):
            x, y = rng.randint(-width // 4, width), rng.randint(-height // 4, height)
            boxes[t] = [x, y, x + rng.randint(1, width), y + rng.randint(1, height)]
        first = rng.randrange(frames)
        path = rng.choice(("smooth", "linear", "none"))
        shown = rng.choice((None, None, [[first, rng.randrange(first, frames)]]))
        objects.append({"name": f"box {k}", "color": PALETTE[k], "interpolate": path, "visible": shown, "boxes": boxes})
    size = rng.choice(("auto", "auto", "480x832" if preset == "wan5b" else "48x48"))
    drawing = {"frames": frames, "width": width, "height": height, "objects": objects}
    return drawing | {"picture": "p", "preset": preset, "size": size}


def test_400_drawings_are_the_same_in_the_page_and_in_trajectory_py(hands, tmp_path):
    """What the page would save, sample.py takes; what not, is refused there too. Half are as hands leave them."""
    rng, counts = random.Random(0), {"saved": 0, "refused": 0, "boxes": 0}
    drawings = [random_drawing(rng) for _ in range(400)]
    read = """(all => all.map((given, i) => {
      const {objects} = page.drawing = given;
      if (i % 2) for (const o of objects) for (const t in o.boxes) o.boxes[t] = bounded(o.boxes[t]);
      const found = {target: target(), problem: problem(), boxes: exportBoxes(), tracks: objects.map(track)};
      page.drawing = fresh();
      return found;
    }))"""
    pages = hands.see(f"{read}({json.dumps(drawings)})")
    file = tmp_path / "boxes.json"
    codecs = {"small": ToyCodec(), "wan5b": WanCodec}
    for number, (drawing, page) in enumerate(zip(drawings, pages, strict=True)):
        source, codec = (drawing["height"], drawing["width"]), codecs[drawing["preset"]]
        size = Codec.video_size(codec, drawing["size"], drawing["frames"], source)
        assert list(size) == page["target"], (drawing, size)
        file.write_text(json.dumps(page["boxes"]))
        try:
            trajectory = load_trajectory(file, size, drawing["frames"], source)
        except UserError as error:
            assert page["problem"], f"{number}: the page would save what is refused: {error}"
            counts["refused"] += 1
            assert number % 2 == 0 or re.search("inside out|neither box nor mask", page["problem"])
            continue
        assert not page["problem"], f"{number}: {page['problem']}"
        counts["saved"] += 1
        for got, want, one in zip(page["tracks"], trajectory.boxes, drawing["objects"], strict=True):
            for t, box in enumerate(want):
                shown = not one["visible"] or one["visible"][0][0] <= t <= one["visible"][0][1]
                assert np.isfinite(box).all() == bool(shown and got[t])
                if shown and got[t]:
                    counts["boxes"] += 1
                    assert np.abs(place(source, size, np.array(got[t])) - box).max() < 1e-8
    assert counts["saved"] > 150 and counts["refused"] > 50 and counts["boxes"] > 5000


def test_masks_are_read_as_the_project_reads_them(hands, one_box, tmp_path):
    """Soft, grey, cut out, of labels: the page lights the pixels that core/media.py lights."""
    soft = np.random.default_rng(0).integers(0, 256, (64, 96), dtype=np.uint8)
    cut_out = np.dstack([np.full((64, 96, 3), 90, np.uint8), soft])
    for number, pixels in enumerate((soft, soft // 128, cut_out, np.dstack([soft, soft // 2, soft // 3]))):
        file, before = tmp_path / f"{number}.png", hands.objects[0]["mask"]
        Image.fromarray(pixels).save(file)
        hands.open(file, button="#loadMask")
        hands.wait(f"page.drawing.objects[0].mask !== {before!r}")
        want = read_mask(file)
        assert np.array_equal(hands.mask(0), want)
    Image.fromarray(soft[:32]).save(tmp_path / "half.png")
    hands.open(tmp_path / "half.png", button="#loadMask")
    hands.wait("$('saidObject').textContent.includes('96 x 32')")  # and the old mask stands
    assert np.array_equal(hands.mask(0), want)


NAMED = """[...document.querySelectorAll("button, input, select, textarea, summary, [tabindex], video")]
  .filter(e => e.checkVisibility() && !e.disabled).map(e => [e.id || e.textContent.trim(),
    e.ariaLabel || e.labels?.[0]?.textContent.trim() || (/BUTTON|SUMMARY/.test(e.tagName) && e.textContent.trim())])"""
# Contrast of every text with the ground it stands on (WCAG 2), of what is not disabled; or of its border.
CONTRAST = """(border => {
  const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = rgb => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => sum + share * linear(rgb[i]), 0);
  const parts = text => text.match(/[\\d.]+/g).map(Number);
  const ground = e => {
    for (; e; e = e.parentElement) {
      const c = parts(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0.5) return c;
    }
    return [255, 255, 255];
  };
  const shows = e => e.checkVisibility() && !e.closest(":disabled, script, style, dialog:not([open])");
  const says = e => /INPUT|SELECT|TEXTAREA/.test(e.tagName)
    || [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  const edged = e => /BUTTON|SELECT|TEXT/.test(e.tagName) && !e.closest("#names") || /text|number/.test(e.type);
  return [...document.querySelectorAll("body *")].filter(e => shows(e) && (border ? edged : says)(e)).map(e => {
    const {color, borderTopColor} = getComputedStyle(e), behind = ground(border ? e.parentElement : e);
    const [a, b] = [parts(border ? borderTopColor : color), behind].map(light).sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), e.id || e.tagName, e.textContent.trim().slice(0, 30)];
  }).sort((x, y) => x[0] - y[0]);
})"""


def test_every_control_has_a_name_is_reached_by_tab_and_its_text_can_be_read(hands, one_box):
    hands.drag((20, 20), (50, 30), frame=4)
    hands.press("i")
    for summary in hands.page.locator("summary").all():
        summary.click()
    controls = dict(hands.see(NAMED))
    assert len(controls) > 35 and all(controls.values()), [name for name, told in controls.items() if not told]
    found = []
    hands.see("document.activeElement.blur()")
    while len(found) < 200 and (len(found) < 2 or found[-1] != found[0]):  # once around
        hands.press("Tab")
        found.append(hands.see("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert not set(controls) - set(found)
    hands.press("?")
    assert hands.page.is_visible("#keys")
    for scheme in ("dark", "light"):
        hands.page.emulate_media(color_scheme=scheme)
        for border, least in (("false", 4.5), ("true", 3)):
            worst = hands.see(f"{CONTRAST}({border})")
            assert len(worst) > 40 and worst[0][0] >= least, worst[:3]
    hands.press("Escape")
    for name in ("redo", "key"):  # what is disabled looks it
        style = hands.see(f"(e => [e.disabled, getComputedStyle(e).borderStyle])($('{name}'))")
        assert style == [style[0], "dashed" if style[0] else "solid"]


def test_colours_of_objects_are_told_apart(hands):
    shown = np.array(hands.see("PALETTE.map(color => css(color).match(/\\d+/g).slice(0, 3).map(Number))"))
    apart = np.linalg.norm(shown[:, None] - shown, axis=-1)[np.triu_indices(len(shown), 1)]
    assert apart.min() > 60
    assert (shown @ [0.2126, 0.7152, 0.0722]).min() > 70  # and from the dark ground


def test_20_objects_push_nothing_out(hands, photo):
    hands.open(photo)
    hands.page.focus("#stage")
    hands.press(*["Enter"] * 21)
    assert len(hands.objects) == 20 and hands.see("problem()") == "" and "20 objects" in hands.note
    for width, height in ((1440, 900), (1024, 768)):
        hands.page.set_viewport_size({"width": width, "height": height})
        hands.page.wait_for_timeout(100)
        assert hands.see("document.documentElement.scrollHeight <= innerHeight")
        for name in ("play", "prompt", "seed", "stage", "name"):
            box = hands.page.locator(f"#{name}").bounding_box()
            assert box["y"] >= 0 and box["y"] + min(box["height"], 40) <= height, name
    assert hands.page.locator("#names button").last.text_content() == "object 19"
    hands.page.locator("#names button").first.click()  # it is scrolled to
    assert hands.see("page.chosen") == 0


def test_the_walk_with_the_keyboard_alone(hands, photo, tmp_path):
    """Open, two objects, keyframes, a mask, one that comes late and leaves, undo, play, save: no mouse."""

    def tab_to(name: str) -> None:
        for _ in range(120):
            if hands.see("document.activeElement.id") == name:
                return
            hands.press("Tab")
        raise AssertionError(f"Tab never comes to {name}")

    tab_to("open")
    with hands.page.expect_file_chooser() as chooser:
        hands.press("Enter")
    chooser.value.set_files(photo)
    hands.wait("page.drawing.picture && !$('pane').ariaBusy")
    tab_to("stage")
    hands.press("Enter", *["Alt+ArrowLeft"] * 5, *["Alt+Shift+ArrowRight"] * 6)
    x0, y0, x1, y1 = hands.boxes()["0"]
    assert (x1 - x0, y1 - y0) == (30, 15)
    hands.press(*["ArrowRight"] * 5, *["Alt+ArrowDown"] * 9)
    assert hands.boxes()["5"] == [x0, y0 + 9, x1, y1 + 9]
    hands.press("Control+ArrowRight", ",", "k", ".")
    assert list(hands.boxes()) == ["0", "6"] and hands.see("page.now") == 6
    hands.press("Home", "ArrowRight", "ArrowRight", "Enter", *["Alt+ArrowUp"] * 3)
    assert hands.page.is_hidden("#late")
    hands.press("i")
    assert hands.page.is_visible("#late") and hands.objects[1]["visible"] == [[2, 8]]
    hands.press(*["ArrowRight"] * 4, "o")
    assert hands.objects[1]["visible"] == [[2, 6]]
    hands.press("Alt+ArrowUp", "Control+z", "Control+Shift+z", "[")
    tab_to("ellipse")
    hands.press("Enter")
    assert hands.objects[0]["mask"]
    tab_to("x0")
    hands.press("Control+a", "7", "Tab")
    assert hands.boxes()["0"][0] == 7
    tab_to("name")
    hands.page.keyboard.type("one")
    tab_to("prompt")
    hands.page.keyboard.type("a thing")
    tab_to("ruler")
    hands.press("Home", "Space")
    hands.wait("page.playing && page.now > 2")
    hands.press("Space")
    tab_to("save")
    folder = hands.save(tmp_path, "Enter")
    assert folder.name.startswith("drawn-my-photo-")
    trajectory = load_trajectory(folder / "boxes.json", (64, 96), 9)
    assert trajectory.names == ["one", "object 1"] and trajectory.masks.any((1, 2)).tolist() == [True, False]
    assert np.isfinite(trajectory.boxes[1, :, 0]).nonzero()[0].tolist() == [2, 3, 4, 5, 6]


def test_fingers_on_a_phone_draw_record_and_move_keyframes(browser, photo):
    hands = Hands(browser, size=(390, 844), has_touch=True, is_mobile=True)
    hands.open(photo)
    hands.touch([hands.spot(10, 10), hands.spot(20, 20), hands.spot(40, 35)])
    assert hands.boxes() == {"0": [10, 10, 40, 35]}
    hands.touch([hands.spot(25, 22), hands.spot(30, 25), hands.spot(45, 30)])
    assert hands.boxes() == {"0": [30, 18, 60, 43]}
    hands.page.tap("#record")
    hands.touch([hands.spot(45 + i, 30) for i in range(24)], pause=120)  # the count, and then the motion
    keys = list(map(int, hands.boxes()))
    assert len(keys) > 1 and max(keys) >= 4 and hands.boxes()[str(max(keys))][0] > 32
    assert not hands.see("page.recording")  # it has ended by itself
    hands.press("Control+z")
    assert list(hands.boxes()) == ["0"]
    hands.touch([row(hands, 0, 0), row(hands, 0, 1), row(hands, 0, 3)])
    assert list(hands.boxes()) == ["3"]
    assert hands.see("document.documentElement.scrollWidth <= innerWidth")
    hands.close()
