"""Several processes on this machine train one network, as on several machines."""

import contextlib
import dataclasses
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import assert_same_outcome, assert_same_state, metrics_without_times, wait_until_trained
from PIL import Image

from cnn_jax import cli, train
from cnn_jax.aborts import ABORTS, LOST_PROCESS, NOT_CONNECTED
from cnn_jax.config import Config
from cnn_jax.errors import UsageError
from cnn_jax.runs.fit import fit, resume
from cnn_jax.runs.processes import Processes
from cnn_jax.runs.run import load_run
from cnn_jax.training.loop import Trainer
from cnn_jax.training.sharding import make_mesh

# A small learning rate, with which rounding errors do not grow much.
CONFIG = Config(dataset="digits", epochs=3, batch_size=50, checkpoint_every=7, learning_rate=0.001, seed=5)
FLAGS = ["--dataset=digits", "--batch-size=50", "--checkpoint-every=7", "--learning-rate=0.001", "--seed=5"]

TIMEOUT = 120
"""The seconds after which a test fails: far more than anything here takes."""


def free_port(first=20_000, last=60_000):
    """A port that no other process listens on."""
    while True:
        port = first + int.from_bytes(os.urandom(4)) % (last - first)
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def start(command, environments, cwd):
    """Start a process with one CPU device for each environment, and kill those that are left at the end."""
    processes = []
    for environment, directory in zip(environments, cwd, strict=True):
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"} | environment
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen([*command], cwd=directory, env=environment, **pipes))
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def flags_of(count):
    """The flags of ``count`` processes on this machine, in an environment variable that ``TRAIN`` reads."""
    port = free_port()
    return [
        {"FLAGS": f"--coordinator=127.0.0.1:{port} --num-processes={count} --process-index={index}"}
        for index in range(count)
    ]


TRAIN = """
import functools, os, sys
import jax
from cnn_jax import cli, train
# jax waits minutes by default.
timeouts = {"initialization_timeout": int(os.environ.get("CONNECT", 60)), "heartbeat_timeout_seconds": 10}
jax.distributed.initialize = functools.partial(jax.distributed.initialize, **timeouts)
cli.start(lambda args: train.main([*args, *os.environ.get("FLAGS", "").split()]))
"""


def training(*words):
    return [sys.executable, "-c", TRAIN, "--distributed", *words]


def run(count, *words, cwd, environments=None):
    """Run processes to their end; return the exit status, standard output and standard error of each."""
    cwd = cwd if isinstance(cwd, list) else count * [cwd]
    with start(training(*words), environments or flags_of(count), cwd) as processes:
        outputs = [process.communicate(timeout=TIMEOUT) for process in processes]
        return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def is_lost_process(err, message=LOST_PROCESS):
    """Whether a process says that another is missing: in one line, or before jax 0.9.2 as the runtime does."""
    if err == f"error: {message}\n":
        return True
    is_connecting = "RegisterTask" in err
    of_runtime = "JAX distributed service detected fatal errors" in err
    return not ABORTS and of_runtime and is_connecting == (message == NOT_CONNECTED)


PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"

SRUN = """#!/bin/bash
for index in 0 1; do
    SLURM_NTASKS=2 SLURM_PROCID=$index SLURM_LOCALID=$index "$@" > $index.out 2> $index.err &
    tasks+=($!)
done
status=0
for task in ${tasks[@]}; do wait $task || status=$?; done
exit $status
"""
"""A command ``srun`` that starts two tasks on this machine."""


def script(first_line, cwd, *words, path=(), **environment):
    """Run the script of the page on several machines with this line, and return its exit status."""
    (block,) = re.findall(rf"^```bash\n({re.escape(first_line)}\n.*?)^```$", PAGE.read_text(), flags=re.M | re.S)
    folders = [*map(str, path), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = os.environ | {"PATH": os.pathsep.join(folders)} | environment
    block = block.replace("12345", str(free_port()))
    return subprocess.run(["bash", "-c", block, "bash", *words], cwd=cwd, env=environment, timeout=TIMEOUT, check=True)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """``CONFIG`` trained by the two tasks of a SLURM job: the outputs of each, and the run directory."""
    cwd = tmp_path_factory.mktemp("two")
    (cwd / "srun").write_text(SRUN)
    (cwd / "srun").chmod(0o755)
    port = free_port(61440, 65536)  # jax computes it from the number of the job
    job = {"SLURM_JOB_ID": str(port - 61440), "SLURM_STEP_NODELIST": "localhost", "JAX_NUM_CPU_DEVICES": "1"}
    script("#!/bin/bash", cwd, *FLAGS, "--epochs=3", "--workdir=run", path=[cwd], **job)
    return [[(cwd / f"{index}.{stream}").read_text() for stream in ("out", "err")] for index in range(2)], cwd / "run"


@pytest.fixture(scope="module")
def by_one(tmp_path_factory):
    """The run directory of ``CONFIG``, trained in this process on one device."""
    return fit(CONFIG, tmp_path_factory.mktemp("one") / "run", devices=jax.devices()[:1], report=False).workdir


def assert_close_outcome(workdir, reference):
    """Fail unless two runs have equal metrics and final states up to rounding."""
    for record, expected in zip(metrics_without_times(workdir), metrics_without_times(reference), strict=True):
        assert record == pytest.approx(expected, rel=1e-3)
    states = (load_run(path).state for path in (workdir, reference))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *states)


