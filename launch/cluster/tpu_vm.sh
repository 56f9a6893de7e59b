#!/bin/bash
# One run on a TPU VM slice of 16 v5e chips (4 hosts, one process each), from
# your own machine: makes the slice, installs, runs.
#   PROJECT=... REPOSITORY=https://... WORKDIR=/mnt/shared/runs/one \
#     launch/cluster/tpu_vm.sh
# WORKDIR must be a folder that all hosts share (a mounted bucket or filestore).
# After a preemption the same line makes the slice anew and the run goes on.
# A slice costs until it is deleted; this script deletes preempted ones only.
set -euo pipefail
PROJECT=${PROJECT:?the Google Cloud project}
REPOSITORY=${REPOSITORY:?a git address of hetlora_jax that the hosts can clone}
WORKDIR=${WORKDIR:?a folder that all hosts share}
CONFIG=${CONFIG:-configs/chitchat_gemma3.py}
# Their product: the chips of the slice.
MESH_CLIENTS=${MESH_CLIENTS:-4}
MESH_MODEL=${MESH_MODEL:-4}
ZONE=${ZONE:-us-west4-a}
NAME=${NAME:-hetlora}
ACCELERATOR=${ACCELERATOR:-v5litepod-16}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
WHERE=(--project="$PROJECT" --zone="$ZONE")

tpu_vm() {
  local verb=$1
  shift
  gcloud compute tpus tpu-vm "$verb" "$NAME" "${WHERE[@]}" "$@"
}

everywhere() {
  tpu_vm ssh --worker=all --command="$1"
}

# A preempted slice keeps its name until it is deleted.
STATE=$(tpu_vm describe --format='value(state)' 2> /dev/null || true)
if [[ $STATE == PREEMPTED || $STATE == TERMINATED ]]; then
  tpu_vm delete --quiet
  STATE=
fi
if [[ -z $STATE ]]; then
  tpu_vm create --spot --accelerator-type="$ACCELERATOR" --version="$VERSION"
fi

# The image's own Python may be older than 3.11; uv brings one.
everywhere "set -e
  test -d hetlora_jax || git clone '$REPOSITORY' hetlora_jax
  cd hetlora_jax
  python3 -m pip install --quiet --user uv
  test -d .venv || python3 -m uv venv --quiet --seed --python 3.11 .venv
  python3 -m uv pip install --quiet --python .venv/bin/python \
    --editable '.[tpu,gemma,chat]'"
# jax.distributed finds the other hosts by the slice's metadata.
everywhere "cd hetlora_jax && . .venv/bin/activate && \
  python -m launch.train --distributed \
  --config='$CONFIG' --workdir='$WORKDIR' \
  --config.federated.clients_per_round=16 \
  --config.mesh.clients='$MESH_CLIENTS' --config.mesh.model='$MESH_MODEL'"
