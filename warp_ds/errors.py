"""Every error that is told in one line: what is wrong and what to do about it. Anything else is a traceback."""

from __future__ import annotations


class WarpError(Exception):
    """What a user can mend; the process ends with ``exit_status``."""

    exit_status = 2


class ConfigError(WarpError, ValueError):
    """A flag that cannot be used, with the cause and the cure."""


class ArtifactError(WarpError, ValueError):
    """A basis, masks or run directory that is missing, broken or made for something else."""


class CheckpointError(ArtifactError):
    """A checkpoint file is missing, damaged, not what its header says, or not the only one that could be meant."""


class PickledCheckpoint(CheckpointError):
    """The weights are pickled (pytorch_model.bin), not safetensors."""


class DataError(WarpError, ValueError):
    """A data set, or a row of it, that cannot be used."""


class UnsupportedSetting(WarpError, ValueError):
    """A setting of DeepSpeed, or a version of it, that the masked step cannot work with."""


class DirectoryGoneError(WarpError, ValueError):
    """A run's directory was removed, replaced or unmounted while the run was under way."""


class OtherRankError(WarpError, RuntimeError):
    """Another rank failed in a step that all ranks must finish; its message says with what."""


class SlurmError(WarpError, RuntimeError):
    """A Slurm command that failed, with its own message."""
