"""What a replay's record says: a table for terminal and README, and load, latency and ratio over one time axis."""

from __future__ import annotations

import html as html_module
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from variator.bench.drawing import MUTED, SERIES, draw_rows, standalone, style
from variator.bench.replay_record import ReplayRecord, Served
from variator.bench.wording import MISSING, clean, decimal, markdown_table, percent, significant, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ("policy", "in time", "95 % interval", "quality", "p50 ms", "p99 ms", "p99.9 ms", "ratios of the answers",
           "late", "given up", "refused", "failed", "switches", "padding", "pace", "all runs")  # fmt: skip
LABELS = 1
SIZE = (9.4, 6.4)


def title(record: ReplayRecord) -> str:
    """The workload in a line."""
    load = record.workload
    weights = "real weights" if record.model.real else "TOY: random weights"
    return clean(
        f"{record.model.id} ({weights}), {record.engine} {record.precision}, {record.machine.cpu}, "
        f"{record.machine.cores} cores | {load.kind}: {load.requests} requests in {load.seconds:.0f} s "
        f"({load.rate:.0f}/s, {load.load:.2f} of what ratio 1 can serve, peak {load.peak:.1f} x mean), "
        f"{load.mean_tokens:.0f} tokens on average | SLO {record.slo_ms:g} ms | {record.machine.date}"
    )


def rows(record: ReplayRecord) -> list[list[str]]:
    """A line per policy and source."""
    return [_row(served) for served in record.served]


def _row(served: Served) -> list[str]:
    low, high = served.interval
    name = served.policy if served.source == "replay" else f"{served.policy}, simulated x {served.replicas}"
    mix = ", ".join(f"{ratio}: {percent(share, 0)}" for ratio, share in served.mix.items() if share >= 0.005)
    return [
        name,
        percent(served.attainment, 2),
        f"{100 * low:.2f} to {100 * high:.2f}",
        MISSING if served.quality is None else decimal(served.quality, 4),
        *(significant(value) for value in (served.p50_ms, served.p99_ms, served.p999_ms)),
        mix or MISSING,
        *(str(count) for count in (served.late, served.dropped, served.refused, served.failed, served.switches)),
        percent(served.padding),
        decimal(served.pace, 2),
        _range(served),
    ]


def _range(served: Served) -> str:
    """Attainment and quality of all runs of a policy, from the least to the most of each."""
    if not served.rounds:
        return MISSING
    attained = [one for one, _ in served.rounds]
    reached = f"{100 * min(attained):.2f} to {percent(max(attained), 2)}"
    known = [mean for _, mean in served.rounds if mean is not None]
    return f"{reached}, {decimal(min(known), 4)} to {decimal(max(known), 4)}" if known else reached


def notes(record: ReplayRecord) -> list[str]:
    """What a reader must know beside the table."""
    found = [
        "In time: of all requests sent, from when each was due. Quality: of what was in time, relative to ratio 1."
    ]
    for served in record.served:
        if served.back_s is not None:
            found.append(f"{served.policy} ({served.source}): back at ratio 1 {served.back_s:.2f} s after the step.")
        if served.source == "replay":
            found.append(
                f"{served.policy}: requests were sent {served.sent_late_ms:.1f} ms late (p99); "
                f"{size(served.memory_bytes)} of memory not given back."
            )
    return [*found, *record.notes]


def show(record: ReplayRecord, console: Console) -> None:
    """Print it."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for index, column in enumerate(COLUMNS):
        table.add_column(Text(column), justify="left" if index < LABELS else "right", overflow="fold")
    for row in rows(record):
        table.add_row(*map(Text, row))
    console.print(Text(title(record), style="bold"), table, *(Text(note, style="dim") for note in notes(record)))


SHORT = ("policy", "in time", "quality", "p50 ms", "p99 ms", "ratios of the answers", "pace", "all runs")


def markdown(records: Sequence[ReplayRecord], source: str = "replay") -> str:
    """One table of several workloads: what was replayed, or what was simulated of it."""
    lines = []
    for record in records:
        for served, row in zip(record.served, rows(record), strict=True):
            if served.source == source:
                cells = dict(zip(COLUMNS, row, strict=True))
                lines.append([_short(record), *(cells[column] for column in SHORT)])
    return markdown_table(("workload", *SHORT), lines, LABELS + 1)


def _short(record: ReplayRecord) -> str:
    load = record.workload
    kind = load.kind if not Path(load.kind).suffixes else Path(load.kind).name.split(".")[0]
    return f"{kind}, {load.rate:.0f}/s, load {load.load:.2f}"


def picture(record: ReplayRecord, policy: str) -> str:
    """How a policy served a workload over time, as an SVG file of its own."""
    served = next(one for one in record.served if one.policy == policy and one.source == "replay")
    seconds = [row["second"] for row in served.by_second]
    ratios = list(served.mix)

    def load(axes: Axes) -> None:
        axes.step(seconds, [row["arrivals"] for row in served.by_second], where="post", color=SERIES[0])
        axes.set(ylabel="requests / s", title=f"{record.workload.kind}, policy {policy}, SLO {record.slo_ms:g} ms")
        axes.set_ylim(bottom=0)

    def latency(axes: Axes) -> None:
        known = [(row["second"] + 0.5, row["p99_ms"]) for row in served.by_second if row["p99_ms"] is not None]
        axes.plot([at for at, _ in known], [value for _, value in known], color=SERIES[1], marker=".")
        axes.axhline(record.slo_ms, color=MUTED, linestyle="--", linewidth=1)
        axes.set(ylabel="p99 latency, ms")
        axes.set_ylim(bottom=0)

    def mix(axes: Axes) -> None:
        shares = [[row["mix"].get(ratio, 0.0) for row in served.by_second] for ratio in ratios]
        axes.stackplot(seconds, shares, labels=[f"ratio {ratio}" for ratio in ratios], colors=SERIES, step="post")
        axes.set(ylabel="answers by ratio", xlabel="seconds", ylim=(0, 1))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(ratios))

    name = f"{record.workload.kind} through {policy}"
    with style():
        return standalone(draw_rows(SIZE, name, (load, latency, mix)))


def html(record: ReplayRecord) -> str:
    """The report: table, notes and a picture per policy, one file without requests to anywhere."""
    cells = "".join(
        "<tr>" + "".join(f"<td>{html_module.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows(record)
    )
    head = "".join(f"<th>{html_module.escape(column)}</th>" for column in COLUMNS)
    remarks = "".join(f"<p>{html_module.escape(note)}</p>" for note in notes(record))
    policies = dict.fromkeys(one.policy for one in record.served if one.source == "replay")
    pictures = "".join(f"<figure>{picture(record, policy)}</figure>" for policy in policies)
    style_ = (
        "body{font:15px/1.5 system-ui;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#1d2329;background:#fff}"
        "table{border-collapse:collapse;display:block;overflow-x:auto}td,th{padding:.3rem .7rem;text-align:right;"
        "border-bottom:1px solid #d8dde2;white-space:nowrap}td:first-child,th:first-child{text-align:left}"
        "figure{margin:2rem 0}svg{max-width:100%;height:auto}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Replay: {html_module.escape(record.workload.kind)}</title><style>{style_}</style>"
        f"<h1>{html_module.escape(record.workload.kind)}</h1><p>{html_module.escape(title(record))}</p>"
        f"<table><tr>{head}</tr>{cells}</table>{remarks}{pictures}</html>\n"
    )


if __name__ == "__main__":
    print(markdown([ReplayRecord.from_json(Path(place).read_text(encoding="utf-8")) for place in sys.argv[1:]]))
