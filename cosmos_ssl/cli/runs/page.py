"""Runs as one page of HTML that needs nothing beside it: the table, curves, config differences, pictures, warnings.

Python writes the tables and packs the curves; ``static/page.js`` sorts, switches and draws, the curves by uPlot.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from cosmos_ssl.cli.runs.gallery import Gallery
from cosmos_ssl.cli.runs.reading import Run
from cosmos_ssl.cli.runs.report import NOT_GIVEN, config_differences, metric_names, remarks, shown
from cosmos_ssl.cli.runs.series import Series, lower_is_better, summary, thinned
from cosmos_ssl.cli.runs.table import facts_shown, value_shown
from cosmos_ssl.evaluation.document import document

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c")
"""Okabe and Ito's, which people of any colour vision tell apart, without yellow and black, which one of light and dark
hides.
"""
DASHES = ((), (8, 4), (2, 3), (10, 3, 2, 3), (16, 5))
"""Lengths of dashes and gaps in pixels, by which runs differ that share a colour."""

_BUCKETS = 200_000  # of all curves together
_MOST, _LEAST = 400, 100  # of a curve, which has two points in each
_DRAWN = 12_000  # of all runs in one chart
_WARNINGS = 200


def runs_page(
    runs: Sequence[Run], metrics: Sequence[str], gallery: Gallery, *, sort: str | None, refresh: float | None
) -> str:
    """The page. ``metrics``: the columns of its table; all can be drawn. ``refresh``: it renews itself so often, in
    seconds.
    """
    names = sorted(metric_names(runs), key=lambda name: (name.count("/") == 0, name))
    pictures, left_out = gallery.pictures(runs)
    about = {
        "runs": [
            {"name": run.name, "batch": run.batch, "flops": run.flops, "colour": _colour(n), "dash": _dash(n)}
            for n, run in enumerate(runs)
        ],
        "metrics": names,
        "charts": list(dict.fromkeys([*metrics[:1], "loss"])) if "loss" in names else list(metrics[:1] or names[:1]),
        "refresh": refresh,
    }
    body = (
        f"<header><h1>{len(runs)} {'run' if len(runs) == 1 else 'runs'}</h1>{_subtitle(sort, refresh)}</header>\n<main>"
        + _section("runs", "Runs", _switches() + _table(runs, metrics) + _notes(runs))
        + _section(
            "curves", "Curves", _static("controls.html") if names else "<p>There are no rows of metrics yet.</p>"
        )
        + _section("configs", "Where the configs differ", _differences(runs))
        + _section("pictures", "Pictures", _pictures(pictures, left_out))
        + _section("warnings", "Warnings of the logs", _warnings(runs))
        + f"</main>\n{_licence()}<dialog><button autofocus>Close</button><img alt=''></dialog>\n"
        + _data("data", about)
        + "".join(_data(f"m{n}", _curves(runs, name, len(names))) for n, name in enumerate(names))
        + _data("images", pictures)
    )
    again = "" if refresh is None else f'<noscript><meta http-equiv="refresh" content="{refresh:g}"></noscript>\n'
    style = _static("uplot/uPlot.min.css") + _static("page.css")
    scripts = [_static("uplot/uPlot.iife.min.js"), _static("page.js")]
    return document(f"{len(runs)} runs", body, style=style, scripts=scripts, head=again)


@cache
def _static(name: str) -> str:
    return (files(__package__) / "static" / name).read_text("utf-8")


def _data(name: str, value: Any) -> str:
    """JSON for the script; no ``<`` in it, so nothing in it ends the element."""
    text = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def _section(name: str, title: str, content: str) -> str:
    return f'<section id="{name}" aria-labelledby="h-{name}"><h2 id="h-{name}">{title}</h2>{content}</section>\n'


def _subtitle(sort: str | None, refresh: float | None) -> str:
    text = f"Written {time.strftime('%Y-%m-%d %H:%M:%S')}" + (f"; sorted by {escape(sort)}" if sort else "")
    if refresh is None:
        return f'<p class="soft">{text}</p>'
    return (
        f'<p class="soft">{text}</p><p id="live"><label><input type="checkbox" id="renew" checked> renew every '
        f"{refresh:g} s while runs go on</label></p>"
    )


# ---------------------------------------------------------------------------- tables


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _dash(number: int) -> tuple[int, ...]:
    return DASHES[number // len(COLOURS) % len(DASHES)]


def _swatch(number: int) -> str:
    return (
        f'<svg width="30" height="10" aria-hidden="true"><line x1="1" x2="29" y1="5" y2="5" stroke="{_colour(number)}" '
        f'stroke-width="3" stroke-dasharray="{" ".join(map(str, _dash(number)))}"/></svg>'
    )


def _switches() -> str:
    return '<p><button id="on">All on</button> <button id="off">All off</button></p>'


def _head(name: str, first: str, which: str = "") -> str:
    """A column's head: a button that sorts, in the ``first`` direction at first. ``which`` of a metric's values."""
    label = re.sub(r"([/.])(?=\w{3})", r"\1<wbr>", escape(name)) + (f" <small>{which}</small>" if which else "")
    return (
        f'<th scope="col" aria-sort="none" data-key="{escape(f"{name} {which}".strip())}" data-first="{first}">'
        f'<button type="button">{label}</button></th>'
    )


def _cell(value: float | str | None, text: str) -> str:
    """A cell that sorts by ``value``, and after all others where that is None."""
    kind = ' class="number"' if not isinstance(value, str) else ""
    given = "" if value is None else f' data-v="{escape(str(value))}"'
    return f"<td{kind}{given}>{escape(text)}</td>"


def _framed(name: str, title: str, heads: str, rows: Sequence[str]) -> str:
    """A table that scrolls by itself, also by keys."""
    return (
        f'<div class="table" tabindex="0" role="region" aria-label="{title}"><table id="{name}"><thead><tr>{heads}'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _table(runs: Sequence[Run], metrics: Sequence[str]) -> str:
    known = any(run.mfu is not None for run in runs)
    heads = _head("run", "ascending") + _head("state", "ascending")
    for name in ("step", "samples", "hours", "samples/s", *(["MFU"] if known else [])):
        heads += _head(name, "descending")
    for name in metrics:
        first = "ascending" if lower_is_better(name) else "descending"
        heads += _head(name, first, "last") + _head(name, first, "best")
    rows = []
    for number, run in enumerate(runs):
        cells = (
            f'<th scope="row" data-v="{escape(run.name)}"><label><input type="checkbox" checked data-run="{number}">'
            f'{_swatch(number)}<span class="name">{escape(run.name)}</span></label></th>'
            f'<td data-v="{run.state}"><span class="state {run.state}">{run.state}</span></td>'
        )
        values = (run.step, run.samples, run.hours, run.rate)
        cells += "".join(map(_cell, values, facts_shown(run)))
        cells += _cell(run.mfu, "-" if run.mfu is None else f"{run.mfu:.1%}") if known else ""
        for name in metrics:
            cells += _metric_cells(run, name)
        rows.append(f'<tr data-run="{number}">{cells}</tr>')
    return _framed("all-runs", "all runs", heads, rows)


def _metric_cells(run: Run, name: str) -> str:
    if name not in run.series:
        return 2 * _cell(None, "-")
    told = summary(run.series[name], name)
    best = f"{value_shown(told['best'])} at {told['best_step']:,}"
    return _cell(told["last"], value_shown(told["last"])) + _cell(told["best"], best)


def _differences(runs: Sequence[Run]) -> str:
    differences = config_differences(runs)
    if not differences:
        return "<p>In nothing.</p>"
    heads = _head("run", "ascending") + "".join(_head(key, "ascending") for key in differences)
    rows = [
        f'<tr data-run="{number}"><th scope="row" data-v="{escape(run.name)}">{_swatch(number)}{escape(run.name)}</th>'
        + "".join(_config_cell(values[number]) for values in differences.values())
        + "</tr>"
        for number, run in enumerate(runs)
    ]
    return _framed("all-configs", "config differences", heads, rows)


def _config_cell(value: Any) -> str:
    if value == NOT_GIVEN:
        return f'<td class="soft">{NOT_GIVEN}</td>'
    plain = type(value) in (int, float)
    return _cell(value if plain else shown(value), shown(value))


def _notes(runs: Sequence[Run]) -> str:
    lines = "".join(f"<li><b>{escape(names)}</b> {escape(text)}</li>" for names, text in remarks(runs, warnings=False))
    return f'<ul class="notes">{lines}</ul>' if lines else ""


# ---------------------------------------------------------------------------- what is drawn and shown


def _curves(runs: Sequence[Run], name: str, metrics: int) -> list[dict[str, str] | None]:
    """One metric's curve of each run, packed."""
    buckets = max(_LEAST, min(_MOST, _DRAWN // len(runs), _BUCKETS // (metrics * len(runs))))
    return [_packed(run.series[name], buckets) if name in run.series else None for run in runs]


def _packed(series: Series, buckets: int) -> dict[str, str]:
    """Little-endian arrays in base64: steps (uint32) and values (float32), and the means of buckets with theirs."""
    curve = thinned(series, buckets)
    found = {"s": _base64(curve.steps, "<u4"), "v": _base64(curve.values, "<f4")}
    if curve.means is not None and curve.mean_steps is not None:
        found |= {"t": _base64(curve.mean_steps.round(), "<u4"), "m": _base64(curve.means, "<f4")}
    return found


def _base64(values: NDArray[np.number[Any]], kind: str) -> str:
    import numpy as np

    most = np.finfo(np.float32).max
    return base64.b64encode(np.clip(values, -most, most).astype(kind).tobytes()).decode()


def _pictures(pictures: Sequence[Mapping[str, Mapping[int, str]]], left_out: int) -> str:
    kinds = sorted({kind for of_run in pictures for kind in of_run})
    if not kinds:
        return "<p>There are none.</p>"
    options = "".join(f"<option>{escape(kind)}</option>" for kind in kinds)
    told = f'<p class="soft">{left_out:,} pictures of other steps are left out, to keep this page small.</p>'
    return (
        f'<div class="controls"><label>what <select id="kind">{options}</select></label>'
        '<label>after step <input type="range" id="at" min="0" step="1"><output id="at-step" for="at"></output></label>'
        f'</div>{told if left_out else ""}<div id="gallery"></div>'
    )


def _warnings(runs: Sequence[Run]) -> str:
    found = []
    for number, run in enumerate(runs):
        if run.warnings:
            lines = "".join(
                f"<li><time>{each.time}</time> {escape(each.text)}"
                + (f" <small>({each.count:,} times, last then)</small>" if each.count > 1 else "")
                + "</li>"
                for each in run.warnings[-_WARNINGS:]
            )
            more = f", the last {_WARNINGS} shown" if len(run.warnings) > _WARNINGS else ""
            count = sum(each.count for each in run.warnings)
            found.append(
                f'<details data-run="{number}"><summary>{_swatch(number)}{escape(run.name)}: {count:,}{more}</summary>'
                f"<ul>{lines}</ul></details>"
            )
    return "".join(found) or "<p>There are none.</p>"


def _licence() -> str:
    return (
        f"<footer><details><summary>Curves by uPlot</summary><pre>{escape(_static('uplot/LICENSE'))}</pre></details>"
        "</footer>\n"
    )
