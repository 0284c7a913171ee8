"""draw.html as people use it: tabs, masks and rows that move, zoom, recording, paths by hand, and what Play shows."""

import base64
import io
import json
import zipfile

import numpy as np
from browser import Hands, picture
from PIL import Image

import trajectory
from core import media
from core.codec import Codec, best_size
from flow import FAST
from toy.codec import ToyCodec
from trajectory import load_trajectory
from wan.codec import WanCodec


def test_each_tab_keeps_a_drawing_of_its_own_and_that_of_another_is_offered(hands, one_box, tmp_path):
    def take(words: str) -> None:
        hands.page.click(f"#kept button:has-text('{words}')")
        hands.wait("page.drawing.objects.length === 1")

    first = hands.page
    hands.page.click("#ellipse")
    hands.settle()
    second = hands.new_page()
    assert hands.page.is_visible("#welcome") and not hands.objects
    assert "Copy what the other tab has: my photo.png, 1 object" in hands.page.text_content("#kept")
    hands.open(picture(tmp_path / "other.png", 50, 40))
    for tab, name in ((first, "my photo.png"), (second, "other.png"), (first, "my photo.png")):
        hands.page = tab
        hands.reload()  # neither has deleted what the other needs
        assert hands.see("things.get(page.drawing.picture).name") == name
    assert hands.mask(0).any()
    hands.page = second
    hands.page.click("#clear")
    take("Copy")
    hands.drag((20, 20), (50, 30))
    hands.settle()
    hands.page = first
    hands.reload()
    assert hands.boxes() == {"0": [10, 10, 30, 30]} and hands.mask(0).any()
    first.close()
    hands.page = second
    hands.page.click("#clear")
    hands.settle()
    take("Go on with my photo.png")  # what a closed tab has left
    assert hands.boxes() == {"0": [10, 10, 30, 30]} and hands.mask(0).any()
    hands.settle()
    second.close()
    hands.new_page()  # the browser is opened anew: the last drawing is there
    assert hands.boxes() == {"0": [10, 10, 30, 30]}


def test_saved_zips_bring_all_back_each_from_a_folder_of_its_own(hands, one_box, tmp_path):
    hands.page.click("#ellipse")
    hands.page.select_option("#size", "168x168")
    hands.page.fill("#prompt", "a disc")
    hands.fill("#steps", "2")
    boxes, names = hands.see("exportBoxes()"), set()
    for seed in ("77", "78"):
        hands.fill("#seed", seed)
        zipped = hands.download("Control+s").rename(tmp_path / f"{seed}.zip")
        with zipfile.ZipFile(zipped) as file:
            names.add(file.namelist()[0].split("/")[0])
        hands.page.wait_for_timeout(1100)
    assert len(names) == 2 and all(name.startswith("drawn-my-photo-") for name in names)
    data = bytearray(zipped.read_bytes())
    data[200] ^= 255
    (tmp_path / "bad.zip").write_bytes(data)
    hands.page.click("#clear")
    hands.open(tmp_path / "77.zip")
    hands.open(tmp_path / "bad.zip")
    assert hands.note == "bad.zip is no zip that this page saved" and hands.see("exportBoxes()") == boxes
    got = hands.see("(({seed, steps, size, prompt}) => [seed, steps, size, prompt])(page.drawing)")
    assert got == [77, 2, "168x168", "a disc"] and hands.see("things.get(page.drawing.picture).name") == "my photo.png"
    assert [hands.page.input_value(f"#{name}") for name in ("seed", "steps", "size")] == ["77", "2", "168x168"]


def test_a_mask_goes_with_its_box_in_frame_0(hands, one_box, tmp_path):
    hands.page.click("#ellipse")
    before = hands.mask(0)
    hands.drag((20, 20), (40, 30))
    hands.press("Alt+ArrowRight")
    after = hands.mask(0)
    assert before.sum() > 200 and np.array_equal(after[10:, 21:], before[:-10, :-21])
    hands.drag((45, 30), (60, 40), frame=4)
    assert np.array_equal(hands.mask(0), after)  # a later box leaves it
    hands.go(0)
    hands.press("Control+z", "Control+z", "Control+z")
    assert np.array_equal(hands.mask(0), before)
    hands.drag((30, 30), (50, 50))  # its corner: twice as large
    assert abs(hands.mask(0).sum() / before.sum() - 4) < 0.1
    folder = hands.save(tmp_path)
    masks = load_trajectory(folder / "boxes.json", (64, 96), 9).masks
    assert np.array_equal(masks[0], hands.mask(0))


