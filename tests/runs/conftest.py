"""Runs on a small dataset, and one that is trained once for all tests that only read or copy it."""

import dataclasses
import shutil
import subprocess

import pytest
from helpers import CONFIG

from cnn_jax.runs.fit import fit, resume


@pytest.fixture(scope="session")
def train(dataset):
    """``fit`` on the small dataset, without a report."""

    def train(config, workdir, **options):
        named = dataclasses.replace(dataset, name=config.dataset)
        return fit(config, workdir, **{"dataset": named, "report": False} | options)

    return train


@pytest.fixture(scope="session")
def continue_run(dataset):
    """``resume`` with all settings of a config, as the command does; on the small dataset, without a report."""

    def continue_run(config, workdir, **options):
        named = dataclasses.replace(dataset, name=config.dataset)
        options = {"dataset": named, "report": False} | options
        settings = dataclasses.asdict(config)
        del settings["dataset"]  # given as the examples
        return resume(workdir, **options, **settings)

    return continue_run


@pytest.fixture(scope="session")
def uninterrupted(train, tmp_path_factory):
    """The run directory of ``CONFIG``, trained without interruption; not to be changed."""
    return train(CONFIG, tmp_path_factory.mktemp("uninterrupted") / "run").workdir


@pytest.fixture
def finished(uninterrupted, tmp_path):
    """A copy of ``uninterrupted``."""
    return shutil.copytree(uninterrupted, tmp_path / "run")


def mount(directory, *options):
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", directory], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("may not mount a file system")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 9 MB."""
    disk = tmp_path / "disk"
    mount(disk, "-o", "size=9m,nr_inodes=12k")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.fixture
def read_only_disk(tmp_path):
    disk = tmp_path / "disk"
    mount(disk, "-o", "ro")
    yield disk
    subprocess.run(["umount", disk], check=True)
