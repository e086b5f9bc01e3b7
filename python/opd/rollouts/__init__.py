# SPDX-License-Identifier: Apache-2.0
"""Sources of completions. To add one: a file with a config that builds an engine, and two lines."""

from opd.rollouts.dataset import DatasetConfig, DatasetRollouts
from opd.rollouts.hf import HfConfig, HfRollouts, Sampling, sample
from opd.rollouts.mixture import MixtureConfig, MixtureRollouts
from opd.rollouts.protocol import Rollouts
from opd.rollouts.replay import ReplayConfig, ReplayRollouts
from opd.rollouts.speculative import SpeculativeConfig, SpeculativeRollouts
from opd.rollouts.teacher_mixed import TeacherMixedConfig, TeacherMixedRollouts

ROLLOUTS = {
    "dataset": DatasetConfig,
    "hf": HfConfig,
    "mixture": MixtureConfig,
    "replay": ReplayConfig,
    "speculative": SpeculativeConfig,
    "teacher_mixed": TeacherMixedConfig,
}

RolloutConfig = (
    DatasetConfig | HfConfig | MixtureConfig | ReplayConfig | SpeculativeConfig | TeacherMixedConfig
)

__all__ = [
    "ROLLOUTS",
    "DatasetConfig",
    "DatasetRollouts",
    "HfConfig",
    "HfRollouts",
    "MixtureConfig",
    "MixtureRollouts",
    "ReplayConfig",
    "ReplayRollouts",
    "RolloutConfig",
    "Rollouts",
    "Sampling",
    "SpeculativeConfig",
    "SpeculativeRollouts",
    "TeacherMixedConfig",
    "TeacherMixedRollouts",
    "sample",
]
