"""A CSV file with the classes of the images."""

import csv
import io
import os

import pytest
from folders import gray, load, numbers, put, put_split, refusal

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.data import folder, table
from cnn_jax.errors import UsageError


@pytest.fixture
def images(root):
    """A folder with the images 0.png to 39.png in images/."""
    for number in range(40):
        put(root, f"images/{number}.png", gray(number))
    return root


def write(path, rows, **options):
    content = io.StringIO(newline="")
    csv.writer(content, **options).writerows(rows)
    path.write_bytes(content.getvalue().encode())
    return path


def labeled(numbers, name="images/{}.png"):
    """Rows for images, whose class is their number modulo 2."""
    return [[name.format(number), ("cat", "dog")[number % 2]] for number in numbers]


def read(tmp_path, content, files=("1.png", "2.png")):
    for file in files:
        put(tmp_path, file, b"")
    return table.read(put(tmp_path, "t.csv", content.encode() if isinstance(content, str) else content))


def wrong(tmp_path, content):
    with pytest.raises(UsageError) as caught:
        read(tmp_path, content)
    message = str(caught.value)
    assert message.isprintable()
    return message.removeprefix(f"{tmp_path / 't.csv'}")


def test_a_folder_with_labels_csv_or_the_file(images):
    write(images / "labels.csv", [["file", "label"], *labeled(range(40))])
    dataset = load(images)
    assert dataset.name == f"folder:{images}"
    assert dataset.class_names == ("cat", "dog")
    assert sorted(numbers(dataset.train) + numbers(dataset.test)) == list(range(40))
    for split in (dataset.train, dataset.test):
        assert split.labels.tolist() == [number % 2 for number in numbers(split)]
        assert split.files.tolist() == [f"images/{number}.png" for number in numbers(split)]
    (images / "labels.csv").rename(images / "Other.CSV")
    other = load(images / "Other.CSV")
    assert other.name == folder.dataset_name(str(images / "Other.CSV")) == f"folder:{images / 'Other.CSV'}"
    assert other.sha256 == dataset.sha256


def test_the_same_as_folders(images, tmp_path):
    """Also with the rows in another order, and images that are held out."""
    write(images / "labels.csv", [["class", "path"], *(row[::-1] for row in labeled(reversed(range(40))))])
    for number in range(40):
        put(tmp_path, f"folders/{('cat', 'dog')[number % 2]}/{number}.png", gray(number))
    settings = {"validation_fraction": 0.3, "split_seed": 4}
    assert load(images, **settings).sha256 == load(tmp_path / "folders", **settings).sha256
    assert list(load(images, **settings).splits) == ["train", "validation", "test"]


def test_classes_are_in_the_order_of_folders(images, tmp_path):
    """Uppercase letters come first."""
    names = ("Zebra", "ape")
    write(images / "labels.csv", [["file", "label"], *([f"images/{n}.png", names[n % 2]] for n in range(10))])
    for number in range(10):
        put(tmp_path, f"folders/{names[number % 2]}/{number}.png", gray(number))
    assert load(images).class_names == load(tmp_path / "folders").class_names == names


def test_the_splits(images, tmp_path):
    rows = labeled(range(8))
    for row, split in zip(
        rows, ["train", "Train", "TEST", "test ", "val", "validation", "training", "train"], strict=True
    ):
        row.append(split)
    write(images / "labels.csv", [["Image", " LABEL", "Split"], *rows[::-1]])
    dataset = load(images)
    assert folder.has_splits(str(images))
    assert list(dataset.splits) == ["train", "validation", "test"]
    assert [sorted(numbers(split)) for split in dataset.splits.values()] == [[0, 1, 6, 7], [4, 5], [2, 3]]
    assert (numbers(dataset.validation), numbers(dataset.test)) == ([4, 5], [2, 3])
    assert refusal(images, validation_fraction=0.1).endswith(
        "has its own validation split: leave out validation_fraction"
    )
    counts = {"train": [0, 1, 6, 7], "val": [4, 5], "test": [2, 3]}
    for part, values in counts.items():
        for number in values:
            put(tmp_path, f"folders/{part}/{('cat', 'dog')[number % 2]}/{number}.png", gray(number))
    assert load(tmp_path / "folders").sha256 == dataset.sha256


