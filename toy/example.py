"""Write a held-out video of the small preset's world as a user's input, with the truth beside it.

python -m toy.example --video 3
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from core.config import require, run_script
from core.files import write_text
from core.media import to_uint8, write_image, write_video
from toy.world import World

KEYFRAMES = 4  # frames from one keyframe of a boxes.json to the next


@dataclass(frozen=True)
class Config:
    out: str = "out/toy"  # folder for image.png, boxes.json, the masks it names, prompt.txt and truth.mp4
    split: Literal["train", "validation", "test"] = "test"  # which seeds
    video: int = 0  # its number in the split


def main(cfg: Config) -> None:
    world, out = World(cfg.split), Path(cfg.out)
    fresh = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    require(fresh, f"--out {out}: exists and is no empty folder; give another")
    batch = world.batch([cfg.video])
    trajectory, objects = batch.trajectory(0), []
    for k, name in enumerate(trajectory.names):
        start, last = int(np.isnan(trajectory.boxes[k, :, 0]).sum()), world.frames - 1
        keys = [*range(start, last, KEYFRAMES), last]
        item = {"name": name, "boxes": {str(t): trajectory.boxes[k, t].round(1).tolist() for t in keys}}
        if start:
            item["visible"] = [[start, last]]
        elif not batch.by_box[0, batch.used[0].nonzero()[k, 0]]:
            item["mask"] = f"mask_{k}.png"
            write_image(out / item["mask"], trajectory.masks[k].astype(np.uint8) * 255)
        objects.append(item)
    write_image(out / "image.png", to_uint8(batch.video[0, :, :1])[0])
    top = {"num_frames": world.frames, "width": world.size[1], "height": world.size[0], "objects": objects}
    write_text(out / "boxes.json", json.dumps(top, indent=1))
    write_text(out / "prompt.txt", batch.captions[0])
    write_video(out / "truth.mp4", to_uint8(batch.video[0], scale=4), fps=8)
    print(f"{out}: {batch.captions[0]}")


if __name__ == "__main__":
    run_script(main, Config)