def test_space_plays_unless_text_is_typed_or_the_keyboard_has_come_to_a_button(hands, one_box):
    hands.drag((50, 10), (80, 30))
    hands.drag((50, 40), (80, 60))
    hands.page.click("#remove")
    hands.press("Space")
    assert len(hands.objects) == 2 and hands.see("!!page.playing")
    hands.press("Space")
    hands.page.click("#prompt")
    hands.page.keyboard.type("a b")
    assert hands.see("page.drawing.prompt") == "a b" and not hands.see("page.playing")
    hands.page.focus("#name")
    hands.press("Tab", "Space")  # Duplicate
    assert len(hands.objects) == 3 and not hands.see("page.playing")


def test_recording_counts_down_ends_by_itself_and_says_why_it_does_nothing(hands, one_box):
    hands.page.click("#record")
    x, y = hands.spot(20, 20)
    hands.page.mouse.move(x, y)
    hands.page.mouse.down()
    hands.wait("$('badge').textContent === 'Recording in 2'")
    assert hands.page.is_visible("#badge") and hands.see("page.now") == 0
    hands.wait("page.now > 0")
    hands.page.mouse.move(*hands.spot(50, 30), steps=5)
    hands.wait("!page.gesture")  # the mouse is still down
    assert hands.note == "Recorded, to the last frame." and hands.see("[page.now, page.recording]") == [8, False]
    end = hands.boxes()["8"]  # as far as the mouse had come by then
    assert end[0] > 10 and hands.see("page.past.length") == 3
    hands.page.mouse.move(*hands.spot(10, 10))
    hands.page.mouse.up()
    assert hands.boxes()["8"] == end
    hands.page.click("#record")
    hands.drag(((end[0] + end[2]) / 2, (end[1] + end[3]) / 2), (20, 60))
    assert hands.note.startswith("Frame 8 is the last") and hands.boxes()["8"] == end
    hands.press("Escape")
    assert not hands.see("page.recording")


def test_what_is_transparent_is_white_as_in_the_video(hands, tmp_path):
    pixels = np.full((64, 96, 4), 60, np.uint8)
    pixels[:, 48:, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "half.png")
    hands.open(tmp_path / "half.png")
    want = media.read_picture(tmp_path / "half.png")
    for x in (20, 80):
        assert np.abs(np.array(hands.look("photo", x, 30)[:3]) - want[30, x]).max() < 3
    hands.drag((70, 10), (90, 30))
    hands.drag((80, 20), (20, 20), frame=4)
    hands.press("Space")
    hands.wait("page.now === 6")
    assert min(hands.look("stage", 20, 20)) > 250


def test_rows_are_dragged_and_pushed_to_another_depth(hands, one_box, tmp_path):
    for x in (40, 70):
        hands.drag((x, 40), (x + 20, 60))
    names = hands.page.locator("#names button")
    boxes = [names.nth(k).bounding_box() for k in range(3)]
    hands.drag_on_screen(*((box["x"] + 60, box["y"] + 15) for box in (boxes[2], boxes[0])))
    assert [one["name"] for one in hands.objects] == ["object 2", "object 0", "object 1"]
    assert hands.see("page.chosen") == 0 and names.first.text_content() == "object 2"
    hands.press("}", "}")
    assert [one["name"] for one in hands.objects] == ["object 0", "object 1", "object 2"]
    hands.page.click("#backward")
    saved = load_trajectory(hands.save(tmp_path) / "boxes.json", (64, 96), 9)
    assert saved.names == ["object 0", "object 2", "object 1"]
    hands.press("Control+z", "Control+z", "Control+z", "Control+z")
    assert [one["name"] for one in hands.objects] == ["object 0", "object 1", "object 2"]


def test_two_fingers_zoom_and_draw_nothing(browser, photo):
    hands = Hands(browser, size=(390, 844), has_touch=True, is_mobile=True)
    hands.open(photo)
    scale, touch = hands.see("view.scale"), hands.finger
    (ax, ay), (bx, by) = hands.spot(40, 30), hands.spot(60, 40)
    touch("touchStart", (ax, ay))
    touch("touchMove", (ax - 10, ay - 10))  # the first already draws
    touch("touchStart", (ax - 10, ay - 10), (bx, by))
    for way in range(20, 60, 10):
        touch("touchMove", (ax - way, ay - way), (bx + way, by + way))
    touch("touchEnd", (bx + 50, by + 50))
    touch("touchMove", (bx, by))
    touch("touchEnd")
    assert not hands.objects and hands.see("page.past.length") == 1 and hands.see("view.scale") > 1.5 * scale
    hands.close()


