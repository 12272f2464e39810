"""The page of `prdp evaluate`, evaluation.md: its tables, and below them what they are of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prdp_fast.reporting.tables import diversity_table, reward_table


def evaluation_page(record: Mapping[str, Any], level: float) -> str:
    """Markdown.

    Args:
        record: "settings" and "sets" of an evaluation, of one model or of two.
        level: of its intervals, e.g. 0.95.
    """
    settings, sets = record["settings"], record["sets"]
    names = {role: model["name"] for role, model in settings["models"].items()}
    compared = len(names) > 1
    models = {role: f"{name} ({role})" for role, name in names.items()} if compared else names
    counts = ", ".join(f"{name} {len(part['prompts'])}" for name, part in sets.items())
    lines = [
        f"# Evaluation: {' against '.join(reversed(names.values()))}",
        "",
        reward_table(models, sets).markdown(),
        "",
        f"Diversity: mean distance of a prompt's images in features of {settings['features']['name']}.",
        "",
        diversity_table(models, sets).markdown(),
        "",
        f"Prompts: {counts}; {settings['samples']} images each, seed {settings['seed']}"
        + (", the same noise for both models." if compared else "."),
        sampling(settings),
        "Means over the images of a prompt, then over prompts; ± standard error over prompts; "
        f"[{level:.0%} bootstrap interval over prompts].",
    ]
    if compared:
        lines.append("Win rate: share of image pairs, of one prompt and one noise, that the finetuned model wins; a tie is half.")
    unscored = sum(sum(entry["unscored"].values()) for part in sets.values() for entry in part["rewards"].values())
    if unscored:
        lines.append(f"{unscored} scores were not finite and are left out. {'; '.join(left_out(models, sets))}.")
    return "\n".join(lines) + "\n"


def left_out(models: Mapping[str, str], sets: Mapping[str, Any]) -> Iterator[str]:
    """For every prompt set and reward with scores that are not finite: how many of which model, and what is left."""
    for label, part in sets.items():
        for reward, entry in part["rewards"].items():
            if sum(entry["unscored"].values()):
                counts = " and ".join(
                    f"{count} of {models[role]} (n = {entry[role]['n']} prompts)" for role, count in entry["unscored"].items()
                )
                yield f"{label}, {reward}: {counts}" + (
                    f", compared on n = {entry['difference']['n']}" if len(models) > 1 else ""
                )


def sampling(settings: Mapping[str, Any]) -> str:
    """How the images were sampled, in a line."""
    sampler = settings["sampler"]
    guidance = "without guidance" if sampler["guidance_scale"] is None else f"guidance {sampler['guidance_scale']:g}"
    if sampler["guidance_interval"]:
        guidance += " at timesteps {} to {}".format(*sampler["guidance_interval"])
    schedulers = " and ".join(dict.fromkeys(model["scheduler"] for model in settings["models"].values()))
    noise = f"eta {sampler['eta']:g}"
    if sampler.get("method") or schedulers == "FlowMatchEulerDiscreteScheduler":
        noise = sampler.get("method") or "flow_sde"
        noise += f" of noise level {sampler['noise_level']:g}" if sampler.get("noise_level") else ""
    if steps := sampler.get("stochastic_steps"):
        noise += f" at steps {steps[0]} to {steps[1]}" if isinstance(steps, list) else f" at runs of {steps['count']} steps"
    return f"{schedulers}, {sampler['num_inference_steps']} steps, {noise}, {guidance}."
