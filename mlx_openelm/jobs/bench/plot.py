"""A benchmark as a picture: speeds of prompts and of decoding, and the times between tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...evaluation.timings import Result, Spread
from ...formats import atomic
from .turns import Measured

_COLOURS = ("#1f77b4", "#c55a11")
_MARKERS = {50: "o", 95: "s", 99: "^"}  # by percentile
_BARS = 0.8  # the share of the axis that bars fill
_LABELS = 5  # more sizes than these have slanted names


def draw(measured: Measured, path: Path, title: str) -> None:
    """Draw what was measured into a PNG, SVG or PDF, by the suffix of `path`; see `report.check_picture`."""
    with atomic.new_file(path) as file:
        figure(measured, title).savefig(file, format=path.suffix[1:].lower())


def figure(measured: Measured, title: str) -> Any:
    """The matplotlib figure: a group of bars for each size, in a colour for each program."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = [[measured.result(program, size) for size in measured.complete] for program in measured.programs]
    decodes = any(result.token_seconds for result in results[0])
    picture = Figure(figsize=(10 if decodes else 4.5, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(picture)
    count = max((result.repetitions for result in results[0]), default=0)
    note = f"medians of {count} runs, lines from the slowest to the fastest" if count > 1 else "one run"
    picture.suptitle(f"{title}: {note}", parse_math=False, fontsize=11)
    panels = picture.subplots(1, 3 if decodes else 1, squeeze=False)[0]
    handles = _draw_speeds(panels[0], "prompt (tokens/s)", [[result.prompt_tps for result in its] for its in results])
    names = [f"{program.name} {program.version}, {program.dtype}" for program in measured.programs]
    if decodes:
        _draw_speeds(panels[1], "decoding (tokens/s)", [[result.generation_tps for result in its] for its in results])
        handles += _draw_intervals(panels[2], results)
        names += [f"{percent}% of tokens" for percent in _MARKERS]
    for axes in panels:
        sizes = [size.label.replace(", ", "\n") for size in measured.complete]
        slant = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if len(sizes) > _LABELS else {}
        axes.set_xticks(range(len(sizes)), sizes, **slant)
        axes.set_xlim(-0.6, len(sizes) - 0.4)
        axes.set_xlabel("tokens: prompt + new")
        axes.set_axisbelow(True)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    picture.legend(handles, names, loc="outside lower center", ncols=5 if decodes else 1, frameon=False, fontsize=9)
    return picture


def _draw_speeds(axes: Any, label: str, speeds: Sequence[Sequence[Spread | None]]) -> list[Any]:
    """Bars as high as the medians, each with a line from the slowest run to the fastest; returns those of a program."""
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(lambda value, _: _short(value))
    drawn = []
    for n, its in enumerate(speeds):
        known = [(x, spread) for x, spread in zip(_places(n, speeds), its, strict=True) if spread is not None]
        xs, medians = [x for x, _ in known], [spread.median for _, spread in known]
        reach = [
            [spread.median - spread.low for _, spread in known],
            [spread.high - spread.median for _, spread in known],
        ]
        drawn.append(axes.bar(xs, medians, _BARS / len(speeds), color=_COLOURS[n]))
        if any(reach[0] + reach[1]):
            axes.errorbar(xs, medians, reach, fmt="none", ecolor="0.2", capsize=3, linewidth=1)
        for x, spread in known:
            axes.annotate(_short(spread.median), (x, spread.high), (0, 4), textcoords="offset points", ha="center",
                          fontsize=8)  # fmt: skip
    axes.margins(y=0.1)
    return drawn


def _draw_intervals(axes: Any, results: Sequence[Sequence[Result]]) -> list[Any]:
    """A line through the percentiles of each program's times, with a marker at each; returns one of every marker."""
    axes.set_ylabel("time per token (ms)")
    axes.set_yscale("log")
    for n, its in enumerate(results):
        for x, result in zip(_places(n, results), its, strict=True):
            times = {percent: 1e3 * seconds for percent, seconds in result.token_seconds.items()}
            axes.plot([x] * len(times), [*times.values()], color=_COLOURS[n], linewidth=1)
            for percent, milliseconds in times.items():
                axes.plot(x, milliseconds, _MARKERS[percent], color=_COLOURS[n], markersize=5)
    axes.yaxis.set_major_formatter(lambda value, _: _short(value))
    axes.yaxis.set_minor_formatter(lambda value, _: _short(value) if f"{value:.0e}"[0] in "25" else "")
    axes.tick_params(axis="y", which="minor", labelsize="medium")
    axes.margins(y=0.1)
    return [axes.plot([], [], marker, color="0.4", markersize=5)[0] for marker in _MARKERS.values()]


def _places(n: int, groups: Sequence[Sequence[Any]]) -> list[float]:
    """Where the bars of the n-th program stand, side by side with the others'."""
    width = _BARS / len(groups)
    return [size + (n - (len(groups) - 1) / 2) * width for size in range(len(groups[n]))]


def _short(value: float) -> str:
    """A number for a label."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
