import dataclasses
import subprocess

import numpy as np
import pytest
from safetensors import safe_open

from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.formats import pytorch, safetensors, stablehlo, verify

FORMATS = ["stablehlo", "safetensors", "pytorch"]  # test_onnx.py has the fourth

pytestmark = pytest.mark.usefixtures("known_data")


@pytest.fixture
def image_shape():
    return 16, 16, 1


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_written_is_verified(run, tmp_path, format):
    verification = run.export(tmp_path / "network", format)
    assert verification.num_images == 60
    assert verification.largest_difference < 2e-6
    assert [path.name for path in tmp_path.iterdir()] == ["network"]


@pytest.mark.parametrize("format", FORMATS)
def test_test_time_augmentation_is_verified(run, tmp_path, format):
    """Programs contain it, and of weights the metadata say it."""
    run = dataclasses.replace(run, task=dataclasses.replace(run.task, tta="multicrop"))
    assert run.export(tmp_path / "network", format).largest_difference < 2e-6
    if format != "stablehlo":
        with safe_open(tmp_path / "network", framework="np") as file:
            assert file.metadata()["tta"] == "multicrop"


def test_a_verification_reads_as_the_command_prints_it():
    verification = verify.Verification(300, 1.234e-7)
    assert str(verification) == "verified on 300 images, largest difference 1.2e-07"


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_network_gives_the_same_bytes(run, tmp_path, format):
    for name in ("one", "two"):
        run.export(tmp_path / name, format)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("broken", [lambda p: p + 2e-4, lambda p: p * np.nan], ids=["off", "not a number"])
@pytest.mark.parametrize("form", [stablehlo, safetensors, pytorch])
def test_what_computes_something_else_is_not_kept(run, tmp_path, monkeypatch, form, broken):
    load = form.load

    def load_broken(path, network):
        classifier = load(path, network)
        return lambda images: broken(np.asarray(classifier(images)))

    monkeypatch.setattr(form, "load", load_broken)
    format = form.__name__.rpartition(".")[2]
    with pytest.raises(CnnJaxError, match=r"was not written: its probabilities differ from the network's by (2.*|nan)"):
        run.export(tmp_path / "network", format)
    assert list(tmp_path.iterdir()) == []


def test_one_wrong_image_among_all_is_noticed(run, tmp_path, monkeypatch):
    load = safetensors.load
    seen = []

    def load_broken(path, network):
        def classify(images):
            seen.append(len(images))
            probabilities = np.array(load(path, network)(images))
            probabilities[-1] += 1e-3 * (sum(seen) == 60)
            return probabilities

        return classify

    monkeypatch.setattr(safetensors, "load", load_broken)
    monkeypatch.setattr("cnn_jax.training.evaluation.MAX_BATCH_BYTES", 40 * 16 * 16)
    with pytest.raises(CnnJaxError, match=r"differ from the network's by 1"):
        run.export(tmp_path / "network", "safetensors")
    assert seen == [1, 32, 27]  # more than one size of a batch


def test_images_are_spread_over_the_whole_test_set():
    images = np.arange(1000).reshape(1000, 1, 1, 1)
    sample = verify.sample(images).ravel()
    assert len(sample) == 300
    assert (sample[0], sample[-1]) == (0, 996)
    assert set(np.diff(sample)) == {3, 4}
    assert verify.sample(images[:7]).ravel().tolist() == list(range(7))


@pytest.mark.parametrize(("side", "count"), [(28, 300), (224, 55), (800, 4), (8000, 2)])
def test_of_large_images_fewer_are_taken(side, count):
    assert verify.sample_size((side, side, 3)) == count


@pytest.mark.parametrize("there", ["file", "directory", "link to nothing"])
def test_what_is_there_already_is_kept(run, tmp_path, there):
    path = tmp_path / "network"
    match there:
        case "file":
            path.write_text("precious")
        case "directory":
            path.mkdir()
        case "link to nothing":
            path.symlink_to(tmp_path / "nothing")
    with pytest.raises(UsageError, match="network already exists: remove it, or choose another --output"):
        run.export(path, "safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["network"]
    assert there != "file" or path.read_text() == "precious"


def test_nothing_can_be_written_there(run, tmp_path):
    (tmp_path / "file").touch()
    for path, reason in {
        tmp_path / "missing" / "network": "No such file or directory",
        tmp_path / "file" / "network": "Not a directory",
        tmp_path / ("x" * 300): "File name too long",
    }.items():
        with pytest.raises(UsageError, match=rf"cannot write .* \({reason}\): choose another --output"):
            run.export(path, "safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, of 64 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_one_error_and_leaves_nothing(run, disk):
    (disk / "filler").write_bytes(bytes(40_000))
    with pytest.raises(CnnJaxError, match=r"cannot write .* \(No space left on device\): fix this, then export again"):
        run.export(disk / "network", "safetensors")
    assert [path.name for path in disk.iterdir()] == ["filler"]


def test_a_read_only_disk_is_refused(run, disk):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(UsageError, match=r"cannot write .* \(Read-only file system\): choose another --output"):
        run.export(disk / "network", "safetensors")


def test_an_unknown_format_is_refused(run, tmp_path):
    with pytest.raises(UsageError, match="unknown format 'safetensor'; did you mean 'safetensors'\\?; formats: stable"):
        run.export(tmp_path / "network", "safetensor")
