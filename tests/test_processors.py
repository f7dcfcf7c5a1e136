"""The number of processors, and their name."""

import os
import subprocess
import sys

import pytest

from cnn_jax.processors import cpu_model, num_processors


@pytest.mark.parametrize(("count", "expected"), [(3, 3), (None, 1)])
def test_where_the_system_does_not_say_which_may_be_used_all_are_counted(monkeypatch, count, expected):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert num_processors() == expected


@pytest.mark.skipif(num_processors() < 2, reason="needs two processors")
def test_others_of_the_machine_are_not_counted():
    script = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    script += "from cnn_jax.processors import num_processors; print(num_processors())"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout == b"1\n"


def test_the_model_of_the_cpu(monkeypatch):
    text = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel\t\t: 1\nmodel name\t: AMD EPYC 7B13\n"
    monkeypatch.setattr("pathlib.Path.read_text", lambda path, **options: text)
    assert cpu_model() == "AMD EPYC 7B13"


def test_the_architecture_where_the_model_is_unknown(monkeypatch):
    monkeypatch.setattr("pathlib.Path.read_text", lambda path, **options: "processor\t: 0\nBogoMIPS\t: 50\n")
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert cpu_model() == "aarch64"
