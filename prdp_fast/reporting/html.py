"""The report: one HTML file of one run, or of several, that asks nothing of any network.

Style, charts and pictures are in the page. Its policy allows that one style sheet, by its hash, and pictures of data; no script.
Everything that comes from a run's files is escaped by `markup.tag`.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prdp_fast.core.run_directory import COMPARISON, SAMPLES
from prdp_fast.core.visible import visible
from prdp_fast.reporting import gallery, words
from prdp_fast.reporting.bands import BANDS, Group, band, group_runs
from prdp_fast.reporting.evaluation_page import sampling
from prdp_fast.reporting.markup import Markup, join, tag
from prdp_fast.reporting.private import without_places
from prdp_fast.reporting.run_data import EvaluatedSet, RunData, at, finite, points_of
from prdp_fast.reporting.settings_page import settings_of
from prdp_fast.reporting.style import stylesheet
from prdp_fast.reporting.svg import STYLES, Chart, Line, histogram, line_chart, tick
from prdp_fast.reporting.tables import Table, before_after, diversity_table, left_out, reward_table
from prdp_fast.reporting.times_page import times_of

REPORT = "report.html"  # in the run directory
PAIRS = 12  # of pictures, of one run or of all together
FEWEST_PAIRS = 6  # of each of several runs
RUNS_WITH_PICTURES = 4
MOST_ROWS = 60  # of a table of denoising steps, or of a reward's parts
STEP = "drift/step_"  # the metrics of single steps

# (before, after or None) scores of (P, B) images, and a seed -> "before", "after" and "difference" with intervals, as JSON.
Compare = Callable[..., Mapping[str, Any]]
MALFORMED = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)  # of JSON that is not as expected

# Title, metric, name of the vertical axis, logarithmic. A run shows those that it has.
TRAINING = (
    ("Reward of the epoch's images", "reward", "reward", False),
    ("Loss", "loss", "loss", True),
    ("Pairs that are ordered right", "pair_accuracy", "share of pairs", False),
    ("Gradient norm before clipping", "grad_norm", "norm", True),
)
HEALTH = (
    ("Share of log-ratios that are clipped", "clip_fraction", "share", False),
    ("Log-ratio to the reference, estimate of KL", "kl_to_reference", "nats", False),
    ("Drift of the log-prob, sampler to trainer", "drift", "nats", True),
    ("Error of the first ratio, which should be 1", "first_ratio_error", "error", True),
)


SPEED = (("Images a second", "images_per_s", "images/s", False),)


@dataclass
class Page:
    """What the parts of a page share."""

    runs: Sequence[RunData]
    compare: Compare
    bands: str = BANDS[0]
    budget: gallery.Budget = field(default_factory=gallery.Budget)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.groups = group_runs(self.runs)
        several = len(self.runs) > 1
        self.faults += [f"{run.name}: {fault}" if several else fault for run in self.runs for fault in run.faults]
        self.evaluations = [self.with_intervals(run) for run in self.runs]

    def with_intervals(self, run: RunData) -> dict[str, Any]:
        """The summary's evaluation, each number with its interval where the scores are kept; computed anew without a summary."""
        told = at(run.summary, "evaluation", kind=dict) or {}
        found: dict[str, Any] = {}
        for name in dict.fromkeys([*told, *run.before]):
            before, after = run.before.get(name), run.after.get(name)
            try:
                known = {moment: dict(told.get(name, {}).get(moment, {})) for moment in ("before", "after", "difference")}
                if before is not None:
                    paired = after if after is not None and after.scores.shape == before.scores.shape else None
                    computed = self.compare(before.scores.numpy(), None if paired is None else paired.scores.numpy(), seed=0)
                    known = {moment: dict(computed[moment]) | part for moment, part in known.items()}
                further = {key: part for key, part in told.get(name, {}).items() if key not in known}  # held-out rewards
                found[str(name)] = known | further
            except MALFORMED as error:
                self.faults.append(f"{run.name}: the evaluation of {visible(name, most=60)} is none ({type(error).__name__})")
        return found

    def label(self, run: RunData) -> str:
        return visible(run.name, most=60)


