"""The shipped recipes: the paper's values, what they cost, and that each is a job that starts."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.lib.published import HUB_IDS, write_configurations
from prdp_fast import train as train_command
from prdp_fast.commands import embed as embed_command
from prdp_fast.commands import evaluate as evaluate_command
from prdp_fast.config.load import RECIPES, load_recipe
from prdp_fast.config.recipe import Settings
from prdp_fast.core.format import format_flop
from prdp_fast.evaluation.plan import choose_rewards
from prdp_fast.models.families import Family
from prdp_fast.planning import cost
from prdp_fast.planning.job import Job
from prdp_fast.planning.memory import Activations, fake_activations, plan_memory
from prdp_fast.planning.micro_batch import choose_micro_batch
from prdp_fast.prompts.stream import PromptSet

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))
# PRDP (arXiv:2402.08714) Table 4: E, K, N, B, beta, epsilon, learning rate.
SMALL, LARGE, MULTI = (
    (100, 10, 32, 16, 3e-5, 1e-6, 1e-5),
    (1000, 1, 64, 8, 3e-6, 1e-4, 7e-6),
    (1000, 1, 64, 8, 3e-5, 1e-4, 1e-5),
)
STUDY = (250, 10, 32, 16, 10, 1e-6, 1e-5)  # of beta: section 4.4 and appendix C; 0.1 and 1 are its other values
COSINE = {"logit_scale": False}
PAPER: dict[str, tuple[tuple[float, ...], str, list[tuple[str, float, dict[str, Any]]]]] = {
    "sd14_animals_hpsv2": (SMALL, "animals", [("hpsv2", 1, {})]),
    "sd14_animals_pickscore": (SMALL, "animals", [("pickscore", 1, COSINE)]),
    "sd14_animals_aesthetic": (STUDY, "prompts/animal_names.txt", [("aesthetic", 1, {})]),
    "sd14_hpdv2_hpsv2": (LARGE, "prompts/hpdv2", [("hpsv2", 1, {})]),
    "sd14_hpdv2_pickscore": (LARGE, "prompts/hpdv2", [("pickscore", 1, COSINE)]),
    "sd14_pickapic_multireward": (
        MULTI, "prompts/pickapic", [("pickscore", 10, COSINE), ("hpsv2", 2, {}), ("aesthetic", 0.05, {})],
    ),
}  # fmt: skip
OWN = ("sdxl_pickapic_lora", "sd15_custom_reward", "sd35m_pickscore", "sd35m_pickscore_fast", "flux_hpsv2_lora")
MEMORY, PEAK, SHARE = 80e9, "NVIDIA H100", 0.4  # of the GPUs that the estimates are for, and how much of their peak


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_values(name: str) -> None:
    settings = load_recipe(name)
    schedule, objective, optimizer, sampler = settings.schedule, settings.objective, settings.optimizer, settings.sampler
    values, source, rewards = PAPER[name]
    assert (
        schedule.epochs, schedule.updates_per_epoch, schedule.prompts_per_epoch, schedule.images_per_prompt,
        objective.kl_weight, objective.clip_range, optimizer.learning_rate,
    ) == values  # fmt: skip
    assert objective.name == "prdp" and (optimizer.weight_decay, optimizer.max_grad_norm) == (1e-4, 1.0)
    assert (optimizer.betas, optimizer.eps) == ((0.9, 0.999), 1e-8)
    assert (sampler.num_inference_steps, sampler.guidance_scale, sampler.eta, sampler.guidance_interval) == (50, 5.0, 1.0, None)
    assert settings.model.pretrained == "CompVis/stable-diffusion-v1-4" and settings.model.lora is None
    assert settings.prompts.source == source and settings.prompts.limit is None
    assert [(reward.name, reward.weight, reward.options) for reward in settings.rewards] == rewards
    assert (schedule.update_timesteps, schedule.reference_timesteps) == (None, None)


def test_every_recipe_is_known_here() -> None:
    assert {name for name in SHIPPED if name.startswith(("sd", "flux"))} == {*PAPER, *OWN}


@pytest.mark.parametrize("name", SHIPPED)
def test_it_loads_and_its_launch_commands_are_real(name: str) -> None:
    """Of the head comment: train.py and `prdp evaluate` take the words, the config is there, prompts divide among the GPUs."""
    settings = load_recipe(name)
    commands = [line.strip("# ") for line in head(name) if line.startswith("#     ")]
    launches = [shlex.split(command) for command in commands if command.startswith("deepspeed ")]
    assert launches or name not in (*PAPER, *OWN)
    for words in launches:
        script = words.index("prdp_fast/train.py")
        parser = argparse.ArgumentParser()
        train_command.add_arguments(parser)
        args = parser.parse_args(words[script + 1 :])
        assert args.recipe == name and (ROOT / "configs" / args.config).is_file()
        load_recipe(args.recipe, args.overrides).check_ranks(int(words[2]) if words[1] == "--num_gpus" else 1)
    for words in map(shlex.split, commands):
        if words[:2] == ["prdp", "evaluate"]:
            parser = argparse.ArgumentParser()
            evaluate_command.add_arguments(parser)
            choose_rewards(parser.parse_args(words[2:]).rewards, settings.rewards)
        if words[:2] == ["prdp", "embed"]:
            parser = argparse.ArgumentParser()
            embed_command.add_arguments(parser)
            args = parser.parse_args(words[2:])
            assert settings.prompts.stored_embeddings and str(args.directory) == settings.prompts.source
            assert (args.model, args.max_sequence_length) == (settings.model.pretrained, settings.sampler.max_sequence_length)
        if words[:3] == ["prdp", "shards", "build"]:
            assert words[words.index("--output") + 1] == settings.prompts.source
            from prdp_fast.commands import shards as command

            parser = argparse.ArgumentParser()
            command.add_arguments(parser)
            parser.parse_args(words[2:])


def test_the_animals_bare_names_are_a_command_away(tmp_path: Path) -> None:
    """Of the study of beta, whose prompts are the names alone."""
    (command,) = [line.strip("# ") for line in head("sd14_animals_aesthetic") if "animal_names.txt" in line]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=True, timeout=60)
    source = tmp_path / load_recipe("sd14_animals_aesthetic").prompts.source
    names = source.read_text().splitlines()
    assert (len(names), names[0], names[-1]) == (45, "cat", "kangaroo")
    assert sorted(prompt.text for prompt in PromptSet.open(source, "train")) == sorted(names)


def head(name: str) -> list[str]:
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    return lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]


# ------------------------------------------------------------------------------------------------------------- what they cost


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("published")
    return {hub_id: str(write_configurations(preset, directory / preset)) for hub_id, preset in HUB_IDS.items()}


def activations_of(family: Family, dtype: torch.dtype, checkpointing: bool) -> Activations:
    """Of a transformer, from a few of its blocks of each kind: each more adds the same, and fakes of all take a minute."""
    config = family.denoiser_config
    if "num_single_layers" in config:
        kinds = {"num_layers": config["num_layers"], "num_single_layers": config["num_single_layers"]}
    elif "dual_attention_layers" in config:
        dual = len(config["dual_attention_layers"])
        kinds = {"dual": dual, "plain": config["num_layers"] - dual}
    else:
        return fake_activations(family, dtype, checkpointing=checkpointing)

    def measured(**counts: int) -> list[int]:
        if "dual" in counts:
            few = {"num_layers": sum(counts.values()), "dual_attention_layers": list(range(counts["dual"]))}
        else:
            few = counts
        return list(astuple(fake_activations(replace(family, denoiser_config=config | few), dtype, checkpointing=checkpointing)))

    few = dict.fromkeys(kinds, 2)
    total = base = measured(**few)
    for kind, count in kinds.items():
        one_more = measured(**few | {kind: 3})
        total = [value + (count - 2) * (more - first) for value, more, first in zip(total, one_more, base, strict=True)]
    return Activations(*total)


COUNTED: dict[str, tuple[Activations, int, float]] = {}


def sizes(family: Family, dtype: torch.dtype, checkpointing: bool) -> tuple[Activations, int, float]:
    """Everything that is counted on a denoiser of full size, once for each size of call."""
    key = str((family.pretrained, family.lora, family.latent_shape, family.text_length, dtype, checkpointing))
    if key not in COUNTED:
        # In a process of its own: what is counted of FLUX has depended on what ran before it. The cause is not known.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
            COUNTED[key] = alone.submit(count, family, dtype, checkpointing).result()
    return COUNTED[key]


def count(family: Family, dtype: torch.dtype, checkpointing: bool) -> tuple[Activations, int, float]:
    return activations_of(family, dtype, checkpointing), cost.denoiser_flop(family), cost.backward_per_forward(family)


def job_of(name: str, model: str, config: str, gpus: int) -> Job:
    """As `--dry-run` makes it on that many GPUs, with the embedded world's prompts where prompts would have to be built."""
    source = load_recipe(name).prompts.source
    settings = load_recipe(name, [f"model.pretrained={model}", f"prompts.source={source if source == 'animals' else 'scenes'}"])
    with mock.patch("prdp_fast.planning.job.has_embeddings", return_value=True):
        return Job.prepare(settings, config, world_size=gpus, cuda=True)