def test_ctrl_wheel_zooms_at_the_mouse(hands, photo):
    hands.open(photo)
    x, y = hands.spot(20, 50)
    before = hands.see("view.scale")
    hands.page.mouse.move(x, y)
    hands.page.keyboard.down("Control")
    hands.page.mouse.wheel(0, -50)
    hands.page.mouse.wheel(0, -50)
    hands.page.keyboard.up("Control")
    hands.wait(f"view.scale > {1.5 * before}")
    assert np.abs(np.array(hands.spot(20, 50)) - (x, y)).max() < 1  # what lies under the mouse stays there
    hands.page.mouse.wheel(30, 0)
    hands.wait(f"view.x + 20 * view.scale < {x - 20} - stage.getBoundingClientRect().left")
    hands.drag((20, 40), (30, 50))
    assert hands.boxes() == {"0": [20, 40, 30, 50]}
    hands.press("0")
    assert hands.see("view.scale") == before


def test_small_things(hands, one_box, photo, tmp_path):
    hands.page.click("#paint")
    hands.press("Escape")  # ends Paint
    assert hands.see("page.brush") is None
    hands.page.click("summary:has-text('Camera')")
    for name, typed, taken, words in (
        ("steps", "9", "4", "took 4"), ("seed", "-3", "0", "took 0"), ("seed", "", "0", "put back"),
        ("x0", "500", "95", "took the nearest"), ("wide", "0", "1", "took the nearest"),
        ("amount", "300", "90", "took 90"),
    ):  # fmt: skip
        hands.fill(f"#{name}", typed)
        assert (hands.page.input_value(f"#{name}"), words in hands.note) == (taken, True), (name, hands.note)
    hands.page.fill("#seed", "7")
    hands.see("show()")  # as whenever an estimate or a video arrives
    assert hands.page.input_value("#seed") == "7" and hands.see("page.drawing.seed") == 0
    hands.press("Enter")
    assert hands.see("page.drawing.seed") == 7
    hands.fill("#visible", "3-1")
    assert hands.page.get_attribute("#visible", "aria-invalid") and "no range" in hands.page.text_content("#saidObject")
    assert hands.page.input_value("#visible") == "3-1" and hands.objects[0]["visible"] is None
    red, green, blue = map(int, hands.see("getComputedStyle($('saidObject')).color.match(/\\d+/g)"))
    assert red > green + 80 and red > blue + 80
    hands.fill("#visible", "1-3")
    assert not hands.page.get_attribute("#visible", "aria-invalid") and hands.objects[0]["visible"] == [[1, 3]]
    hands.go(4)
    hands.page.focus("#key")
    hands.press("Enter")  # what had the focus is disabled now
    assert hands.see("document.activeElement.id") == "unkey"
    assert [option for option in hands.page.locator("#size option").all_text_contents() if "x" in option] == [
        "auto (208 x 136)", "168 x 168", "224 x 128", "128 x 224"
    ]  # fmt: skip
    other = picture(tmp_path / "dropped.png", 30, 20)
    data = {"items": [], "files": [str(other)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "dragOver"):
        hands.cdp.send("Input.dispatchDragEvent", {"type": kind, "x": 300, "y": 300, "data": data})
        hands.page.wait_for_timeout(200)
    assert hands.see("document.body.classList.contains('drop')")
    hands.cdp.send("Input.dispatchDragEvent", {"type": "drop", "x": 300, "y": 300, "data": data})
    hands.wait("page.drawing.width === 30")
    assert not hands.see("document.body.classList.contains('drop')")


def test_play_shows_what_the_networks_will_be_given(hands, tmp_path):
    """In the video's own size, as trajectory.py paints it: pixels for the small networks, outlines for wan5b's."""
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(40, 255, (16, 24, 3)), np.ones((10, 10, 1))).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    hands.open(tmp_path / "photo.png")
    hands.drag((20, 20), (80, 80))
    hands.page.click("#ellipse")
    hands.drag((50, 50), (150, 100), frame=8)
    hands.drag((70, 60), (120, 110), frame=0)  # in front of the first
    assert hands.page.text_content("#comes") == "9 frames of 208 x 136"
    small, large = ("small", (136, 208)), ("wan5b", (768, 1152))
    for (preset, size), frame in ((small, 6), (large, 90), (large, 0), (small, 0), (small, 5)):
        hands.page.select_option("#preset", preset)
        if frame == 5:
            hands.page.click("summary:has-text('Camera')")
            hands.page.click("#shoot")
        frames = hands.see("page.drawing.frames")
        made = load_trajectory(hands.save(tmp_path) / "boxes.json", size, frames, (160, 240))
        image = media.cover_frames(pixels[None], size)[:, 0] / 127.5 - 1
        want = (made.maps("box", image if preset == "small" else None)[:, frame].permute(1, 2, 0).numpy() + 1) * 127.5
        hands.go(frame)
        hands.page.click("#play")
        hands.see(f"(cancelAnimationFrame(page.playing.next), go({frame}))")
        assert hands.see("[$('map').height, $('map').width]") == list(size) and hands.page.is_visible("#map")
        if preset == "small":  # beside the picture, as large as the video
            assert hands.page.locator("#map").bounding_box()["width"] == size[1]
        shown = base64.b64decode(hands.see("$('map').toDataURL()").split(",")[1])
        got = np.array(Image.open(io.BytesIO(shown)).convert("RGB"))
        near = np.abs(got - want).max(-1) < 40
        assert near.mean() > (0.97 if preset == "small" else 0.995), (preset, frame, near.mean())
        hands.page.click("#play")


