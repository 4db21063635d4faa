#!/usr/bin/env bash
# Fetch Python packages for a machine without a network that already has torch, transformers, peft, pytest and pyarrow
# (a cluster's container, a lent GPU). They go into wheels/, which git ignores.
#
#     scripts/card_wheels.sh              # for python3.12 on x86_64 Linux; PYTHON_VERSION=3.11 for another version
#     scripts/card_wheels.sh --with-peer  # also TRL, which benchmarks/gpu.py compares with
#
# On that machine:  PYTHONPATH=wheels/site python -m benchmarks.gpu --output gpu
set -euo pipefail
cd "$(dirname "$0")/.."
python_version=${PYTHON_VERSION:-3.12}
# What train.py imports besides torch and transformers. antlr4 has no wheel for this version, so it is built here.
packages=(hydra-core==1.3.8 omegaconf==2.3.1 tensordict==0.15.3 pyvers datasets dill multiprocess xxhash)
[ "${1:-}" = --with-peer ] && packages+=(trl==1.16.0)
rm -rf wheels && mkdir -p wheels/site
for_there=(--no-deps --python-version "$python_version" --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64
           --only-binary=:all:)
python3 -m pip download --quiet --dest wheels "${for_there[@]}" "${packages[@]}"
python3 -m pip wheel --quiet --no-deps --wheel-dir wheels antlr4-python3-runtime==4.9.3
# Unpack them, because one folder on PYTHONPATH needs no installer on the other machine.
for wheel in wheels/*.whl; do python3 -m zipfile -e "$wheel" wheels/site; done
rm wheels/*.whl
du -sh wheels
