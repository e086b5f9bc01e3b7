# SPDX-License-Identifier: Apache-2.0
"""Ours before any package of this name that a machine may have installed."""
