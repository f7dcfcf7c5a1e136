import gzip
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from cnn_jax.data import download, mnist
from cnn_jax.data.mnist import FAMILIES, PARTS
from cnn_jax.errors import CnnJaxError, UsageError

GENUINE = Path(os.environ.get("CNN_JAX_DATA_DIR", "nowhere"))
needs_genuine = pytest.mark.skipif(
    not any((GENUINE / folder / f"{PARTS[0]}.gz").is_file() for folder in ("", "fashion_mnist")),
    reason="CNN_JAX_DATA_DIR holds no Fashion-MNIST",
)


def assert_is(dataset, name, arrays):
    assert dataset.name == name
    assert dataset.class_names == ("a", "b", "c")
    for split, images, labels in ((dataset.train, *PARTS[:2]), (dataset.test, *PARTS[2:])):
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        np.testing.assert_array_equal(split.images, arrays[images][..., np.newaxis])
        np.testing.assert_array_equal(split.labels, arrays[labels])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("form", ["gzip", "plain", "dotted"])
@pytest.mark.parametrize("folder", ["", "own"])
def test_files_on_disk(fakes, tmp_path, monkeypatch, name, form, folder):
    monkeypatch.setitem(sys.modules, "requests", None)
    fakes.put(name, tmp_path / (folder and name), form)
    assert_is(mnist.load(name, tmp_path), name, fakes.arrays[name])


def test_own_folder_comes_first(fakes, tmp_path):
    fakes.put("mnist", tmp_path)
    fakes.put("fashion_mnist", tmp_path / "fashion_mnist", "plain")
    fakes.put("mnist", tmp_path / "mnist")
    assert_is(mnist.load("fashion_mnist", tmp_path), "fashion_mnist", fakes.arrays["fashion_mnist"])


def test_decompressed_file_with_the_name_of_a_compressed_one(fakes, tmp_path):
    fakes.put("mnist", tmp_path)
    (tmp_path / f"{PARTS[0]}.gz").write_bytes(fakes.files["mnist"][PARTS[0]])
    assert_is(mnist.load("mnist", tmp_path), "mnist", fakes.arrays["mnist"])


def test_files_of_another_dataset(fakes, tmp_path):
    fakes.put("mnist", tmp_path)
    for name in ("fashion_mnist", "kmnist"):
        with pytest.raises(UsageError, match=f"{PARTS[0]}.gz is mnist's {PARTS[0]}, not {name}'s"):
            mnist.load(name, tmp_path)


@pytest.mark.parametrize("form", ["gzip", "plain"])
def test_a_file_of_another_dataset(fakes, tmp_path, form):
    fakes.put("kmnist", tmp_path, form)
    suffix, bodies = (".gz", fakes.gzipped) if form == "gzip" else ("", fakes.files)
    (tmp_path / f"{PARTS[3]}{suffix}").write_bytes(bodies["mnist"][PARTS[3]])
    with pytest.raises(UsageError, match=f"{PARTS[3]}(.gz)? is mnist's {PARTS[3]}, not kmnist's"):
        mnist.load("kmnist", tmp_path)


@pytest.mark.parametrize("form", ["gzip", "plain"])
def test_swapped_files(fakes, tmp_path, form):
    fakes.put("mnist", tmp_path, form)
    images, labels = (tmp_path / f"{part}{'.gz' if form == 'gzip' else ''}" for part in PARTS[:2])
    images.rename(tmp_path / "aside")
    labels.rename(images)
    (tmp_path / "aside").rename(labels)
    with pytest.raises(UsageError, match=f"is mnist's {PARTS[1]}, not mnist's {PARTS[0]}"):
        mnist.load("mnist", tmp_path)


@pytest.mark.parametrize("form", ["gzip", "plain"])
@pytest.mark.parametrize("damage", [lambda body: body[:-3], lambda body: body + b"x", lambda body: b""])
def test_damaged_file_is_an_error_and_stays(fakes, served, tmp_path, form, damage):
    fakes.put("fashion_mnist", tmp_path, form)
    path = tmp_path / f"{PARTS[2]}{'.gz' if form == 'gzip' else ''}"
    path.write_bytes(damaged := damage(path.read_bytes()))
    (tmp_path / f"{PARTS[0]}{'.gz' if form == 'gzip' else ''}").unlink()
    with pytest.raises(UsageError, match=f"{PARTS[2]}.* is damaged or not fashion_mnist's: .*; delete it"):
        mnist.load("fashion_mnist", tmp_path)
    assert path.read_bytes() == damaged
    assert served.asked == []


