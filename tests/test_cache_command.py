from pathlib import Path

import pytest

from cnn_jax import cache


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A cache of 4 MB of datasets, 2 of images, 1 of programs and 5 of weights, and a link out of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = tmp_path / "cnn_jax"
    sizes = {"mnist/a": 3, "tfds/b/c": 1, "folders/entry": 2, "compiled/program": 1, "weights/network.pth": 5}
    for name, size in sizes.items():
        path = root / name
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(size * 1_000_000))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").touch()
    (root / "linked").symlink_to(tmp_path / "outside")
    return root


def lines(root, *sizes):
    kinds = zip(("datasets", "images", "programs", "weights"), sizes, strict=True)
    return "".join(f"{kind}: {size:.1f} MB\n" for kind, size in kinds) + f"cache directory: {root}\n"


def test_sizes(root, capsys):
    assert cache.main([]) == 0
    assert capsys.readouterr().out == lines(root, 4, 2, 1, 5)


@pytest.mark.parametrize(
    ("what", "left"),
    [
        ("datasets", (0, 2, 1, 5)),
        ("images", (4, 0, 1, 5)),
        ("programs", (4, 2, 0, 5)),
        ("weights", (4, 2, 1, 0)),
        ("all", (0, 0, 0, 0)),
    ],
)
def test_clear(root, capsys, what, left):
    assert cache.main(["--clear", what]) == 0
    assert capsys.readouterr().out == lines(root, *left)
    assert (root.parent / "outside" / "kept").exists()


def test_no_cache_is_no_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    assert cache.main(["--clear", "all"]) == 0
    assert capsys.readouterr().out == lines(Path(tmp_path, "none", "cnn_jax"), 0, 0, 0, 0)
