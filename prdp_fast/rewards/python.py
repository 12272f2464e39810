"""A reward of the user's own: a function in a file or a module.

def brightness(images, prompts):            # (N, 3, H, W) uint8, N texts; a third argument gets N metadata dicts
    return images.float().mean((1, 2, 3))   # N numbers, higher is better; NaN: this image could not be scored

rewards: [{name: python, options: {function: my_reward.py:brightness}}]
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from prdp_fast.core.errors import RewardError
from prdp_fast.rewards.base import Reward, RewardOutput

FORMS = "expected 'path/to/file.py:function' or 'package.module:function'"


class PythonReward(Reward):
    """Calls `function(images, prompts)`, or with a third positional parameter `function(images, prompts, metadata)`."""

    name = "python"

    def __init__(self, *, function: str, arguments: Mapping[str, Any] | None = None) -> None:
        """The user's module is imported here, so that its faults show before any work; it should load models on first use.

        Args:
            function: where it is; a file's path is relative to the current directory.
            arguments: further keyword arguments of every call.
        Raises: ValueError if there is no such function, its module fails to import, or it cannot be called so.
        """
        self.function, self.arguments = find(function), dict(arguments or {})
        self.where = function
        self.wants_metadata = accepts(self.function, 3, self.arguments)
        if not self.wants_metadata and not accepts(self.function, 2, self.arguments):
            named = "".join(f", {name}=..." for name in self.arguments)
            raise ValueError(
                f"{function} has the signature {inspect.signature(self.function)}; expected to call it as "
                f"(images, prompts{named}) or (images, prompts, metadata{named})"
            )

    def score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        given = (images, prompts, metadata) if self.wants_metadata else (images, prompts)
        try:
            result = self.function(*given, **self.arguments)
        except Exception as error:
            raise RewardError(f"reward 'python': {self.where} raised {describe(error)}") from error
        return result if isinstance(result, RewardOutput) else RewardOutput(result)


def find(function: str) -> Callable[..., Any]:
    """Raises: ValueError saying what is missing."""
    place, separator, name = function.rpartition(":")
    if not separator or not place or not name.isidentifier():
        raise ValueError(f"function is {function!r}; {FORMS}")
    try:
        module = load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except FileNotFoundError:
        raise ValueError(f"there is no file {place!r} in {Path.cwd()}; {FORMS}") from None
    except Exception as error:
        raise ValueError(f"{place} could not be imported: {describe(error)}") from error
    found = getattr(module, name, None)
    if not callable(found):
        public = sorted(key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_"))
        raise ValueError(f"{place} has no function {name!r}; it has {', '.join(public) or 'none'}")
    return found


def load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(path)
    # A name of its own: two files may share theirs, with each other or with a library.
    name = f"prdp_reward_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return module


def accepts(function: Callable[..., Any], count: int, named: Mapping[str, Any]) -> bool:
    """Whether it can be called with so many positional arguments and these named ones."""
    try:
        inspect.signature(function).bind(*[None] * count, **named)
    except (TypeError, ValueError):
        return False
    return True


def describe(error: BaseException) -> str:
    """What went wrong, and the last line of it that is not a library's: 'KeyError: 'x' (my_reward.py:7)'."""
    message = str(error).splitlines()[0] if str(error) else ""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not is_library(frame.filename)]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' if message else ''}{message}{place}"


def is_library(filename: str) -> bool:
    return (
        filename == __file__ or filename.startswith("<") or any(part in filename for part in ("site-packages", sys.base_prefix))
    )
