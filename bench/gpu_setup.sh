#!/usr/bin/env bash
# Puts the wheels in .whl and this checkout on PYTHONPATH of a GPU machine without a network; source it.
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl || return 1
export PYTHONPATH=/tmp/site:$PWD TORCH_CUDA_ARCH_LIST=9.0 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 FTRAY_CACHE=/tmp/ftray-cache
mkdir -p /tmp/ftray-meta/ftray-0.1.0.dist-info
printf 'Metadata-Version: 2.1\nName: ftray\nVersion: 0.1.0\n' > /tmp/ftray-meta/ftray-0.1.0.dist-info/METADATA
export PYTHONPATH=$PYTHONPATH:/tmp/ftray-meta