def test_without_splits_nothing_is_held_out_for_evaluation(images):
    path = write(images / "t.csv", [["file", "label"], *labeled(range(3))])
    assert not folder.has_splits(str(path))
    dataset = folder.load_unsplit(str(path), Config(dataset=f"folder:{path}"))
    assert dataset.name == f"folder:{path}"
    assert numbers(dataset.test) == [0, 2, 1]


def test_settings_apply(images, decoded):
    put(images, "images/text.png", b"text")
    write(images / "labels.csv", [["file", "label"], *labeled(range(10)), ["images/text.png", "cat"]])
    assert refusal(images).startswith(f"{images}/images/text.png is not a PNG")
    dataset = load(images, image_size=(6, 6), channels=3, skip_unreadable=True)
    assert dataset.train.images.shape[1:] == (6, 6, 3)
    assert len(dataset.train) + len(dataset.test) == 10
    decoded.clear()
    images.rename(images.with_name("moved"))
    moved = load(images.with_name("moved"), image_size=(6, 6), channels=3, skip_unreadable=True)
    assert moved.sha256 == dataset.sha256
    assert [path.name for path in decoded] == ["text.png"]  # the others are cached


def test_folders_of_classes_come_first(images, caplog):
    put_split(images, {".": {"a": 2, "b": 2}})
    csv_file = write(images / "labels.csv", [["file", "label"], *labeled(range(4))])
    assert load(images).class_names == ("a", "b", "images")
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{csv_file} is ignored, because the folders next to it are the classes: use folder:{csv_file} to read it"
    )
    assert load(csv_file).class_names == ("cat", "dog")
    assert not folder.has_splits(str(images))


def test_folders_of_splits_without_classes(root, caplog):
    for number in range(4):
        put(root, f"{('train', 'test')[number // 2]}/{number}.png", gray(number))
    rows = [
        [f"{part}/{number}.png", number % 2, part]
        for part, numbers in (("train", (0, 1)), ("test", (2, 3)))
        for number in numbers
    ]
    write(root / "labels.csv", [["file", "label", "split"], *rows])
    dataset = load(root)
    assert dataset.class_names == ("0", "1")
    assert numbers(dataset.test) == [2, 3]
    assert caplog.records == []
    put_split(root, {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}})
    assert load(root).class_names == ("a", "b")


def test_links_in_the_folder_are_followed(root, tmp_path):
    put(tmp_path, "elsewhere/1.png", gray(1))
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "elsewhere")
    put(root, "2.png", gray(2))
    put(root, "3.png", gray(3))
    put(root, ".4.png", gray(4))  # named, so not hidden
    path = write(
        root / "labels.csv", [["file", "label"], *zip(["link/1.png", "2.png", "3.png", ".4.png"], "abab", strict=True)]
    )
    assert len(load(path).train) + len(load(path).test) == 4


def test_a_pipe_is_not_read(images):
    os.mkfifo(images / "pipe.png")
    path = write(images / "t.csv", [["file", "label"], *labeled(range(4)), ["pipe.png", "cat"]])
    assert "pipe.png: not a regular file" in refusal(path)
    assert len(load(path, skip_unreadable=True).train) >= 2
    path.unlink()
    os.mkfifo(path)
    assert f"cannot read the file {path}: not a regular file; check the path" in refusal(path)


