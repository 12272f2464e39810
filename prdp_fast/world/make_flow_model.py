"""Train the embedded flow model `tiny_flow` from nothing but the autoencoder and the tokenizer of `tiny`.

    python -m prdp_fast.world.make_flow_model --work runs/make_tiny_flow --output prdp_fast/world/tiny_flow

Two CLIP text encoders and an SD3Transformer2DModel are trained together by rectified flow (arXiv:2209.03003, the loss of
arXiv:2403.03206) on cached latents: x = (1 - sigma) x0 + sigma eps, and the network learns v = eps - x0. Seeded, saved every
minute, and resumed from `--work` when the command is given again. Every 500 steps it prints the loss on scenes kept aside, with
their own texts and with each other's: where the two are equal, the text is not read.

Only scenes of the split "train" are drawn, so the held-out prompts are unseen by the base model too.
The result is a StableDiffusion3Pipeline directory in float16 safetensors, without a T5 encoder.
"""

from __future__ import annotations

import argparse
import copy
import inspect
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from prdp_fast.world import TINY
from prdp_fast.world.making import (
    LATENT_SIZE,
    MAX_TOKENS,
    Trainer,
    draw_dataset,
    encode_dataset,
    report_samples,
    save_pipeline,
    step_generator,
)

TEXT_WIDTH = 64  # of each of the two text encoders
WIDTH, HEADS, BLOCKS = 128, 4, 6  # of the transformer
# Without a T5 encoder the pipeline puts zeros in its place: `max_sequence_length` tokens, all alike. A training row has a number
# of them drawn from here; the last is the pipeline's default. So the model draws as well with one, at a quarter of the cost.
EMPTY_TOKENS = (1, 16, 64, inspect.signature(StableDiffusion3Pipeline.encode_prompt).parameters["max_sequence_length"].default)
KEPT_ASIDE = 512  # scenes


# ---------------------------------------------------------------------------------------------------------------- models
def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,  # the tokens are read before the last one, as in SD3; the last serves the pooled embedding
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_transformer() -> SD3Transformer2DModel:
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=BLOCKS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIZE // 2,
        qk_norm="rms_norm",
    )
    # Every block starts as the identity, and the output as zero (arXiv:2212.09748); diffusers leaves that to training code.
    for name, module in transformer.named_modules():
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    return transformer


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    # No shift: it makes up for the redundancy of large pictures, and 8x8 latents have none. (diffusers applies a static shift
    # twice, to the range and to the steps in it.)
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


