"""A report as a picture: KL divergence over bits per weight and size, each family of formats in a colour."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..formats import atomic
from .recipes import RECIPES
from .report import Row

# Families by the beginning of their rows' names; the row of the model that is written has one of its own.
_FAMILIES = {"affine": ("affine",), "floating point": ("mxfp", "nvfp"), "mixed recipes": tuple(RECIPES)}
_THIS = "this: "
_SEPARATE = ("mixed recipes",)  # no line: these are choices of their own, not steps of one format
# Pixels by which a name must be closer to its own point than to any other.
_CLEARLY = 5.0
_COLOURS, _MARKERS = ("#1f77b4", "#c55a11", "#2e7d32", "#c62828"), ("o", "s", "^", "*")
# Where the label of a point may be, in points from it, the best place first, with the side of the text that is there.
_PLACES = [
    (distance * x, distance * y, side)
    for distance in (7, 14, 24, 36, 50)
    for x, y, side in ((1, 0.4, "left"), (-1, -0.4, "right"), (0, 1, "center"), (0, -1.4, "center"),
                       (1, -0.9, "left"), (-1, 0.9, "right"))
]  # fmt: skip


# A name, the rows in the order of their bits, a colour, and a marker.
_Family = tuple[str, list[Row], str, str]


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw a report into a PNG, SVG or PDF, by the suffix of `path`; see `report.check_picture`."""
    with atomic.new_file(path) as file:
        figure(rows, title).savefig(file, format=path.suffix[1:].lower())


def figure(rows: Sequence[Row], title: str) -> Any:
    """The matplotlib figure of a report; rows without a finite, positive divergence, as the full model's, are left out.

    Args:
        title: about the model and the text.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    picture = Figure(figsize=(8, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.subplots()
    picture.suptitle(title, parse_math=False)
    axes.set(xlabel="bits per weight", ylabel="KL divergence from the full model (nats per token)", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.08, y=0.08)
    axes.grid(alpha=0.3)
    points = [row for row in rows if 0 < row.kl_divergence < math.inf]
    if not points:
        return picture
    _add_sizes(axes, points[0])
    families = list(_families(points))
    for family, members, colour, marker in families:
        xs, ys = [row.bits_per_weight for row in members], [row.kl_divergence for row in members]
        size = 14 if marker == "*" else 6
        axes.plot(xs, ys, marker=marker, color=colour, label=family, linewidth=1, markersize=size, alpha=0.9,
                  linestyle="None" if family in _SEPARATE else "-")  # fmt: skip
    axes.legend(loc="upper right")
    arrow = axes.annotate(
        "better", (0.02, 0.03), (0.11, 0.14), xycoords="axes fraction", color="0.35", arrowprops={"arrowstyle": "->"}
    )
    _place_labels(picture, axes, families, [arrow, axes.get_legend()])
    return picture


def _add_sizes(axes: Any, row: Row) -> None:
    """A second axis above, with the size of the model in MB (1e6 bytes), which is proportional to its bits."""
    megabytes = row.size / 1e6 / row.bits_per_weight
    above = axes.secondary_xaxis("top", functions=(lambda bits: bits * megabytes, lambda size: size / megabytes))
    above.set_xlabel("size (MB)")


def _families(rows: Sequence[Row]) -> Iterator[_Family]:
    """The families that have rows."""
    starts = {**_FAMILIES, _THIS: (_THIS,)}
    for (family, names), colour, marker in zip(starts.items(), _COLOURS, _MARKERS, strict=True):
        members = [row for row in rows if row.name.startswith(names)]
        if members:
            label = textwrap.fill(members[-1].name, 36, subsequent_indent="  ") if family == _THIS else family
            yield label, sorted(members, key=lambda row: row.bits_per_weight), colour, marker


def _place_labels(picture: Any, axes: Any, families: Sequence[_Family], taken: list[Any]) -> None:
    """Name each point in the colour of its family, where the name covers no other, no point and as little as can be."""
    from matplotlib.patheffects import withStroke

    picture.draw_without_rendering()
    picture.set_layout_engine("none")  # or the places would move
    renderer = picture.canvas.get_renderer()
    halo = [withStroke(linewidth=3, foreground="white")]  # so that a name on a line can be read
    inside = axes.get_window_extent(renderer)
    boxes = [artist.get_window_extent(renderer) for artist in taken]
    curves = {
        family: axes.transData.transform([(row.bits_per_weight, row.kl_divergence) for row in rows])
        for family, rows, _, _ in families
    }
    dots = [dot for curve in curves.values() for dot in curve]
    lines = [
        spot
        for family, curve in curves.items()
        if family not in _SEPARATE
        for start, end in pairwise(curve)
        for spot in _between(start, end)
    ]
    named = [(row, colour) for _, rows, colour, _ in families for row in rows]
    for index, (row, colour) in enumerate(named):
        label = axes.annotate(
            "this" if row.name.startswith(_THIS) else row.name.removeprefix("affine "),
            (row.bits_per_weight, row.kl_divergence),
            (0, 0),
            textcoords="offset points",
            fontsize=9,
            va="center",
            color=colour,
            path_effects=halo,
        )
        costs = {}
        for rank, (x, y, side) in enumerate(_PLACES):
            label.set(position=(x, y), ha=side)
            box = label.get_window_extent(renderer).padded(3)
            is_outside = not (inside.x0 < box.x0 and box.x1 < inside.x1 and inside.y0 < box.y0 and box.y1 < inside.y1)
            covered = sum(box.overlaps(other) for other in boxes) + int(box.padded(4).count_contains(dots))
            # A name close to another point might be taken for that one's, unless its own is clearly closer.
            distances = [_distance(box, dot) for dot in dots]
            own = distances.pop(index)
            unclear = max(0, round(own + _CLEARLY - min(distances, default=own + _CLEARLY)))
            near = sum(distance < 14 for distance in distances)
            costs[x, y, side] = is_outside, covered, unclear, int(box.count_contains(lines)) + 3 * near + rank
        x, y, side = min(costs, key=costs.__getitem__)
        label.set(position=(x, y), ha=side)
        boxes.append(label.get_window_extent(renderer))


def _distance(box: Any, dot: Any) -> float:
    """Pixels between a point and the nearest of a box; 0 inside."""
    return math.dist(dot, (min(max(dot[0], box.x0), box.x1), min(max(dot[1], box.y0), box.y1)))


def _between(start: Any, end: Any, spacing: float = 4.0) -> Iterator[Any]:
    """Spots on the line between two points, in pixels."""
    count = max(1, round(math.dist(start, end) / spacing))
    return (start + (end - start) * part / count for part in range(count + 1))
