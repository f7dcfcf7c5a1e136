"""Shared code of the commands: flags, output files, one-line errors, exit status, signals, and how jax starts."""

from cnn_jax.cli.environment import initialize_jax, use_every_processor
from cnn_jax.cli.flags import flag, given, parse, parse_several
from cnn_jax.cli.outputs import reporting, writing
from cnn_jax.cli.process import run, start
from cnn_jax.cli.signals import StopSignals
from cnn_jax.cli.streams import discarding_output, say

__all__ = [
    "StopSignals",
    "discarding_output",
    "flag",
    "given",
    "initialize_jax",
    "parse",
    "parse_several",
    "reporting",
    "run",
    "say",
    "start",
    "use_every_processor",
    "writing",
]
