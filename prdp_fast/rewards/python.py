"""A reward of the user's own: a function in a file or a module.

def brightness(images, prompts):            # (N, 3, H, W) uint8, N texts; a parameter `metadata` gets N dicts
    return images.float().mean((1, 2, 3))   # N numbers, higher is better; NaN or None: this image could not be scored

rewards: [{name: python, options: {function: my_reward.py:brightness}}]
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import importlib.util
import inspect
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from prdp_fast.core.errors import RewardError
from prdp_fast.rewards.base import Reward, RewardOutput
from prdp_fast.rewards.surroundings import Surroundings

FORMS = "expected 'path/to/file.py:function' or 'package.module:function'"


class PythonReward(Reward):
    """Calls `function(images, prompts)`, with `metadata` if it has such a parameter, or a third one that needs a value.

    The images are a copy, so a function may write into them. What it changes in the process is put back after every call.
    """

    name = "python"

    def __init__(self, *, function: str, arguments: Mapping[str, Any] | None = None) -> None:
        """The user's module is imported here, so that its faults show before any work; it should load models on first use.

        Args:
            function: where it is; a file's path is relative to the current directory.
            arguments: further keyword arguments of every call.
        Raises: ValueError if there is no such function, its module fails to import, or it cannot be called so.
        """
        self.where, self.arguments = function, dict(arguments or {})
        self._surroundings = Surroundings(f"reward 'python': {function}")
        self._folder = folder_of(function)
        with self._surroundings.kept(), importable(self._folder):
            self.function = find(function)
        if inspect.iscoroutinefunction(self.function):
            raise ValueError(f"{function} is an async function; expected a plain one: call asyncio.run inside it")
        self.metadata_goes = way_of_metadata(self.function, self.arguments)
        if not accepts(self.function, *self._given([], [], []), self.arguments):
            named = "".join(f", {name}=..." for name in self.arguments)
            raise ValueError(
                f"{function} has the signature {inspect.signature(self.function)}; expected to call it as "
                f"(images, prompts{named}) or (images, prompts, metadata{named})"
            )

    def score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        given, named = self._given(images.clone(), list(prompts), [copy.deepcopy(dict(entry)) for entry in metadata])
        with self._surroundings.kept(), importable(self._folder):
            result = self._call(given, named)
        return result if isinstance(result, RewardOutput) else RewardOutput(first_of(result, len(prompts)))

    def _call(self, given: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """Raises: RewardError."""
        try:
            result = self.function(*given, **named, **self.arguments)
            return list(result) if isinstance(result, Iterator) else result  # of a generator nothing has run yet
        except Exception as error:
            raise RewardError(f"reward 'python': {self.where} raised {describe(error)}") from error
        except BaseException as error:  # sys.exit and its like would end the job without a word, or with status 0
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                raise  # the user's own
            raise RewardError(
                f"reward 'python': {self.where} raised {describe(error)}; a reward that cannot go on raises an ordinary exception"
            ) from error

    def _given(self, images: Any, prompts: Any, metadata: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named arguments of a call."""
        if self.metadata_goes == "third":
            return (images, prompts, metadata), {}
        return (images, prompts), {"metadata": metadata} if self.metadata_goes == "named" else {}


def first_of(result: Any, count: int) -> Any:
    """The scores in what other trainers' rewards return: (scores, metadata). A tuple of numbers is the scores."""
    if isinstance(result, tuple) and result and not isinstance(result[0], (str, bytes)):
        with contextlib.suppress(TypeError):
            if len(result[0]) == count:
                return result[0]
    return result


def way_of_metadata(function: Callable[..., Any], named: Mapping[str, Any]) -> str:
    """How a call hands metadata over: "named", "third" or "not".

    A third parameter with a default is an option of the function's own, unless it is called metadata.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return "not"
    free = [parameter for parameter in parameters if parameter.name not in named]
    if any(p.name == "metadata" and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in free[2:]):
        return "named"
    third = free[2] if len(free) > 2 else None
    if any(p.kind is p.VAR_POSITIONAL for p in free[:3]):
        return "third"
    if third is None or third.kind not in (third.POSITIONAL_ONLY, third.POSITIONAL_OR_KEYWORD):
        return "not"
    return "third" if third.default is third.empty or third.name == "metadata" else "not"


def folder_of(function: str) -> Path | None:
    """Of a function in a file: where the modules beside it are."""
    place = function.rpartition(":")[0] if isinstance(function, str) else ""
    return Path(place).resolve().parent if place.endswith(".py") else None


@contextlib.contextmanager
def importable(folder: Path | None) -> Iterator[None]:
    """The folder first on sys.path, as Python does for a script."""
    added = None if folder is None or str(folder) in sys.path else str(folder)
    if added is not None:
        sys.path.insert(0, added)
    try:
        yield
    finally:
        if added is not None:
            with contextlib.suppress(ValueError):
                sys.path.remove(added)


def find(function: str) -> Callable[..., Any]:
    """Raises: ValueError saying what is missing."""
    place, separator, name = function.rpartition(":") if isinstance(function, str) else ("", "", "")
    if not separator or not place or not name.isidentifier():
        raise ValueError(f"function is {function!r}; {FORMS}")
    try:
        module = load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except FileNotFoundError as error:
        if Path(place).is_file():
            raise ValueError(f"{place} could not be imported: {describe(error)}") from error
        raise ValueError(f"there is no file {place!r} in {Path.cwd()}; {FORMS}") from None
    except (Exception, SystemExit, GeneratorExit) as error:
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


def accepts(function: Callable[..., Any], given: tuple[Any, ...], named: Mapping[str, Any], more: Mapping[str, Any]) -> bool:
    """Whether it can be called so."""
    try:
        inspect.signature(function).bind(*given, **named, **more)
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