def rows_of(job: Job) -> dict[str, cost.PhaseRows]:
    return cost.epoch_rows(job.settings.schedule, job.policy, needs_reference=job.needs_reference)


def estimate(job: Job, settings: Settings, gpus: int) -> str:
    recompute = settings.performance.activation_checkpointing
    activations, flop, backward = sizes(job.family, job.config.dtype, recompute)
    footprint = replace(job.footprint(cuda=True), activations=activations)
    rows = choose_micro_batch(footprint, int(MEMORY), most=job.rows_per_update)
    plan = plan_memory(replace(footprint, micro_batch=rows))
    total = sum(phase.flop(flop, recompute, backward) for phase in rows_of(job).values())
    peak = cost.device_peak(PEAK, job.config.dtype, tf32=settings.performance.tf32 == "on")
    assert peak is not None and plan.fits(int(MEMORY))
    precision = {torch.bfloat16: "bf16", torch.float32: "float32 (TF32)"}[job.config.dtype]
    seconds = total / (SHARE * peak * gpus)
    hours = seconds * settings.schedule.epochs / 3600
    whole = f"{hours:.0f} hours" if hours > 2 else f"{60 * hours:.0f} minutes"
    which = f"{gpus} H100s of 80 GB" if gpus > 1 else "one H100 of 80 GB"
    return (
        f"On {which}, {precision}, estimated, not measured: {plan.total() / 1e9:.0f} GB a GPU at micro-batch {rows}; "
        f"{format_flop(total)} an epoch, {seconds:.0f} s at {SHARE:.0%} of peak, {whole} in all, rewards not counted."
    )