class CountedEmptyTokens:
    """Joint attention in which the last text token stands for many that are alike.

    Text tokens of SD3 have no positions, so tokens that start alike stay alike, and n of them are one whose weight before the
    softmax's division is n times as large: log n added to its logits. Exact, and far cheaper.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: None = None,  # diffusers passes it
        *,
        log_counts: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log_counts: (N,) float32. Returns: image tokens (N, I, D) and text tokens (N, T, D) after attention."""

        def heads(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        own, text = hidden_states, encoder_hidden_states
        query = torch.cat([attn.norm_q(heads(attn.to_q(own))), attn.norm_added_q(heads(attn.add_q_proj(text)))], dim=2)
        key = torch.cat([attn.norm_k(heads(attn.to_k(own))), attn.norm_added_k(heads(attn.add_k_proj(text)))], dim=2)
        value = torch.cat([heads(attn.to_v(own)), heads(attn.add_v_proj(text))], dim=2)
        bias = query.new_zeros(len(query), 1, 1, key.shape[2])
        bias[:, 0, 0, -1] = log_counts
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
        own, text = mixed[:, : own.shape[1]], mixed[:, own.shape[1] :]
        return attn.to_out[1](attn.to_out[0](own)), text if attn.context_pre_only else attn.to_add_out(text)


# -------------------------------------------------------------------------------------------------------------- training
def encode_text(modules: nn.ModuleDict, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `StableDiffusion3Pipeline.encode_prompt` does, but with one empty token at the end.

    Args: tokens: (N, MAX_TOKENS) int64.
    Returns: (N, MAX_TOKENS + 1, 2 TEXT_WIDTH) and pooled (N, 2 TEXT_WIDTH), float32.
    """
    outputs = [modules[name](tokens, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
    hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return F.pad(hidden, (0, 0, 0, 1)), torch.cat([output.text_embeds for output in outputs], dim=-1)


def flow_errors(
    modules: nn.ModuleDict,
    latents: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    tokens: torch.Tensor,
    empty_tokens: torch.Tensor,
) -> torch.Tensor:
    """Squared error of the velocity, a mean per row.

    Args: latents, noise: (N, 4, 8, 8) float32; sigmas: (N,) float32 in (0, 1); tokens: (N, MAX_TOKENS) int64; empty_tokens: (N,)
        int64, how many each row has.
    Returns: (N,) float32.
    """
    level = sigmas[:, None, None, None]
    hidden, pooled = encode_text(modules, tokens)
    output = modules["transformer"](
        (1 - level) * latents + level * noise, hidden, pooled, sigmas * 1000,
        joint_attention_kwargs={"log_counts": empty_tokens.to(noise.dtype).log()},
    ).sample  # fmt: skip
    return (output - (noise - latents)).square().mean((1, 2, 3))


@torch.no_grad()
def text_losses(modules: nn.ModuleDict, latents: torch.Tensor, tokens: torch.Tensor) -> dict[str, float]:
    """Mean error at four noise levels, with the rows' own texts and with each other's."""
    generator = step_generator(0, 0)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    counts = torch.full((len(latents),), EMPTY_TOKENS[-1], device=latents.device)
    losses = {}
    for sigma in (0.95, 0.8, 0.5, 0.2):
        for name, texts in (("own", tokens), ("others", tokens.roll(1, 0))):
            sigmas = torch.full((len(latents),), sigma, device=latents.device)
            losses[f"{name}_{sigma}"] = flow_errors(modules, latents, noise, sigmas, texts, counts).mean().item()
    return losses


def train_flow(
    work: Path, tokenizer: CLIPTokenizer, vae: AutoencoderKL, prompts: list[str], latents: torch.Tensor, args: argparse.Namespace
) -> nn.ModuleDict:
    torch.manual_seed(args.seed)
    modules = nn.ModuleDict({name: build_text_encoder(tokenizer) for name in ("text_encoder", "text_encoder_2")})
    modules["transformer"] = build_transformer()
    modules["transformer"].set_attn_processor(CountedEmptyTokens())
    modules.to(args.device)
    trainer = Trainer(modules, work / "flow.pt", steps=args.steps, lr=1e-3, ema=0.998)
    tokens = tokenizer(prompts, padding="max_length", return_tensors="pt")["input_ids"]
    empty = tokenizer([""], padding="max_length", return_tensors="pt")["input_ids"]
    drawn = len(latents) - KEPT_ASIDE
    aside = latents[drawn:].to(args.device), tokens[drawn:].to(args.device)
    while trainer.step < trainer.steps:
        generator = step_generator(args.seed, trainer.step)
        rows = torch.randint(drawn, (64,), generator=generator)
        dropped = torch.rand(len(rows), 1, generator=generator) < 0.1  # classifier-free guidance needs the empty prompt
        noise = torch.randn(len(rows), *latents.shape[1:], generator=generator)
        # Logit-normal as in SD3, its middle moved to sigma 0.62: small latents settle what is where at the noisy end.
        sigmas = torch.sigmoid(0.5 + torch.randn(len(rows), generator=generator))
        counts = torch.tensor(EMPTY_TOKENS)[torch.randint(len(EMPTY_TOKENS), (len(rows),), generator=generator)]
        batch = latents[rows], noise, sigmas, torch.where(dropped, empty, tokens[rows]), counts
        loss = flow_errors(modules, *(tensor.to(args.device) for tensor in batch)).mean()
        trainer.update(loss)
        if trainer.step % 100 == 0:
            trainer.log(loss=loss.item())
        if trainer.step % 500 == 0:
            trainer.log(**text_losses(trainer.ema, *aside))
        if trainer.step % 1000 == 0:
            pipeline = assemble(tokenizer, vae, trainer.ema)
            report_samples(pipeline, work / f"samples_{trainer.step}.png", max_sequence_length=EMPTY_TOKENS[0])
    return trainer.ema.eval()


def assemble(tokenizer: CLIPTokenizer, vae: AutoencoderKL, modules: nn.ModuleDict) -> StableDiffusion3Pipeline:
    transformer = copy.deepcopy(modules["transformer"])  # training goes on with its own attention
    transformer.set_attn_processor(JointAttnProcessor2_0())
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=build_scheduler(), vae=vae, text_encoder=modules["text_encoder"], tokenizer=tokenizer,
        text_encoder_2=modules["text_encoder_2"], tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory of the resumable state")
    parser.add_argument("--output", type=Path, required=True, help="directory of the finished pipeline")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=49_152, help="training scenes drawn")
    parser.add_argument("--steps", type=int, default=4_000)
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    # The pipeline adds `shift_factor` to latents, which `tiny` has no need of.
    vae = AutoencoderKL.from_pretrained(TINY / "vae", shift_factor=0.0).to(args.device).eval()
    prompts, images, _ = draw_dataset(args.images, args.seed)
    latents = encode_dataset(vae, images)
    pipeline = assemble(tokenizer, vae, train_flow(args.work, tokenizer, vae, prompts, latents, args))
    report_samples(pipeline, args.work / "samples.png")
    save_pipeline(pipeline, args.output)


if __name__ == "__main__":
    main()