def test_two_processes_train_the_same_network_as_one(by_two, tmp_path):
    """Bit for bit, because the sum over two devices does not depend on their order."""
    _, workdir = by_two
    alone = fit(CONFIG, tmp_path / "run", devices=jax.devices()[:2]).workdir
    assert_same_outcome(workdir, alone)
    summary = json.loads((workdir / "summary.json").read_text())
    assert (summary["device_count"], summary["process_count"]) == (2, 2)
    assert {path.name for path in workdir.iterdir()} == {path.name for path in alone.iterdir()}


def test_only_the_first_process_prints(by_two):
    (first, second), _ = by_two
    assert [line.split(" total")[0] for line in first[0].splitlines()] == ["epoch: 0", "epoch: 1", "epoch: 2"]
    lines = first[1].splitlines()
    assert lines[0].endswith("2 CPU devices of 2 processes")
    assert lines[2:] == ["run directory: run"]
    assert second == ["", ""]


def test_the_script_for_one_machine(tmp_path):
    script("export JAX_NUM_CPU_DEVICES=1", tmp_path)
    summary = json.loads((tmp_path / "runs" / "two" / "summary.json").read_text())
    assert (summary["epochs"], summary["process_count"], summary["device_count"]) == (2, 2, 2)


def test_the_flags_of_the_page_exist():
    text = PAGE.read_text().replace("\\\n", " ").replace("$index", "0")
    commands = re.findall(r"(?:cnn_jax\.train|train\.sbatch) (--[^\n\"&`]*)", text)
    assert len(commands) == 6
    for words in commands:
        cli.parse(train.TrainFlags, shlex.split(words), module="cnn_jax.train")


@pytest.fixture(scope="module")
def by_four(tmp_path_factory):
    """The run directory of two epochs of ``CONFIG``, trained by four processes, whose parts of a batch are padded."""
    cwd = tmp_path_factory.mktemp("four")
    results = run(4, *FLAGS, "--epochs=2", cwd=cwd)
    assert [status for status, *_ in results] == 4 * [0], results
    (workdir,) = cwd.glob("runs/*")  # one for all, named after the time
    return workdir


@pytest.mark.slow
def test_run_of_four_processes_is_resumed_by_one(by_four, by_one, tmp_path, caplog):
    shutil.copytree(by_four, tmp_path / "run")
    resume(tmp_path / "run", epochs=3, devices=jax.devices()[:1])
    assert "was trained on 4 device(s) of 4 processes and is resumed on 1 device(s): results agree" in caplog.text
    assert_close_outcome(tmp_path / "run", by_one)


@pytest.mark.slow
def test_run_of_four_processes_is_resumed_by_three(by_four, by_one, tmp_path):
    """Without a common file system: the others have the settings."""
    machines = [tmp_path / name for name in ("first", "second", "third")]
    shutil.copytree(by_four, machines[0] / "run")
    for machine in machines[1:]:
        (machine / "run").mkdir(parents=True)
        shutil.copy(by_four / "config.yaml", machine / "run")
    results = run(3, "--resume", "--workdir=run", "--epochs=3", cwd=machines)
    assert [status for status, *_ in results] == 3 * [0], results
    assert_close_outcome(machines[0] / "run", by_one)
    assert {path.name for machine in machines[1:] for path in (machine / "run").iterdir()} == {"config.yaml"}


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_process_ends_the_others_and_the_run_is_resumed(by_two, tmp_path, victim):
    with start(training(*FLAGS, "--epochs=1000", "--workdir=run"), flags_of(2), 2 * [tmp_path]) as processes:
        wait_until_trained(tmp_path / "run", processes[0])
        processes[victim].kill()
        killed = time.monotonic()
        _, err = processes[1 - victim].communicate(timeout=TIMEOUT)
        assert time.monotonic() - killed < 10
        assert processes[1 - victim].returncode == 1
        assert is_lost_process(err if victim == 0 else err.partition("\n")[2])  # after a line about the data
    if victim == 1:
        return
    results = run(2, "--resume", "--workdir=run", "--epochs=3", cwd=tmp_path)
    assert [status for status, *_ in results] == [0, 0], results
    assert_same_outcome(tmp_path / "run", by_two[1])


