# SPDX-License-Identifier: Apache-2.0
"""On-policy distillation: the student writes, the teacher judges every token of it."""
