"""The HTML report: well-formed, accessible, asks nothing of a network, tells no secret, and is there for every state of a run.

No browser: what can be said of the page from its text is checked here, with `html.parser`; test_browser.py opens it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import PROMPTS, SECRET, a_run, row

from prdp_fast.cli import main
from prdp_fast.core.visible import visible
from prdp_fast.evaluation.statistics import compare
from prdp_fast.reporting import gallery
from prdp_fast.reporting.bands import band, group_runs
from prdp_fast.reporting.html import report_page
from prdp_fast.reporting.markup import Markup, tag
from prdp_fast.reporting.report import Report, find_runs
from prdp_fast.reporting.run_data import read_run
from prdp_fast.reporting.style import DARK, LIGHT
from prdp_fast.reporting.svg import MOST_POINTS, Chart, Line, histogram, line_chart, log_ticks, thinned, tick, ticks

# A page as a tree

VOID = {"meta", "link", "img", "input", "br", "hr"}


@dataclass
class Node:
    name: str
    attributes: dict[str, str]
    children: list[Node | str] = field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def find(self, name: str) -> list[Node]:
        return [node for node in self.walk() if node.name == name]

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class Tree(HTMLParser):
    """Balanced tags only: an end tag closes the element that is open."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("", {})
        self.open = [self.root]
        self.feed(page)
        self.close()
        assert [node.name for node in self.open] == [""], f"still open: {[node.name for node in self.open]}"

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len({key for key, _ in attributes}) == len(attributes), f"{name}: an attribute is there twice"
        node = Node(name, {key: value or "" for key, value in attributes})
        self.open[-1].children.append(node)
        if name not in VOID:
            self.open.append(node)

    def handle_endtag(self, name: str) -> None:
        assert name not in VOID and self.open[-1].name == name, f"</{name}> closes {self.open[-1].name}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def faults_of(page: str) -> list[str]:
    """What a reader with a screen reader, a keyboard or no network would stumble over."""
    root, found = Tree(page).root, []
    nodes = list(root.walk())
    identities = [node.attributes["id"] for node in nodes if "id" in node.attributes]
    found += [f"two elements are {one}" for one in set(identities) if identities.count(one) > 1]
    levels = [int(node.name[1]) for node in nodes if re.fullmatch(r"h[1-6]", node.name)]
    if levels[:1] != [1] or levels.count(1) != 1:
        found.append("there is one h1, and it comes first")
    found += [f"h{low} is followed by h{high}" for low, high in pairwise(levels) if high > low + 1]
    for node in nodes:
        attributes = node.attributes
        found += [f"{node.name} has {key}" for key in attributes if key.startswith("on") or key in ("style", "srcset", "action")]
        for key in ("href", "src", "xlink:href", "data", "poster"):
            target = attributes.get(key, "#")
            if target.startswith("#") and target != "#" and target[1:] not in identities:
                found.append(f"{target} leads nowhere")
            elif not target.startswith(("#", "data:")):
                found.append(f"{node.name} asks for {target}")
        for key in ("aria-labelledby", "aria-describedby", "for"):
            found += [f"{key} {one} is nobody" for one in attributes.get(key, "").split() if one not in identities]
        if node.name in ("script", "iframe", "object", "embed", "base", "form", "foreignobject"):
            found.append(f"there is a {node.name}")
        if node.name == "img" and (len(attributes.get("alt", "")) < 20 or not attributes["src"].startswith("data:image/")):
            found.append("a picture without words")
        if node.name == "th" and attributes.get("scope") not in ("col", "row"):
            found.append("a head of a table without scope")
        if node.name == "table" and (not node.find("caption") or not node.find("caption")[0].text):
            found.append("a table without caption")
        if (
            node.name == "svg"
            and attributes.get("aria-hidden") != "true"
            and (
                attributes.get("role") != "img"
                or not all(node.find(part) and node.find(part)[0].text for part in ("title", "desc"))
            )
        ):
            found.append("a chart without words")
        if node.name == "input" and not any(node in label.walk() for label in root.find("label")):
            found.append("a control without label")
        if node.name == "tr" and len({len(row.find("th") + row.find("td")) for row in root.find("table")[0].find("tr")}) != 1:
            found.append("a row of another length")
    found += [f"the page is without {name}" for name in ("main", "header", "title") if len(root.find(name)) < 1]
    if root.find("html")[0].attributes.get("lang") != "en" or not page.startswith("<!DOCTYPE html>"):
        found.append("no language or no doctype")
    (policy,) = (node.attributes["content"] for node in nodes if node.attributes.get("http-equiv") == "Content-Security-Policy")
    (style,) = root.find("style")
    digest = base64.b64encode(hashlib.sha256(style.text.encode()).digest()).decode()
    if policy != f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'":
        found.append(f"the policy is {policy}")
    if re.search(r"url\(|@import|expression", style.text):
        found.append("the style asks for something")
    if re.search(r"\w+://\w", re.sub(r'src="data:[^"]*"', "", page)):
        found.append("an address stands in the page")
    return sorted(set(found))