def report_page(runs: Sequence[RunData], compare: Compare, *, bands: str = BANDS[0], refresh: float | None = None) -> str:
    """The page, UTF-8.

    Args:
        runs: one or more.
        compare: of evaluation/statistics.py.
        bands: of several runs, "minmax" or "stderr".
        refresh: seconds after which a browser reads the page again; None of a page that nobody writes again.
    """
    page = Page(runs, compare, bands)
    heading = words.title(runs) + (f": {page.label(runs[0])}" if len(runs) == 1 else "")
    sections = [
        ("results", "Before and after", results(page)),
        ("pictures", "Pictures", pictures(page)),
        ("training", "Training", panels([*curves(page, TRAINING, "training"), *details(page)])),
        ("health", "Health of the training", panels([*curves(page, HEALTH, "health"), *drift_by_step(page)])),
        ("time", "Time", join(times_of(runs), panels(curves(page, SPEED, "speed")))),
        ("settings", "Settings", settings_of(runs)),
    ]
    if page.budget.refused:
        page.faults.append(f"{page.budget.refused} pictures are left out: the page would be too large")
    if page.faults:
        sections.append(("notes", "What could not be shown", tag("ul", *(tag("li", fault) for fault in page.faults))))
    there = [(name, title, content) for name, title, content in sections if content]
    links = tag("nav", tag("ul", *(tag("li", tag("a", title, href=f"#{name}")) for name, title, _ in there)), aria_label="Parts")
    body = (tag("section", tag("h2", title, id=name), content, aria_labelledby=name) for name, title, content in there)
    made = time.strftime("%Y-%m-%d %H:%M:%S %z")
    foot = tag("footer", tag("p", f"Made by prdp report on {made}.", class_="note"))
    lead = introduction(page)
    document = tag("body", tag("header", tag("h1", heading), *lead, links), tag("main", *body), foot)
    return f"<!DOCTYPE html>\n{tag('html', head(heading, refresh), document, lang='en')}"


def head(title: str, refresh: float | None) -> Markup:
    style = stylesheet()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    return tag(
        "head", tag("meta", charset="utf-8"), tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        None if refresh is None else tag("meta", http_equiv="refresh", content=f"{refresh:g}"),
        tag("link", rel="icon", href="data:,"),  # or a browser asks the server of the page for one
        tag("title", title), Markup(f"<style>{style}</style>\n"),
    )  # fmt: skip


# Results


def introduction(page: Page) -> list[Markup]:
    """What was done, what came of it, and whether it is finished."""
    if len(page.runs) == 1:
        run = page.runs[0]
        lead = " ".join(filter(None, [words.what_was_done(run), words.what_came_of_it(page.evaluations[0])]))
        return [tag("p", lead, class_="lead"), tag("p", words.state(run), class_="note")]
    lines = []
    for group in page.groups:
        evaluations = [page.evaluations[page.runs.index(run)] for run in group.runs]
        who = group.name or words.rewards_of(group.runs[0])
        told = over_runs([one for one in evaluations if one])
        count = "1 run" if len(group.runs) == 1 else f"{len(group.runs)} runs"
        lines.append(f"{who}: {count}. {words.what_came_of_it(told, 'runs') or 'Not evaluated yet.'}")
    if len(lines) == 1:
        return [tag("p", lines[0], class_="lead")]
    return [tag("ul", *(tag("li", line) for line in lines), class_="lead")]


