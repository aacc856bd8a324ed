"""How results look: text tables for scripts, HTML tables and a small curve for notebooks."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from math import isfinite

Cell = str | int | float


def format_bytes(count: float) -> str:
    """Bytes in binary units, three figures: `format_bytes(8_400_000)` is `'8.01 MiB'`."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    size, unit = float(count), units[0]
    for unit in units:
        if abs(size) < 1024 or unit == units[-1]:
            break
        size /= 1024
    # From 1000 on, `.3g` would write 1e+03.
    return f"{size:.0f} {unit}" if unit == "B" or abs(size) >= 999.5 else f"{size:.3g} {unit}"


def format_cell(value: Cell) -> str:
    """Four figures of a fraction, thousands divided in a count, text as it is."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def text_table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Columns padded to their widest cell; numbers to the right."""
    cells = [list(header), *[[format_cell(c) for c in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [bool(rows) and all(not isinstance(row[i], str) for row in rows) for i in range(len(header))]
    lines = ["  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def html_table(header: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = "") -> str:
    """A plain table that takes the notebook's own colours; everything from outside is escaped."""
    head = "".join(f'<th scope="col" style="text-align:left">{html.escape(h)}</th>' for h in header)
    body = "".join(
        "<tr>"
        + "".join(f'<td style="text-align:{"left" if isinstance(c, str) else "right"}">{html.escape(format_cell(c))}</td>' for c in row)
        + "</tr>"
        for row in rows
    )
    title = f'<caption style="text-align:left;font-weight:bold">{html.escape(caption)}</caption>' if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def svg_curve(values: Sequence[float], label: str, width: int = 420, height: int = 120) -> str:
    """One curve in the text's own colour, with its first, lowest and last value said in words."""
    points = [(i, v) for i, v in enumerate(values) if isfinite(v)]
    if len(points) < 2:
        return ""
    low, high = min(v for _, v in points), max(v for _, v in points)
    span = (high - low) or 1.0
    path = " ".join(
        f"{8 + i * (width - 16) / (len(values) - 1):.1f},{height - 8 - (v - low) / span * (height - 16):.1f}" for i, v in points
    )
    said = f"{label}: from {points[0][1]:.3f} to {points[-1][1]:.3f}, lowest {low:.3f}"
    return (
        f'<svg role="img" aria-label="{html.escape(said)}" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f'<polyline points="{path}" fill="none" stroke="currentColor" stroke-width="1.5"/></svg><div>{html.escape(said)}</div>'
    )


def svg_heatmap(rows: Sequence[str], columns: Sequence[str], values: Mapping[tuple[str, str], float], label: str) -> str:
    """Cells (row, column) → value in [−1, 1], the stronger the further from 0: blue above, orange below; others stay empty.

    Each cell has its number in it, and its row and column in a tooltip; lowest and highest are said in words.
    """
    if not values:
        return ""
    left, cell, line = 8 + 7 * max(map(len, rows)), 38, 18
    width, height = left + cell * len(columns) + 8, line * (len(rows) + 1) + 4
    texts = [_svg_text(left + cell * (i + 0.5), 13, name, "middle") for i, name in enumerate(columns)]
    texts += [_svg_text(left - 6, line * (i + 1) + 13, name, "end") for i, name in enumerate(rows)]
    for (row, column), value in values.items():
        x, y = left + cell * columns.index(column), line * (rows.index(row) + 1)
        colour, strength = "#1f77b4" if value >= 0 else "#d95f02", 0.75 * min(1.0, abs(value))
        texts.append(
            f"<g><title>{html.escape(f'{row}, {column}: {value:.4f}')}</title>"
            f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{line - 1}" fill="{colour}" fill-opacity="{strength:.3f}"/>'
            f"{_svg_text(x + cell / 2, y + 13, f'{value:.2f}', 'middle')}</g>"
        )
    said = html.escape(f"{label}: from {min(values.values()):.3f} to {max(values.values()):.3f}")
    return (
        f'<div style="overflow-x:auto">{said}<br/><svg role="img" aria-label="{said}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" fill="currentColor" font-size="11" font-family="sans-serif">{"".join(texts)}</svg></div>'
    )


def _svg_text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{html.escape(text)}</text>'