# The digests of kmnist's decompressed files are unknown, so their content is checked.
@pytest.mark.parametrize(
    ("part", "array", "wrong"),
    [
        (PARTS[0], np.ones((5, 5, 4), np.uint8), "do not belong together: 5 images, 6 labels"),
        (PARTS[1], np.ones(7, np.uint8), "do not belong together: 6 images, 7 labels"),
        (PARTS[2], np.ones((4, 4, 5), np.uint8), r"its images have shape \(4, 4, 5, 1\), not \(4, 5, 4, 1\)"),
        (PARTS[3], np.array([0, 1, 3, 0], np.uint8), "has label 3, but there are only 3 classes"),
        (PARTS[0], np.ones(6, np.uint8), "contains labels, not images"),
    ],
)
def test_files_with_unknown_digests(fakes, tmp_path, idx_bytes, part, array, wrong):
    fakes.put("kmnist", tmp_path, "plain")
    (tmp_path / part).write_bytes(idx_bytes(array))
    with pytest.raises(UsageError, match=wrong) as caught:
        mnist.load("kmnist", tmp_path)
    assert str(tmp_path / part) in str(caught.value)


def test_too_few_images_and_labels_with_unknown_digests(fakes, tmp_path, idx_bytes):
    fakes.put("kmnist", tmp_path, "plain")
    (tmp_path / PARTS[0]).write_bytes(idx_bytes(np.ones((3, 5, 4), np.uint8)))
    (tmp_path / PARTS[1]).write_bytes(idx_bytes(np.ones(3, np.uint8)))
    with pytest.raises(UsageError, match=r"its images have shape \(3, 5, 4, 1\), not \(6, 5, 4, 1\)"):
        mnist.load("kmnist", tmp_path)


def test_a_file_may_be_compressed_again(fakes, tmp_path):
    fakes.put("mnist", tmp_path)
    again = gzip.compress(fakes.files["mnist"][PARTS[0]], 1, mtime=1)
    assert again != fakes.gzipped["mnist"][PARTS[0]]
    (tmp_path / f"{PARTS[0]}.gz").write_bytes(again)
    assert_is(mnist.load("mnist", tmp_path), "mnist", fakes.arrays["mnist"])
    fakes.put("fashion_mnist", tmp_path / "fashion_mnist")
    (tmp_path / "fashion_mnist" / f"{PARTS[0]}.gz").write_bytes(again)
    with pytest.raises(UsageError, match=f"{PARTS[0]}.gz is mnist's {PARTS[0]}, not fashion_mnist's {PARTS[0]}; move"):
        mnist.load("fashion_mnist", tmp_path / "fashion_mnist")


def test_a_file_compressed_again_whose_content_is_unknown(fakes, tmp_path):
    fakes.put("kmnist", tmp_path)
    (tmp_path / f"{PARTS[0]}.gz").write_bytes(gzip.compress(fakes.files["kmnist"][PARTS[0]], 1, mtime=1))
    with pytest.raises(UsageError, match="is damaged or not kmnist's: compressed, it must be the same file as the pub"):
        mnist.load("kmnist", tmp_path)


@pytest.mark.parametrize("damaged", [b"", b"text", b"\x1f\x8b", gzip.compress(b"other", mtime=0)])
@pytest.mark.parametrize("intact", [PARTS[0], f"mnist/{PARTS[0]}", PARTS[0].replace("-idx", ".idx")])
def test_an_intact_file_beside_a_damaged_one(fakes, tmp_path, damaged, intact):
    fakes.put("mnist", tmp_path)
    (tmp_path / f"{PARTS[0]}.gz").write_bytes(damaged)
    (tmp_path / "mnist").mkdir()
    (tmp_path / intact).write_bytes(fakes.files["mnist"][PARTS[0]])
    assert_is(mnist.load("mnist", tmp_path), "mnist", fakes.arrays["mnist"])


def test_two_damaged_forms_of_a_file(fakes, tmp_path):
    fakes.put("mnist", tmp_path)
    for name in (f"{PARTS[0]}.gz", PARTS[0]):
        (tmp_path / name).write_bytes(b"text")
    with pytest.raises(UsageError, match=f"{PARTS[0]}.gz is damaged or not mnist's: its content differs from the pub"):
        mnist.load("mnist", tmp_path)


def test_a_file_that_decompresses_to_too_much(fakes, tmp_path, monkeypatch):
    fakes.put("mnist", tmp_path)
    monkeypatch.setattr(mnist, "MAX_FILE_BYTES", 1000)
    (tmp_path / f"{PARTS[0]}.gz").write_bytes(gzip.compress(bytes(10**5)))
    with pytest.raises(UsageError, match="is damaged or not mnist's"):
        mnist.load("mnist", tmp_path)
    assert mnist._decompressed(gzip.compress(bytes(1000))) == bytes(1000)
    assert mnist._decompressed(gzip.compress(bytes(1001))) == b""


def test_download_and_then_no_more(fakes, served, tmp_path, capfd):
    directory = tmp_path / "not" / "there yet"
    assert_is(mnist.load("mnist", directory), "mnist", fakes.arrays["mnist"])
    assert sorted(path.relative_to(directory) for path in directory.rglob("*")) == [
        Path("mnist"),
        *sorted(Path("mnist", f"{part}.gz") for part in PARTS),
    ]
    asked = len(served.asked)
    assert {Path(path).stem for path in served.asked} == set(PARTS)
    assert_is(mnist.load("mnist", directory), "mnist", fakes.arrays["mnist"])
    assert len(served.asked) == asked
    assert capfd.readouterr() == ("", "")