# Runs


def page_of(*directories: Path, **options: Any) -> str:
    return report_page([read_run(directory) for directory in directories], compare, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_run(tmp_path_factory.mktemp("runs") / "finished")


def text_of(page: str) -> str:
    return " ".join(Tree(page).root.text.split())


# One run


def test_a_finished_run_has_every_part(finished: Path) -> None:
    page = page_of(finished)
    assert faults_of(page) == []
    root, text = Tree(page).root, text_of(page)
    assert [node.text for node in root.find("h2")] == [
        "Before and after", "Pictures", "Training", "Health of the training", "Time", "Settings"
    ]  # fmt: skip
    summary = json.loads((finished / "summary.json").read_text())["evaluation"]["unseen"]
    lead = next(node.text for node in root.find("p") if node.attributes.get("class") == "lead")
    assert lead.startswith("PRDP finetuned base-model on http: 6 of 6 epochs, 48 images, 40 seconds.")
    assert (
        f"from {summary['before']['mean']:.3f} to {summary['after']['mean']:.3f}: {summary['difference']['mean']:+.3f} ±" in lead
    )
    assert len(root.find("img")) == 2 * len(PROMPTS) and "The run is finished." in text
    assert "unseen, jpeg_size (held out)" in text
    assert len(root.find("input")) == 3 and "2e-7" in page and "A processor" in text and "stage" in text
    (table,) = (node for node in root.find("table") if node.find("caption")[0].text.startswith("Seconds by phase"))
    cells = [[cell.text.strip() for cell in line.find("th") + line.find("td")] for line in table.find("tr")]
    # Six epochs; 600 rows at 10 ms a forward, and a backward of two.
    assert cells[1] == ["update", "19.8", "62.3%", "600", "33.00", "18.0", "1.10"]
    assert cells[2] == ["rollout", "6.0", "18.9%", "600", "10.00", "6.0", "1.00"]


def test_the_table_has_the_summary_s_numbers_and_intervals_of_the_same_scores(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())["evaluation"]["unseen"]
    found = compare(
        *(read_run(finished).__getattribute__(moment)["unseen"].scores.numpy() for moment in ("before", "after")), seed=0
    )
    for moment, part in found.items():
        assert {"mean": part["mean"], "stderr": part["stderr"], "n": part["n"]} == {
            "mean": pytest.approx(summary[moment]["mean"], rel=1e-6),
            "stderr": pytest.approx(summary[moment]["stderr"], rel=1e-6), "n": summary[moment]["n"],
        }  # fmt: skip
        assert part["low"] < part["mean"] < part["high"]
    (line,) = (line for line in Tree(page_of(finished)).root.find("tr") if line.find("th")[0].text == "unseen")
    difference = found["difference"]
    assert line.find("td")[3].text == (
        f"{difference['mean']:+.4f} ± {difference['stderr']:.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]"
    )


def test_no_secret_and_no_place_of_this_machine(finished: Path) -> None:
    page = page_of(finished)
    assert SECRET not in page and "somebody" not in page and "example" not in page
    assert page.count("left out") == 4 and "batch: 4" in page and "base-model" in page and "nvme" in page
    assert str(finished.parent) not in page


def test_text_of_files_is_text(finished: Path) -> None:
    page = page_of(finished)
    assert "<script" not in page and "\x1b" not in page and "\u202e" not in page and "\x00" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; \\u202egnirts\\u202c \\x1b[31mred" in page
    assert "\u05e9\u05dc\u05d5\u05dd" in page and f"{'x' * 400}..." in page and "x" * 401 not in page
    page.encode("utf-8")


@pytest.mark.parametrize(("given", "expected"), [
    ("a\u200db\u200c", "a\u200db\u200c"), ("\ud800", "\\ud800"), ("a\nb\tc", "a\\nb\\tc"), ("\u2028\x9b1m", "\\u2028\\x9b1m"),
    ("\U000e0041", "\\U000e0041"), ("caf\u00e9 \u4e2d", "caf\u00e9 \u4e2d"),
])  # fmt: skip
def test_what_is_hidden_is_shown(given: str, expected: str) -> None:
    assert visible(given) == expected
    assert visible("a\nb", lines=True) == "a\nb" and visible("abcd", most=2) == "ab..."


def test_markup_escapes_what_is_not_markup() -> None:
    assert tag("p", "a<b", tag("b", '"'), title="\"<&'") == '<p title="&quot;&lt;&amp;&#x27;">a&lt;b<b>&quot;</b></p>\n'
    assert tag("img", alt="x", hidden=True, width=None) == '<img alt="x" hidden>\n'
    assert tag("p", str(tag("b", "x")) + "") == "<p>&lt;b&gt;x&lt;/b&gt;</p>\n", "joined with + it is no markup any more"
    assert isinstance(tag("p"), Markup)


# Every state of a run


def without_after(run: Path) -> None:
    (run / "summary.json").unlink()
    (run / "evaluation_after.pt").unlink()


def cut(run: Path) -> None:
    without_after(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 6, "reward": 0.')


def without_evaluation(run: Path) -> None:
    for name in ("evaluation_before.pt", "evaluation_after.pt"):
        (run / name).unlink()
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"evaluation": {}}))