def test_stopped_process_ends_the_others(tmp_path):
    """As when a machine does not answer any more: the connections stay open."""
    with start(training(*FLAGS, "--epochs=1000", "--workdir=run"), flags_of(2), 2 * [tmp_path]) as processes:
        wait_until_trained(tmp_path / "run", processes[0])
        processes[1].send_signal(signal.SIGSTOP)
        _, err = processes[0].communicate(timeout=60)  # 10 s without a heartbeat are enough
        assert processes[0].returncode == 1
        assert is_lost_process(err.partition("\n")[2])


def test_signal_to_one_process_stops_all_after_the_same_step(by_two, tmp_path):
    with start(training(*FLAGS, "--epochs=1000", "--workdir=run"), flags_of(2), 2 * [tmp_path]) as processes:
        wait_until_trained(tmp_path / "run", processes[0])
        processes[1].send_signal(signal.SIGTERM)
        (_, err), (_, other_err) = (process.communicate(timeout=TIMEOUT) for process in processes)
        assert [process.returncode for process in processes] == [143, 143]
    assert other_err == "stopping after this chunk; interrupt again to stop immediately\n"
    resume_command = f"python -m cnn_jax.train --distributed --resume --workdir {tmp_path / 'run'}"
    assert re.search(rf"stopped after step \d+: continue with {resume_command}\n", err)


def test_missing_process_is_one_line(tmp_path):
    with start(training(*FLAGS), [flags_of(2)[0] | {"CONNECT": "3"}], [tmp_path]) as (process,):
        out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out) == (1, "")
    assert is_lost_process(err, NOT_CONNECTED)
    assert not list(tmp_path.iterdir())


def test_different_data_are_refused(tmp_path):
    machines = [tmp_path / "first", tmp_path / "second"]
    rng = np.random.default_rng(0)
    for path in (f"photos/{name}/{number}.png" for name in ("cat", "dog") for number in range(5)):
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        for machine in machines:
            (machine / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(machine / path)
    Image.fromarray(255 - pixels).save(machines[1] / path)
    for status, out, err in run(2, "--dataset=folder:photos", cwd=machines):
        assert (status, out) == (2, "")
        assert err == "error: process 1 has other images or labels than process 0: start all with the same\n"
    assert not list(tmp_path.glob("*/runs"))


SCRIPT = """
import hashlib, json, os, sys
import jax
index = int(os.environ["INDEX"])
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, index, initialization_timeout=60)
import numpy as np
from cnn_jax import CnnJaxError, Config, UsageError, fit
from cnn_jax.runs.processes import Processes
from cnn_jax.training.sharding import local_part, make_mesh

def raised(function):
    try:
        return function()
    except CnnJaxError as error:
        return f"{type(error).__name__}: {error}"

def fail_in_second():
    with processes.together():
        if index == 1:
            raise UsageError("no \\x1b such file")

def fail():
    raise CnnJaxError("no room")

processes = Processes(make_mesh())
results = {
    "first": processes.is_first,
    "part": [local_part(6, make_mesh()).start, local_part(6, make_mesh()).stop],
    "sent": processes.from_first(lambda: {"from": index}),
    "error of second": raised(fail_in_second),
    "error of first": raised(lambda: processes.from_first(fail)),
    "same": raised(lambda: processes.check_same("settings", "equal")),
    "different": raised(lambda: processes.check_same("settings", str(index))),
}
calls = iter([False, index == 1, False, False])
requested = processes.requested_in_any(lambda: next(calls))
results["requests"] = [requested() for _ in range(4)]
records = []
run = fit(Config(dataset="digits", epochs=1, batch_size=50), "run", on_epoch=records.append, report=False)
results["records"] = len(records)
arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(run.state)]
results["state"] = hashlib.sha256(b"".join(map(bytes, arrays))).hexdigest()
own = fit(Config(dataset="digits", epochs=1, seed=index), f"own-{index}", devices=jax.local_devices(), report=False)
results["own seed"] = own.config.seed
print(json.dumps(results))
"""


def test_from_python_on_different_numbers_of_devices(tmp_path):
    words = [sys.executable, "-W", "error", "-c", SCRIPT, str(free_port())]
    environments = [{"JAX_NUM_CPU_DEVICES": str(2 - index), "INDEX": str(index)} for index in range(2)]
    with start(words, environments, 2 * [tmp_path]) as processes:
        outputs = [process.communicate(timeout=TIMEOUT) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert (first.pop("first"), second.pop("first")) == (True, False)
    assert (first.pop("part"), second.pop("part")) == ([0, 4], [4, 6])
    assert (first.pop("records"), second.pop("records")) == (1, 0)
    assert (first.pop("own seed"), second.pop("own seed")) == (0, 1)
    assert first.pop("error of second") == r"UsageError: process 1: no \x1b such file"
    assert second.pop("error of second") == r"UsageError: no \x1b such file"
    assert first.pop("error of first") == "CnnJaxError: no room"
    assert second.pop("error of first") == "CnnJaxError: process 0: no room"
    assert first == second
    assert first.pop("state")
    assert first == {
        "sent": {"from": 0},
        "same": None,
        "different": "UsageError: process 1 has other settings than process 0: start all with the same",
        "requests": [False, False, True, False],
    }
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["device_count"] == 3
    assert {path.name for path in tmp_path.iterdir()} == {"run", "own-0", "own-1"}


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    process_index: int


def test_devices_of_a_process_are_next_to_each_other():
    """On a TPU pod they are not in the order of their numbers."""
    devices = [Device(number, index) for number, index in enumerate([0, 0, 1, 1, 0, 0, 1, 1])]
    assert [device.id for device in make_mesh(devices).devices] == [0, 1, 4, 5, 2, 3, 6, 7]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "muon"])
