#!/bin/sh
# One or several machines with torchrun. Run this on each of them, with
#     NODES  the number of machines
#     HOST   the name of one of them that all reach; its port 29400 is free
#     GPUS   of a machine
# All machines see the same run directory.
#
# torchrun gives its ranks 30 seconds after SIGTERM, so the grace stays below that. A rank that ends with an error ends the
# job; with --max-restarts 3 torchrun starts all ranks again, and they go on from the newest checkpoint.
set -eu

# NCCL_SOCKET_IFNAME names the network between the machines where there are several, NCCL_DEBUG=INFO says what NCCL found.
exec torchrun \
    --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-8}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "${HOST:-localhost}:29400" --rdzv-id prdp \
    prdp_fast/train.py --config zero2.json --recipe sd14_hpdv2_hpsv2 --output runs/sd14 --resume auto --grace 25
