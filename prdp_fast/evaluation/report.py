"""What an evaluation found: one record for programs, tables laid out like the paper's for people, pictures side by side."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prdp_fast.evaluation import statistics as comparison
from prdp_fast.evaluation.blocks import Block
from prdp_fast.evaluation.statistics import Estimate
from prdp_fast.reporting.images import image_grid

SHOWN_PROMPTS = 12  # of each set's picture
PAIR_COLUMNS = 3
GAP = 2  # white pixels between the two images of a pair
BASE, FINETUNED, SINGLE = "base", "finetuned", "model"


def measure(
    prompts: Sequence[str], blocks: Mapping[str, Sequence[Block]], trained: Mapping[str, str], seed: int
) -> dict[str, Any]:
    """Everything about one prompt set.

    Args:
        prompts: P texts.
        blocks: of each role, in the order of the prompts.
        trained: for each reward whether it was trained on, in words; other scores of the blocks are details.
        seed: of the bootstrap.
    Returns: JSON with prompts, rewards, details and diversity.
    """
    names = list(next(iter(blocks.values()))[0].scores)
    result: dict[str, Any] = {"prompts": list(prompts), "rewards": {}, "details": {}}
    for name in names:
        scores = {role: torch.cat([block.scores[name] for block in parts]).double().numpy() for role, parts in blocks.items()}
        entry = compare({role: comparison.prompt_means(values) for role, values in scores.items()}, seed)
        if BASE in scores:
            base, finetuned = scores[BASE], scores[FINETUNED]
            entry["difference"] = comparison.paired_difference(base, finetuned, seed=seed)._asdict()
            entry["win_rate"] = comparison.win_rate(base, finetuned, seed=seed)._asdict()
        entry["unscored"] = {role: int((~np.isfinite(values)).sum()) for role, values in scores.items()}
        entry["scores"] = scores
        if name in trained:
            entry = {"trained": trained[name]} | entry
        result["rewards" if name in trained else "details"][name] = entry
    spread = {role: torch.cat([block.diversity for block in parts]).double().numpy() for role, parts in blocks.items()}
    result["diversity"] = compare(spread, seed)
    if BASE in spread:
        result["diversity"]["ratio"] = comparison.ratio(spread[FINETUNED], spread[BASE], seed=seed)._asdict()
    result["diversity"]["prompts"] = spread
    return result


def compare(values: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    """The mean of each role's (P,) values."""
    return {role: comparison.mean(part, seed=seed)._asdict() for role, part in values.items()}


def markdown(result: Mapping[str, Any]) -> str:
    """The tables. result: "settings" and "sets" of an evaluation's record."""
    settings, sets = result["settings"], result["sets"]
    models = {
        role: f"{model['name']} ({role})" if role != SINGLE else model["name"] for role, model in settings["models"].items()
    }
    columns = [(name, reward) for name, part in sets.items() for reward in part["rewards"]]
    entries = [sets[name]["rewards"][reward] for name, reward in columns]
    heads = [f"{name}: {reward}" + TRAINED[entry["trained"]] for (name, reward), entry in zip(columns, entries, strict=True)]
    rows = {models[role]: [_cell(entry[role]) for entry in entries] for role in models}
    if BASE in models:
        rows["difference"] = [_cell(entry["difference"], sign="+") for entry in entries]
        rows["win rate"] = [_cell(entry["win_rate"], digits=3) for entry in entries]
    spread = [part["diversity"] for part in sets.values()]
    spread_rows = {models[role]: [_cell(entry[role]) for entry in spread] for role in models}
    if BASE in models:
        spread_rows["ratio"] = [_cell(entry["ratio"], digits=3) for entry in spread]
    title = " against ".join(reversed([model["name"] for model in settings["models"].values()]))
    counts = ", ".join(f"{name} {len(part['prompts'])}" for name, part in sets.items())
    sampler = settings["sampler"]
    guidance = "without guidance" if sampler["guidance_scale"] is None else f"guidance {sampler['guidance_scale']:g}"
    if sampler["guidance_interval"]:
        guidance += " at timesteps {} to {}".format(*sampler["guidance_interval"])
    schedulers = " and ".join(dict.fromkeys(model["scheduler"] for model in settings["models"].values()))
    lines = [
        f"# Evaluation: {title}",
        "",
        *_table("model", heads, rows),
        "",
        "Diversity: mean distance of a prompt's images in features of " + settings["features"]["name"] + ".",
        "",
        *_table("model", list(sets), spread_rows),
        "",
        f"Prompts: {counts}; {settings['samples']} images each, seed {settings['seed']}"
        + (", the same noise for both models." if BASE in models else "."),
        f"{schedulers}, {sampler['num_inference_steps']} steps, eta {sampler['eta']:g}, {guidance}.",
        "Means over the images of a prompt, then over prompts; ± standard error over prompts; "
        f"[{comparison.LEVEL:.0%} bootstrap interval over prompts].",
    ]
    if BASE in models:
        lines.append("Win rate: share of image pairs, of one prompt and one noise, that the finetuned model wins; a tie is half.")
    unscored = sum(sum(entry["unscored"].values()) for entry in entries)
    if unscored:
        lines.append(f"{unscored} scores were not finite and are left out.")
    return "\n".join(lines) + "\n"


TRAINED = {"yes": " (trained on)", "other options": " (trained on with other options)", "no": ""}


def _table(corner: str, heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [
        line([corner, *heads]),
        "|---|" + "---:|" * len(heads),
        *(line([name, *cells]) for name, cells in rows.items()),
    ]


def _cell(entry: Mapping[str, Any], digits: int = 4, sign: str = "") -> str:
    estimate = Estimate(**entry)
    if not math.isfinite(estimate.mean):
        return "-"
    text = f"{estimate.mean:{sign}.{digits}f}"
    if math.isfinite(estimate.low):
        text += f" ± {estimate.stderr:.{digits}f} [{estimate.low:{sign}.{digits}f}, {estimate.high:{sign}.{digits}f}]"
    return text


def write_picture(prompts: Sequence[str], blocks: Mapping[str, Sequence[Block]], path: Path) -> Path:
    """The first image of a set's first prompts, base left and finetuned right of a pair, its prompt below."""
    images = {role: torch.cat([block.images for block in parts])[:SHOWN_PROMPTS] for role, parts in blocks.items()}
    shown = list(images.values())
    captions = list(prompts[: len(shown[0])])
    if len(shown) == 1:
        return image_grid(shown[0], path, columns=2 * PAIR_COLUMNS, captions=captions)
    white = torch.full((*shown[0].shape[:3], GAP), 255, dtype=torch.uint8)
    pairs = torch.cat([images[BASE], white, images[FINETUNED]], dim=-1)
    scale = max(1, math.ceil(2 * 128 / pairs.shape[-1]))
    return image_grid(pairs, path, columns=PAIR_COLUMNS, scale=scale, captions=captions)


def file_name(label: str) -> str:
    """A prompt set's name as that of a file."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.") or "set"