def not_finite(run: Path) -> None:
    rows = [
        row(epoch) | {"reward": value, "loss": None, "drift": -math.inf} for epoch, value in enumerate([0.1, math.nan, 10**400])
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))


def of_other_kinds(run: Path) -> None:
    (run / "metrics.jsonl").write_text(
        '{"epoch": true}\n{"epoch": -1}\n{"epoch": 10000000000000000000}\n{"epoch": 1.0}\n[]\n{"epoch": 0, "reward": "x"}\n\xff\n'
    )
    (run / "run.json").write_text(
        '{"recipe": {"rewards": [1, {"name": 2, "options": []}], "model": [], "schedule": {"epochs": "x"}}}'
    )
    (run / "summary.json").write_text('{"evaluation": {"unseen": {"before": 3}}, "unet_forwards": [], "wall_s": "x"}')
    (run / "acceleration.json").write_text("[1]")
    (run / "evaluation").mkdir()
    (run / "evaluation" / "evaluation.json").write_text('{"settings": {"models": 3}}')


def damaged(run: Path) -> None:
    for name in ("run.json", "summary.json", "acceleration.json"):
        (run / name).write_text("{")
    for name in ("evaluation_before.pt", "evaluation_after.pt"):
        (run / name).write_bytes((run / name).read_bytes()[:300])
    (run / "samples").mkdir()
    (run / "samples" / "epoch-000002.png").write_bytes(b"no picture")


