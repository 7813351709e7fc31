#!/bin/bash
# RPT with torchrun, started once on every node:
#   NUM_NODES=2 GPUS_PER_NODE=8 RDZV_ENDPOINT=node-0:29500 scripts/launch/torchrun.sh \
#     --config configs/14b.yaml --trainer.default_root_dir /shared/runs/14b \
#     --trainer.strategy.gather_bf16 true
# Everything after the script's name goes to `rpt fit`. RDZV_ENDPOINT names one of the nodes and a free port on it, and must be the same on all nodes.
# If a process dies, torchrun restarts all of them, and the run resumes from its last checkpoint (--ckpt_path
# auto). SIGTERM ends the run after its step, with a checkpoint. TORCH_ELASTIC_SHUTDOWN_TIMEOUT (seconds)
# gives it the time for that. We have not run this on several machines.
set -euo pipefail

: "${NUM_NODES:=1}" "${GPUS_PER_NODE:=8}" "${RDZV_ENDPOINT:=localhost:29500}" "${RUN_ID:=rpt}" "${MAX_RESTARTS:=3}"
: "${TORCHRUN:=.venv/bin/torchrun}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
# torchrun's own 30 seconds are shorter than a step of a large model.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-270}"
# Use a new store for each start. torchrun's own store outlives a restart, and restarted ranks would find the
# addresses of earlier ranks in it.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec "$TORCHRUN" \
  --nnodes "$NUM_NODES" \
  --nproc-per-node "$GPUS_PER_NODE" \
  --rdzv-id "$RUN_ID" \
  --rdzv-backend c10d \
  --rdzv-endpoint "$RDZV_ENDPOINT" \
  --max-restarts "$MAX_RESTARTS" \
  --module rpt_lightning.cli fit --config configs/strategy/multi-node.yaml "$@" \
  --trainer.num_nodes "$NUM_NODES" \
  --trainer.devices "$GPUS_PER_NODE" \
  --ckpt_path auto
