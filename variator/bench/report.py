"""The HTML report of a benchmark record: one file, no external requests, readable in light and dark and on a phone.

`write` is called by `variator bench --html`. The plots are those of `bench.plots`, the tables those of
`bench.table`. Nothing is stated that is not computed from the record.
"""

from __future__ import annotations

import math
from pathlib import Path

from variator.bench import table, wording
from variator.bench.plots import plots, series_of
from variator.bench.record import Record, Result
from variator.files import write_atomically
from variator.toolkit.plugin_format import in_order

TEMPLATE = Path(__file__).with_name("report.html.jinja")
TOLERATED_DROP = 0.02


def write(record: Record, path: Path) -> None:
    """Write the report beside `path` and rename it into place.

    Raises:
        VariatorError: If the file cannot be written; an older report is kept.
    """
    write_atomically(path, html(record))


def html(record: Record) -> str:
    """The whole page as text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        record=record,
        header=table.header(record),
        finding=finding(record),
        caveats=caveats(record),
        plots=plots(record),
        grids=table.grids(record),
        absent=table.not_measured(record),
        clean=wording.clean,
    )


# What the record says -------------------------------------------------------------------------------------------------


def finding(record: Record) -> str:
    """The main finding in a sentence or two: our best configuration at the largest shape against the fastest peer."""
    if not record.results:
        return "The record holds no latency."
    shape = table.largest(table.shapes(record))
    best = headline(record, shape)
    if best is None:
        return f"Only peers were measured at {table.tokens(shape)}."
    peer = table.peer_to_beat(record, shape)
    ours = f"At {table.tokens(shape)} tokens, ratio {best.ratio} in {series_of(best)}"
    if peer:
        factor = wording.times(best.throughput_per_s / peer.throughput_per_s if peer.throughput_per_s else float("nan"))
        text = f"{ours} answers {factor} as many sequences per second as the fastest peer, {series_of(peer)}"
    else:
        text = f"{ours} runs {wording.times(best.speedup)} as fast as ratio 1 of the same engine (no peer was measured)"
    if not (best.stable and (peer is None or peer.stable)):
        text += "; these timings are unstable"
    return f"{text}. {_cost(record, best, peer)}"


def headline(record: Record, shape: table.Shape) -> Result | None:
    """Our fastest compressed row that loses at most 2 % of the main score; failing that our fastest stable one."""

    def merit(row: Result) -> tuple[bool, bool, bool, float]:
        return row.ratio != 1, _tolerable(record, row), row.stable, row.throughput_per_s

    return max((row for row in table.at(record, shape) if not table.is_peer(row)), key=merit, default=None)


def caveats(record: Record) -> list[str]:
    """What a reader must know before believing a figure."""
    found = []
    if table.untrained_ratios(record):
        ratios = ", ".join(map(str, in_order(table.untrained_ratios(record))))
        found.append(f"{table.UNTRAINED}. Scores at ratio {ratios} mean nothing.")
    if not record.model.real:
        found.append("Toy model with random weights: only the timings and FLOPs mean anything.")
    shaky = sum(not row.stable for row in record.results)
    if shaky:
        total = wording.count(len(record.results), "timing")
        found.append(f"{shaky} of {total} unstable: marked in the tables, drawn hollow in the plots.")
    return found


def _tolerable(record: Record, row: Result) -> bool:
    score = table.main_quality(record).get(table.key(row))
    trained = row.ratio not in table.untrained_ratios(record)
    return score is not None and trained and table.relative_drop(score) <= TOLERATED_DROP


def _cost(record: Record, best: Result, peer: Result | None) -> str:
    scores = table.main_quality(record)
    score = scores.get(table.key(best))
    if best.ratio in table.untrained_ratios(record):
        return "Its plugin is untrained, so nothing can be said about its quality."
    if score is None:
        return "Its quality was not measured."
    drop = table.relative_drop(score)
    change = f"{'costs' if drop >= 0 else 'gains'} {wording.percent(abs(drop))} of" if math.isfinite(drop) else "has"
    ours, reference = wording.decimal(score.value, 4), wording.decimal(score.reference, 4)
    values = f"{ours} against {reference}, {wording.clean(score.split)}"
    if peer and table.key(peer) in scores:
        values += f"; the peer has {wording.decimal(scores[table.key(peer)].value, 4)}"
    text = f"It {change} the {wording.clean(score.metric)} score ({values})."
    if best.ratio != 1 and best.stable and _tolerable(record, best):
        limit = wording.percent(TOLERATED_DROP, 0)
        text += f" It is the fastest compressed configuration with a stable timing and a loss of at most {limit}."
    return text
