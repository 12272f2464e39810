"""What an evaluation is: models, prompts, rewards and sampling, from the command line and a run's recipe.

All of it is checked before a weight is in memory.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from prdp_fast.config.recipe import PromptSettings, RewardSettings, SamplerSettings, Settings
from prdp_fast.core.errors import UserError
from prdp_fast.core.records import Prompt
from prdp_fast.evaluation.blocks import BlockName, digest
from prdp_fast.evaluation.features import Features, choose_features
from prdp_fast.evaluation.report import BASE, FINETUNED, SINGLE
from prdp_fast.models.families import find_family, read_family
from prdp_fast.models.families.base import Family
from prdp_fast.models.files import find_file, read_json, resolve
from prdp_fast.models.lora import WEIGHTS
from prdp_fast.models.schedulers import SCHEDULERS
from prdp_fast.prompts.stream import SHIPPED, PromptSet
from prdp_fast.rewards import WeightedRewards, build_reward
from prdp_fast.sampling.policy import Policy, build_policy
from prdp_fast.sampling.transitions import Transitions

EXPORT = "model"  # of a run directory
ROLE_SETS = ("seen", "unseen")  # of a run's recipe


class Model(NamedTuple):
    """One row of the tables."""

    name: str
    pretrained: str
    adapter: Path | None  # directory of LoRA weights to load onto it
    digest: str  # of its weights


@dataclass(frozen=True)
class Plan:
    """What is evaluated, checked before a weight is in memory."""

    models: dict[str, Model]  # by role
    policies: dict[str, Policy]
    prompts: dict[str, list[Prompt]]  # by the set's label
    rewards: dict[str, WeightedRewards]  # by label
    trained: dict[str, str]  # by label: yes, no, other options
    features: Features
    block: int  # prompts
    batch: int  # images a U-Net call
    dtype: str
    output: Path
    settings: dict[str, Any]  # all of the above as JSON, and what else the numbers depend on

    def blocks(self) -> list[BlockName]:
        """Model by model, so that each is loaded once."""
        return [
            BlockName(role, number, block)
            for role in self.models
            for number, prompts in enumerate(self.prompts.values())
            for block in range(-(-len(prompts) // self.block))
        ]

    def part(self, name: BlockName) -> tuple[list[Prompt], int]:
        """The prompts of a block, and the position of the first in its set."""
        start = name.number * self.block
        return list(self.prompts.values())[name.prompt_set][start : start + self.block], start


def prepare(args: argparse.Namespace, *, cuda: bool) -> Plan:
    """Resolve and check everything. Raises: UserError."""
    for option in ("samples", "limit", "steps", "batch"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option} is {value}; expected at least 1")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; expected a whole number from 0")
    directory = Path(args.model)
    recipe, run_record = read_run(directory) if (directory / "run.json").is_file() else (None, {})
    sampler = choose_sampler(args, recipe)
    prompts, prompt_record = choose_prompts(args, recipe)
    rewards, trained, reward_record = choose_rewards(args.rewards, recipe.rewards if recipe else [])
    features = choose_features(args.features)
    models: dict[str, Model] = {}
    pretrained = args.base or (recipe.model.pretrained if recipe else None)
    if pretrained is not None:
        models[BASE] = describe(pretrained)
    models[FINETUNED if models else SINGLE] = export_of(directory, models[BASE]) if recipe else describe(args.model)
    families = {role: read_family(model.pretrained) for role, model in models.items()}
    if len({shapes(family) for family in families.values()}) > 1:
        raise UserError(
            "; ".join(f"{model.name!r} has {shapes(families[role])}" for role, model in models.items())
            + "; models can share noise only if their latents and pictures have one size: choose another --base"
        )
    schedulers = {role: families[role].scheduler(sampler.scheduler) for role, model in models.items()}
    policies = {
        role: build_policy(
            sampler, Transitions.from_scheduler(scheduler, sampler.num_inference_steps, sampler.eta), families[role].predict,
            setting="--guidance-interval",
        )
        for role, scheduler in schedulers.items()
    }  # fmt: skip

    *_, last = models
    default = directory / "evaluation" if recipe else Path("evaluations") / models[last].name
    dtype = args.dtype or (run_dtype(run_record) if cuda else "float32")
    block = max(1, sampler.rollout_batch // args.samples)
    settings = {
        "models": {
            role: {"name": model.name, "pretrained": model.pretrained, "adapter": model.adapter and str(model.adapter)}
            | {"digest": model.digest, "scheduler": type(schedulers[role]).__name__}
            for role, model in models.items()
        },
        "sampler": sampler.model_dump(mode="json"),
        "prompts": prompt_record,
        "rewards": reward_record,
        "samples": args.samples,
        "seed": args.seed,
        "features": features.record(),
        "dtype": dtype,
        "device": "cuda" if cuda else "cpu",
        "block": block,
    }
    return Plan(
        models,
        policies,
        prompts,
        rewards,
        trained,
        features,
        block,
        sampler.rollout_batch,
        dtype,
        args.output or default,
        settings,
    )


def read_run(directory: Path) -> tuple[Settings, dict[str, Any]]:
    """A run's recipe and record. Raises: UserError if they cannot be read."""
    try:
        record = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        return Settings.model_validate(record["recipe"]), record
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        raise UserError(
            f"{directory / 'run.json'} is no record of a run ({reason}); evaluate {directory / EXPORT} as a model"
        ) from None


