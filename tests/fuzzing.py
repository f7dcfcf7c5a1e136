"""Damaged, lying and hostile files for each of the package's readers, which may refuse them and nothing else.

    python tests/fuzzing.py

Threat model: pictures, datasets, weights, configs and whole run directories may come from somebody else. Whatever is in
them, a command must end in time with a result or with the package's own error on one short line, without taking much
memory, executing anything from the files, or changing anything outside the run directory. An attacker who can write to
the files while a command reads them, or who controls the environment or the Python packages, is out of scope.

``--examples 10000`` inputs per reader are tried, or only the named readers: python tests/fuzzing.py images config. The
first input with another outcome ends the program with exit status 1 and is kept in a directory whose name is printed.
"""

import argparse
import io
import json
import logging
import math
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tensorstore as ts
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisWarning
from hypothesis.strategies import DrawFn, SearchStrategy
from PIL import Image

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.data import Dataset, Split, idx
from cnn_jax.data.image import read_image
from cnn_jax.errors import CnnJaxError
from cnn_jax.formats.weights import open_weights
from cnn_jax.runs.checkpoint import SUMS, CheckpointWriter, _sums
from cnn_jax.runs.fit import resume
from cnn_jax.runs.metadata import RunMetadata
from cnn_jax.runs.run import Run, load_run
from cnn_jax.runs.workdir import Workdir
from cnn_jax.training import loop
from cnn_jax.training.history import EpochRecord
from cnn_jax.training.loop import abstract_state, create_task
from cnn_jax.training.metrics import NO_STEP, Metrics
from cnn_jax.training.task import SCALE

Files = Mapping[str, bytes]
"""Contents by relative path."""

MAX_MEMORY = 1 << 30
"""Bytes that an input may cost over what the process had at its peak before; no input is larger than a few millions."""

MAX_MESSAGE = 1000

EXTREMES = (0, 1, 2**7, 2**8, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
HUGE = "9" * 5000
DEEP = "[" * 5000


@dataclass(frozen=True)
class Reader:
    """What is fuzzed.

    Attributes:
        files: the inputs; where ``base`` is given, what takes the place of its files.
        read: called with the directory in which they lie.
        base: the genuine directory.
    """

    files: SearchStrategy[Files]
    read: Callable[[Path], object]
    base: Path | None = None

    def lay_out(self, files: Files, directory: Path) -> None:
        """Write an input down, sums and all: what passes them must be safe to read too."""
        if self.base:
            shutil.copytree(self.base, directory, dirs_exist_ok=True)
        for name, content in files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)
        for sums in directory.rglob(SUMS):
            if str(sums.relative_to(directory)) not in files:
                write_sums(sums.parent)


@dataclass
class Tally:
    """What came of a reader's inputs; ``failing`` is the last one with another outcome than those allowed."""

    succeeded: int = 0
    refused: int = 0
    slowest: float = 0.0
    failing: Files | None = None

    def __str__(self) -> str:
        return (
            f"{self.succeeded + self.refused} tried, {self.succeeded} succeeded, {self.refused} refused, "
            f"slowest {self.slowest:.2f} s, peak memory {peak_memory() / 2**20:.0f} MiB"
        )


def fuzz(reader: Reader, examples: int, tally: Tally, derandomize: bool = False) -> None:
    """Try that many inputs, the same ones each time where ``derandomize`` says so; what is wrong is raised."""

    @settings(
        max_examples=examples,
        derandomize=derandomize,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
    )
    @given(reader.files)
    def attempt(files: Files) -> None:
        try:
            _attempt(reader, files, tally)
        except Exception:
            tally.failing = files
            raise

    with warnings.catch_warnings(), late_callbacks_ignored():
        warnings.simplefilter("ignore", HypothesisWarning)  # that it would be long to write the strategies out
        attempt()


def _attempt(reader: Reader, files: Files, tally: Tally) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        reader.lay_out(files, directory)
        before, began = peak_memory(), time.perf_counter()
        try:
            reader.read(directory)
            tally.succeeded += 1
        except CnnJaxError as error:
            check_message(str(error))
            tally.refused += 1
        tally.slowest = max(tally.slowest, time.perf_counter() - began)
        taken = peak_memory() - before
        assert taken < MAX_MEMORY, f"{taken / 2**20:.0f} MiB for {sum(map(len, files.values()))} bytes"


