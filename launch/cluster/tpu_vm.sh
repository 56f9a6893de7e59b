#!/bin/bash
# One run on a TPU VM slice of 16 v5e chips (4 hosts, one process each), from a
# checkout on your own machine: makes the slice, installs, runs.
#   PROJECT=... ZONE=us-west4-a WORKDIR=/mnt/shared/runs/one launch/cluster/tpu_vm.sh
# WORKDIR must be a folder that all hosts share (a mounted bucket or filestore).
# After a preemption the same line makes the slice anew and the run goes on.
set -euo pipefail
PROJECT=${PROJECT:?the Google Cloud project}
ZONE=${ZONE:-us-west4-a}
NAME=${NAME:-hetlora}
CONFIG=${CONFIG:-configs/chitchat_gemma3.py}
WORKDIR=${WORKDIR:?a folder that all hosts share}
REPOSITORY=${REPOSITORY:?a git address of hetlora_jax that the hosts can clone}
WHERE=(--project="$PROJECT" --zone="$ZONE")

everywhere() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker=all --command="$1"
}

gcloud compute tpus tpu-vm describe "$NAME" "${WHERE[@]}" > /dev/null 2>&1 ||
  gcloud compute tpus tpu-vm create "$NAME" "${WHERE[@]}" --spot \
    --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite

everywhere "test -d hetlora_jax || git clone '$REPOSITORY' hetlora_jax
  cd hetlora_jax && python3 -m venv .venv && .venv/bin/pip install --quiet --editable '.[tpu,gemma,chat]'"
# jax.distributed finds the other hosts by the slice's metadata.
everywhere "cd hetlora_jax && . .venv/bin/activate && python -m launch.train --distributed \
  --config='$CONFIG' --workdir='$WORKDIR' \
  --config.federated.clients_per_round=16 \
  --config.mesh.clients=4 --config.mesh.model=4"
