"""What an evaluation is: models, prompts, rewards and sampling, from what is asked and a run's recipe.

All of it is checked before a weight is in memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from prdp_fast.config.load import parse_value
from prdp_fast.config.recipe import PromptSettings, RewardSettings, SamplerSettings, Settings
from prdp_fast.core.errors import UserError
from prdp_fast.core.files import read_json
from prdp_fast.core.records import Prompt
from prdp_fast.core.run_directory import EVALUATION, EXPORT, RUN
from prdp_fast.evaluation.blocks import ALONE, BASE, FINETUNED, BlockName, digest
from prdp_fast.evaluation.features import Features, choose_features
from prdp_fast.evaluation.request import EvaluationRequest
from prdp_fast.models.families import find_family, read_family
from prdp_fast.models.families.base import Family
from prdp_fast.models.files import find_file, resolve, what_else
from prdp_fast.models.lora import WEIGHTS
from prdp_fast.models.schedulers import SCHEDULERS
from prdp_fast.prompts.directory import is_url
from prdp_fast.prompts.stream import SHIPPED, PromptSet
from prdp_fast.rewards import WeightedRewards, build_reward
from prdp_fast.sampling.policy import Policy, build_policy, build_transitions

RUN_SETS = ("seen", "unseen")  # of a run's recipe


class Model(NamedTuple):
    """One row of the tables."""

    name: str
    pretrained: str
    adapter: Path | None  # directory of LoRA weights to load onto it
    digest: str  # of its weights


@dataclass(frozen=True)
class EvaluationPlan:
    """What is evaluated, checked before a weight is in memory."""

    models: dict[str, Model]  # by role
    families: dict[str, Family]  # by role, as they are sampled from
    policies: dict[str, Policy]  # by role
    prompts: dict[str, list[Prompt]]  # by the set's label
    rewards: dict[str, WeightedRewards]  # by label
    trained: dict[str, str]  # by the reward's label, whether it was trained on: yes, no, other options
    features: Features
    samples: int  # images a prompt
    seed: int
    block: int  # prompts
    batch: int  # images a call of the denoiser
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

    def blocks_of(self, role: str, prompt_set: int) -> list[BlockName]:
        """One model's blocks of a set, in the order of the prompts."""
        return [name for name in self.blocks() if (name.role, name.prompt_set) == (role, prompt_set)]

    def prompts_of(self, name: BlockName) -> tuple[list[Prompt], int]:
        """The prompts of a block, and the position of the first in its set."""
        start = name.number * self.block
        return list(self.prompts.values())[name.prompt_set][start : start + self.block], start