STATES = {
    "unfinished": (without_after, "The run is not finished: 0 epochs are left."),
    "a half-written last line": (cut, "6 of 6 epochs"),
    "one epoch": (lambda run: (run / "metrics.jsonl").write_text(json.dumps(row(0)) + "\n"), "1 of 6 epochs"),
    "no epoch": (lambda run: [without_after(run), (run / "metrics.jsonl").unlink()], "The run has not finished an epoch yet."),
    "no evaluation": (without_evaluation, "The run is finished."),
    "not finite": (not_finite, "2 epochs have no finite number here."),
    "other kinds": (of_other_kinds, "TRAINING finetuned a model on a reward: 1 epochs."),
    "damaged": (damaged, "evaluation_before.pt cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_a_run_in_any_state(state: str, tmp_path: Path) -> None:
    change, expected = STATES[state]
    run = a_run(tmp_path / "run")
    change(run)
    page = page_of(run)
    assert faults_of(page) == [] and expected in text_of(page)
    assert str(tmp_path) not in page, "an error names a place of this machine"
    assert "NaN" not in page and ">nan<" not in page and "None" not in text_of(page).replace("None of", "")


def test_before_is_shown_while_there_is_no_after(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    without_after(run)
    root = Tree(page_of(run)).root
    alts = [node.attributes["alt"] for node in root.find("img")]
    assert len(alts) == len(PROMPTS) and all(alt.startswith("Generated picture before finetuning") for alt in alts)
    (line,) = (line for line in root.find("tr") if line.find("th")[0].text == "unseen")
    assert line.find("td")[1].text.startswith("0.") and line.find("td")[2].text == "-"


def test_large_pictures_are_made_smaller_and_the_page_stays_below_5_mb(tmp_path: Path) -> None:
    """Noise is the worst that JPEG can meet."""
    page = page_of(a_run(tmp_path / "run", side=768))
    assert faults_of(page) == [] and len(page.encode()) < 5e6
    assert len(Tree(page).root.find("img")) == 2 * len(PROMPTS) and "data:image/jpeg" in page


def test_what_the_page_has_no_room_for_is_told(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery.Budget.__init__, "__defaults__", (2000,))
    page = page_of(finished)
    assert faults_of(page) == [] and "pictures are left out: the page would be too large" in page
    assert 0 < len(Tree(page).root.find("img")) < 2 * len(PROMPTS)


def test_a_page_refreshes_only_while_it_is_written_again(finished: Path) -> None:
    assert 'http-equiv="refresh"' not in page_of(finished)
    assert '<meta http-equiv="refresh" content="30">' in page_of(finished, refresh=30.0)


# Several


def test_seeds_are_one_curve_with_a_band(tmp_path: Path) -> None:
    runs = [read_run(a_run(tmp_path / f"seed{seed}", seed, epochs=6 - seed)) for seed in range(3)]
    assert [len(group.runs) for group in group_runs(runs)] == [3]
    mean, around = band(runs, "reward", "minmax")
    assert [epoch for epoch, _ in mean] == [1, 2, 3, 4], "of the epochs that every run has"
    assert mean[0] == (1.0, pytest.approx(0.51)) and around[0] == (1.0, pytest.approx(0.5), pytest.approx(0.52))
    _, around = band(runs, "reward", "stderr")
    assert around[0][2] - around[0][1] == pytest.approx(2 * 0.01 / math.sqrt(3))
    page = report_page(runs, compare)
    assert faults_of(page) == [] and "mean of 3 runs" in page and "Band: lowest and highest run." in page
    text = text_of(page)
    assert (
        "unseen, mean over 3 runs" in text
        and "(standard error over runs)" in text
        and "Settings in which the runs differ" in text
    )


def test_other_recipes_are_other_curves(tmp_path: Path) -> None:
    runs = [read_run(a_run(tmp_path / f"{beta}-{seed}", seed, kl_weight=beta)) for beta in (1.0, 5.0) for seed in (0, 1)]
    assert [group.name for group in group_runs(runs)] == ["objective.kl_weight 1.0", "objective.kl_weight 5.0"]
    page = report_page(runs, compare, bands="stderr")
    assert faults_of(page) == [] and "standard error of the mean over runs" in page
    (chart, *_) = (node for node in Tree(page).root.find("figure") if "Reward of the epoch" in node.text)
    assert [entry.text.strip() for entry in chart.find("li")] == ["objective.kl_weight 1.0", "objective.kl_weight 5.0"]


# The command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [a_run(tmp_path / f"seed{seed}", seed) for seed in range(2)]
    assert main(["report", str(runs[0])]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [str(runs[0] / "report.html"), str(runs[0] / "curves.png")]
    assert (runs[0] / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert main(["report", str(tmp_path)]) == 0 and main(["report", *map(str, runs)]) == 0
    assert capsys.readouterr().out.splitlines() == 2 * [str(tmp_path / "report.html")]
    assert main(["report", str(runs[0]), "--output", str(tmp_path / "other.html")]) == 0 and (tmp_path / "other.html").is_file()
    a_run(tmp_path / "elsewhere" / "run")
    capsys.readouterr()
    assert main(["report", str(runs[0]), str(tmp_path / "elsewhere")]) == 2
    assert "are in 2 directories; say with --output FILE" in capsys.readouterr().err
    assert main(["report", str(runs[0]), "--output", str(tmp_path / "no" / "page.html")]) == 2
    assert "no page: " in capsys.readouterr().err
    assert [path.name for path in find_runs([tmp_path, runs[1]])] == ["seed0", "seed1"]


def test_the_page_is_written_again_until_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path / "run")
    summary = (run / "summary.json").read_text()
    without_after(run)
    pages = []

    def sleep(seconds: float) -> None:
        pages.append((run / "report.html").read_text())
        if len(pages) == 2:
            (run / "summary.json").write_text(summary)

    monkeypatch.setattr("prdp_fast.reporting.report.time.sleep", sleep)
    Report([run], [run], None, compare).follow(30.0)
    assert len(pages) == 2 and all('http-equiv="refresh" content="30"' in page for page in pages)
    last = (run / "report.html").read_text()
    assert "refresh" not in last and "The run is finished." in last

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    (run / "summary.json").unlink()
    monkeypatch.setattr("prdp_fast.reporting.report.time.sleep", interrupted)
    assert main(["report", str(run), "--watch", "30"]) == 130
    assert "refresh" not in (run / "report.html").read_text(), "nobody writes it any more"


# Colours


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance of #rrggbb."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_computed_as_wcag_does() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0) and contrast("#767676", "#ffffff") == pytest.approx(
        4.54, abs=0.01
    )


def test_both_themes_have_enough_contrast(finished: Path) -> None:
    """Of the colours as they stand in the page."""
    (style,) = Tree(page_of(finished)).root.find("style")
    blocks = [dict(re.findall(r"--([\w-]+):(#\w{6})", block)) for block in re.findall(r":root\{(--[^}]*)\}", style.text)]
    assert blocks == [LIGHT, DARK, LIGHT], "light, dark, and light again on paper"
    for theme in (LIGHT, DARK):
        for background in (theme["paper"], theme["raised"]):
            for name in ("ink", "quiet", "focus"):
                assert contrast(theme[name], background) >= 4.5, (name, background)
            for name in ("rule", "s0", "s1", "s2", "s3", "s4", "s5"):
                assert contrast(theme[name], background) >= 3, (name, background)
    used = set(re.findall(r"var\(--([\w-]+)\)", style.text))
    assert used == set(LIGHT) == set(DARK)


# Charts


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 1.0, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0]) and ticks(1, 3, 6, whole=True) == [1, 2, 3]
    assert log_ticks(1e-6, 1e-2) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2]) and log_ticks(0.9, 6) == pytest.approx(
        [1, 2, 5]
    )
    assert [tick(value) for value in (0.0, 0.05, 1200.0, 2.5e7, -1e-5, 99999.0)] == [
        "0",
        "0.05",
        "1200",
        "2.5e7",
        "-1e-5",
        "99999",
    ]