def over_runs(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For each prompt set the mean over runs of before, after and difference, its standard error over runs, and their number."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for one in evaluations for name in one):
        found[name] = {}
        for moment in ("before", "after", "difference"):
            parts = [one[name][moment] for one in evaluations if name in one]
            means = [value for value in (finite(part.get("mean")) for part in parts) if value is not None]
            rates = [value for value in (finite(part.get("strict")) for part in parts) if value is not None]
            found[name][moment] = words.mean_of(means) | ({"strict": sum(rates) / len(rates)} if rates else {})
    return found


def results(page: Page) -> Markup:
    several = len(page.runs) > 1
    rows: dict[str, Any] = {}
    for run, evaluation in zip(page.runs, page.evaluations, strict=True):
        rows |= {f"{name}, {page.label(run)}" if several else name: part for name, part in evaluation.items()}
    for group in page.groups if several else []:
        evaluations = [page.evaluations[page.runs.index(run)] for run in group.runs]
        means = over_runs([one for one in evaluations if one])
        which = f" of {group.name}" if group.name else ""
        rows |= {f"{name}, mean over {part['difference'].get('n', 0)} runs{which}": part for name, part in means.items()}
    parts: list[object] = []
    if rows:
        try:
            parts.append(before_after(rows, digits=4).html("Reward before and after finetuning"))
            parts.append(tag("p", EXPLAINED + (OF_RUNS if several else ""), class_="note"))
            parts.append(tag("p", unscored, class_="note") if (unscored := left_out(rows)) else None)
        except MALFORMED as error:
            page.faults.append(f"the summary's evaluation is none ({type(error).__name__})")
    charts = distributions(page)
    parts.append(panels(charts))
    parts += [evaluated(run, page) for run in page.runs]
    return join(*parts)


EXPLAINED = (
    "Mean over prompts ± its standard error [95% bootstrap interval over prompts], with the same prompts and noise before "
    "and after. The difference is paired; s.e. is that difference in its own standard errors."
)
OF_RUNS = " Of a mean over runs, n is the number of runs and ± the standard error over runs."


def distributions(page: Page) -> list[Markup]:
    """Histograms of the images' rewards, by prompt set: before, and after of each group of runs."""
    charts = []
    names = list(dict.fromkeys(name for run in page.runs for name in run.before))
    for number, name in enumerate(names):
        samples = []
        if first := next((run.before[name] for run in page.runs if name in run.before), None):
            samples.append(("before", gallery.finite_scores([first])))
        for group in page.groups:
            after: list[EvaluatedSet] = [run.after[name] for run in group.runs if name in run.after]
            samples.append((f"after, {group.name}" if group.name else "after", gallery.finite_scores(after)))
        samples = [(label, values) for label, values in samples if values]
        if samples:
            chart = Chart(
                f"distribution-{number}", f"Rewards of {visible(name, most=60)} prompts", words.describe_samples(samples),
                "reward", "% of images", x_whole=False,
            )  # fmt: skip
            charts.append(histogram(chart, samples, notes=samples[0][0] if len(samples) == 1 else ""))
    return charts


def evaluated(run: RunData, page: Page) -> Markup | None:
    """The tables of `prdp evaluate`, if it has looked at the run."""
    if run.evaluation is None:
        return None
    try:
        settings, sets = run.evaluation["settings"], run.evaluation["sets"]
        models = {role: visible(without_places(model["name"]), most=60) for role, model in settings["models"].items()}
        what = f" of {page.label(run)}" if len(page.runs) > 1 else ""
        return join(
            tag("h3", f"prdp evaluate{what}"), reward_table(models, sets).html(f"Rewards{what}"),
            diversity_table(models, sets).html(f"Diversity{what}, in features of {settings['features']['name']}"),
            tag("p", f"{settings['samples']} images a prompt; {sampling(settings)}", class_="note"),
        )  # fmt: skip
    except MALFORMED as error:
        page.faults.append(f"{run.name}: evaluation.json is none of prdp evaluate ({type(error).__name__})")
        return None


# Pictures


def pictures(page: Page) -> Markup:
    compared = [run for run in page.runs if shared_set(run)][:RUNS_WITH_PICTURES]
    count = max(FEWEST_PAIRS, PAIRS // max(1, len(compared)))
    parts = []
    for number, run in enumerate(compared):
        name = shared_set(run)
        of_run = f", {page.label(run)}" if len(page.runs) > 1 else ""
        heading = f"{visible(name, most=60).capitalize()} prompts, the same noise{of_run}"
        parts.append(gallery.pairs(run.before[name], run.after[name], count, str(number), heading, page.budget))
    if not any(parts):
        parts += [without_after(run, page) for run in page.runs[:1]]
    return join(*parts)


def shared_set(run: RunData) -> str:
    """The prompt set that is shown: unseen, or one that has pictures before and after; "" if none has."""
    names = [name for name in run.before if name in run.after]
    return "unseen" if "unseen" in names else next(iter(names), "")


def without_after(run: RunData, page: Page) -> Markup:
    """Of a run that has not been evaluated again, or whose pictures are on their sheets alone."""
    parts: list[Markup] = []
    if (sheet := run.directory / COMPARISON).is_file():
        alt = "Generated pictures before and after finetuning, in rows, with their prompts and rewards"
        return gallery.sheet(sheet, alt, "Before and after", page.budget, page.faults)
    if latest := gallery.latest_sheet(run.directory / SAMPLES):
        epoch = latest.stem.removeprefix("epoch-").lstrip("0") or "0"
        alt = f"Generated pictures after {visible(epoch, most=20)} epochs, in a grid, each with its prompt below it"
        parts.append(gallery.sheet(latest, alt, f"After {visible(epoch, most=20)} epochs", page.budget, page.faults))
    if run.before:
        name = "unseen" if "unseen" in run.before else next(iter(run.before))
        parts.append(gallery.singles(run.before[name], PAIRS, "Before finetuning", "before", page.budget))
    return join(*parts)


# Curves


def group_lines(page: Page, metric: str) -> list[Line]:
    """Of every group its mean with a band and its runs, faint; of a single run its curve alone."""
    lines = []
    for number, group in enumerate(page.groups):
        if len(group.runs) == 1:
            (run,) = group.runs
            lines.append(Line(single_label(page, group), points_of(run.rows, metric), number, reward_band(page, metric)))
            continue
        mean, around = band(group.runs, metric, page.bands)
        lines.append(Line(group.name or f"mean of {len(group.runs)} runs", mean, number, around))
        lines += [Line(page.label(run), points_of(run.rows, metric), number, faint=True) for run in group.runs]
    return [line for line in lines if line.points]


def single_label(page: Page, group: Group) -> str:
    return group.name or page.label(group.runs[0])


def reward_band(page: Page, metric: str) -> list[tuple[float, float, float]]:
    """Around the reward of one run: one standard deviation of the epoch's images. None where several runs are shown."""
    if metric != "reward" or len(page.runs) > 1:
        return []
    found = []
    for row in page.runs[0].rows:
        centre, deviation = finite(row.get("reward")), finite(row.get("reward_std"))
        if centre is not None and deviation is not None:
            found.append((float(row["epoch"] + 1), centre - deviation, centre + deviation))
    return found


def panels(parts: Sequence[Markup]) -> Markup | None:
    """Charts and small tables beside each other."""
    return tag("div", *parts, class_="panels") if parts else None


def curves(page: Page, wanted: Sequence[tuple[str, str, str, bool]], part: str) -> list[Markup]:
    charts = []
    for title, metric, unit, logarithmic in wanted:
        lines = group_lines(page, metric)
        if not lines:
            continue
        level = None
        clip = finite((at(page.runs[0].recipe, "objective", kind=dict) or {}).get("clip_range"))
        if metric == "drift" and clip is not None and len(page.groups) == 1:
            level = ("clip range", clip)
        chart = Chart(
            f"{part}-{metric}", title, words.describe(lines), "epoch", unit, logarithmic=logarithmic, level=level, lines=lines
        )
        charts.append(line_chart(chart, note_of(page, metric, lines)))
    return charts


def note_of(page: Page, metric: str, lines: Sequence[Line]) -> str:
    """What the band is; and how many epochs have no number."""
    notes = []
    if any(line.band for line in lines):
        kind = {"minmax": "lowest and highest run", "stderr": "standard error of the mean over runs"}[page.bands]
        notes.append(f"Band: {kind if len(page.runs) > 1 else 'one standard deviation of the images of the epoch'}.")
    missing = sum(metric in row and finite(row[metric]) is None for run in page.runs for row in run.rows)
    if missing:
        notes.append(f"{missing} epochs have no finite number here.")
    return " ".join(notes)


def details(page: Page) -> list[Markup]:
    """What the rewards tell beside their total, of one run: parts of a sum, and what a reward says of an image."""
    if len(page.runs) > 1:
        return []
    names = dict.fromkeys(name for row in page.runs[0].rows for name in row if name.startswith("reward/"))
    lines: list[Line] = []
    for name in names:
        if points := points_of(page.runs[0].rows, name):
            lines.append(Line(visible(name.removeprefix("reward/"), most=60), points, len(lines)))
    if len(lines) < 2:
        return []
    rows = tuple((line.label, tick(line.points[0][1]), tick(line.points[-1][1])) for line in lines[:MOST_ROWS])
    table = Table(("part", "first epoch", "last epoch"), rows).html("Parts of the reward, means over the images of an epoch")
    drawn = lines[:STYLES]
    chart = Chart("details", "Parts of the reward", words.describe(drawn), "epoch", "reward", lines=drawn)
    return [line_chart(chart), tag("div", table, class_="panel")]


def drift_by_step(page: Page) -> list[Markup]:
    """The largest drift of each denoising step, over all epochs."""
    lines = []
    for number, group in enumerate(page.groups):
        rows = [row for run in group.runs for row in run.rows]
        names = dict.fromkeys(name for row in rows for name in row if name.startswith(STEP))
        steps = {name: whole_number(name.removeprefix(STEP)) for name in names}
        worst = [
            (float(step), max(value for _, value in points))
            for name, step in steps.items() if step is not None and (points := points_of(rows, name))
        ]  # fmt: skip
        lines.append(Line(group.name or "largest of all epochs", sorted(worst), number))
    lines = [line for line in lines if line.points]
    if not lines:
        return []
    chart = Chart(
        "drift-by-step", "Drift by denoising step", words.describe(lines, "step"), "denoising step", "nats", logarithmic=True,
        lines=lines,
    )  # fmt: skip
    cells = tuple((f"step {tick(step)}", f"{value:.2e}" if value else "0") for step, value in lines[0].points[:MOST_ROWS])
    which = f" of {lines[0].label}" if len(lines) > 1 else " of all epochs"
    table = Table(("denoising step", "nats"), cells).html(f"Largest drift{which}")
    return [line_chart(chart), tag("div", table, class_="panel")]


def whole_number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 9 else None
