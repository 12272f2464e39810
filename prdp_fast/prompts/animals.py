"""The small prompt set of the papers: 45 common animals.

PRDP's small-scale experiments train and evaluate on 45 prompts "A painting of a <animal>", the animals being those of DDPO
(section 4.1). Training prompts and the seen evaluation set are these 45; the paper has no unseen ones. `unseen_eval` here is 45
other animals in the same words: the six that AlignProp evaluates on, and 39 further ones of this project's choice. No unseen
animal is a kind of a seen one's own name (no "house cat").

Sources: arXiv 2402.08714; the list: DDPO, arXiv 2305.13301, and its ddpo_pytorch/assets/simple_animals.txt; the six: AlignProp,
arXiv 2310.03739, assets/eval_simple_animals.txt.
"""

from __future__ import annotations

from prdp_fast.core.records import Prompt

SEEN = (
    "cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep", "deer", "cow", "goat", "lion", "tiger", "bear",
    "raccoon", "fox", "wolf", "lizard", "beetle", "ant", "butterfly", "fish", "shark", "whale", "dolphin", "squirrel", "mouse",
    "rat", "snake", "turtle", "frog", "chicken", "duck", "goose", "bee", "pig", "turkey", "fly", "llama", "camel", "bat",
    "gorilla", "hedgehog", "kangaroo",
)  # fmt: skip
UNSEEN = (
    "snail", "hippopotamus", "cheetah", "crocodile", "lobster", "octopus",
    "elephant", "giraffe", "rhinoceros", "leopard", "hyena", "jackal", "otter", "badger", "beaver", "skunk", "weasel", "mole",
    "hamster", "porcupine", "sloth", "koala", "panda", "donkey", "bison", "moose", "walrus", "seal", "penguin", "owl", "eagle",
    "parrot", "flamingo", "peacock", "ostrich", "crab", "jellyfish", "starfish", "dragonfly", "grasshopper", "ladybug",
    "scorpion", "caterpillar", "armadillo", "chameleon",
)  # fmt: skip


def prompt(animal: str) -> str:
    """The paper's template, with the article that English has."""
    return f"A painting of {'an' if animal[0] in 'aeiou' else 'a'} {animal}"


def animal_sets() -> dict[str, list[Prompt]]:
    """The sets by name, seen animals numbered from 0 and unseen ones after them."""
    seen = [Prompt(i, prompt(animal), {"split": "train", "animal": animal}) for i, animal in enumerate(SEEN)]
    unseen = [Prompt(len(SEEN) + i, prompt(animal), {"split": "unseen", "animal": animal}) for i, animal in enumerate(UNSEEN)]
    return {"train": seen, "seen_eval": seen, "unseen_eval": unseen}