@pytest.mark.slow  # a U-Net of full size is counted, without a weight
@pytest.mark.parametrize("name", [*PAPER, *OWN])
def test_its_head_says_what_it_costs(name: str, models: dict[str, str]) -> None:
    hub_id = load_recipe(name).model.pretrained
    launch = next(line for line in head(name) if line.startswith("#     deepspeed "))
    gpus, config = re.search(r"--num_gpus (\d+)", launch), re.search(r"--config (\S+)", launch)
    assert config is not None
    job = job_of(name, models[hub_id], config[1], int(gpus[1]) if gpus else 1)
    said = " ".join(line.removeprefix("#").strip() for line in head(name))
    assert estimate(job, job.settings, job.world_size) in said
    if job.settings.sampler.stochastic_steps is None:
        assert len(job.transitions.stochastic) == len(job.transitions), "DDIM with eta 1 has a density at every step"


def test_clipping_that_matters_is_not_rounded_away() -> None:
    """bf16 rounds a log-prob by 1e-5 and more; at one update an epoch nothing is clipped."""
    for name in PAPER:
        configs = {re.search(r"--config (\S+)", line)[1] for line in head(name) if "deepspeed " in line}  # type: ignore[index]
        assert configs == ({"zero2.json"} if load_recipe(name).schedule.updates_per_epoch == 1 else {"zero0.json"}), name


@pytest.mark.slow
def test_a_dry_run_of_a_paper_recipe(models: dict[str, str]) -> None:
    command = [
        sys.executable, "prdp_fast/train.py", "--recipe", "sd14_animals_hpsv2", "--dry-run", "--set",
        f"model.pretrained={models['CompVis/stable-diffusion-v1-4']}",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "WORLD_SIZE": "1"}, timeout=300)
    assert result.returncode == 0, result.stderr
    rows = ("U-Net rows per epoch, rollout: 51200", "U-Net rows per epoch, update: 972800")
    for words in (*rows, '"kl_weight": 3e-05', "at the worst moment"):  # a machine it does not fit plans it all the same
        assert words in result.stdout
