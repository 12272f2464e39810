"""Finetune a text-to-image diffusion model on rewards.

    deepspeed prdp_fast/train.py --config zero2.json
    deepspeed --num_gpus 8 prdp_fast/train.py --config zero2.json --recipe my_recipe.yaml --set schedule.epochs=200

What launchers run, by path or as a module; `commands/train.py` is the command.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    # DeepSpeed runs this file by path, which puts prdp_fast/ itself on sys.path, where its modules would shadow others'.
    _root = Path(__file__).resolve().parent.parent
    sys.path[0] = str(_root)
    sys.path.insert(1, str(_root / "kernels"))

from prdp_fast.core import environment

environment.prepare()

from prdp_fast.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
