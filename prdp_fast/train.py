"""Finetune a text-to-image diffusion model on rewards.

    deepspeed prdp_fast/train.py --config zero2.json
    deepspeed --num_gpus 8 prdp_fast/train.py --config zero2.json --recipe my_recipe.yaml --set schedule.epochs=200

What launchers run, by path or as a module; `commands/train.py` is the command.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    # Python puts the folder of a script that is run by path on sys.path. Here that is prdp_fast/ itself, whose modules would
    # shadow others. What is needed is the folder above.
    _above = Path(__file__).resolve().parent.parent
    if _above.name in ("site-packages", "dist-packages"):
        del sys.path[0]  # already there, and behind the standard library, where it belongs
    else:
        sys.path[0] = str(_above)

from prdp_fast.core import environment

environment.prepare()

from prdp_fast.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