def test_too_few_images_of_a_class(images):
    path = write(images / "t.csv", [["file", "label"], *labeled(range(3))])
    assert refusal(path) == (
        f"class 'dog' in {path} has 1 readable image: every class needs at least 2, one of them to be held "
        "out for testing"
    )
    rows = [[*row, split] for row, split in zip(labeled(range(3)), ["train", "train", "test"], strict=True)]
    write(path, [["file", "label", "split"], *rows])
    assert refusal(path) == (
        f"class 'dog' of the split test in {path} has no readable images: every class needs at least 1"
    )


def test_only_some_of_the_splits(images):
    path = write(images / "t.csv", [["file", "label", "split"], *([*row, "train"] for row in labeled(range(4)))])
    assert refusal(path) == (
        f"{path} has no row with the split test: add some, or remove the column of the splits to hold out a fifth of "
        "the images for testing"
    )
    write(path, [["file", "label", "split"], *([*row, "test"] for row in labeled(range(4)))])
    assert "has no row with the split train: " in refusal(path)


def test_only_one_class(images):
    path = write(images / "t.csv", [["file", "label"], *labeled([0, 2, 4])])
    assert refusal(path) == f"{path} has only one class, cat: at least 2 classes are needed"


def test_a_missing_file_of_the_table(root):
    assert refusal(root / "x.csv") == (
        f"cannot read the file {root}/x.csv: No such file or directory; check the path, and give that of a moved file "
        "with --dataset folder:PATH"
    )


def test_a_folder_named_like_a_table(tmp_path, own_cache):
    put_split(tmp_path / "photos.csv", {".": {"a": 2, "b": 2}})
    assert load(tmp_path / "photos.csv").class_names == ("a", "b")


def test_the_path_of_a_table_is_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "my.csv", b"")
    with pytest.raises(UsageError, match=r"unknown dataset 'my\.csv'; did you mean 'folder:my\.csv'"):
        data.load(Config(dataset="my.csv"))


# Reading


@pytest.mark.parametrize(
    ("content", "files", "classes"),
    [
        ("file,label\n1.png,cat\n2.png,dog", "12", ["cat", "dog"]),
        ("\ufefffilename,class\r\n1.png,cat\r\n2.png,dog\r\n", "12", ["cat", "dog"]),
        ('id,"image",width,label\n7,1.png,30,"cat, big"\n8,2.png,,"a ""b"""\n', "12", ["cat, big", 'a "b"']),
        ("file, label\n1.png, cat\n2.png,cat \n", "12", ["cat", "cat"]),
        ('label, file\ncat , 1.png\n"a, b", "2.png"\n', "12", ["cat", "a, b"]),
        ("label,path\n\nKatze ä,1.png\n,\n猫,2.png\n\n", "12", ["Katze ä", "猫"]),
        ("file,label\n1.png,cat\n./1.png,cat\n.//2.png,1e3\n", "12", ["cat", "1e3"]),
        ("file\tx,file,label\na,1.png,cat\n", "1", ["cat"]),
    ],
)
def test_read(tmp_path, content, files, classes):
    result = read(tmp_path, content)
    assert [row.file for row in result.rows] == [f"{file}.png" for file in files]
    assert [row.class_name for row in result.rows] == classes
    assert {row.split for row in result.rows} == {"train"}
    assert not result.has_splits


