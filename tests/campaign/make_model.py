"""Write the model that the campaign's jobs train: make_model.py DIRECTORY. Random weights, some ten thousand.

At stage 3 every layer costs messages between the ranks, so it has few.
"""

import sys

from models.tiny_pipelines import build
from small_model import small_unet

small_unet().save_pretrained(build("sd1", sys.argv[1]) / "unet")