def run_dtype(record: dict[str, Any]) -> str:
    config = record.get("deepspeed", {})
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if config.get(name, {}).get("enabled"):
            return dtype
    return "float32"


def describe(pretrained: str) -> Model:
    """Raises: UserError if it is neither a diffusers pipeline nor something on the hub that looks like one."""
    path = Path(resolve(pretrained))
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise UserError(f"{path} is neither a run (run.json) nor a diffusers pipeline (model_index.json); give one of the two")
    find_family(pretrained)
    if path.is_dir():
        return Model(Path(pretrained).name or path.resolve().name, pretrained, None, digest(path))
    # In the hub's cache a file lies in a directory named after its commit.
    return Model(pretrained, pretrained, None, find_file(pretrained, "model_index.json").parent.name)


def export_of(run: Path, base: Model) -> Model:
    """What a run made: a whole pipeline, or LoRA weights for its base. Raises: UserError if it has made nothing yet."""
    export = run / EXPORT
    name = run.resolve().name
    if (export / "model_index.json").is_file():
        return describe(str(export))._replace(name=name)
    if (export / WEIGHTS).is_file():
        return base._replace(name=name, adapter=export, digest=f"{base.digest} {digest(export / WEIGHTS)}")
    raise UserError(f"run {run} has no export ({export} is missing); finish it with --resume auto, which writes it at the end")


def shapes(family: Family) -> str:
    """Of latents and pictures, from configurations alone."""
    channels, height, width = family.latent_shape
    blocks = len(read_json(family.pretrained, "vae/config.json")["block_out_channels"])
    return f"{channels} channels of {height} x {width} latents, 2^{blocks - 1} pixels a latent"


