"""What the HTML report of a benchmark record says, and that it is one safe, self-contained file."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.bench.records import make_record, make_result, unstable, untrain
from variator.bench import drawing, plots, report, table, wording
from variator.bench.plots import Point
from variator.bench.record import Quality, Record
from variator.errors import VariatorError

EVIL = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'
EMPTY: dict[str, Any] = {
    "results": [],
    "quality": [],
    "flops": [],
    "memory": [],
    "plugins": [],
    "disk": {},
    "notes": [],
    "versions": {},
}


@pytest.fixture(scope="module")
def full_page() -> str:
    return report.html(make_record())


class Page(HTMLParser):
    """The elements, addresses, ids and text of a page, and the record in its details."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.json = ""
        self._path: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._path.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        while self._path and self._path.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "pre" in self._path:
            self.json += data


def test_everything_from_the_record_is_escaped() -> None:
    record = make_record(command=EVIL, notes=[EVIL], versions={EVIL: EVIL}, disk={EVIL: 5})
    rows = [dataclasses.replace(row, engine=EVIL, precision=EVIL) for row in record.results]
    quality = [Quality(4, EVIL, EVIL, EVIL, EVIL, 0.8, 0.9)]
    flops = record.flops
    model = dataclasses.replace(record.model, id=EVIL)
    machine = dataclasses.replace(record.machine, cpu=EVIL, features=[EVIL])
    evil = dataclasses.replace(record, results=rows, quality=quality, flops=flops, model=model, machine=machine)
    page = Page(report.html(evil))
    assert not {"script", "img"} & set(page.tags)
    assert not [key for key, _ in page.attributes if key.startswith("on")]


def test_the_page_refers_to_nothing_outside_itself(full_page: str) -> None:
    text, page = full_page, Page(full_page)
    addresses = [value for key, value in page.attributes if key in ("src", "href", "xlink:href", "srcset", "data")]
    assert addresses and all(value.startswith("#") for value in addresses)
    assert not {"link", "script", "iframe", "img", "object"} & set(page.tags)
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_references_inside_the_drawings_have_one_target(full_page: str) -> None:
    page = Page(full_page)
    ids = [value for key, value in page.attributes if key == "id"]
    targets = {value[1:] for key, value in page.attributes if key == "xlink:href"}
    assert len(ids) == len(set(ids)) and targets <= set(ids)


def test_the_record_can_be_read_back_from_the_page() -> None:
    record = make_record(command=EVIL, results=[])
    assert Record.from_json(Page(report.html(record)).json) == record


def test_a_full_record_has_every_plot_and_table(full_page: str) -> None:
    length_panels = 3  # one per engine and precision
    assert full_page.count("<svg") == len(("quality", "speed-up", "FLOPs", "memory", "disk")) + length_panels
    assert all(f"<h2>{found.title}</h2>" in full_page for found in table.grids(make_record()))


def test_drawings_follow_the_colour_scheme(full_page: str) -> None:
    assert "prefers-color-scheme: dark" in full_page
    for placeholder, variable in drawing.VARIABLES.items():
        assert placeholder not in full_page and (variable in full_page)


def test_untrained_plugins_are_marked_and_nothing_is_said_about_their_quality(full_page: str) -> None:
    assert "UNTRAINED" not in full_page
    record = untrain(make_record())
    text = report.html(record)
    assert all(table.UNTRAINED in title for title in re.findall("<h2>((?!How).*?)</h2>", text))
    assert table.UNTRAINED in report.caveats(record)[0]
    assert "untrained" in report.finding(record) and "costs" not in report.finding(record)


def test_unstable_timings_are_counted_marked_and_admitted_in_the_finding() -> None:
    record = make_record()
    assert report.caveats(record) == [] and "unstable" not in report.finding(record)
    shaky = unstable(unstable(record, "openvino"), "onnxruntime")
    assert "36 of 42 timings unstable" in report.caveats(shaky)[0]
    assert "unstable" in report.finding(shaky)
    assert report.html(shaky).count('<tr class="unstable">') == 36


def test_the_finding_states_what_the_record_holds() -> None:
    rows = [
        make_result("openvino", "bf16", 1, 2.0),
        make_result("openvino", "bf16", 4, 5.0),
        make_result("openvino", "bf16", 8, 8.0),
        make_result("peer:stock", "int8", 1, 2.0),
    ]
    quality = [
        Quality(4, "openvino", "bf16", "spearman", "dev", 0.792, 0.8),
        Quality(8, "openvino", "bf16", "spearman", "dev", 0.7, 0.8),
    ]
    text = report.finding(make_record(results=rows, quality=quality))
    factor = wording.times(2.5)
    assert f"ratio 4 in openvino bf16 answers {factor} as many sequences per second" in text
    assert "as the fastest peer, stock int8." in text
    assert "costs 1.0 % of the spearman score (0.7920 against 0.8000, dev)" in text