def test_state_can_be_sent(dataset, optimizer):
    config = Config(dataset="squares", optimizer=optimizer, accumulate=2, clip_norm=1.0, average_decay=0.9)
    state = Trainer(config, dataset).start().state
    assert_same_state(pickle.loads(pickle.dumps(state)), state)


def test_single_process_needs_no_agreement():
    processes = Processes(make_mesh())
    assert (processes.count, processes.is_first) == (1, True)
    assert processes.from_first(lambda: 3) == 3
    processes.check_same("settings", "any")
    with pytest.raises(UsageError, match="as it is"), processes.together():
        raise UsageError("as it is")
    with pytest.raises(ValueError, match="Gloo"), processes.reporting_loss():
        raise ValueError("Gloo all-reduce failed")
    requested = object()
    assert processes.requested_in_any(requested) is requested


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--coordinator=a:1"], "--coordinator is for several processes: add --distributed, or leave it out"),
        (["--num-processes=2"], "--num-processes is for several processes"),
        (["--distributed", "--seeds=3"], "--seeds does not train with other processes: leave out --distributed"),
        (["--distributed", "--coordinator=a"], "--coordinator must be a host and a port, such as node1:12345, not 'a'"),
        (["--distributed", "--coordinator=a:x"], "--coordinator must be a host and a port"),
        (["--distributed", "--num-processes=0"], "--num-processes must be a positive integer"),
        (["--distributed", "--process-index=-1"], "--process-index must be an integer from 0"),
        (
            ["--distributed", "--coordinator=a:1", "--num-processes=2", "--process-index=2"],
            "--process-index 2 must be below --num-processes 2: they are counted from 0",
        ),
    ],
)
def test_invalid_flags(words, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        train.parse(words)


def test_no_cluster_is_one_line(tmp_path):
    with start(training(*FLAGS), [{}], [tmp_path]) as (process,):
        out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: no TPU pod, SLURM, Open MPI or Kubernetes cluster was found: in each process, pass")


def test_settings_of_processes_are_not_settings_of_the_run():
    flags = train.parse(["--distributed", "--coordinator=a:1", "--num-processes=2", "--process-index=1"])
    assert (flags.distributed, flags.coordinator, flags.num_processes, flags.process_index) == (True, "a:1", 2, 1)
    assert not hasattr(Config(), "distributed")


def test_an_abort_for_another_reason_stays_as_it_is():
    script = """
import ctypes, os
from cnn_jax import aborts
aborts.end_in_one_line()
libc = ctypes.CDLL(None)
libc.fputs.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
libc.fputs(b"some other reason\\n", ctypes.c_void_p.in_dll(libc, "stderr"))
os.abort()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (-signal.SIGABRT, "some other reason\n")
