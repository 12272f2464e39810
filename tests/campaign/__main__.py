"""python -m tests.campaign [--only WORDS] [--seed N] [--jobs N] [--short]"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

from campaign.command import main

if __name__ == "__main__":
    sys.exit(main())
