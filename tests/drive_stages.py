"""Run the same three-epoch job under several DeepSpeed configurations in one process per rank; launched by test_stages.py.

deepspeed --num_gpus 2 tests/drive_stages.py OUTPUT zero0.json zero2.json ...
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

OVERRIDES = [
    "sampler.num_inference_steps=3", "schedule.epochs=3", "schedule.updates_per_epoch=2", "schedule.prompts_per_epoch=2",
    "schedule.images_per_prompt=3", "schedule.micro_batch=4", "evaluation.prompts=0", "optimizer.learning_rate=1e-5",
    "optimizer.eps=1e-4", "objective.kl_weight=1e-2", "sampler.rollout_batch=3",
]  # fmt: skip


def main() -> None:
    import torch

    from prdp_fast.config.load import load_recipe
    from prdp_fast.core import distributed
    from prdp_fast.core.run_directory import claim
    from prdp_fast.planning.job import Job
    from prdp_fast.training.trainer import Trainer

    torch.set_num_threads(1)
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    output, configs = Path(arguments[0]), arguments[1:]
    device = distributed.init()
    for config in configs:
        job = Job.prepare(load_recipe("smoke", OVERRIDES), config, world_size=distributed.world_size(), cuda=False)
        directory = output / Path(config).stem
        if distributed.rank() == 0:
            claim(directory, job.record(), "never")
        distributed.barrier()
        Trainer.build(job, device, directory).train()
    distributed.shutdown()


if __name__ == "__main__":
    main()