def test_a_loss_above_the_limit_is_stated_not_hidden() -> None:
    rows = [make_result("openvino", "bf16", 8, 8.0)]
    quality = [Quality(8, "openvino", "bf16", "spearman", "dev", 0.7, 0.8)]
    text = report.finding(make_record(results=rows, quality=quality))
    assert "no peer was measured" in text and "costs 12.5 %" in text and "at most" not in text


def test_a_stable_timing_is_preferred_for_the_finding() -> None:
    rows = [make_result("openvino", "bf16", 4, 9.0, stable=False), make_result("openvino", "fp32", 4, 3.0)]
    best = report.headline(make_record(results=rows, quality=[]), (8, 128))
    assert best is not None and best.precision == "fp32"


def test_pareto_front_holds_exactly_the_unbeaten_points() -> None:
    slow, middle, fast = Point(1, 0.9, "slow"), Point(2, 0.8, "middle"), Point(3, 0.5, "fast")
    beaten = [
        Point(1.5, 0.8, "beaten by middle"),
        Point(2, 0.7, "as fast as middle"),
        Point(0.5, 0.9, "as good as slow"),
        Point(2.5, 0.4, "beaten by fast"),
    ]
    assert plots.pareto([beaten[0], fast, beaten[1], slow, beaten[2], middle, beaten[3]]) == [slow, middle, fast]
    assert plots.pareto([]) == []
    assert plots.pareto([fast]) == [fast]


def test_quality_is_joined_with_the_largest_shape_by_engine_precision_and_ratio() -> None:
    rows = [
        make_result("openvino", "bf16", 4, 4.0),
        make_result("openvino", "bf16", 4, 9.0, sequence=64),
        make_result("openvino", "fp32", 4, 2.0),
        make_result("peer:stock", "fp32", 1, 1.0),
    ]
    quality = [
        Quality(4, "openvino", "bf16", "spearman", "dev", 0.85, 0.87),
        Quality(1, "peer:stock", "fp32", "spearman", "dev", 0.87, 0.87),
        Quality(2, "openvino", "fp32", "spearman", "dev", 0.86, 0.87),
    ]
    points = plots.quality_points(make_record(results=rows, quality=quality))
    assert [(point.label, point.throughput, point.peer) for point in points] == [
        ("openvino bf16 k=4", 80.0, False),
        ("stock fp32", 20.0, True),
    ]


@pytest.mark.parametrize("field", EMPTY)
def test_a_record_without_one_part_has_a_report(field: str) -> None:
    one_shape = [row for row in make_record().results if row.sequence == 128]
    assert "</html>" in report.html(make_record(**{"results": one_shape, field: EMPTY[field]}))


def test_an_empty_record_has_a_report_that_says_so() -> None:
    text = report.html(make_record(**EMPTY))
    assert "The record holds no latency." in text and "<svg" not in text


def test_one_shape_or_only_peers_or_only_ratio_1_are_enough() -> None:
    record = make_record()
    one = [row for row in record.results if row.sequence == 128]
    assert "sequence length" not in report.html(make_record(results=one))
    peers = [row for row in record.results if table.is_peer(row)]
    assert "Only peers were measured" in report.html(make_record(results=peers))
    plain = [row for row in record.results if row.ratio == 1]
    assert "ratio 1 in" in report.html(make_record(results=plain))


@pytest.mark.filterwarnings("error")
def test_long_names_leave_room_for_the_drawings() -> None:
    rows = [make_result("engine" * 30, "fp32", ratio, 2.0) for ratio in (1, 4)]
    files = {"a" * 200 + str(number): number for number in range(30)}
    text = report.html(make_record(results=rows, disk=files))
    assert "20 further files" in text


def test_dollar_signs_are_no_mathematics() -> None:
    rows = [make_result(r"$\frac{$", "fp32", ratio, 2.0) for ratio in (1, 4)]
    assert "$\\frac{$" in report.html(make_record(results=rows))


def test_the_same_record_gives_the_same_page(full_page: str) -> None:
    assert report.html(make_record()) == full_page


def test_write_leaves_the_page_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    report.write(make_record(**EMPTY), path)
    assert path.read_text(encoding="utf-8").endswith("</html>")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_an_interrupted_write_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(VariatorError, match="No space left on device"):
        report.write(make_record(**EMPTY), path)
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(VariatorError, match=r"missing/report\.html"):
        report.write(make_record(**EMPTY), tmp_path / "missing" / "report.html")
