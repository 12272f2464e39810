"""The directory of an evaluation: one file a block of prompts, so that a killed evaluation goes on where it stopped.

    settings.json                    what is computed; a directory belongs to one such record
    work/MODEL/SET/block-00003.pt    scores, diversity and a few pictures of some prompts
    evaluation.json, evaluation.md   what was found, once every block is there
    samples/                         pictures side by side

A block is computed alike whichever rank does it and whatever was done before. Ranks meet in these files alone, on a disk that all
of them see.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prdp_fast.core.errors import UserError
from prdp_fast.core.files import read_json, write_json, write_tensors
from prdp_fast.core.paths import check_output, fault
from prdp_fast.core.run_directory import first_difference

SETTINGS = "settings.json"
BLOCKS = "work"  # folder
RESULT, PAGE = "evaluation.json", "evaluation.md"
BASE, FINETUNED, ALONE = "base", "finetuned", "model"  # roles of models; one that is compared with nothing is alone
KEPT_PICTURES = 12  # of each set, for the picture of samples
WAIT_S = 0.2  # between two looks for another rank's block
TELL_S = 60.0  # of waiting, between two lines that say for what


class BlockName(NamedTuple):
    """Prompts number * size to (number + 1) * size of a set, sampled by one model."""

    role: str
    prompt_set: int  # position of the set in the plan
    number: int


@dataclass(frozen=True)
class Block:
    """What one model did on P prompts, B images each."""

    scores: dict[str, torch.Tensor]  # by reward and detail, (P, B) float32
    diversity: torch.Tensor  # (P,) float64
    images: torch.Tensor  # (p, 3, H, W) uint8, the first image of the first p <= P prompts, for the picture of samples


class EvaluationDirectory:
    """The blocks of one evaluation on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def claim(self, settings: dict[str, Any], *, restart: bool) -> None:
        """Make the directory this evaluation's, or refuse it. One rank calls this, before the others look.

        Args: restart: begin anew, whatever an earlier evaluation left there.
        Raises: UserError if it holds another evaluation or something else; nothing in it is touched then.
        """
        record, directory = self.path / SETTINGS, self.path
        check_output("--output", directory)
        settings = json.loads(json.dumps(settings))
        try:
            if record.is_file():
                if not restart:
                    earlier = read_json(record)
                    if not isinstance(earlier, dict):
                        raise ValueError("it holds no settings")
                    difference = first_difference(earlier, settings)
                    if difference:
                        raise UserError(
                            f"--output {directory} holds another evaluation: {difference}; choose another directory, give the "
                            "same settings to go on with it, or begin anew with --restart"
                        )
                else:
                    shutil.rmtree(directory / BLOCKS, ignore_errors=True)
            elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
                raise UserError(f"--output {directory} is not empty and holds no evaluation; choose a new directory")
            directory.mkdir(parents=True, exist_ok=True)
            write_json(record, settings)
        except OSError as error:
            raise UserError(f"--output {directory}: {fault(error)}; name a directory that can be written") from None
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{record} is damaged ({error}); begin anew with --restart") from None

    def block_path(self, name: BlockName) -> Path:
        return self.path / BLOCKS / name.role / f"set-{name.prompt_set}" / f"block-{name.number:05d}.pt"

    def missing(self, names: Iterable[BlockName]) -> list[BlockName]:
        return [name for name in names if not self.block_path(name).is_file()]

    def discard_damaged(self, names: Iterable[BlockName]) -> list[Path]:
        """Remove blocks that a copy or a full disk has cut off: they are computed again. One rank calls this, before others look.

        Returns: the files that were removed. Raises: OSError.
        """
        damaged = []
        for name in names:
            path = self.block_path(name)
            if not path.is_file():
                continue
            try:
                self.load(name)
            except OSError:
                raise
            except Exception:  # what zip, pickle and torch say of a damaged file; its block can be made again
                path.unlink()
                damaged.append(path)
        return damaged

    def save(self, name: BlockName, block: Block) -> None:
        """Write a block whole or not at all."""
        path = self.block_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, vars(block))

    def load(self, name: BlockName) -> Block:
        return Block(**torch.load(self.block_path(name), weights_only=True))

    def wait(self, names: Iterable[BlockName], say: Callable[[str], None]) -> None:
        """Until all blocks are there. A rank that fails is the launcher's to notice: it ends the job."""
        told = time.monotonic()
        left = self.missing(names)
        while left:
            if time.monotonic() - told > TELL_S:
                told = time.monotonic()
                say(f"waiting for {len(left)} blocks of other ranks")
            time.sleep(WAIT_S)
            left = self.missing(left)


def digest(path: Path) -> str:
    """Of a file, or of all files of a directory with their names: 16 hexadecimal digits of SHA-256.

    The weights of a model are read again when it is loaded; the first reading is what takes time.
    """
    total = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        total.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                total.update(chunk)
    return total.hexdigest()[:16]
