"""``python -m cnn_jax.cache``: how much disk space the user's cache takes, and clear it."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cnn_jax import cli
from cnn_jax.errors import CnnJaxError, printable
from cnn_jax.files import user_cache
from cnn_jax.settings import Settings, choice, setting

KINDS = {"images": "folders", "programs": "compiled", "weights": "weights"}
"""The directories of decoded images, compiled programs and published weights; all others contain datasets."""


@dataclass(frozen=True, kw_only=True)
class CacheFlags(Settings):
    """Print how much disk space the user's cache directory takes, and clear it if asked.

    It contains downloaded datasets, decoded images of folder:PATH and tfds:NAME, compiled programs, and published
    weights; not the directories of --data-dir or CNN_JAX_DATA_DIR.
    """

    clear: choice("datasets", *KINDS, "all") | None = setting("what to remove", default=None)


def main(args: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    flags = cli.parse(CacheFlags, args, module="cnn_jax.cache")
    root = user_cache()
    for kind in ("datasets", *KINDS):
        paths = _paths(root, kind)
        if flags.clear in (kind, "all"):
            for path in paths:
                _remove(path)
            paths = _paths(root, kind)
        print(f"{kind}: {sum(map(_size, paths)) / 1e6:.1f} MB")
    print(f"cache directory: {printable(root)}")
    return 0


def _paths(root: Path, kind: str) -> list[Path]:
    if kind in KINDS:
        return [path for path in [root / KINDS[kind]] if path.exists()]
    return [path for path in root.glob("*") if path.name not in KINDS.values()]


def _size(path: Path) -> int:
    """The size of a file, or of all files in a directory, in bytes; links are not followed."""
    if path.is_symlink() or path.is_file():
        return path.lstat().st_size
    return sum(Path(folder, name).lstat().st_size for folder, _, names in os.walk(path) for name in names)


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise CnnJaxError(f"cannot remove all of {path} ({error.strerror}): remove it by hand") from None


if __name__ == "__main__":
    cli.start(main)
