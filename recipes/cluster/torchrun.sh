#!/bin/sh
# One run on all devices of one machine, or of several.
#
#   one machine:       RECIPE=recipes/resnet18-cifar10.toml OUT=runs/resnet18 sh recipes/cluster/torchrun.sh
#   several machines:  the same on each, with NODES=2 and HEAD=name-of-one-of-them:29500; OUT on a shared file system
#
# A process that dies makes torchrun start all of them again, RESTARTS times; the run goes on from its last checkpoint.
set -eu
# otherwise processes that are started again may read addresses of those that have ended (pytorch issue 135712)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
PROCESSES=${PROCESSES:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
exec torchrun \
  --nproc-per-node "$PROCESSES" --nnodes "${NODES:-1}" --max-restarts "${RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-id "${JOB:-earlybird}" --rdzv-endpoint "${HEAD:-localhost:0}" \
  -m earlybird train "${RECIPE:?a recipe, such as recipes/resnet18-cifar10.toml}" --out "${OUT:?a run folder}" --quiet "$@"
