"""Every ZeRO stage, one rank and two, ends with the weights of a plain torch loop."""

from __future__ import annotations

import copy
from pathlib import Path

import launching
import pytest
import torch
from drive_stages import OVERRIDES
from launching import ROOT
from safetensors.torch import load_file

from prdp_fast.config.load import load_recipe
from prdp_fast.models.pipeline import Pipeline
from prdp_fast.prompts.stream import PromptSet, PromptStream
from prdp_fast.rewards import build_rewards
from prdp_fast.sampling.transitions import Transitions
from prdp_kernels import derive_seeds, philox_normal, prdp_loss

pytestmark = pytest.mark.slow

CONFIGS = ["zero0.json", "zero1.json", "zero2.json", "zero3.json", "zero3_offload.json"]


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def weights(request, tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    output = tmp_path_factory.mktemp(f"ranks{request.param}")
    result = launching.run(ROOT / "tests/drive_stages.py", output, *CONFIGS, ranks=request.param, cwd=output)
    assert "deprecated" not in result.stderr, "a user can do nothing about what DeepSpeed calls"
    return {
        config: load_file(output / Path(config).stem / "model/unet/diffusion_pytorch_model.safetensors") for config in CONFIGS
    }


@pytest.fixture(scope="module")
def plain() -> dict[str, torch.Tensor]:
    """PRDP written out: one process, one graph over all steps, torch's own AdamW, no engine."""
    settings = load_recipe("smoke", OVERRIDES)
    schedule, sampler = settings.schedule, settings.sampler
    pipeline = Pipeline.load("tiny", torch.device("cpu"), torch.float32)
    table = Transitions.from_scheduler(pipeline.scheduler, sampler.num_inference_steps)
    denoiser, reference = pipeline.denoiser.requires_grad_(True), copy.deepcopy(pipeline.denoiser)
    options = settings.optimizer
    optimizer = torch.optim.AdamW(
        denoiser.parameters(), lr=options.learning_rate, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay
    )
    rewards = build_rewards(settings.rewards)
    stream = PromptStream(PromptSet.open("scenes", "train"), seed=settings.seed, prompts_per_epoch=schedule.prompts_per_epoch)
    images_per_prompt = schedule.images_per_prompt

    def encode(texts: list[str]) -> torch.Tensor:
        tokens = pipeline.whole.tokenizer(texts, padding="max_length", return_tensors="pt")["input_ids"]
        return pipeline.whole.text_encoder(tokens)[0]

    for epoch in range(schedule.epochs):
        prompts = stream.epoch(epoch)
        with torch.no_grad():
            prompt_embeds = encode([prompt.text for prompt in prompts]).repeat_interleave(images_per_prompt, 0)
            empty = encode([""]).expand_as(prompt_embeds)
        seeds = derive_seeds(
            settings.seed, epoch,
            torch.tensor([prompt.index for prompt in prompts]).repeat_interleave(images_per_prompt),
            torch.arange(images_per_prompt).repeat(len(prompts)),
        )  # fmt: skip

        def mean(model, x: torch.Tensor, step: int, prompt_embeds=prompt_embeds, empty=empty) -> torch.Tensor:
            t = table.timesteps[step]
            uncond = model(x, t, encoder_hidden_states=empty).sample
            output = uncond + sampler.guidance_scale * (model(x, t, encoder_hidden_states=prompt_embeds).sample - uncond)
            return table.sample_coef[step].float() * x + table.output_coef[step].float() * output

        with torch.no_grad():
            chain = [philox_normal(seeds, pipeline.latent_shape, step=0)]
            for step in range(len(table)):
                noise = philox_normal(seeds, pipeline.latent_shape, step=step + 1)
                chain.append(mean(denoiser, chain[-1], step) + table.std[step].float() * noise)
            images = pipeline.decode(chain[-1])
        rows = [prompt for prompt in prompts for _ in range(images_per_prompt)]
        scores = rewards.score(images, [row.text for row in rows], [row.metadata for row in rows]).total

        def log_probs(model, chain=chain, mean=mean) -> torch.Tensor:
            columns = [
                torch.distributions.Normal(mean(model, chain[step], step), table.std[step].float())
                .log_prob(chain[step + 1])
                .mean((1, 2, 3))
                for step in table.stochastic.tolist()
            ]
            return torch.stack(columns, 1).view(len(prompts), images_per_prompt, -1)  # noqa: B023

        with torch.no_grad():
            ref, old = log_probs(reference), log_probs(denoiser)
        for _ in range(schedule.updates_per_epoch):
            objective = settings.objective
            loss = prdp_loss(
                log_probs(denoiser), old, ref, scores.view(len(prompts), -1), clip_range=objective.clip_range,
                kl_weight=objective.kl_weight, backend="torch",
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(denoiser.parameters(), options.max_grad_norm)
            optimizer.step()
    return {name: parameter.detach() for name, parameter in denoiser.named_parameters()}


@pytest.mark.parametrize("config", CONFIGS)
def test_stage_agrees_with_a_plain_loop(config: str, weights, plain) -> None:
    start = dict(Pipeline.load("tiny", torch.device("cpu"), torch.float32).denoiser.named_parameters())
    assert weights[config].keys() == plain.keys()
    moved = sum(float((plain[name] - start[name]).square().sum()) for name in plain) ** 0.5
    assert moved > 1e-3, "the plain loop hardly moved: this test would accept anything"
    for name, expected in plain.items():
        error = float((weights[config][name] - expected).norm() / expected.norm())
        assert error < 1e-5, f"{config}: {name} is off by {error:.1e} of its norm"
    # The weights are hardly different after three epochs; what was learnt must agree too.
    apart = sum(float((weights[config][name] - plain[name]).square().sum()) for name in plain) ** 0.5
    assert apart < 0.02 * moved, f"{config}: the step itself is off by {apart / moved:.1%}"
