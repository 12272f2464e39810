"""Encode the prompts of a directory once and store the embeddings beside its shards.

    prdp embed prompts/mine --model tiny

float16; Stable Diffusion takes 118 KB a prompt, 12 GB for 100,000, a T5 of 512 tokens 4 MB and 420 GB.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from prdp_fast.core.errors import UserError
from prdp_fast.core.paths import check_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="built by 'prdp shards build'")
    parser.add_argument("--model", required=True, metavar="MODEL", help="as model.pretrained in a recipe")
    parser.add_argument(
        "--max-sequence-length", type=int, metavar="N", help="sampler.max_sequence_length of the recipe (default: the pipeline's)"
    )
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="prompts encoded at once (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Prints the path of embeddings.json last. Raises: UserError if the directory or the model cannot be read."""
    import torch

    from prdp_fast.config.recipe import SamplerSettings
    from prdp_fast.models.families import read_family
    from prdp_fast.models.pipeline import Pipeline
    from prdp_fast.models.text import TextEncoder
    from prdp_fast.models.weights import encoder_digest
    from prdp_fast.prompts.directory import is_url
    from prdp_fast.prompts.embeddings import StoredEmbeddings, write_embeddings
    from prdp_fast.prompts.shards import INDEX, read_index

    for option, value in (("--batch", args.batch), ("--max-sequence-length", args.max_sequence_length)):
        if value is not None and value < 1:
            raise UserError(f"{option} is {value}; expected at least 1")
    if is_url(args.directory):
        raise UserError("DIR is a URL; expected a directory on this machine: embed it there, and upload what was written")
    read_index(args.directory / INDEX)  # before a model is loaded
    check_output("DIR", args.directory)  # embeddings are written beside the shards
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sampler = SamplerSettings(guidance_scale=None, max_sequence_length=args.max_sequence_length)
    family = read_family(args.model).for_sampler(sampler)
    pipeline = Pipeline.load(family, torch.device("cpu"), frozen_dtype=torch.float32)
    for text_encoder in pipeline.text_encoders.values():  # the denoiser may take what room there is
        text_encoder.to(device)
    for note in pipeline.family.notes:
        print(note)
    encoder = TextEncoder(pipeline, torch.float32)
    digest = encoder_digest(args.model)
    path = write_embeddings(args.directory, encoder.encode, model=args.model, batch=args.batch, encoder=digest)
    stored = StoredEmbeddings.open(args.directory)
    assert stored is not None
    megabytes = sum(entry.bytes for entry in stored.manifest.files) / 1e6
    shapes = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in stored.manifest.shapes.items())
    print(f"{len(stored):,} prompts, {shapes}, {megabytes:,.1f} MB")
    print(path)
    return 0
