"""The picture of a report, read back from matplotlib's objects."""

from __future__ import annotations

import functools
import math
from itertools import combinations
from pathlib import Path
from typing import Any

from mlx_openelm.quantization.report import Row
from mlx_openelm.quantization.report_plot import draw, figure

import pytest

pytest.importorskip("matplotlib")

# Bits and divergences of the tiny model.
MEASURED = {
    "not quantized": (16.0, 0.0), "affine 2-bit": (2.52, 1.71), "affine 3-bit": (3.52, 0.315),
    "affine 4-bit": (4.52, 0.0714), "affine 5-bit": (5.52, 0.0156), "affine 6-bit": (6.51, 0.00406),
    "affine 8-bit": (8.51, 0.00039), "mxfp4": (4.26, 0.116), "nvfp4": (4.51, 0.0798), "mxfp8": (8.26, 0.00613),
    "mixed_2_6": (3.71, 1.02), "mixed_3_4": (3.81, 0.227), "mixed_3_6": (4.41, 0.202), "mixed_4_6": (5.11, 0.0479),
}  # fmt: skip
THIS = "this: --target-bpw 4.5 --method awq,gptq --sequence-length 512"


def rows(**more: tuple[float, float]) -> list[Row]:
    return [Row(name, bits, round(bits * 312_500), 9.0, kl) for name, (bits, kl) in (MEASURED | more).items()]


def labels(picture: Any) -> dict[str, Any]:
    return {text.get_text(): text for text in picture.axes[0].texts if text.get_text() != "better"}


@functools.cache
def drawn(this: tuple[float, float] | None = None) -> Any:
    """The picture of `MEASURED`, and of `THIS` at a point, laid out."""
    picture = figure(rows(**({} if this is None else {THIS: this})), "Quantizations of a_$b$")
    picture.draw_without_rendering()
    return picture


BESIDE = (4.5, 0.0798)  # where nvfp4 is


def test_families_are_lines_of_one_colour_in_the_order_of_bits() -> None:
    axes = drawn(BESIDE).axes[0]
    lines = {line.get_label().split()[0]: line for line in axes.lines}
    assert list(lines) == ["affine", "floating", "mixed", "this:"]
    assert list(lines["affine"].get_xdata()) == [2.52, 3.52, 4.52, 5.52, 6.51, 8.51]
    assert list(lines["floating"].get_xdata()) == [4.26, 4.51, 8.26]
    assert list(lines["mixed"].get_ydata()) == [1.02, 0.227, 0.202, 0.0479]
    assert len({line.get_color() for line in axes.lines}) == 4
    styles = {name: line.get_linestyle() for name, line in lines.items()}
    assert styles == {"affine": "-", "floating": "-", "mixed": "None", "this:": "-"}  # the recipes have no order
    assert lines["this:"].get_label().replace("\n ", "") == THIS  # in full, in the legend


def test_title_axes_and_the_arrow() -> None:
    picture = drawn()
    axes = picture.axes[0]
    assert picture.get_suptitle() == "Quantizations of a_$b$"
    assert (axes.get_xlabel(), axes.get_yscale()) == ("bits per weight", "log")
    assert axes.get_ylabel() == "KL divergence from the full model (nats per token)"
    (above,) = axes.child_axes
    assert above.get_xlabel() == "size (MB)"
    assert above.get_xlim() == pytest.approx([bits * 0.3125 for bits in axes.get_xlim()], rel=1e-6)
    (better,) = [text for text in axes.texts if text.get_text() == "better"]
    assert better.arrow_patch is not None
    assert better.xy[0] < better.get_position()[0] and better.xy[1] < better.get_position()[1]


@pytest.mark.parametrize(
    "this",
    [
        BESIDE,
        *(pytest.param(at, marks=pytest.mark.slow) for at in (None, (4.5, 0.05), (2.4, 1.8), (8.6, 0.0003))),
    ],
)
def test_labels_cover_neither_each_other_nor_points_nor_the_frame(this: tuple[float, float] | None) -> None:
    picture = drawn(this)
    axes, renderer = picture.axes[0], picture.canvas.get_renderer()
    texts = labels(picture)
    assert len(texts) == 13 + (this is not None) and {"2-bit", "mxfp4", "mixed_3_6"} <= set(texts)
    boxes = {name: text.get_window_extent(renderer) for name, text in texts.items()}
    boxes |= {"legend": axes.get_legend().get_window_extent(renderer)}
    assert [pair for pair in combinations(boxes, 2) if boxes[pair[0]].overlaps(boxes[pair[1]])] == []
    frame = axes.get_window_extent(renderer)
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 <= box.y1 <= frame.y1
               for box in boxes.values())  # fmt: skip
    points = axes.transData.transform([point for line in axes.lines for point in zip(*line.get_data(), strict=True)])
    assert not any(box.count_contains(points) for box in boxes.values())


def test_a_label_is_beside_its_own_point() -> None:
    picture = drawn()
    axes, renderer = picture.axes[0], picture.canvas.get_renderer()
    points = {
        name.removeprefix("affine "): axes.transData.transform(MEASURED[name])
        for name in MEASURED
        if name != "not quantized"
    }
    for name, text in labels(picture).items():
        box = text.get_window_extent(renderer)
        (x0, x1), (y0, y1) = box.intervalx, box.intervaly
        away = {other: math.hypot(max(x0 - x, 0, x - x1), max(y0 - y, 0, y - y1)) for other, (x, y) in points.items()}
        assert min(away, key=away.__getitem__) == name
        assert sorted(away.values())[1] - away[name] > 1  # 4-bit and nvfp4 are 8 pixels apart


def test_rows_outside_of_the_plot_are_left_out() -> None:
    assert labels(figure([Row("not quantized", 16, 1000, 9.0, 0.0)], "title")) == {}
    few = [Row("affine 2-bit", 2.5, 1000, 9.0, float("inf")), Row("mxfp4", 4.3, 1000, 9.0, 0.1)]
    assert set(labels(figure(few, "title"))) == {"mxfp4"}


@pytest.mark.parametrize(
    "ending,head",
    [
        ("png", b"\x89PNG"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("svg", b"<?xml"), ("pdf", b"%PDF"))),
    ],
)
def test_a_picture_is_written(ending: str, head: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"report.{ending}"
    draw(rows()[:5], path, "title")
    content = path.read_bytes()
    assert content.startswith(head) and len(content) > 1000
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