def test_paths_are_bent_by_hand_eased_and_copied(hands, one_box):
    hands.drag((20, 20), (80, 20), frame=8)
    hands.drag((50, 20), (50, 40))
    assert hands.boxes()["4"] == [40, 30, 60, 50] and hands.see("page.now") == 4
    assert len(hands.objects) == 1
    hands.page.mouse.click(*hands.spot(*hands.see("(b => [(b[0] + b[2]) / 2, (b[1] + b[3]) / 2])(box(current(), 6))")))
    assert "6" in hands.boxes()
    hands.press("Control+z", "Control+z")
    for button, way in (("#easeIn", lambda s: s * s), ("#easeOut", lambda s: s * (2 - s))):
        hands.page.click(button)
        eased = hands.see("track(current()).map(b => b[0])")
        assert np.abs(np.array(eased) - [10 + 60 * way(t / 8) for t in range(9)]).max() <= 1.5
        hands.press("Control+z")
    hands.page.click("#copyMotion")
    hands.drag((5, 40), (15, 60), frame=0)
    hands.page.click("#pasteMotion")
    assert hands.boxes(1) == {"0": [5, 40, 15, 60], "8": [65, 40, 75, 60]}


def test_constants_sizes_and_cuts_are_those_of_the_project(hands):
    assert hands.see("PALETTE") == [list(color) for color in trajectory.PALETTE]
    assert hands.see("[TOP_FIELDS, OBJECT_FIELDS]") == [list(trajectory.TOP_FIELDS), list(trajectory.OBJECT_FIELDS)]
    for module, names in ((trajectory, ("SIDE", "OBJECTS", "BYTES")), (media, ("VIDEO", "PICTURE"))):
        for name in names:
            assert hands.see(f"MOST_{name}") == getattr(module, f"MOST_{name}")
    shapes = np.random.default_rng(0).integers(1, 5000, (3000, 2)).tolist() + [[n, n] for n in range(1, 200)]
    for name, codec in (("small", ToyCodec()), ("wan5b", WanCodec)):
        page = hands.see(f"PRESETS.{name}")
        assert [page[key] for key in ("fps", "area", "every", "unit", "steps")] == [
            codec.fps, codec.area, codec.temporal, codec.spatial * Codec.patch, FAST[name].steps
        ]  # fmt: skip
        for size in page["sizes"]:
            assert Codec.video_size(codec, size, page["frames"]) == tuple(map(int, size.split("x")))
        area, unit = page["area"], page["unit"]
        got = hands.see(f"{json.dumps(shapes)}.map(s => {{ const b = bestSize(s, {area}, {unit}), c = cover(s, b);"
                        "return [b, c.h, c.w, c.top, c.left]; })")  # fmt: skip
        for shape, (best, h, w, top, left) in zip(shapes, got, strict=True):
            assert best == list(best_size(tuple(shape), area, unit))
            assert ((h, w), top, left) == media.cover(tuple(shape), tuple(best))
