"""Tables as text and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

Table = Sequence[Sequence[str]]


def text(table: Table) -> list[str]:
    """Lines with columns as wide as their longest cell, all but the first to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row)) for row in table)
    return [line.rstrip() for line in lines]


def markdown(table: Table) -> list[str]:
    """Lines of a Markdown table."""
    head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in table]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]


def render(table: Table, style: str) -> list[str]:
    """`text` or `markdown`."""
    return markdown(table) if style == "markdown" else text(table)


def percent(value: float | None, error: float | None = None) -> str:
    """A share in percent, with its standard error if there is one."""
    if value is None:
        return "-"
    return f"{100 * value:.2f}" + (f" ± {100 * error:.2f}" if error is not None else "")
