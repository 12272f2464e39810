"""What a recipe tells others: the model card and the report show it without what is the user's own business."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PRIVATE = ("url", "token_env", "arguments")  # options that name a server, a secret's variable, and whatever else a user sends


def recipe_for_others(recipe: dict[str, Any]) -> dict[str, Any]:
    """A resolved recipe, as JSON, without addresses, secrets, places of this machine, and where the user's numbers go.

    What is no recipe is passed through.
    """
    recipe = {name: section for name, section in recipe.items() if name != "tracking"}
    recipe = with_rewards_for_others(recipe)
    if isinstance(recipe.get("evaluation"), dict):  # which has held-out ones
        recipe = recipe | {"evaluation": with_rewards_for_others(recipe["evaluation"])}
    return without_places(recipe)


def with_rewards_for_others(section: dict[str, Any]) -> dict[str, Any]:
    rewards = section.get("rewards")
    if not isinstance(rewards, list):
        return section
    return section | {"rewards": [reward_for_others(reward) for reward in rewards]}


def reward_for_others(reward: Any) -> Any:
    if not isinstance(reward, dict) or not isinstance(reward.get("options"), dict):
        return reward
    return reward | {"options": for_others(reward["options"])}


def for_others(options: dict[str, Any]) -> dict[str, Any]:
    """A reward's options without what is the user's own business."""
    return {name: "left out" if name in PRIVATE and value else value for name, value in options.items()}


def without_places(value: Any) -> Any:
    """A recipe for others: of an absolute path of this machine, and of a URL, the last name alone."""
    if isinstance(value, dict):
        return {key: without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_places(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and ("://" in value or Path(value).is_absolute()) else value
