"""An epoch of training: its phases, sizes, memory, ranks and rivals. Every job is built by `Trainer.build`, as training's is."""

import os

from prdp_fast.core import environment

# Libraries read these when they are imported. One thread, as each rank of `make train` has: ratios do not depend on it, and other
# processes on the machine disturb it less.
os.environ.setdefault("OMP_NUM_THREADS", "1")
environment.prepare()
