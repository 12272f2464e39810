"""Write the model that the campaign's jobs train: make_model.py DIRECTORY. Random weights, a few thousand of each kind."""

import sys

from models.tiny_pipelines import build

build("sd1", sys.argv[1])