NAME_FILES = " has no column of the files: name it file or filename or path or image in the first row"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", NAME_FILES),
        ("1.png,cat\n2.png,dog\n", NAME_FILES),
        ("file;label\n1.png;cat\n", f"{NAME_FILES}, and separate the columns with commas"),
        ("file\tlabel\n1.png\tcat\n", f"{NAME_FILES}, and separate the columns with commas"),
        ("file,name\n1.png,cat\n", " has no column of the classes: name it label or class in the first row"),
        (
            "file,Path,label\n1.png,1.png,cat\n",
            " has several columns with the same meaning, file, path: rename or remove all but one",
        ),
        (
            "file,label,class\n1.png,1,cat\n",
            " has several columns with the same meaning, label, class: rename or remove all but one",
        ),
        ("file,label\n", " has no rows below the names of the columns: add one for each image"),
        (
            "file,label\n1.png,cat\n2.png,dog,big\n",
            ", row 3: it has 3 fields, and the first row has 2: put double quotes around fields with commas",
        ),
        (
            "file,label\n1.png\n",
            ", row 2: it has 1 fields, and the first row has 2: put double quotes around fields with commas",
        ),
        ("file,label\n\n1.png, \n", ", row 3: the class is empty: add it, or remove the row"),
        ("file,label\n,cat\n", ", row 2: the file is empty: add it, or remove the row"),
        (
            "file,label,split\n1.png,cat,train\n2.png,cat,dev\n",
            ", row 3: unknown split 'dev': use train, validation or test",
        ),
        ("file,label,split\n1.png,cat,\n", ", row 2: unknown split '': use train, validation or test"),
        (
            "file,label\n3.png,cat\n",
            ", row 2: the file '3.png' does not exist: correct it, relative to the CSV file, or remove the row",
        ),
        (
            "file,label\n1.png/x,cat\n",
            ", row 2: the file '1.png/x' does not exist: correct it, relative to the CSV file, or remove the row",
        ),
        ("file,label\nx\\1.png,cat\n", ", row 2: the file 'x\\\\1.png' does not exist: use / instead of \\"),
        (
            "file,label\n.,cat\n",
            ", row 2: the file '.' is a folder: correct it, relative to the CSV file, or remove the row",
        ),
        (
            "file,label\na\0b,cat\n",
            r", row 2: the file 'a\x00b' contains a null byte: correct it, relative to the CSV file, or remove the row",
        ),
        (
            f"file,label\n{'x' * 300},cat\n",
            f", row 2: the file '{'x' * 100}...' cannot be read (File name too long): correct it, relative to the CSV "
            "file, or remove the row",
        ),
        ("file,label\n1.png,a\x1b[31m\n", r", row 2: 'a\x1b[31m' is not a printable class name: rename the class"),
        ('file,label\n1.png,"a\nb"\n', r", row 2: 'a\nb' is not a printable class name: rename the class"),
        (
            f"file,label\n1.png,{'x' * 256}\n",
            f", row 2: the class name '{'x' * 100}...' is longer than 255 characters: shorten it",
        ),
        (
            "file,label\n1.png,cat\n2.png,dog\n./1.png,dog\n",
            ", row 4: '1.png' has the class 'dog' here and 'cat' in row 2: remove one of the rows",
        ),
        (
            "file,label,split\n1.png,cat,train\n1.png,cat,test\n",
            ", row 3: '1.png' has the split 'test' here and 'train' in row 2: remove one of the rows",
        ),
        ('file,label\n1.png,cat\n2.png,"dog\n', ", row 3: unexpected end of data; check the quotes in it"),
        ('file,label\n1.png,"cat"s\n', ", row 2: ',' expected after '\"'; check the quotes in it"),
        (b"file,label\n1.png,caf\xe9\n", " is not encoded as UTF-8: save it as CSV in UTF-8"),
        ("file,label\n1.png,cat\n".encode("utf-16"), " is not encoded as UTF-8: save it as CSV in UTF-8"),
    ],
)
def test_mistakes(tmp_path, content, message):
    assert wrong(tmp_path, content) == message


@pytest.mark.parametrize("name", ["../1.png", "/1.png", "a/../1.png", "//1.png"])
def test_files_elsewhere_are_refused(tmp_path, name):
    (tmp_path / "a").mkdir()
    assert wrong(tmp_path, f"file,label\n{name},cat\n") == (
        f", row 2: {name!r} is not below {tmp_path}: use a path relative to it, without .."
    )


def test_a_huge_table_is_not_read(tmp_path):
    path = tmp_path / "t.csv"
    with path.open("wb") as file:
        file.truncate(table.MAX_BYTES + 1)
    with pytest.raises(UsageError, match=f"cannot read the file {path}: larger than {table.MAX_BYTES} bytes"):
        table.read(path)
