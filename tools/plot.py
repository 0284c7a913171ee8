"""Draw what runs have logged: one chart a measure, one line a run, in a page that needs nothing else.

python -m tools.plot runs/fast_adapter runs/other --out out/curves.html
"""

import html
import json
from dataclasses import dataclass
from pathlib import Path

from core.config import UserError, run_script
from core.files import atomic, output_path

COLORS = ("#2a7de1", "#e1562a", "#2aa84a", "#9b3fd1", "#c9a200", "#00a3a3", "#d13f7f", "#777777")
WIDTH, HEIGHT, LEFT, BOTTOM = 460, 220, 56, 22


@dataclass(frozen=True)
class Config:
    """Options of the charts."""

    runs: tuple[str, ...] = ("runs/fast_adapter",)  # folders with a log.jsonl
    out: str = "out/curves.html"  # the page
    smooth: int = 1  # logged steps that are averaged


def read_log(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """A run's log as measure -> (step, value) pairs. UserError if there is none."""
    file = folder / "log.jsonl"
    if not file.is_file():
        raise UserError(f"{file}: no such file; give folders of runs")
    curves: dict[str, list[tuple[int, float]]] = {}
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1):
        try:
            values = json.loads(line)
            step = int(values.pop("step"))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{file}: line {number} is no logged step; remove it") from None
        for name, value in values.items():
            if isinstance(value, int | float) and abs(value) < float("inf"):  # no NaN either
                curves.setdefault(name, []).append((step, value))
    if not curves:
        raise UserError(f"{file}: holds no logged step; let the run log first")
    return curves


def smoothed(curve: list[tuple[int, float]], width: int) -> list[tuple[int, float]]:
    """Each value the mean of the last `width`."""
    values = [value for _, value in curve]
    windows = [values[max(0, i - width + 1) : i + 1] for i in range(len(values))]
    return [(step, sum(w) / len(w)) for (step, _), w in zip(curve, windows, strict=True)]


def chart(name: str, curves: dict[int, list[tuple[int, float]]]) -> str:
    """One measure as SVG. curves: number of the run -> points."""
    points = [point for curve in curves.values() for point in curve]
    (x0, x1), (y0, y1) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    across, up = (WIDTH - LEFT - 8) / ((x1 - x0) or 1), (HEIGHT - BOTTOM - 8) / ((y1 - y0) or 1)
    lines = []
    for number, curve in curves.items():
        path = " ".join(f"{LEFT + (x - x0) * across:.1f},{HEIGHT - BOTTOM - (y - y0) * up:.1f}" for x, y in curve)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{COLORS[number % len(COLORS)]}"/>')
    marks = [(LEFT - 4, HEIGHT - BOTTOM, y0, "end"), (LEFT - 4, 16, y1, "end"),
             (LEFT, HEIGHT - 6, x0, "start"), (WIDTH - 8, HEIGHT - 6, x1, "end")]  # fmt: skip
    text = "".join(f'<text x="{x}" y="{y}" text-anchor="{a}">{value:.4g}</text>' for x, y, value, a in marks)
    frame = f'<path d="M{LEFT} 8V{HEIGHT - BOTTOM}H{WIDTH - 8}" fill="none" stroke="gray"/>'
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}">{frame}{"".join(lines)}{text}</svg>'
    return f"<figure><figcaption>{html.escape(name)}</figcaption>{svg}</figure>"


def main(cfg: Config) -> None:
    out = output_path(cfg.out, ".html")
    if cfg.smooth < 1:
        raise UserError(f"--smooth {cfg.smooth}: at least 1")
    runs = [Path(name) for name in cfg.runs]
    logs = [read_log(run) for run in runs]
    charts = []
    for name in dict.fromkeys(name for log in logs for name in log):
        charts.append(chart(name, {i: smoothed(log[name], cfg.smooth) for i, log in enumerate(logs) if name in log}))
    legend = " ".join(
        f'<b style="color:{COLORS[i % len(COLORS)]}">{html.escape(str(run))}</b>' for i, run in enumerate(runs)
    )
    head = "<!doctype html><meta charset=utf-8><title>Runs</title>"
    head += "<style>body{font:13px system-ui} figure{display:inline-block} svg text{font-size:10px;fill:gray}</style>"
    page = f"{head}<p>{legend}</p>{''.join(charts)}\n"
    with atomic(out) as temporary:
        temporary.write_text(page)
    print(f"{len(charts)} charts of {len(runs)} runs: {out}")


if __name__ == "__main__":
    run_script(main, Config, positional="runs")
