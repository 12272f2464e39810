"""The embedded world: its scenes and prompts, the reader that checks a picture, the models that draw them, and their training."""

from pathlib import Path

HERE = Path(__file__).resolve().parent
TINY = HERE / "tiny"  # a StableDiffusionPipeline of 7.7 MB, trained by make_model.py
TINY_FLOW = HERE / "tiny_flow"  # a StableDiffusion3Pipeline of 9.2 MB without T5, trained by make_flow_model.py
TINY_SCORER = HERE / "tiny_scorer"  # a CLIPModel, trained by make_scorer.py: a reward that is learnt, and can be over-optimised
EMBEDDED = {path.name: path for path in (TINY, TINY_FLOW)}  # what `model.pretrained` calls them
