"""What a job is: recipe and DeepSpeed file, resolved and checked against each other before a weight is in memory."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from prdp_fast.config.deepspeed import DeepSpeedConfig, resolve_config
from prdp_fast.config.recipe import PromptSettings, Settings
from prdp_fast.core.digest import files_digest, text_digest
from prdp_fast.core.errors import UserError
from prdp_fast.core.paths import told
from prdp_fast.core.records import Prompt
from prdp_fast.core.run_directory import CONTENT, MACHINE, VERSIONS
from prdp_fast.models.families import read_family
from prdp_fast.models.families.base import Family
from prdp_fast.models.weights import encoder_digest, pipeline_digest
from prdp_fast.objectives import build_objective
from prdp_fast.planning.memory import Activations, Footprint
from prdp_fast.prompts.directory import Directory, LocalDirectory
from prdp_fast.prompts.embeddings import StoredEmbeddings, embeddings_digest, has_embeddings
from prdp_fast.prompts.stream import PromptSet, PromptStream
from prdp_fast.rewards import WeightedRewards, build_rewards
from prdp_fast.sampling.policy import Policy, build_policy, build_transitions, flow_method
from prdp_fast.sampling.transitions import Transitions
from prdp_kernels import dispatch

LARGE_KAPPA = 10.0  # a step that counts so many times as much as another is told of
READ_OPTIONS = ("function", "model", "processor", "tokenizer", "weights")  # of rewards: what they name is read
LIBRARIES = ("prdp-fast", "torch", "triton", "deepspeed", "diffusers", "transformers", "peft", "xformers", "numpy", "pillow")


@dataclass(frozen=True)
class Job:
    """A recipe that can be carried out: everything that can be built and checked without a weight in memory."""

    settings: Settings
    config: DeepSpeedConfig
    world_size: int
    family: Family
    policy: Policy
    train_prompts: PromptSet
    evaluation_prompts: dict[str, list[Prompt]]  # "seen", "unseen"
    rewards: WeightedRewards
    held_rewards: WeightedRewards | None = None  # held out from training, scored at evaluations

    @classmethod
    def prepare(cls, settings: Settings, config_name: str, *, world_size: int, cuda: bool) -> Job:
        """Resolve and check the whole job. Raises: UserError, before anything is loaded."""
        settings.check_ranks(world_size)
        check_kernels(settings.kernels, cuda)
        rewards = build_rewards(settings.rewards, settings.schedule.reward_timeout_s)
        held_rewards = settings.evaluation.rewards
        held_out = build_rewards(held_rewards, settings.schedule.reward_timeout_s) if held_rewards else None
        family = read_family(settings.model.pretrained, settings.model.lora).for_sampler(settings.sampler)
        if family.lora is not None:
            family.meta_denoiser()  # refuses an adapter that does not fit
            # With its layers named: what is resumed is the adapter that was started.
            settings = settings.model_copy(update={"model": settings.model.model_copy(update={"lora": family.lora})})
        sampler = settings.sampler
        transitions = build_transitions(family, sampler)
        stochastic_steps = transitions.trained
        config = resolve_config(
            config_name, settings, world_size=world_size, stochastic_steps=stochastic_steps, cuda=cuda
        )  # fmt: skip
        check_subsets(settings, stochastic_steps)
        policy = build_policy(sampler, transitions, family.predict, settings.kernels)
        train, held = open_prompts(settings, world_size)
        return cls(settings, config, world_size, family, policy, train, held, rewards, held_out)

    def record(self) -> dict[str, Any]:
        """What identifies the job in its run directory."""
        return {
            "recipe": self.settings.model_dump(mode="json"),
            "prompts": self.train_prompts.fingerprint,  # a directory may have been rebuilt under the same name
            "deepspeed": self.config.values,
            "world_size": self.world_size,
        }

    def full_record(self) -> dict[str, Any]:
        """The record with digests of the files that the job reads, and versions. Reads the model's weights, once."""
        return self.record() | {CONTENT: self.content(), VERSIONS: versions(), MACHINE: machine()}

    def content(self) -> dict[str, str]:
        """Digests of what the recipe names by a path or hub id, by its keys. Raises: UserError if a file cannot be read."""
        settings = self.settings
        with told("the files of the job cannot be read", "check the paths of the recipe and their permissions"):
            found = {"model.pretrained": pipeline_digest(settings.model.pretrained)}
            for name, held in self.evaluation_prompts.items():
                # A set may have been rebuilt between a run's evaluation before and the one after.
                lines = [json.dumps([prompt.index, prompt.text, prompt.metadata], sort_keys=True) for prompt in held]
                found[f"prompts.{name}"] = text_digest("\n".join(lines))
            if settings.prompts.stored_embeddings:
                found["prompts.stored_embeddings"] = embeddings_digest(self.train_prompts.directory)
            for section, rewards in (("rewards", settings.rewards), ("evaluation.rewards", settings.evaluation.rewards)):
                for reward in rewards:
                    if files := reward_files(reward.options):
                        found[f"{section}.{reward.name}"] = files_digest(files)
        return found

    @property
    def transitions(self) -> Transitions:
        return self.policy.transitions

    def step_lines(self) -> list[str]:
        """For the user: which steps are noisy and trained, and how much each counts, where that is a choice."""
        sampler, table, weights = self.settings.sampler, self.transitions, self.step_weights
        flow, lines = table.timesteps.is_floating_point(), []
        kappa = table.kappa[table.stochastic]
        first, last = int(table.stochastic[0]), int(table.stochastic[-1])
        if flow or sampler.stochastic_steps is not None:
            method = f"{flow_method(sampler)}; " if flow else ""
            run = f"a run of {table.trained} of steps {first} to {last} for each trajectory"
            which = f"steps {first} to {last}" if table.window is None else run
            lines.append(f"sampler: {method}{len(table)} steps, of which {which} are noisy and trained, the others the ODE's")
        if weights == "uniform" and flow and kappa.max() > LARGE_KAPPA * kappa.min():
            lines.append(
                f"objective.step_weights uniform: the model's output counts {kappa.max() / kappa.min():.0f} times as much in the "
                f"log-prob of step {int(table.stochastic[kappa.argmax()])} as of step {int(table.stochastic[kappa.argmin()])}; "
                "inverse_kappa evens that out, and sampler.stochastic_steps can leave steps out"
            )
        elif weights != "uniform":
            inverse = kappa.reciprocal() / kappa.reciprocal().mean()
            lines.append(
                f"objective.step_weights {weights}: {inverse[0]:.2g} at step {first} to {inverse[-1]:.2g} at step {last}"
            )
        return lines

    @property
    def needs_reference(self) -> bool:
        return build_objective(self.settings.objective).needs_reference

    @property
    def averages_reference(self) -> bool:
        """Whether log-ratios are taken to the moving average of the trained weights."""
        return getattr(self.settings.objective, "reference", None) == "moving_average"

    @property
    def keeps_reference(self) -> bool:
        """Whether the model that training began with stays at hand: a copy, or the denoiser without its adapter."""
        return self.needs_reference and not self.averages_reference

    @property
    def on_policy(self) -> bool:
        """Whether the policy samples its own trajectories, and not the frozen reference."""
        return getattr(self.settings.objective, "trajectories", "policy") == "policy"

    @property
    def clip_range(self) -> float | None:
        """Of the objective; None if it has none."""
        return getattr(self.settings.objective, "clip_range", None)

    @property
    def step_weights(self) -> str:
        """Of the objective: how a trajectory's steps count in the mean over them."""
        return getattr(self.settings.objective, "step_weights", "uniform")

    @property
    def images_per_rank(self) -> int:
        """Of one epoch: trajectories that a rank samples and trains on."""
        schedule = self.settings.schedule
        return schedule.prompts_per_epoch * schedule.images_per_prompt // self.world_size

    @property
    def rows_per_update(self) -> int:
        """Of one rank: more in a micro-batch there never are."""
        stochastic = self.transitions.trained
        return self.images_per_rank * min(self.settings.schedule.update_timesteps or stochastic, stochastic)

    @property
    def evaluations(self) -> int:
        """Denoiser rows of one row (trajectory, timestep): 2 with guidance."""
        return 1 if self.settings.sampler.guidance_scale is None else 2

    def knows_embeddings(self) -> bool:
        """Whether every embedding of the job is stored, and by its own text encoders: then they need not be in memory.

        Raises: UserError if what is stored is damaged or of other prompts.
        """
        stored = StoredEmbeddings.open(self.train_prompts.directory) if self.settings.prompts.stored_embeddings else None
        if stored is None:
            return False
        with told("the files of the job cannot be read", "check the paths of the recipe and their permissions"):
            return stored.is_of(encoder_digest(self.settings.model.pretrained), self.family.text_length)

    def footprint(self, *, cuda: bool, micro_batch: int = 1) -> Footprint:
        """What the job holds; activations are still to be measured."""
        return Footprint.of(
            self.settings, self.config, self.family, Activations(0), micro_batch, world_size=self.world_size,
            needs_reference=self.keeps_reference, cuda=cuda,
        )  # fmt: skip


