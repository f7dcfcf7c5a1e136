"""jax's devices and its cache of compiled programs, which environment variables choose."""

import glob
import os
import re
import textwrap
import warnings
from pathlib import Path
from typing import Any

from cnn_jax.config import DETERMINISTIC_OPS
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.files import private_directory, user_cache
from cnn_jax.processors import num_processors


def use_every_processor() -> None:
    """Make each processor a jax device; existing environment variables win. Call it before jax initializes."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):  # the older setting
        return
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(num_processors()))


def initialize_jax(*, deterministic: bool = False) -> None:
    """Import jax and initialize its devices, which environment variables may prevent.

    Args:
        deterministic: whether operations on GPUs have to be bitwise reproducible.

    Raises:
        UsageError: jax cannot be imported, or has no device.
    """
    if deterministic:  # XLA reads its flags once, now
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC_OPS}"
    try:
        import jax

        jax.devices()
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = textwrap.shorten(str(error).partition("\n")[0], 120) or "there is no such device"
        raise UsageError(
            f"jax cannot start ({reason}): check JAX_PLATFORMS, JAX_NUM_CPU_DEVICES and XLA_FLAGS"
        ) from None


def keep_compiled_programs() -> None:
    """Keep jax's compiled programs in the user's cache; existing environment variables win.

    Compiled programs are executed, so only the user may have access to the cache.
    """
    try:
        cache = user_cache() / "compiled"
    except CnnJaxError:  # no home directory
        return
    if not private_directory(cache):
        return
    # Environment variables, because jax is not imported yet.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    if os.environ["JAX_COMPILATION_CACHE_DIR"] == str(cache):
        _repair_damaged_entries(cache)


def _repair_damaged_entries(cache: Path) -> None:
    """Remove damaged entries of the compilation cache when jax warns about them.

    jax then compiles the program, but does not overwrite the entry.
    """
    show_warning = warnings.showwarning

    def showwarning(message: Warning | str, *details: Any, **options: Any) -> None:
        if match := re.match(r"Error reading persistent compilation cache entry for '([^']+)'", str(message)):
            for entry in cache.glob(f"{glob.escape(match[1])}-*"):
                entry.unlink(missing_ok=True)
        else:
            show_warning(message, *details, **options)

    warnings.showwarning = showwarning
    warnings.filterwarnings("always", "Error reading persistent compilation cache entry")  # also with PYTHONWARNINGS
