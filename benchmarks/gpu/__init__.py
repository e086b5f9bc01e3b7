# SPDX-License-Identifier: Apache-2.0
"""Everything that a GPU is asked in one short run; `benchmarks/gpu.sh` starts it."""
