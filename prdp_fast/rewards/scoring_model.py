"""What rewards that are models share: where they compute and how finely, in what batches, and where their files come from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from prdp_fast.core.environment import launched
from prdp_fast.core.errors import RewardError, UserError
from prdp_fast.core.hub import hub_file
from prdp_fast.core.weight_files import check_weight_file
from prdp_fast.rewards.base import Reward, RewardOutput

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a model in transformers' layout
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class ScoringModel(Reward):
    """A reward that is a model.

    Options of all of them:
        batch: images a forward; changes speed and memory only.
        device: auto (this rank's GPU if there is one, else the CPU), or any that torch knows: cpu, cuda:1.
        dtype: of weights and activations; scores are float32. Differences between the images of one prompt are what is learnt,
            often a hundredth of the score, and scoring costs little beside sampling: float32 unless memory is short.
    """

    def __init__(self, *, batch: int = 32, device: str = "auto", dtype: str = "float32") -> None:
        """Raises: ValueError for an option that makes no sense."""
        if type(batch) is not int or batch < 1:
            raise ValueError(f"batch is {batch!r}; expected a whole number from 1")
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; expected {', '.join(DTYPES)}")
        self.batch, self.dtype = batch, DTYPES[dtype]
        self.device = choose_device(device)
        self.loaded = False

    @abstractmethod
    def load(self) -> None:
        """Put the model on `self.device` in `self.dtype`. Raises: UserError if a file is missing or another's."""

    @abstractmethod
    def score_batch(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores of (n, 3, H, W) uint8 images on the CPU, (n,) float32 on any device."""

    def prepare(self) -> None:
        if self.loaded:
            return
        try:
            self.load()
        except UserError as error:  # so that every rank hears of it
            raise RewardError(str(error)) from error
        self.loaded = True

    @torch.no_grad()
    def score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        self.prepare()
        parts = [torch.empty(0)]
        for start in range(0, len(images), self.batch):
            part = slice(start, start + self.batch)
            parts.append(self.score_batch(images[part].cpu(), prompts[part]).float().cpu())
        return RewardOutput(torch.cat(parts))

    @property
    def owner(self) -> str:
        """Opens an error."""
        return f"reward {self.name!r}"

    def place(self, module: torch.nn.Module) -> torch.nn.Module:
        return module.to(self.device, self.dtype).eval().requires_grad_(False)


def choose_device(name: str) -> torch.device:
    """Raises: ValueError if it is no device, or one that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {name!r}; expected auto, cpu or cuda, or one such as cuda:1") from error
    if device.type != "cuda":
        return device
    # This rank's own, by its number: rewards are scored in a thread beside the denoiser's, and a new thread starts on GPU 0.
    index = launched("LOCAL_RANK", 0) if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but torch sees {torch.cuda.device_count()} GPUs; expected auto or cpu")
    return torch.device("cuda", index)


def find_model_file(owner: str, name: str, filename: str) -> Path:
    """A file of a model. name: a directory, or a hub id. Raises: UserError."""
    what = f"{owner}: {name!r}"
    if Path(name).is_dir():
        path = Path(name) / filename
        if not path.is_file():
            raise UserError(f"{what} has no {filename}; expected the files of the model, as on the hub")
        check_weight_file(what, path)
        return path
    return hub_file(what, name, filename, lacking="is it the right model?")


def find_weights(owner: str, override: str | None, name: str, filename: str) -> Path:
    """The file `override`, if the user has it somewhere, or a file of a hub id. Raises: UserError."""
    if override is None:
        return find_model_file(owner, name, filename)
    if not Path(override).is_file():
        raise UserError(f"{owner}: weights {override!r} is no file; expected a copy of {filename} of {name}")
    return Path(override)


def read_checkpoint(owner: str, path: Path) -> dict[str, Any]:
    """A .pt or .pth of tensors. Nothing in it is run. Raises: UserError if it holds anything else."""
    check_weight_file(owner, path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle, zip and torch's own
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{owner}: {path} is no file of tensors ({line}); fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{owner}: {path} holds a {type(content).__name__}; expected tensors by name")
    return content


def check_tensors(owner: str, path: Path, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Raises: UserError if names or shapes disagree, with the first few that do."""
    missing = [name for name in expected if name not in found]
    strange = [name for name in found if name not in expected]
    reshaped = [
        f"{name} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
        for name, tensor in found.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    quantised = [
        f"{name} as {tensor.dtype}"
        for name, tensor in found.items()
        if name in expected and expected[name].is_floating_point() and not tensor.is_floating_point()
    ]
    faults = [
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (("lacks", missing), ("has unknown", strange), ("has", reshaped), ("has", quantised))
        if names
    ]
    if faults:
        raise UserError(f"{owner}: {path} {'; '.join(faults)}; is it the right model?")


def read_pretrained(owner: str, loader: Any, name: str, **options: Any) -> Any:
    """`loader.from_pretrained`, in silence. owner: opens an error, e.g. "reward 'hpsv2'". Raises: UserError."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if Path(name).is_dir():
        for path in sorted(Path(name).iterdir()):
            if path.is_file() and (path.suffix == ".json" or path.name in WEIGHTS):
                check_weight_file(f"{owner}: {name!r}", path)
    is_network = isinstance(loader, type) and issubclass(loader, torch.nn.Module)
    try:
        if not is_network:
            return loader.from_pretrained(name, **options)
        network, found = loader.from_pretrained(name, output_loading_info=True, **options)
    except Exception as error:  # transformers, tokenizers and safetensors raise all kinds
        line = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{owner}: {name!r} does not load as a {loader.__name__} ({line})") from None
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        lacking = f"{', '.join(missing[:3])}{more} of a {loader.__name__}"
        raise UserError(f"{owner}: the weights of {name!r} lack {lacking}; fetch them again")
    return network
