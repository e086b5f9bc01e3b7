#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# All that needs a GPU, in one run of under nine minutes: builds, calls every op, tests, sanitizes, measures
# ceilings, our kernels and other people's, and reads the counters; writes <out>/<gpu>.json after every row.
#   benchmarks/gpu.sh                          everything, into benchmarks/results
#   benchmarks/gpu.sh build ours peers         some of build smoke tests sanitizer ceilings ours peers ncu
#   benchmarks/gpu.sh --budget 300 --out DIR   another time limit (s) and directory
#   benchmarks/gpu.sh --dry-run                the same code at tiny sizes on a CPU
# benchmarks/gpu.md has the order of parts for a machine that is lent for half an hour.
# PYTHON=python3.12 picks an interpreter: it needs torch >= 2.11 with CUDA, triton, pytest, cmake, ninja,
# pybind11 and Python's headers.
# pybind11 and the peers may come as wheels on PYTHONPATH: benchmarks/gpu_peers.md.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root:$root/python${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
