import contextlib
import os
import stat
import subprocess
import sys

import pytest

from cnn_jax import files
from cnn_jax.errors import UsageError, printable

EVENTS = []
"""What the interpreter opened and renamed, while a test listens."""


@pytest.fixture
def events():
    """The audit events of a test: an audit hook cannot be removed again."""
    if not hasattr(sys, "_cnn_jax_hook"):
        sys._cnn_jax_hook = True
        sys.addaudithook(lambda event, args: EVENTS.append((event, args)) if event in ("open", "os.rename") else None)
    EVENTS.clear()
    return EVENTS


def test_a_file_is_whole_or_old(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with contextlib.suppress(ZeroDivisionError), files.replacing(path) as temporary:
        temporary.write_text("ne")
        1 / 0  # noqa: B018
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_never_written_in_its_place(tmp_path, events):
    path = tmp_path / "file"
    with files.replacing(path) as temporary:
        temporary.write_text("new")
    opened = [args for event, args in events if event == "open"]
    assert str(path) not in {str(name) for name, _, _ in opened}
    created = [flags for name, _, flags in opened if str(name) == str(temporary) and flags & os.O_CREAT]
    assert created[0] & os.O_EXCL
    assert created[0] & os.O_NOFOLLOW
    assert (str(temporary), str(path)) in [
        (str(args[0]), str(args[1])) for event, args in events if event == "os.rename"
    ]
    assert path.read_text() == "new"


def test_temporary_names_cannot_be_guessed(tmp_path):
    names = set()
    for _ in range(3):
        with files.replacing(tmp_path / "file") as temporary:
            names.add(temporary.name)
    assert len(names) == 3


def test_a_new_file_has_the_users_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        with files.replacing(tmp_path / "file") as temporary:
            temporary.write_text("new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_only_regular_files_are_opened(tmp_path):
    (tmp_path / "file").write_text("content")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    assert files.read_bytes(tmp_path / "file", 7) == b"content"
    with pytest.raises(OSError, match="too large"):
        files.read_bytes(tmp_path / "file", 6)
    for name in ("link", "pipe", "directory", "missing"):
        with pytest.raises(OSError, match=r"symbolic links|not a regular file|No such file"):
            files.open_regular(tmp_path / name)


def test_a_private_directory_is_closed_to_others(tmp_path):
    path = tmp_path / "parent" / "cache"
    assert files.private_directory(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert files.private_directory(path)
    path.chmod(0o777)
    assert not files.private_directory(path)
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "file").touch()
    assert not files.private_directory(tmp_path / "link")
    assert not files.private_directory(tmp_path / "file")
    assert not files.private_directory(tmp_path / "file" / "cache")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a directory away")
def test_somebody_elses_directory_is_not_used(tmp_path):
    os.chown(tmp_path, 12345, 12345)
    assert not files.private_directory(tmp_path)


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".cnn_jax-0123456789abcdef").mkdir()
    (tmp_path / ".cnn_jax-0123456789abcdef" / "large").touch()
    (tmp_path / ".cnn_jax-0123456789abcdef-file").touch()
    kept = {tmp_path / name for name in ("file", ".tmp-thesis", ".cnn_jax", ".cnn_jax-notes", ".cnn_jax-0123")}
    for path in kept:
        path.mkdir()
    with files.temporary_directory(tmp_path) as path:
        assert set(tmp_path.iterdir()) == {path, *kept}
    assert set(tmp_path.iterdir()) == kept


def test_what_another_process_is_at_work_on_is_kept(tmp_path):
    script = f"""
from pathlib import Path
from cnn_jax.files import temporary_directory
with temporary_directory(Path({str(tmp_path)!r})) as path:
    print(path, flush=True)
    input()
"""
    words = [sys.executable, "-c", script]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        theirs = other.stdout.readline().strip()
        with files.temporary_directory(tmp_path) as ours:
            assert {str(ours), theirs} == {str(path) for path in tmp_path.iterdir()}
        other.communicate("\n")
    assert not list(tmp_path.iterdir())


def test_no_home_directory(monkeypatch):
    with pytest.raises(UsageError, match="home directory"):
        files.expanded("~nobody-of-that-name/x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Größe 猫 \U0001f408", "Größe 猫 \U0001f408"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("two\nlines\r", r"two\nlines\r"),
        ("\u202eabc\u200b", r"\u202eabc\u200b"),
        ("\udcff", r"\udcff"),
        ("\x9b31m", r"\x9b31m"),
    ],
)
def test_printable(text, expected):
    assert printable(text) == expected
