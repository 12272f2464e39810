"""The embedded world: its scenes and prompts, the reader that checks a picture, the model that draws them, and its training."""

from pathlib import Path

TINY = Path(__file__).resolve().parent / "tiny"  # a StableDiffusionPipeline of 6.6 MB, trained by make_model.py