def coordinates(chart: str, css: str) -> list[tuple[float, float]]:
    path, *_ = (node.attributes["d"] for node in Tree(chart).root.find("path") if node.attributes["class"] == css)  # then legend
    return [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)]


def a_chart(lines: list[Line], **options: Any) -> Chart:
    return Chart("x", "a title", "a description", "epoch", "value", lines=lines, **options)


def test_lines_are_where_their_values_are() -> None:
    points = coordinates(line_chart(a_chart([Line("a", [(1, 0.0), (2, 1.0), (3, 0.5)])])), "line s0")
    assert points[0][0] == 58 and points[-1][0] == 410 and points[1][0] == pytest.approx((58 + 410) / 2, abs=0.1)
    assert points[2][1] == pytest.approx((points[0][1] + points[1][1]) / 2, abs=0.1) and points[1][1] < points[0][1]
    logs = coordinates(line_chart(a_chart([Line("a", [(1, 1e-4), (2, 1e-3), (3, 1e-2)])], logarithmic=True)), "line s0")
    assert logs[1][1] == pytest.approx((logs[0][1] + logs[2][1]) / 2, abs=0.1)
    for values in ([0.0, 0.0], [5.0, 5.0], [1e100, -1e100], [1e-300, 2e-300]):
        line_chart(a_chart([Line("a", list(enumerate(values)))]))
    assert "<circle" in line_chart(a_chart([Line("a", [(4, 2.0)])])), "one epoch is a dot"


def test_long_curves_are_thinned_and_keep_their_spikes() -> None:
    points = [(float(i), 1000.0 if i == 7777 else math.sin(i)) for i in range(20_000)]
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS + 2 and (7777.0, 1000.0) in kept and kept == sorted(kept)


def test_bars_of_a_histogram_are_shares() -> None:
    chart = histogram(a_chart([]), [("a", [0.0, 0.0, 0.0, 1.0]), ("b", [0.5])], bins=4)
    a, b = coordinates(chart, "line s0"), coordinates(chart, "line s1")
    base = a[0][1]
    heights = [base - y for _, y in a]
    assert max(heights) / (base - a[-2][1]) == pytest.approx(3, rel=0.01), "three quarters at 0, one at 1"
    assert (base - min(y for _, y in b)) / max(heights) == pytest.approx(100 / 75, rel=0.01)