@contextmanager
def late_callbacks_ignored() -> Iterator[None]:
    """Keep Python from printing what Orbax leaves behind when it refuses: reads that end after their event loop."""
    hook = sys.unraisablehook

    def quieter(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    with mock.patch.object(sys, "unraisablehook", quieter):
        yield
        time.sleep(0.2)  # the last ones


def check_message(message: str) -> None:
    """Fail unless an error's message is one short line, without a terminal's control characters."""
    assert len(message) < MAX_MESSAGE, f"{len(message)} characters: {message[:200]!r}"
    assert not any(unicodedata.category(char) in ("Cc", "Zl", "Zp") for char in message), repr(message)


def peak_memory() -> int:
    """The most bytes the process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def readers(scratch: Path) -> dict[str, Reader]:
    """All of them by name; the genuine run is made in ``scratch``."""
    run = scratch / "run"
    write_run(run)
    runs = run_files(run)
    return {
        "images": Reader(idx_files(3), lambda directory: read_idx(directory / "file", 3)),
        "labels": Reader(idx_files(1), lambda directory: read_idx(directory / "file", 1)),
        "pictures": Reader(picture_files(), lambda directory: read_image(directory / "file", (16, 16), 1)),
        "weights": Reader(
            weights_files(),
            lambda directory: open_weights(directory / "file").variables("cnn", {"params": WEIGHTS}, (16, 16, 1)),
        ),
        "config": Reader(config_files(CONFIG), lambda directory: Config.from_yaml(directory / "config.yaml")),
        "run": Reader(runs, read_run, run),
        "resume": Reader(runs, resume_run, run),
    }


def read_idx(path: Path, num_dimensions: int) -> None:
    """Decode a file as ``mnist.load`` does."""
    idx.decode(path.read_bytes(), path, num_dimensions)


# Bytes


@st.composite
def damaged(draw: DrawFn, genuine: bytes) -> bytes:
    """Up to four places where some bytes, all that follow, or none are replaced by others, or by none."""
    content = bytearray(genuine)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.sampled_from((start, start + 1, start + 4, len(content))))
        integers = st.sampled_from(EXTREMES).map(lambda number: struct.pack(">I", number))
        content[start:end] = draw(st.binary(max_size=8) | integers)
    return bytes(content)


def idx_files(dimensions: int) -> SearchStrategy[Files]:
    """IDX files as ``file``; compressed ones are decoded only if their digests are known."""
    small = st.lists(st.integers(1, 6), min_size=dimensions, max_size=dimensions)
    sizes = st.lists(st.integers(0, 6) | st.sampled_from(EXTREMES), min_size=dimensions, max_size=dimensions)
    genuine = small.flatmap(
        lambda sizes: st.binary(min_size=math.prod(sizes), max_size=math.prod(sizes)).map(
            lambda content: idx_bytes(sizes, content)
        )
    )
    lying = st.builds(idx_bytes, sizes, st.binary(max_size=40))
    content = genuine | genuine.flatmap(damaged) | lying | st.binary(max_size=100)
    return content.map(lambda content: {"file": content})


def idx_bytes(sizes: list[int], content: bytes) -> bytes:
    """An IDX file of unsigned bytes whose header promises these sizes, whatever the content."""
    return struct.pack(f">HBB{len(sizes)}I", 0, 8, len(sizes), *sizes) + content


# Settings

CONFIG = Config(epochs=2, batch_size=10, dataset="squares", checkpoint_every=1)

HOSTILE_YAML = (
    # what names code
    *("!!python/object/apply:os.getcwd []", "!!python/name:os.system ''", "!!python/tuple [1]", "!x y"),
    # what YAML's own tags and types make of nonsense
    *("!!int ''", "!!int x", "!!float ''", "!!float x", "!!bool x", "!!timestamp x", "!!binary x", "!!set {a}"),
    *("2026-13-41", "2026-01-01", "1:1", "1:" * 300 + "1.5", "=", "<<", "~", ".inf", "-.inf", ".nan", "yes"),
    # numbers that are too large
    *(HUGE, f"-{HUGE}", f"0x{HUGE}", f"-0x{HUGE}", f"[0x{HUGE}]", f"!!float {HUGE}", "1e999", "0x" + "f" * 300),
    # text that is no name
    *("''", "'\n\n'", '"\\0"', '"\\ud800"', '"\\u2028"', '"\\e[31m"', "x" * 5000, "é" * 500),
    # what is deep, refers to itself, or grows
    *(DEEP, "{" * 5000, "- " * 5000, "? " * 500, "&a [*a]", "*a", "&a a", "{<<: *a}", "{<<: [*a, *a]}", "[*a, *a]"),
)

GROWING_YAML = "m0: &m0 {a: 1}\n" + "".join(f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}\n" for n in range(1, 40))


def config_files(genuine: Config) -> SearchStrategy[Files]:
    """Damaged, odd and hostile settings as ``config.yaml``."""
    names = st.sampled_from([name.name for name in fields(Config)])
    scalars = (
        st.sampled_from(HOSTILE_YAML)
        | st.integers().map(str)
        | st.floats().map(str)
        | st.booleans().map(str)
        | st.text(max_size=20)
        | st.text(max_size=20).map(json.dumps)
        | st.sampled_from(EXTREMES).map(str)
    )
    values = st.recursive(
        scalars,
        lambda inner: (
            st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]")
            | st.dictionaries(inner, inner, max_size=4).map(
                lambda items: f"{{{', '.join(f'{key}: {value}' for key, value in items.items())}}}"
            )
            | inner.map(lambda value: f"&a {value}")
        ),
        max_leaves=6,
    )
    line = st.tuples(names | values, values).map(lambda item: f"{item[0]}: {item[1]}\n")
    document = st.lists(line, max_size=8).map("".join) | values | st.just(GROWING_YAML)
    encoded = document.map(lambda text: text.encode(errors="surrogatepass"))
    content = damaged(genuine.to_yaml().encode()) | encoded | encoded.flatmap(damaged) | st.binary(max_size=100)
    return content.map(lambda content: {"config.yaml": content})


# Pictures and weights


def picture_files() -> SearchStrategy[Files]:
    """Damaged images of each kind that is read."""
    rng = np.random.default_rng(0)
    genuine = []
    for shape in ((20, 30), (20, 30, 3), (20, 30, 4)):
        kinds = ("PNG", "WEBP", "BMP", "GIF") if shape[2:] == (4,) else ("PNG", "WEBP", "BMP", "GIF", "JPEG")
        for kind in kinds:  # JPEG knows no transparency
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(file, kind)
            genuine.append(file.getvalue())
    return st.sampled_from(genuine).flatmap(damaged).map(lambda content: {"file": content})


WEIGHTS = {"fc": {"kernel": np.zeros((3, 2), np.float32), "bias": np.zeros(2, np.float32)}}


def weights_files() -> SearchStrategy[Files]:
    """Damaged and lying safetensors (https://huggingface.co/docs/safetensors)."""
    arrays = {f"fc.{name}": array for name, array in WEIGHTS["fc"].items()}
    genuine = safetensors.numpy.save(arrays)
    end = 8 + int.from_bytes(genuine[:8], "little")

    def with_header(header: bytes) -> bytes:
        return struct.pack("<Q", len(header)) + header + genuine[end:]

    content = damaged(genuine) | altered_json(genuine[8:end]).map(with_header)
    return content.map(lambda content: {"file": content})


# Runs

STEP = 3
"""In the middle of the second epoch, so that there is some training left."""

SPLIT = Split(np.zeros((20, 16, 16, 1), np.uint8), np.arange(20, dtype=np.int32) % 3)
DATASET = Dataset(CONFIG.dataset, SPLIT, SPLIT, ("top", "middle", "bottom"))

RECORD = EpochRecord(
    epoch=0,
    step=2,
    total_correct=8,
    loss=2.25,
    train_accuracy=0.4,
    test_loss=1.0,
    test_accuracy=0.4,
    seconds=0.5,
    images_per_second=40.0,
)
METADATA = RunMetadata(
    config=CONFIG,
    device_count=1,
    process_count=1,
    image_shape=(16, 16, 1),
    class_names=DATASET.class_names,
    data_sha256=DATASET.sha256,
    steps_per_epoch=1,
    preprocess=SCALE,
    class_weights=None,
    dark_background=True,
    history=(RECORD,),
    epoch_seconds=0.25,
    epoch_metrics=Metrics(jnp.float32(1), jnp.int32(4), jnp.int32(10), jnp.int32(NO_STEP)),
)

JSON_FILES = ("meta/metadata", "metrics/metrics", "state/_METADATA", "_CHECKPOINT_METADATA")


def write_run(directory: Path) -> None:
    """A genuine run as training leaves it when it is stopped at ``STEP``."""
    workdir = Workdir(directory)
    workdir.create()
    workdir.write_config(CONFIG)
    shapes = abstract_state(create_task(CONFIG, 3), (16, 16, 1))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: rng.uniform(0, 0.1, leaf.shape).astype(leaf.dtype), shapes)
    with CheckpointWriter(workdir.checkpoints) as checkpoints:
        checkpoints.save(state.replace(step=np.int32(STEP)), METADATA.to_json(), None)


def write_sums(checkpoint: Path) -> None:
    """Make a checkpoint's sums agree with its files, whatever these are."""
    (checkpoint / SUMS).write_text("".join(f"{sha256}  {name}\n" for name, sha256 in _sums(checkpoint).items()))


def run_files(run: Path) -> SearchStrategy[Files]:
    """One file of a run directory, or of the arrays in its checkpoint, damaged or well-formed and lying."""
    checkpoint = run / "checkpoints" / str(STEP)
    everything = {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    prefix = str(checkpoint.relative_to(run))
    any_file = st.sampled_from([name for name in everything if everything[name]])
    any_json = st.sampled_from([f"{prefix}/{name}" for name in (*JSON_FILES[:1] * 3, *JSON_FILES)])
    arrays = {key: ocdbt(checkpoint).read(key).result().value for key in ocdbt(checkpoint).list().result()}
    any_array = st.sampled_from(sorted(arrays))
    return st.one_of(
        any_file.flatmap(lambda name: damaged(everything[name]).map(lambda content: {name: content})),
        any_json.flatmap(lambda name: altered_json(everything[name]).map(lambda content: {name: content})),
        any_json.flatmap(lambda name: altered_json(everything[name]).map(lambda content: {name: content})),
        any_array.flatmap(lambda key: altered_array(key, arrays[key])).map(
            lambda entries: {f"{prefix}/{name}": content for name, content in rewritten(checkpoint, entries).items()}
        ),
        config_files(CONFIG),
    )


def altered_json(genuine: bytes) -> SearchStrategy[bytes]:
    """JSON of the same form but for a few places, or of none."""
    hostile = (HUGE, DEEP, '{"a":' * 5000, "NaN", "[]", "null", "", '{"format": 1}', '{"format": ' + HUGE[:4000] + "}")
    altered = st.just(json.loads(genuine)).flatmap(altered_value)
    altered |= altered.flatmap(altered_value)
    return altered.map(lambda value: json.dumps(value).encode()) | st.sampled_from(hostile).map(str.encode)


@st.composite
def altered_value(draw: DrawFn, value: Any) -> Any:
    """A JSON value of which one part, at any depth, is replaced, left out or doubled."""
    parts = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    if not parts or draw(st.integers(0, 4)) == 0:
        return draw(json_values())
    part, copy = draw(st.sampled_from(parts)), value.copy()
    match draw(st.sampled_from(["altered"] * 4 + ["left out", "doubled"])):
        case "altered":
            copy[part] = draw(altered_value(value[part]))
        case "left out":
            del copy[part]
        case "doubled" if isinstance(value, dict):
            copy[f"{part}2"] = value[part]
        case "doubled":
            copy.append(value[part])
    return copy


def json_values() -> SearchStrategy[Any]:
    """Any, of any size."""
    integers = st.sampled_from(EXTREMES + tuple(-number for number in EXTREMES) + (10**400, -(10**400), 2**63, 2**64))
    shapes = st.sampled_from(([16, 16, 1], [16, 16, 10**8], [5000, 5000, 1], [10**6, 10**6, 1], [0, 0, 0], ["16"] * 3))
    texts = st.sampled_from(("", "a\nb", "\x1b[31m", "\ud800", "x" * 5000, "../../..", "params.fc1.kernel", "<f8"))
    names = st.sampled_from((["a"] * 3, ["a\nb"] * 3, ["x" * 5000] * 3, ["a"] * 10**4, ["a", "b", 3], [None] * 3))
    plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    return st.recursive(
        plain | integers | texts | shapes | names,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
        max_leaves=6,
    )


def altered_array(key: bytes, genuine: bytes) -> SearchStrategy[Mapping[bytes, bytes]]:
    """Entries of Zarr's (https://zarr-specs.readthedocs.io, version 2): an array's header, its only chunk, or both."""
    if not key.endswith(b"/.zarray"):
        numbers = st.binary(min_size=4, max_size=4) | st.binary(max_size=100)
        content = damaged(genuine) | numbers.map(lambda numbers: zstd(len(numbers), numbers))
        return content.map(lambda content: {key: content})
    header = json.loads(genuine)
    lying = st.fixed_dictionaries(
        {},
        optional={
            "shape": st.lists(st.sampled_from(EXTREMES), max_size=4),
            "chunks": st.lists(st.sampled_from(EXTREMES), max_size=4),
            "dtype": st.sampled_from(("<f8", "<i4", "|u1", "|V99", "|S2147483647", "|O", "bfloat16")),
            "fill_value": st.sampled_from((0, "NaN", [], HUGE[:20])),
            "compressor": st.sampled_from((None, {"id": "blosc"}, {"id": "zlib"}, {"id": "pickle"})),
        },
    )
    headers = lying.map(lambda changes: json.dumps(header | changes).encode()) | altered_json(genuine)
    # Both numbers of bytes are those that are there, of which four are a number: only their sense is wanting.
    chunk = {key.replace(b".zarray", b"0"): zstd(2**31)}
    bombs = st.sampled_from(({"chunks": [2**29]}, {"shape": [2**29], "chunks": [2**29]})).map(
        lambda changes: {key: json.dumps(header | changes).encode()} | chunk
    )
    return st.integers(0, 19).flatmap(lambda n: headers.map(lambda content: {key: content}) if n else bombs)


def zstd(size: int, content: bytes = b"") -> bytes:
    """A frame of Zstandard's (RFC 8878) that unpacks to the content, or to zeros, of which a block is four bytes."""
    frame = bytearray(b"\x28\xb5\x2f\xfd\0\x58")
    for rest in range(size, 0, -(2**17)):
        block, repeated, last = min(rest, 2**17), not content, rest <= 2**17
        frame += struct.pack("<I", block << 3 | repeated << 1 | last)[:3] + (content or b"\0")
    return bytes(frame)


def ocdbt(checkpoint: Path) -> ts.KvStore:
    """The database that a checkpoint's arrays are in; it has sums of its own, which thus agree with what is written."""
    return ts.KvStore.open({"driver": "ocdbt", "base": f"file://{checkpoint / 'state'}/"}).result()


def rewritten(checkpoint: Path, entries: Mapping[bytes, bytes]) -> Files:
    """The files of a checkpoint that come of other entries in its database."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        shutil.copytree(checkpoint / "state", copy / "state")
        for key, content in entries.items():
            ocdbt(copy).write(key, content).result()
        files = (path for path in copy.rglob("*") if path.is_file())
        contents = {str(path.relative_to(copy)): path.read_bytes() for path in files}
    unchanged = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    manifest = "state/manifest.ocdbt"  # the only file that is not written once and for all
    return {path: content for path, content in contents.items() if path not in unchanged or path == manifest}


def read_run(directory: Path) -> None:
    """Load a run, and make sure that it can be used."""
    check_run(load_run(directory, "best"))


def resume_run(directory: Path) -> None:
    """Go on with a run, and make sure that what comes of it can be used. What is slow is done once, or not at all."""
    with (
        mock.patch.object(data, "load", return_value=DATASET),
        mock.patch.object(loop.Trainer, "compile", return_value=0.0),
    ):
        check_run(resume(directory, **asdict(CONFIG)))


def check_run(run: Run) -> None:
    """Fail unless the parts of a run have their types and fit together."""
    assert all(type(name) is str for name in run.class_names)
    assert all(str(record).isprintable() for record in run.history)
    images = jax.ShapeDtypeStruct((1, *run.image_shape), np.float32)
    logits = jax.eval_shape(run.task.model.apply, run.state.variables, images)
    assert logits.shape == (1, len(run.class_names))


def main() -> int:
    """Fuzz the readers one after the other; returns the exit status."""
    parser = argparse.ArgumentParser(description="Try damaged, lying and hostile files on the package's readers.")
    parser.add_argument("--examples", type=int, default=10_000, help="inputs a reader (default: %(default)s)")
    parser.add_argument("readers", nargs="*", metavar="READER", help="one of those; else all")
    flags = parser.parse_args()
    logging.disable()  # the readers' notices of what they leave out
    with tempfile.TemporaryDirectory() as scratch:
        known = readers(Path(scratch))
        if unknown := set(flags.readers) - known.keys():
            parser.error(f"unknown: {', '.join(sorted(unknown))}; readers: {', '.join(known)}")
        for name in flags.readers or known:
            tally = Tally()
            try:
                fuzz(known[name], flags.examples, tally)
            except Exception:
                traceback.print_exc()
                if tally.failing is None:  # there was no input to begin with
                    raise
                kept = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
                known[name].lay_out(tally.failing, kept)
                print(f"{name}: {tally}; the input that broke it is in {kept}: {', '.join(tally.failing)}")
                return 1
            print(f"{name}: {tally}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
