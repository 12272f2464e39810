"""`prdp compile` with a compiler that captures as the real one does, and compiles nothing."""

import sys

from prdp_fast import cli
from prdp_fast.acceleration import compile as compiling

compiling.BACKEND = "aot_eager"
sys.exit(cli.main(["compile", *sys.argv[1:]]))
