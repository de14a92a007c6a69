#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Draws the panels of the dashboard as an SVG, from what a Prometheus answers to their queries.

Usage: qemu-scripts/dashboard.py PROMETHEUS-URL OUTPUT.svg [START END]

START and END are Unix times; without them, the last five minutes are drawn. Grafana draws the panels differently: this
shows what their queries give. Prints each query that has no data, and fails if Prometheus refuses one.
"""

import html
import json
import math
import pathlib
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

DASHBOARD = pathlib.Path(__file__).parent.parent / "packaging/monitoring/grafana-dashboard.json"
STEP = 5
# Pixels for a column and a row of the dashboard's grid, and the gap between panels.
COLUMN, ROW, GAP = 50, 24, 8
COLORS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf"]
# The most series that a panel names below its plot.
NAMED = 6


def ask(url, expression, start, end):
    """The series of an expression: labels, and pairs of a time and a value."""
    for variable, value in {
        "$instance": ".*",
        "$vm": ".*",
        "$__rate_interval": f"{STEP * 4}s",
    }.items():
        expression = expression.replace(variable, value)
    query = urllib.parse.urlencode(
        {"query": expression, "start": start, "end": end, "step": STEP}
    )
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query_range?{query}", timeout=30) as answer:
            result = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        sys.exit(f"{expression}: {error.read().decode()}")
    series = []
    for entry in result:
        values = [(at, float(value)) for at, value in entry["values"]]
        values = [(at, value) for at, value in values if math.isfinite(value)]
        if values:
            series.append((entry["metric"], values))
    return series


def legend(template, labels):
    for key, value in labels.items():
        template = template.replace("{{" + key + "}}", value)
    return template


def shown(value, unit):
    """A value with its unit, in a few characters."""
    if unit == "bytes":
        for suffix in ["B", "KiB", "MiB", "GiB"]:
            if abs(value) < 1024 or suffix == "GiB":
                return f"{value:.3g} {suffix}"
            value /= 1024
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if unit == "s" and 0 < abs(value) < 1:
        return f"{value * 1e3:.3g} ms" if abs(value) >= 1e-3 else f"{value * 1e6:.3g} µs"
    suffix = {"s": " s", "reqps": "/s", "ops": "/s"}.get(unit, "")
    return f"{value:.4g}{suffix}" if abs(value) < 10000 else f"{value / 1000:.4g} k{suffix}"


class Drawing:
    def __init__(self):
        self.parts = []

    def text(self, x, y, text, size=11, color="#333", anchor="start", weight="normal"):
        self.parts.append(
            f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" fill="{color}" '
            f'text-anchor="{anchor}" font-weight="{weight}">{html.escape(text)}</text>'
        )

    def box(self, x, y, width, height):
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="#fff" stroke="#ccc"/>'
        )

    def line(self, points, color):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{color}"/>')


def plot(drawing, left, top, width, height, series, unit, start, end):
    values = [value for _, points in series for _, value in points]
    low, high = min(0, *values), max(0, *values)
    if high == low:
        high = low + 1
    x_of = lambda at: left + (at - start) / (end - start) * width
    y_of = lambda value: top + height - (value - low) / (high - low) * height
    drawing.line([(left, top + height), (left + width, top + height)], "#999")
    drawing.text(left, top + 9, shown(high, unit), 9, "#777")
    for index, (_, points) in enumerate(series):
        drawing.line([(x_of(at), y_of(value)) for at, value in points], COLORS[index % len(COLORS)])


def panel(drawing, url, description, start, end):
    place, title = description["gridPos"], description["title"]
    x, y = place["x"] * COLUMN, place["y"] * ROW
    width, height = place["w"] * COLUMN - GAP, place["h"] * ROW - GAP
    if description["type"] == "row":
        drawing.text(x, y + ROW - GAP, title, 13, weight="bold")
        return
    unit = description.get("fieldConfig", {}).get("defaults", {}).get("unit")
    series = []
    for target in description["targets"]:
        answers = ask(url, target["expr"], start, end)
        if not answers:
            print(f"no data: {title}: {target['expr']}")
        for labels, points in answers:
            series.append((legend(target["legendFormat"], labels), points))
    drawing.box(x, y, width, height)
    drawing.text(x + 8, y + 16, title, 12, weight="bold")
    if not series:
        drawing.text(x + width / 2, y + height / 2, "no data", color="#999", anchor="middle")
    elif description["type"] == "stat":
        name, points = series[0]
        drawing.text(x + width / 2, y + height / 2 + 12, shown(points[-1][1], unit), 34, anchor="middle")
        drawing.text(x + width / 2, y + height - 12, name, 10, "#777", "middle")
    else:
        # What changes most comes first.
        series.sort(key=lambda it: -max(abs(value) for _, value in it[1]))
        below = (min(len(series), NAMED) + 1) // 2 * 13 + 14
        plot(drawing, x + 8, y + 24, width - 16, height - 28 - below, series, unit, start, end)
        for index, (name, points) in enumerate(series[:NAMED]):
            at = (x + 8 + index % 2 * (width / 2 - 8), y + height - below + 18 + index // 2 * 13)
            more = f" (and {len(series) - NAMED} more)" if index + 1 == NAMED < len(series) else ""
            text = f"{name}: {shown(points[-1][1], unit)}{more}"
            drawing.text(*at, text, 9, COLORS[index % len(COLORS)])


def main():
    if len(sys.argv) not in (3, 5):
        sys.exit(__doc__)
    url, output = sys.argv[1:3]
    end = int(float(sys.argv[4])) if len(sys.argv) == 5 else int(time.time())
    start = int(float(sys.argv[3])) if len(sys.argv) == 5 else end - 300
    dashboard = json.loads(DASHBOARD.read_text())
    drawing = Drawing()
    for description in dashboard["panels"]:
        panel(drawing, url, description, start, end)
    bottom = max(it["gridPos"]["y"] + it["gridPos"]["h"] for it in dashboard["panels"])
    width, height = 24 * COLUMN, bottom * ROW
    pathlib.Path(output).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 -8 {width + 8} {height + 16}" '
        'font-family="sans-serif">\n<rect x="-8" y="-8" width="100%" height="100%" fill="#f6f6f6"/>\n'
        + "\n".join(drawing.parts)
        + "\n</svg>\n"
    )


main()
