"""``python -m cnn_jax``, also installed as ``cnn-jax``: every command by its name."""

import inspect
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from cnn_jax import __version__, cli
from cnn_jax.errors import UsageError, suggest

COMMANDS = ("train", "sweep", "evaluate", "compare", "predict", "export", "models", "cache")


def main() -> NoReturn:
    """Run the command that the arguments name, and exit the process."""
    cli.start(_run)


def _run(args: Sequence[str]) -> int:
    name, *rest = args or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"cnn_jax {__version__}")
        return 0
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}{suggest(name, COMMANDS)}; commands: {', '.join(COMMANDS)}")
    return command_module(name).main(rest)


def _help() -> str:
    lines = ["usage: python -m cnn_jax COMMAND [options]", "", *inspect.cleandoc(_DESCRIPTION).splitlines(), ""]
    for name in COMMANDS:
        _, _, description = inspect.getdoc(command_module(name)).partition(": ")
        lines.append(f"  {name:10}{description}")
    return "\n".join([*lines, "", "python -m cnn_jax COMMAND --help explains a command."])


_DESCRIPTION = """
Image classification with CNNs in JAX and Flax. Also installed as cnn-jax;
python -m cnn_jax.COMMAND is the same. The commands:
"""


def command_module(name: str) -> ModuleType:
    """Import the module of a command, which has a function ``main``."""
    module = import_module(f"cnn_jax.{name}")
    return import_module(f"cnn_jax.{name}.__main__") if hasattr(module, "__path__") else module


if __name__ == "__main__":
    main()
