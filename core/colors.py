"""Finding objects painted in flat colours on black, in pictures whose colours a video codec has shifted and blended."""

import numpy as np

MOST_OBJECTS = 64
NEAR = 28  # distance in RGB by which a codec may shift a colour
DARK = 24  # a pixel whose brightest channel is at most this is background, whatever a codec did to it


def flat_colors(frame: np.ndarray) -> np.ndarray:
    """Colours of the objects in frame 0, largest object first: [height, width, 3] -> float [K, 3]."""
    # Only pixels like all their neighbours count: at an edge two colours blend into ones that no object has. In
    # MagicMotion's own videos the codec shifts flat colours by up to 19 in RGB, and objects are at least 27 apart.
    windows = np.lib.stride_tricks.sliding_window_view(frame, (3, 3), axis=(0, 1))  # (H - 2, W - 2, 3, 3, 3)
    flat = (windows.max((-1, -2)) - windows.min((-1, -2))).max(-1) <= 16
    inner = frame[1:-1, 1:-1]
    pixels = inner[flat & (inner.max(-1) > DARK)].astype(float)  # (n, 3)
    colors = []
    while len(pixels) and len(colors) <= MOST_OBJECTS:
        code = pixels.astype(int) // 8 @ np.array([1024, 32, 1])
        color = pixels[code == np.bincount(code).argmax()].mean(0)  # of the fullest 8x8x8 cell, then of all around it
        near = np.linalg.norm(pixels - color, axis=1) < 14
        if near.sum() < 3 + frame.size // 30000:  # only specks are left
            break
        colors.append(pixels[near].mean(0))
        pixels = pixels[np.linalg.norm(pixels - colors[-1], axis=1) > 24]
    return np.array(colors).reshape(-1, 3)


def label_pixels(frame: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Which object's colour each pixel shows: [height, width, 3] -> int8 [height, width], -1 for none."""
    # 4:2:0 video halves the chroma of lines one or two pixels thick, so in small frames anything between a colour and
    # itself at half chroma counts as that colour. Large frames have thicker lines. There, anything narrower than two
    # pixels is a blend of two colours that may look like a third, and is dropped.
    thick = min(frame.shape[:2]) >= 300
    label, bright = np.full(frame.shape[:2], -1, dtype=np.int8), frame.max(-1) > DARK
    distance = np.empty((len(colors), np.count_nonzero(bright)))
    for k, color in enumerate(colors):
        offset = frame[bright] - color  # (n, 3)
        if not thick:
            pale = (color @ [0.299, 0.587, 0.114] - color) / 2  # from the colour to half its chroma
            offset -= (offset @ pale / (pale @ pale + 1e-9)).clip(0, 1)[:, None] * pale
        distance[k] = np.linalg.norm(offset, axis=1)
    label[bright] = np.where(distance.min(0) < NEAR, distance.argmin(0), -1)
    if thick:
        across = label[:, 1:] == label[:, :-1]
        square = np.pad(across[1:] & across[:-1] & (label[1:, 1:] == label[:-1, 1:]), 1)  # 2x2 equal labels
        label[~(square[1:, 1:] | square[1:, :-1] | square[:-1, 1:] | square[:-1, :-1])] = -1
    return label


def extents(label: np.ndarray, count: int) -> np.ndarray:
    """The box around each label's pixels, [count, 4]; NaN for a label that has none."""
    boxes = np.full((count, 4), np.nan)
    for k in range(count):
        y, x = np.nonzero(label == k)
        if len(x):
            boxes[k] = x.min(), y.min(), x.max() + 1, y.max() + 1
    return boxes