def complete_record(record: dict[str, Any]) -> dict[str, Any]:
    """The record of an earlier version: keys that its recipes did not have get their defaults."""
    try:
        return record | {"recipe": Settings.model_validate(record["recipe"]).model_dump(mode="json")}
    except ValueError:  # a recipe that is none now: it is compared as it stands
        return record


def versions() -> dict[str, str]:
    """Of Python and the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def machine() -> dict[str, Any]:
    """What rank 0 computes on. Not its name: a report of the run may be given to others."""
    import torch

    found = None
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    processor = found[1] if found else platform.processor() or platform.machine()
    told: dict[str, Any] = {"processor": processor, "cores": os.cpu_count() or 1, "system": platform.system()}
    if torch.cuda.is_available():
        told |= {"accelerator": torch.cuda.get_device_name(), "accelerators here": torch.cuda.device_count()}
    return told


def reward_files(options: dict[str, Any]) -> list[tuple[str, Path]]:
    """The files on this machine that a reward's options name, and what they go by: a function's own, weights, a model's.

    What a function's file imports, and what it is given as arguments, which it may write, are no part of it.
    """
    files: list[tuple[str, Path]] = []
    for option in READ_OPTIONS:
        value = options.get(option)
        if not isinstance(value, str) or not value:
            continue
        name = value.rpartition(":")[0] if option == "function" else value
        path = Path(name)
        if option == "function" and not name.endswith(".py"):
            path = Path(getattr(sys.modules.get(name), "__file__", None) or name)
        if path.is_file():
            files.append((option, path))
        elif path.is_dir():
            files += [(f"{option}/{file.relative_to(path).as_posix()}", file) for file in path.rglob("*") if file.is_file()]
    return files


def check_kernels(kernels: str, cuda: bool) -> None:
    """Raises: UserError if the recipe insists on kernels that cannot run here."""
    if kernels == "triton" and not (dispatch.HAS_TRITON and (cuda or dispatch.interpreted())):
        raise UserError(
            f"kernels is 'triton', but {'there is no CUDA device' if dispatch.HAS_TRITON else 'triton is not installed'}; "
            "set kernels to 'auto', or TRITON_INTERPRET=1 in the environment to run them, slowly, on a CPU"
        )


def check_subsets(settings: Settings, stochastic_steps: int) -> None:
    """Raises: UserError where the recipe wants more steps than the schedule has."""
    for name in ("update_timesteps", "reference_timesteps"):
        wanted = getattr(settings.schedule, name)
        if wanted is not None and wanted > stochastic_steps:
            raise UserError(
                f"schedule.{name} is {wanted}, more than the {stochastic_steps} stochastic steps of the sampler; lower it or "
                "remove it"
            )


def open_prompts(settings: Settings, world_size: int) -> tuple[PromptSet, dict[str, list[Prompt]]]:
    """The set that is trained on, and the prompts of each evaluation set. Raises: UserError."""
    prompts, evaluation, schedule = settings.prompts, settings.evaluation, settings.schedule
    train = PromptSet.open(prompts.source, prompts.train, limit=prompts.limit, settings=prompts, damage=prompts.on_corrupt)
    check_embeddings(prompts, train, settings.model.pretrained)
    PromptStream(train, seed=settings.seed, prompts_per_epoch=schedule.prompts_per_epoch, world_size=world_size)  # refuses a few
    held = {}
    if evaluation.prompts:
        # With a limited training set, "seen" means the prompts that are trained on.
        seen = train if prompts.limit else PromptSet.open(prompts.source, prompts.seen, settings=prompts)
        unseen = PromptSet.open(prompts.source, prompts.unseen, settings=prompts)
        for name, prompt_set in (("seen", seen), ("unseen", unseen)):
            held[name] = prompt_set.draw(min(evaluation.prompts, len(prompt_set)), seed=evaluation.seed)
    return train, held


def check_embeddings(prompts: PromptSettings, train: PromptSet, pretrained: str) -> None:
    """Raises: UserError if the recipe wants stored embeddings and the set has none."""
    if prompts.stored_embeddings and not has_embeddings(train.directory):
        directory, then = train.directory, ""
        where: Directory | str = directory
        if not isinstance(directory, LocalDirectory):
            where, then = "DIR", " and upload what it wrote"
        raise UserError(
            f"prompts.stored_embeddings is set, but {directory} has none; run 'prdp embed {where} --model {pretrained}'{then}, "
            "or set it false"
        )