def choose_sampler(args: argparse.Namespace, recipe: Settings | None) -> SamplerSettings:
    """The run's sampler with what the command line says instead. Raises: UserError for a value that makes no sense."""
    values = (recipe.sampler if recipe else SamplerSettings()).model_dump()
    if args.scheduler not in (None, *SCHEDULERS):
        raise UserError(f"--scheduler is {args.scheduler!r}; expected {' or '.join(SCHEDULERS)}, or nothing for the model's own")
    given = {"num_inference_steps": args.steps, "eta": args.eta, "rollout_batch": args.batch, "scheduler": args.scheduler}
    values |= {key: value for key, value in given.items() if value is not None}
    if args.guidance is not None:
        try:
            values["guidance_scale"] = None if args.guidance == "none" else float(args.guidance)
        except ValueError:
            raise UserError(f"--guidance is {args.guidance!r}; expected a number above 1, or none") from None
        if args.guidance == "none":
            values["guidance_interval"] = None
    if args.guidance_interval is not None:
        values["guidance_interval"] = tuple(args.guidance_interval)
    try:
        return SamplerSettings(**values)
    except ValidationError as error:
        raise UserError(f"sampling: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def choose_prompts(args: argparse.Namespace, recipe: Settings | None) -> tuple[dict[str, list[Prompt]], dict[str, Any]]:
    """The prompts of each set by its label, and what identifies them. Raises: UserError."""
    run_prompts, run_limit = (recipe.prompts, recipe.evaluation.prompts) if recipe else (None, None)
    wanted = args.prompts or (ROLE_SETS if run_prompts else ())
    if not wanted:
        raise UserError("--prompts is missing; without a run, name SOURCE:NAME (e.g. animals:unseen_eval) or a .txt file")
    drawn: dict[str, list[Prompt]] = {}
    records: dict[str, Any] = {}
    for text in wanted:
        source, name, limit = find_set(text, run_prompts)
        prompt_set = PromptSet.open(source, name, limit=limit)
        label = text if Path(text).suffix != ".txt" else Path(text).stem
        if label in drawn:
            raise UserError(f"--prompts {text!r}: two sets are called {label!r}; give each once, and files different names")
        count = min(args.limit or run_limit or len(prompt_set), len(prompt_set))
        drawn[label] = prompt_set.draw(count, seed=args.seed)
        records[label] = {"source": source, "name": name, "fingerprint": prompt_set.fingerprint, "count": count}
    return drawn, records


def find_set(text: str, run_prompts: PromptSettings | None) -> tuple[str, str, int | None]:
    """Source, set and training limit that a word of --prompts means."""
    if run_prompts is not None and text in ROLE_SETS:
        if text == "seen" and run_prompts.limit:  # as in training: what is trained on has been seen
            return run_prompts.source, run_prompts.train, run_prompts.limit
        return run_prompts.source, run_prompts.seen if text == "seen" else run_prompts.unseen, None
    if text.endswith(".txt"):
        return text, "train", None
    source, separator, name = text.rpartition(":")
    if separator and source and name:
        return source, name, None
    if text in SHIPPED or Path(text).is_dir() or run_prompts is None:
        raise UserError(f"--prompts {text!r} names no set; expected SOURCE:NAME, e.g. {text}:unseen_eval, or a .txt file")
    return run_prompts.source, text, None


def choose_rewards(
    words: list[str], recipe: list[RewardSettings]
) -> tuple[dict[str, WeightedRewards], dict[str, str], dict[str, Any]]:
    """Rewards by label: the recipe's, then those asked for; whether each was trained on; what identifies them.

    Raises: UserError for a name, an option or a value that is wrong, or no reward at all.
    """
    trained_on = [reward for reward in recipe if reward.weight != 0]
    wanted: list[tuple[str, dict[str, Any]]] = [(reward.name, reward.options) for reward in recipe]
    for word in words:
        pair = parse_reward(word)
        if pair not in wanted:
            wanted.append(pair)
    if not wanted:
        raise UserError("--rewards is missing; without a run, name one, e.g. --rewards jpeg_size")
    rewards, trained, options = {}, {}, {}
    for name, values in wanted:
        label = name + (":" + ",".join(f"{key}={shown(value)}" for key, value in values.items()) if values else "")
        rewards[label] = WeightedRewards([build_reward(name, values)], [1.0])
        trained[label] = "no"
        if any(reward.name == name for reward in trained_on):
            trained[label] = (
                "yes" if any((reward.name, reward.options) == (name, values) for reward in trained_on) else "other options"
            )
        options[label] = {"name": name, "options": values, "trained": trained[label], "code": code_digest(values)}
    return rewards, trained, options


def shown(value: Any) -> str:
    return f"[{','.join(map(shown, value))}]" if isinstance(value, list) else str(value)


def code_digest(options: dict[str, Any]) -> str | None:
    """Of the file whose function a reward calls, if it calls one: another function is another reward."""
    path = Path(str(options.get("function", "")).rpartition(":")[0])
    return digest(path) if path.is_file() else None


def parse_reward(word: str) -> tuple[str, dict[str, Any]]:
    """NAME or NAME:KEY=VALUE,KEY=VALUE; commas inside brackets belong to a value. Raises: UserError."""
    name, _, rest = word.partition(":")
    options: dict[str, Any] = {}
    for part in re.split(r",(?![^\[{]*[\]}])", rest) if rest else []:
        key, separator, value = part.partition("=")
        if not key or not separator:
            raise UserError(f"--rewards {word!r}: {part!r} is no option; expected NAME:KEY=VALUE,KEY=VALUE")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--rewards {word!r}: the value {value!r} is not valid YAML") from None
    return name, options
