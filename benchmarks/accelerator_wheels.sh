#!/usr/bin/env bash
# Fetches into .whl/ what benchmarks.accelerator needs of a machine without network
# that has Python 3.12 with jax, flax, optax and orbax-checkpoint:
#
#   bash benchmarks/accelerator_wheels.sh
#
# There: python3 -m pip install --no-index --no-deps --target /tmp/site .whl/*.whl
#        PYTHONPATH=/tmp/site python3 -m benchmarks.accelerator
set -euo pipefail
cd "$(dirname "$0")/.."
out=.whl
most_mb=60  # of the working tree with the wheels
binary='array_record dm-tree docstring_parser gguf googleapis-common-protos
  immutabledict importlib_resources ml_collections nltk simple_parsing
  tensorboardX tensorflow-datasets tensorflow-metadata termcolor toml'
source='promise rouge-score'  # not on PyPI as wheels; pure Python

rm -rf "$out"
platforms=()
for glibc in 28 27 24 17; do
  platforms+=(--platform "manylinux_2_${glibc}_x86_64")
done
platforms+=(--platform manylinux2014_x86_64)
python3 -m pip download --quiet --no-deps --only-binary=:all: \
  --python-version 3.12 --implementation cp "${platforms[@]}" -d "$out" $binary
python3 -m pip wheel --quiet --no-deps -w "$out" $source
tree=$(git ls-files -z --cached --others --exclude-standard | du -cm --files0-from=- | tail -n 1 | cut -f 1)
mb=$((tree + $(du -sm "$out" | cut -f 1)))
echo "$(ls "$out" | wc -l) wheels in $out; $mb MB with the working tree."
if [ "$mb" -gt "$most_mb" ]; then
  echo "That is above $most_mb MB." >&2
  exit 1
fi
