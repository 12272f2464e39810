"""Recipes and DeepSpeed files: where they are, how a recipe is read, overridden and checked, and what is said of a mistake."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from prdp_fast.config.objectives import OBJECTIVES
from prdp_fast.config.recipe import RewardSettings, Settings
from prdp_fast.config.section import Section
from prdp_fast.core.errors import UserError
from prdp_fast.core.run_directory import brief

PACKAGE = Path(__file__).resolve().parent.parent
# setup.py puts them into the package of a wheel. A clone has them at its top, and an editable installation uses the clone's.
# The package is looked at first: a folder `configs` beside it in site-packages would belong to another distribution.
CONFIGS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
RECIPES = CONFIGS / "recipes"
MOST_VALUES, MOST_NESTED = 10_000, 50  # of a recipe
TOO_MANY = f"it holds more than {MOST_VALUES:,} values, aliases counted as what they stand for"


def find_recipe(name: str) -> Path:
    """A path as given, or the name of a recipe in configs/recipes."""
    for candidate in (Path(name), RECIPES / name, RECIPES / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    raise UserError(f"recipe {name!r} is neither a file nor one of the shipped recipes{nearest(name, known)}")


def load_recipe(name: str, overrides: list[str] | None = None, *, seed: int | None = None) -> Settings:
    """Read, override and validate a recipe.

    Args:
        name: path or shipped name.
        overrides: "section.key=value" strings; the value is YAML. List items are addressed by number: rewards.0.weight=2.
        seed: replaces the recipe's own.
    Raises: UserError, one line, naming file, key and the nearest known key.
    """
    path = find_recipe(name)
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"recipe {path.name}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"recipe {path.name}: expected a mapping of sections at the top level, got {type(raw).__name__}")
    for override in overrides or []:
        _apply_override(raw, override)
    if seed is not None:
        raw["seed"] = seed
    if isinstance(raw.get("objective"), dict):
        raw["objective"].setdefault("name", "prdp")
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"recipe {path.name}: {explain(error)}") from None


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a string for want of a dot, and takes the last of two equal keys in silence."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:
            raise yaml.constructor.ConstructorError(None, None, TOO_MANY, node.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                kind = "list" if isinstance(key, list) else "mapping"
                raise yaml.constructor.ConstructorError(None, None, f"a key is a {kind}; expected a name", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _construct_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node))


_RecipeLoader.add_constructor("tag:prdp,scientific", _construct_number)
_RecipeLoader.add_implicit_resolver(
    "tag:prdp,scientific", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
# YAML 1.1 reads 16:30 as 990, for it counts in sixties. Here it is a time of day.
for _first in "0123456789":
    _RecipeLoader.yaml_implicit_resolvers[_first].insert(0, ("tag:yaml.org,2002:str", re.compile(r"^[0-9]{1,2}:[0-9]{2}$")))


def read_yaml(text: str) -> Any:
    """Raises: ValueError saying what is wrong with it."""
    try:
        value = yaml.load(text, Loader=_RecipeLoader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:  # of tags: !!int "", !!bool maybe
        raise ValueError(str(error)) from None
    left = MOST_VALUES
    waiting = [(value, 0)]
    while waiting:  # with what aliases repeat: the few lines of a bomb hold billions of values
        place, depth = waiting.pop()
        left -= 1
        if left < 0:
            raise ValueError(TOO_MANY)
        if depth > MOST_NESTED:
            raise ValueError("it is nested too deeply")
        if isinstance(place, (list, tuple, set)):
            waiting += [(item, depth + 1) for item in place]
        elif isinstance(place, dict):
            waiting += [(item, depth + 1) for item in place.values()]
    return value


def parse_value(text: str) -> Any:
    """A value as a recipe would hold it. Raises: ValueError if it is not YAML."""
    try:
        return read_yaml(text)
    except ValueError as error:
        fault = f" ({error})" if str(error) in (TOO_MANY, "it is nested too deeply") else ""
        raise ValueError(f"the value {brief(text)} is not valid YAML{fault}") from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise UserError(f"--set {brief(override)}: expected section.key=value, e.g. --set schedule.epochs=10")
    try:
        value = parse_value(text)
    except ValueError as error:
        raise UserError(f"--set {brief(override)}: {error}") from None
    place: Any = raw
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(place, list):
            if not key.isdecimal() or int(key) >= len(place):
                raise UserError(
                    f"--set {brief(override)}: {'.'.join(keys[:depth])} is a list of {len(place)}; {key!r} is not in it"
                )
            if last:
                place[int(key)] = value
            else:
                place = place[int(key)]
        elif isinstance(place, dict):
            if last:
                place[key] = value
            else:
                if place.get(key) is None:
                    place[key] = {}
                place = place[key]
        else:
            raise UserError(f"--set {brief(override)}: {'.'.join(keys[:depth])} is {brief(place)}, not a section")


def explain(error: ValidationError, root: type[Section] = Settings) -> str:
    """The first problem as one line, in the file's own words. Args: root: what was validated."""
    problem = error.errors()[0]
    # The discriminated objective adds its tag ("prdp") to the location; the user never wrote it.
    location = [part for i, part in enumerate(problem["loc"]) if not (i == 1 and problem["loc"][0] == "objective")]
    where = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        section, key = location[:-1], str(location[-1])
        fields = _fields_at(root, problem["loc"][:-1])
        place = f" under {'.'.join(map(str, section))!r}" if section else ""
        return f"unknown key {key!r}{place}{nearest(key, fields)}"
    if problem["type"] == "missing":
        return f"{where} is missing; it has no default"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where} is {brief(problem['input'])}: {message[0].lower()}{message[1:]}"


def _fields_at(section: type[Section], location: tuple[int | str, ...]) -> list[str]:
    sections: dict[str, type[Section]] = {"rewards": RewardSettings} | OBJECTIVES
    for part in location:
        if part in sections:
            section = sections[str(part)]
        elif part in section.model_fields:
            annotation = section.model_fields[str(part)].annotation
            choices = [annotation, *get_args(annotation)]  # of an optional section, say
            section = next((c for c in choices if isinstance(c, type) and issubclass(c, Section)), section)
    return list(section.model_fields)


def nearest(word: str, known: list[str]) -> str:
    """'; did you mean ...?', or the list when nothing is near. klweight -> kl_weight."""
    flat = {name.replace("_", "").lower(): name for name in known}
    near = difflib.get_close_matches(word.replace("_", "").lower(), flat, n=1, cutoff=0.6)
    return f"; did you mean {flat[near[0]]!r}?" if near else f"; known: {', '.join(known)}"
