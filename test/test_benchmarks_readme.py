"""README.md says what the recorded results say."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

pytest.importorskip("rich", reason="the benchmarks need the extra [benchmarks]: rich")
pytest.importorskip("matplotlib", reason="the benchmarks need the extra [benchmarks]: matplotlib")
pytest.importorskip("psutil", reason="the benchmarks need the extra [benchmarks]: psutil")

from test_benchmarks import make_rows

from benchmarks import gains, readme
from benchmarks.shared import rows as record
from benchmarks.shared.options import InputError
from benchmarks.shared.rows import Case, Row

TEXT = "before\n<!-- results:uci -->\nold numbers\n<!-- /results -->\nafter\n"


@pytest.fixture
def results(tmp_path):
    record.write(tmp_path / "results" / "uci.json", make_rows())
    return tmp_path / "results"


def test_tables_take_the_place_of_what_stood_there(results, tmp_path):
    new = readme.rendered(TEXT, results, results, tmp_path)
    assert "old numbers" not in new
    assert new.startswith("before\n<!-- results:uci -->\n\n**Training on real data: time.")
    assert new.endswith("\n<!-- /results -->\nafter\n")
    assert "| iris | 20 | stock | 40 [36, 44] | 1.00 |" in new
    assert readme.rendered(new, results, results, tmp_path) == new


def test_a_changed_number_shows(results, tmp_path):
    new = readme.rendered(TEXT, results, results, tmp_path)
    assert readme.rendered(new.replace("40 [36, 44]", "4 [3, 5]"), results, results, tmp_path) == new


def test_marker_picks_rows_and_pictures(results, tmp_path):
    picked = readme.rendered(TEXT.replace("uci -->", "uci n=40 -->"), results, results, tmp_path)
    assert "| iris | 40 |" in picked and "| iris | 20 |" not in picked


@pytest.mark.parametrize("cpus", [["Z80"], ["Z80", "AMD EPYC"]])
def test_each_machine_has_a_picture_of_its_own(results, tmp_path, cpus):
    rows = [replace(row, machine={**row.machine, "cpu": cpu}) for cpu in cpus for row in make_rows()]
    record.write(results / "uci.json", rows)
    text = readme.rendered(TEXT.replace("uci -->", "uci pictures -->"), results, results, tmp_path)
    names = re.findall(r"!\[\]\(results/(.*?)\)", text)
    assert len(set(names)) == len(names) == len(cpus)
    assert all((results / name).exists() for name in names)


@pytest.mark.parametrize(
    "marker, message",
    [("uci n=7", "no such results are recorded"), ("poker", "no such question"), ("uci colour=red", "no such field")],
)
def test_markers_without_results(results, tmp_path, marker, message):
    with pytest.raises(InputError, match=message):
        readme.rendered(TEXT.replace("uci", marker), results, results, tmp_path)


def test_releases_tried_have_a_table_of_their_own(results, tmp_path):
    counts = {"passed": 2000, "failed": 2, "errors": 1, "skipped": 0, "excused": 0}
    names = ("python", "torch", "gpytorch", "linear_operator", "botorch", "numpy")
    summary = {
        "versions": {**dict.fromkeys(names, "1.0"), "torch": "2.0+cpu"},
        "counts": dict.fromkeys(("suite", "off", "on", "stock"), counts),
        "failures": {"suite": ["a", "b", "c"], "off": [], "on": ["d"]},
        "commit": "abc",
        "date": "2026-01-01",
    }
    text = "before\n<!-- stacks -->\nold\n<!-- /stacks -->\nafter\n"
    with pytest.raises(InputError, match="none are on record"):
        readme.rendered(text, results, results, tmp_path)
    (results / "stacks.json").write_text(json.dumps([summary]))
    new = readme.rendered(text, results, results, tmp_path)
    line = "| 1.0 | 2.0 | 1.0 | 1.0 | 1.0 | 1.0 | 2,000, 3 | 2,000, 0 (3) | 2,000, 1 (2) | 2026-01-01, abc |"
    assert line in new and "old" not in new and new.endswith("\n<!-- /stacks -->\nafter\n")


def test_check_fails_when_they_differ(results, tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    monkeypatch.setattr(readme, "PAGES", [page])
    monkeypatch.setattr(readme, "RESULTS", results)
    monkeypatch.setattr(readme.rendered, "__defaults__", (results, tmp_path))
    page.write_text(TEXT)
    assert readme.update(check=True) == 1
    assert readme.update(check=False) == 0
    assert readme.update(check=True) == 0
    page.write_text(page.read_text().replace("2.00", "9.99"))
    assert readme.update(check=True) == 1


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: str(page.relative_to(readme.ROOT)))
def test_page_and_recorded_results_agree(page, tmp_path):
    text = page.read_text()
    new = readme.rendered(text, tmp_path, root=page.parent)
    assert new == text, "run `python -m benchmarks readme`"


def test_readme_is_one_page():
    assert len(readme.PAGES[0].read_bytes()) <= 10_000


def test_latest_rows_say_what_is_gained(results):
    def row(n, provider, seconds, date, **machine):
        case = Case("train", "synthetic", n, 6, "float64", "cpu")
        return Row(case, provider, "step", p50=seconds, machine={"cpu": "Z80", **machine}, commit="abc", date=date)

    rows = [row(20, "stock", 3.0, "2026-01-01"), row(20, "tensors", 1.0, "2026-01-01")]
    rows += [row(20, "stock", 5.0, "2026-02-01", gib=4), row(20, "tensors", 2.0, "2026-02-01", gib=4)]
    rows += [row(100, "stock", 5.0, "2026-02-01")]  # without the flag there is nothing to compare
    record.write(results / "train.json", rows)
    assert "| a training step | 20 | 2.5 |" in gains.text(results)
    assert "one process. Z80, abc, 2026-02-01." in gains.text(results)
    rows += [row(100, provider, 5.0, "2026-03-01") for provider in ("stock", "tensors")]
    record.write(results / "train.json", rows)
    assert "one process. Z80, abc, 2026-02-01 and 2026-03-01." in gains.text(results)
    rows += [row(500, provider, 5.0, "2026-04-01", cpu="6502") for provider in ("stock", "tensors")]
    record.write(results / "train.json", rows)
    assert "a training step: Z80, abc, 2026-02-01 and 2026-03-01; a training step: 6502, abc, 2026-04-01." in (
        gains.text(results)
    )