def test_only_missing_files_are_downloaded(fakes, served, tmp_path):
    fakes.put("mnist", tmp_path, "plain")
    (tmp_path / PARTS[3]).unlink()
    assert_is(mnist.load("mnist", tmp_path), "mnist", fakes.arrays["mnist"])
    assert set(served.asked) == {f"/mnist/{PARTS[3]}.gz"}


def test_downloading_an_unexpected_file(fakes, served, tmp_path):
    served.bodies[f"/mnist/{PARTS[2]}.gz"] = served.bodies[f"/kmnist/{PARTS[2]}.gz"]
    with pytest.raises(CnnJaxError, match=f"{PARTS[2]}.gz sent another file") as caught:
        mnist.load("mnist", tmp_path)
    assert type(caught.value) is CnnJaxError
    assert list(tmp_path.iterdir()) == []


def test_network_failure_keeps_existing_files(fakes, closed_url, tmp_path):
    fakes.url = closed_url
    fakes.put("mnist", tmp_path)
    (tmp_path / f"{PARTS[3]}.gz").unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(mnist.DownloadError) as caught:
        mnist.load("mnist", tmp_path)
    message = str(caught.value)
    assert f"{closed_url}/mnist/{PARTS[3]}.gz: no connection" in message
    assert f"put the files into {tmp_path}, or choose --dataset digits" in message
    assert caught.value.exit_status == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("below", ["", "further/below"])
def test_data_dir_that_is_a_file(fakes, tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot read the data directory .*file.*: Not a directory; .*--data-dir"):
        mnist.load("mnist", tmp_path / "file" / below)


def test_data_dir_that_cannot_be_made(fakes, served, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "for good")
    with pytest.raises(UsageError, match=r"cannot write to the data directory .*link: .*--data-dir"):
        mnist.load("mnist", tmp_path / "link")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here that opens and does not read")
def test_unreadable_file(fakes, tmp_path):
    (tmp_path / PARTS[0]).symlink_to("/proc/self/mem")
    with pytest.raises(UsageError, match=f"cannot read .*{PARTS[0]}: "):
        mnist.load("mnist", tmp_path)


def test_a_file_that_is_too_large_is_not_hashed(fakes, tmp_path):
    with (tmp_path / PARTS[0]).open("wb") as file:
        file.truncate(200 * 10**9)
    with pytest.raises(UsageError, match=rf"cannot read .*{PARTS[0]}: larger than \d+ bytes; delete it to download it"):
        mnist.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("name", "classes", "host"),
    [
        ("fashion_mnist", ("T-shirt/top", "Ankle boot"), "fashion-mnist.s3-website.eu-central-1.amazonaws.com"),
        ("mnist", ("0", "9"), "storage.googleapis.com"),
        ("kmnist", ("o", "wo"), "codh.rois.ac.jp"),
    ],
)
def test_the_real_datasets(tmp_path, name, classes, host):
    family = mnist.family(name, tmp_path)
    assert (family.class_names[0], family.class_names[-1], len(family.class_names)) == (*classes, 10)
    assert family.image_shape == (28, 28, 1)
    assert family.counts == (60_000, 10_000)
    assert sorted(family.urls) == sorted(PARTS)
    assert all(host in url and part in url for part, url in family.urls.items())
    encrypted = [url.startswith(("https://", *download.HTTPS)) for url in family.urls.values()]
    assert all(encrypted)
    assert all(len(sha256) == 64 for sha256 in family.part_of_sha256)
    assert sorted(family.part_of_sha256.values()) == sorted(PARTS * (1 if name == "kmnist" else 2))
    assert list(tmp_path.iterdir()) == []


@needs_genuine
@pytest.mark.parametrize("form", ["published", "decompressed", "compressed again"])
def test_genuine_fashion_mnist(tmp_path, monkeypatch, form):
    monkeypatch.setitem(sys.modules, "requests", None)
    directory = GENUINE
    if form != "published":
        directory = tmp_path
        folder = GENUINE if (GENUINE / f"{PARTS[0]}.gz").is_file() else GENUINE / "fashion_mnist"
        for part in PARTS:
            content = gzip.decompress((folder / f"{part}.gz").read_bytes())
            suffix, content = (".gz", gzip.compress(content, 1)) if form == "compressed again" else ("", content)
            (tmp_path / f"{part}{suffix}").write_bytes(content)
    dataset = mnist.load("fashion_mnist", directory)
    assert dataset.image_shape == (28, 28, 1)
    assert dataset.train.images.shape == (60_000, 28, 28, 1)
    assert dataset.test.images.shape == (10_000, 28, 28, 1)
    assert np.bincount(dataset.train.labels).tolist() == [6000] * 10
    assert np.bincount(dataset.test.labels).tolist() == [1000] * 10
    assert dataset.train.labels[:4].tolist() == [9, 0, 0, 3]
    assert dataset.train.images.mean() / 255 == pytest.approx(0.2860, abs=1e-4)
    assert dataset.class_names[9] == "Ankle boot"