def plan_evaluation(request: EvaluationRequest, *, cuda: bool) -> EvaluationPlan:
    """Resolve and check everything. Raises: UserError."""
    check_numbers(request)
    directory = Path(request.model)
    recipe, run_record = read_run(directory) if (directory / RUN).is_file() else (None, {})
    sampler = choose_sampler(request, recipe)
    prompts, prompt_record = choose_prompts(request, recipe)
    rewards, trained, reward_record = choose_rewards(
        list(request.rewards), recipe.rewards if recipe else [], trust_code=request.trust_code
    )
    features = choose_features(request.features)
    models = choose_models(request, recipe)
    families = {role: read_family(model.pretrained).for_sampler(sampler) for role, model in models.items()}
    check_sizes(models, families)
    policies = {
        role: build_policy(sampler, build_transitions(family, sampler), family.predict, setting="--guidance-interval")
        for role, family in families.items()
    }

    *_, last = models.values()  # of two the second
    output = request.output or (directory / EVALUATION if recipe else Path("evaluations") / last.name)
    dtype = request.dtype or (run_dtype(run_record) if cuda else "float32")
    block = max(1, sampler.rollout_batch // request.samples)
    settings = {
        "models": {
            role: {"name": model.name, "pretrained": model.pretrained, "adapter": model.adapter and str(model.adapter)}
            | {"digest": model.digest, "scheduler": type(families[role].scheduler(sampler.scheduler)).__name__}
            for role, model in models.items()
        },
        "sampler": sampler.model_dump(mode="json"),
        "prompts": prompt_record,
        "rewards": reward_record,
        "samples": request.samples,
        "seed": request.seed,
        "features": features.record(),
        "dtype": dtype,
        "device": "cuda" if cuda else "cpu",
        "block": block,
    }
    return EvaluationPlan(
        models, families, policies, prompts, rewards, trained, features, request.samples, request.seed, block,
        sampler.rollout_batch, dtype, output, settings,
    )  # fmt: skip


def check_numbers(request: EvaluationRequest) -> None:
    """Raises: UserError for a number that no evaluation can have."""
    for option in ("samples", "limit", "steps", "batch"):
        value = getattr(request, option)
        if value is not None and value < 1:
            raise UserError(f"--{option} is {value}; expected at least 1")
    if not 0 <= request.seed < 2**63:
        raise UserError(f"--seed is {request.seed}; expected a whole number from 0, below 2^63")


def read_run(directory: Path) -> tuple[Settings, dict[str, Any]]:
    """A run's recipe and record. Raises: UserError if they cannot be read."""
    try:
        record = read_json(directory / RUN)
        return Settings.model_validate(record["recipe"]), record
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        raise UserError(f"{directory / RUN} is no record of a run ({reason}); evaluate {directory / EXPORT} as a model") from None


def run_dtype(record: dict[str, Any]) -> str:
    config = record.get("deepspeed")
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        section = config.get(name) if isinstance(config, dict) else None
        if isinstance(section, dict) and section.get("enabled"):
            return dtype
    return "float32"


def choose_models(request: EvaluationRequest, recipe: Settings | None) -> dict[str, Model]:
    """By role: the base, if there is one, and then what is compared with it. Raises: UserError."""
    pretrained = request.base or (recipe.model.pretrained if recipe else None)
    if pretrained is None:
        return {ALONE: model_of(request.model)}
    base = model_of(pretrained)
    return {BASE: base, FINETUNED: model_of_run(Path(request.model), base) if recipe else model_of(request.model)}


def refuse_other_directory(path: Path) -> None:
    """Raises: UserError if it is a directory of neither kind that can be evaluated."""
    if path.is_dir() and not (path / "model_index.json").is_file() and not what_else(path):
        raise UserError(f"{path} is neither a run ({RUN}) nor a diffusers pipeline (model_index.json); give one of the two")


def model_of(pretrained: str) -> Model:
    """Raises: UserError if it is neither a diffusers pipeline nor something on the hub that looks like one."""
    path = Path(resolve(pretrained))
    refuse_other_directory(path)
    find_family(pretrained)
    if path.is_dir():
        return Model(Path(pretrained).name or path.resolve().name, pretrained, None, digest(path))
    # In the hub's cache a file lies in a directory named after its commit.
    return Model(pretrained, pretrained, None, find_file(pretrained, "model_index.json").parent.name)


def model_of_run(run: Path, base: Model) -> Model:
    """What a run made: a whole pipeline, or LoRA weights for its base. Raises: UserError if it has made nothing yet."""
    export = run / EXPORT
    name = run.resolve().name
    if (export / "model_index.json").is_file():
        return model_of(str(export))._replace(name=name)
    if (export / WEIGHTS).is_file():
        return base._replace(name=name, adapter=export, digest=f"{base.digest} {digest(export / WEIGHTS)}")
    raise UserError(f"run {run} has no export ({export} is missing); finish it with --resume auto, which writes it at the end")


def check_sizes(models: dict[str, Model], families: dict[str, Family]) -> None:
    """Raises: UserError unless all models draw latents and pictures of one size, which is what sharing noise takes."""
    sizes = {role: size_of(family) for role, family in families.items()}
    if len(set(sizes.values())) > 1:
        raise UserError(
            "; ".join(f"{model.name!r} has {sizes[role]}" for role, model in models.items())
            + "; models can share noise only if their latents and pictures have one size: choose another --base"
        )


def size_of(family: Family) -> str:
    """Of latents and pictures, in words, from configurations alone."""
    channels, height, width = family.latent_shape
    return f"{channels} channels of {height} x {width} latents, {family.vae_scale} pixels a latent"


def choose_sampler(request: EvaluationRequest, recipe: Settings | None) -> SamplerSettings:
    """The run's sampler with what the request says instead. Raises: UserError for a value that makes no sense."""
    values = (recipe.sampler if recipe else SamplerSettings()).model_dump()
    if request.scheduler not in (None, *SCHEDULERS):
        raise UserError(
            f"--scheduler is {request.scheduler!r}; expected {' or '.join(SCHEDULERS)}, or nothing for the model's own"
        )
    given: dict[str, Any] = {"scheduler": request.scheduler, "num_inference_steps": request.steps}
    given |= {"eta": request.eta, "rollout_batch": request.batch, "method": request.method, "noise_level": request.noise_level}
    values |= {key: value for key, value in given.items() if value is not None}
    if request.guidance is not None:
        try:
            values["guidance_scale"] = None if request.guidance == "none" else float(request.guidance)
        except ValueError:
            raise UserError(f"--guidance is {request.guidance!r}; expected a number above 1, or none") from None
        if request.guidance == "none":
            values["guidance_interval"] = None
    if request.guidance_interval is not None:
        values["guidance_interval"] = tuple(request.guidance_interval)
    if request.stochastic_steps is not None:
        words = list(request.stochastic_steps)
        values["stochastic_steps"] = None if words == ["all"] else [int(word) if word.isdecimal() else word for word in words]
    try:
        return SamplerSettings(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        place = "".join(f"{part} is {problem['input']!r}: " for part in problem["loc"][:1])
        raise UserError(f"sampling: {place}{problem['msg'].removeprefix('Value error, ')}") from None


def choose_prompts(request: EvaluationRequest, recipe: Settings | None) -> tuple[dict[str, list[Prompt]], dict[str, Any]]:
    """The prompts of each set by its label, and what identifies them. Raises: UserError."""
    run_prompts, run_limit = (recipe.prompts, recipe.evaluation.prompts) if recipe else (None, None)
    wanted = request.prompts or (RUN_SETS if run_prompts else ())
    if not wanted:
        refuse_other_directory(Path(resolve(request.model)))  # before asking for options that would be for nothing
        raise UserError("--prompts is missing; without a run, name SOURCE:NAME (e.g. animals:unseen_eval) or a .txt file")
    drawn: dict[str, list[Prompt]] = {}
    records: dict[str, Any] = {}
    for text in wanted:
        source, name, limit = find_set(text, run_prompts)
        prompt_set = PromptSet.open(source, name, limit=limit, settings=run_prompts)
        label = text if Path(text).suffix != ".txt" else Path(text).stem
        if label in drawn:
            raise UserError(f"--prompts {text!r}: two sets are called {label!r}; give each once, and files different names")
        count = min(request.limit or run_limit or len(prompt_set), len(prompt_set))
        drawn[label] = prompt_set.draw(count, seed=request.seed)
        records[label] = {"source": source, "name": name, "fingerprint": prompt_set.fingerprint, "count": count}
    return drawn, records


def find_set(text: str, run_prompts: PromptSettings | None) -> tuple[str, str, int | None]:
    """Source, set and training limit that a word of --prompts means."""
    if run_prompts is not None and text in RUN_SETS:
        if text == "seen" and run_prompts.limit:  # as in training: what is trained on has been seen
            return run_prompts.source, run_prompts.train, run_prompts.limit
        return run_prompts.source, run_prompts.seen if text == "seen" else run_prompts.unseen, None
    if text.endswith(".txt"):
        return text, "train", None
    source, separator, name = text.rpartition(":")
    if separator and source and name and "/" not in name:  # of a URL alone, the colon is the scheme's or the port's
        return source, name, None
    if text in SHIPPED or Path(text).is_dir() or is_url(text) or run_prompts is None:
        raise UserError(f"--prompts {text!r} names no set; expected SOURCE:NAME, e.g. {text}:unseen_eval, or a .txt file")
    return run_prompts.source, text, None


def choose_rewards(
    words: list[str], recipe: list[RewardSettings], *, trust_code: bool = True
) -> tuple[dict[str, WeightedRewards], dict[str, str], dict[str, Any]]:
    """Rewards by label: the recipe's, then those asked for; whether each was trained on; what identifies them.

    Args: trust_code: False refuses what the recipe, a file of somebody's run, names as code; what is asked for may run.
    Raises: UserError for a name, an option or a value that is wrong, or no reward at all.
    """
    trained_on = [reward for reward in recipe if reward.weight != 0]
    wanted: list[tuple[str, dict[str, Any]]] = [(reward.name, reward.options) for reward in recipe]
    asked = []
    for word in words:
        pair = parse_reward(word)
        asked.append(pair)
        if pair not in wanted:
            wanted.append(pair)
    for name, values in wanted:
        if name == "python" and (name, values) not in asked and not trust_code:
            raise UserError(
                f"this run's reward is the code {values.get('function')!r}, as its run.json has it; add --trust-code to run it, "
                "if the run is yours or you have read that file"
            )
    if not wanted:
        raise UserError("--rewards is missing; without a run, name one, e.g. --rewards jpeg_size")
    rewards, trained, options = {}, {}, {}
    for name, values in wanted:
        label = name + (":" + ",".join(f"{key}={option_text(value)}" for key, value in values.items()) if values else "")
        rewards[label] = WeightedRewards([build_reward(name, values)], [1.0])
        trained[label] = "no"
        if any(reward.name == name for reward in trained_on):
            trained[label] = (
                "yes" if any((reward.name, reward.options) == (name, values) for reward in trained_on) else "other options"
            )
        options[label] = {"name": name, "options": values, "trained": trained[label], "code": code_digest(values)}
    return rewards, trained, options


def option_text(value: Any) -> str:
    """As it is written on the command line."""
    return f"[{','.join(map(option_text, value))}]" if isinstance(value, list) else str(value)


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
            options[key] = parse_value(value)
        except ValueError as error:
            raise UserError(f"--rewards {word!r}: {error}") from None
    return name, options
