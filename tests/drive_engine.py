"""What the engine does to gradients, at every stage and precision; run by test_engine.py in one process per rank.

    deepspeed --num_gpus N tests/drive_engine.py RESULT.json

Every case makes updates on one linear layer, whose gradient is known in closed form; one of them has 400 backwards.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

BACKWARDS = 400
WIDTH = 24
CASES = [
    *[(f"zero{stage}", precision) for stage in ("0", "1", "2", "3", "3_offload") for precision in ("float32", "bfloat16")],
]


def run_case(name: str, precision: str, device) -> dict[str, float | bool | None]:
    import torch
    import torch.distributed as dist

    from prdp_fast.config.deepspeed import resolve_config
    from prdp_fast.config.load import load_recipe
    from prdp_fast.config.recipe import OptimizerSettings
    from prdp_fast.core import distributed
    from prdp_fast.planning.micro_batch import halve_on_oom
    from prdp_fast.training.engine import ZeroEngine

    settings = load_recipe("smoke", ["schedule.prompts_per_epoch=2"])
    config = json.loads((ROOT / "configs" / f"{name}.json").read_text())
    config["bf16"] = {"enabled": precision == "bfloat16"}
    path = Path(sys.argv[-1]).with_name(f"{name}-{precision}-{dist.get_rank()}.json")
    path.write_text(json.dumps(config))
    resolved = resolve_config(str(path), settings, world_size=dist.get_world_size(), stochastic_steps=BACKWARDS, cuda=False)
    torch.manual_seed(0)
    layer = torch.nn.Linear(WIDTH, 1, bias=False)
    engine = ZeroEngine(layer, OptimizerSettings(learning_rate=1e-2, weight_decay=0.0), resolved, device)
    # Rank r's gradient is (r + 1) * weight per backward; ranks average.
    x = torch.full((1, WIDTH), float(dist.get_rank() + 1), dtype=resolved.dtype)
    mean_x = (dist.get_world_size() + 1) / 2

    def update(weight: float, backwards: int, poison: bool = False):
        engine.set_scale(weight)
        with engine.accumulating():
            for number in range(backwards):
                factor = math.inf if poison and number == 7 else weight
                engine.backward((engine.denoiser(x).float() * factor).sum(), last=number == backwards - 1)
        return engine.step()

    def weights():
        return engine.full_state_dict()["weight"].clone()

    def restart_error() -> float:
        """The last rank runs out of memory in its sixth backward, when that has added its gradient; every rank starts again."""
        attempts: list[int] = []

        def run_out(parameter: torch.Tensor) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        def attempt(size: int) -> None:
            attempts.append(size)
            for number in range(16):
                hook = None
                if len(attempts) == 1 and number == 5 and dist.get_rank() == dist.get_world_size() - 1:
                    hook = layer.weight.register_post_accumulate_grad_hook(run_out)
                try:
                    engine.backward((engine.denoiser(x).float() * 3.0).sum(), last=number == 15)
                finally:
                    if hook:
                        hook.remove()

        engine.set_scale(3.0)
        with engine.accumulating():
            halve_on_oom(
                attempt, 2, clear=engine.discard_gradients, recoverable=engine.passes_are_local, say=lambda line: None,
                any_rank=lambda failed: distributed.all_reduce([float(failed)], "max")[0] > 0,
            )  # fmt: skip
        assert attempts == [2, 1], attempts
        ratio = engine.step().grad_norm / (3.0 * 16 * mean_x * math.sqrt(WIDTH))
        again = update(3.0, 16).grad_norm / (3.0 * 16 * mean_x * math.sqrt(WIDTH))
        return max(abs(ratio - 1), abs(again - 1))

    def master_error() -> float:
        """Of master weights that begin as what was loaded. 23 and 3 numbers, which two ranks cannot share evenly."""
        torch.manual_seed(1)
        odd = torch.nn.Linear(23, 1, bias=False), torch.nn.Linear(1, 3, bias=False)
        loaded = {f"{number}.weight": module.weight.detach().clone() for number, module in enumerate(odd)}
        state = ZeroEngine(torch.nn.Sequential(*odd), OptimizerSettings(), resolved, device).full_state_dict()
        assert state.keys() == loaded.keys()
        return max(float((state[name] - value).abs().max()) for name, value in loaded.items())

    before = weights()
    poisoned = update(1.0, 16, poison=True)
    after_poison = weights()
    # All of them beyond the clipping norm of 1, so that AdamW sees one constant gradient.
    norms = [
        update(weight, backwards).grad_norm / (weight * backwards * mean_x * math.sqrt(WIDTH))
        for weight, backwards in ((1.0, BACKWARDS), (3e5, 16), (0.1, 16))
    ]
    after = weights()
    return {
        "restart_error": restart_error() if engine.passes_are_local else None,
        "poison_applied": poisoned.applied,
        "poison_moved": float((after_poison - before).abs().max()),
        "worst_norm_ratio_error": max(abs(ratio - 1) for ratio in norms),
        "step": float((after - before).mean()),
        "master_error": master_error(),
    }


def main() -> None:
    from prdp_fast.core import distributed
    from prdp_fast.core.errors import UserError

    device = distributed.init()
    results = {}
    for name, precision in CASES:
        try:
            results[f"{name} {precision}"] = run_case(name, precision, device)
        except UserError as error:
            results[f"{name} {precision}"] = {"refused": str(error)}
    if distributed.rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(results))
    distributed.shutdown()


if __name__ == "__main__":
    main()
