"""Weights from what torch.save writes: the right ones to the bit, every other refused, and nothing executed."""

import os
import pickle
import pickletools
import sys
import zipfile

import jax
import numpy as np
import pytest

from cnn_jax.errors import UsageError


@pytest.fixture
def image_shape():
    return 16, 20, 1


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def state_dict(torch, network, in_pytorch):
    return {name: torch.from_numpy(array.copy()) for name, array in in_pytorch(network).items()}


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def saved(request, torch, path, state_dict):
    torch.save(state_dict, path, _use_new_zipfile_serialization=request.param)
    return path


@pytest.fixture
def archive(torch, path, state_dict):
    torch.save(state_dict, path)
    return path


@pytest.fixture
def legacy(torch, path, state_dict):
    torch.save(state_dict, path, _use_new_zipfile_serialization=False)
    return path


def test_it_is_read_to_the_bit(saved, read, network):
    jax.tree.map(np.testing.assert_array_equal, read(), network.params)


def test_in_flaxs_names_too(torch, path, read, network, arrays):
    torch.save({name: torch.nn.Parameter(torch.from_numpy(array.copy())) for name, array in arrays.items()}, path)
    jax.tree.map(np.testing.assert_array_equal, read(), network.params)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"epoch": 3, "state_dict": weights, "loss": 0.5},
        lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()},
        lambda weights: {"model": {f"_orig_mod.module.{name}": tensor for name, tensor in weights.items()}},
        lambda weights: {"model": {f"module._orig_mod.{name}": tensor for name, tensor in weights.items()}},
    ],
    ids=["checkpoint", "data parallel", "compiled", "compiled first"],
)
def test_what_training_scripts_save_is_read(torch, path, read, network, state_dict, wrap):
    torch.save(wrap(state_dict), path)
    jax.tree.map(np.testing.assert_array_equal, read(), network.params)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions_are_rounded_to_float32(torch, path, read, network, state_dict, dtype):
    torch.save({name: tensor.to(getattr(torch, dtype)) for name, tensor in state_dict.items()}, path)
    params = read()
    kernel = state_dict["fc2.weight"].to(getattr(torch, dtype)).float().numpy().T
    np.testing.assert_array_equal(params["fc2"]["kernel"], kernel)


def test_differences_are_told(torch, path, state_dict, assert_refused):
    state_dict["out.weight"] = torch.zeros(1).expand(2**20, 2**20)  # a terabyte, if anybody were to write it out
    state_dict["conv1.bias"] = state_dict["conv1.bias"].long()
    torch.save(state_dict, path)
    assert_refused(
        r"conv1\.bias has dtype torch\.int64 instead of float32, "
        r"out\.weight has shape \[1048576, 1048576\] instead of \[3, 60\]",
    )


def test_missing_pytorch_is_said(saved, monkeypatch, assert_refused):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert_refused("reading the state_dict .* needs PyTorch: pip install -e '\\.\\[torch\\]', or set --init-from")


@pytest.mark.parametrize("content", ["network", "list", "numbers", "names", "sparse", "nothing"])
def test_what_is_no_state_dict_is_refused(torch, path, state_dict, content, assert_refused):
    contents = {
        "network": torch.nn.Linear(2, 3),
        "list": list(state_dict.values()),
        "numbers": dict.fromkeys(state_dict, 0.5),
        "names": dict(enumerate(state_dict.values())),
        "sparse": {name: tensor.to_sparse() for name, tensor in state_dict.items()},
        "nothing": None,
    }
    torch.save(contents[content], path)
    assert_refused(
        "is damaged, larger than 1 GiB, or not a state_dict: set --init-from to a run directory, a safetensors file"
    )


class Hostile:
    """Makes a directory where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_nothing_is_executed(archive, tmp_path, assert_refused):
    with zipfile.ZipFile(archive) as opened:
        members = {name: opened.read(name) for name in opened.namelist()}
    (name,) = (name for name in members if name.endswith("data.pkl"))
    with zipfile.ZipFile(archive, "w") as opened:
        hostile = pickle.dumps({"out.bias": Hostile(tmp_path / "executed")}, 2)
        for member, content in (members | {name: hostile}).items():
            opened.writestr(member, content)
    assert_refused("is damaged, larger than 1 GiB, or not a state_dict")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("place", range(1, 5))
def test_nothing_in_a_legacy_file_is_executed(legacy, tmp_path, assert_refused, place):
    pickles = legacy_pickles(legacy.read_bytes())
    pickles[place] = pickle.dumps({"out.bias": Hostile(tmp_path / "executed")}, 2)
    legacy.write_bytes(b"".join(pickles))
    assert_refused("is damaged, larger than 1 GiB, or not a state_dict")
    assert not (tmp_path / "executed").exists()


def legacy_pickles(content):
    """The five pickles in a legacy file, and its arrays."""
    parts = []
    for _ in range(5):
        *_, (_, _, stop) = pickletools.genops(content)
        parts.append(content[: stop + 1])
        content = content[stop + 1 :]
    return [*parts, content]


def test_long_names_in_a_legacy_file_are_refused(torch, path, state_dict, assert_refused):
    torch.save({"x" * 2**20: state_dict["out.bias"]}, path, _use_new_zipfile_serialization=False)
    assert_refused("is damaged, larger than 1 GiB, or not a state_dict")


def test_a_legacy_file_without_its_arrays_is_refused(legacy, assert_refused):
    *pickles, arrays = legacy_pickles(legacy.read_bytes())
    for rest in (b"", arrays[:100], arrays[:-4]):
        legacy.write_bytes(b"".join(pickles) + rest)
        assert_refused("is damaged, larger than 1 GiB, or not a state_dict")


def test_what_would_unpack_is_refused(archive, assert_refused):
    with zipfile.ZipFile(archive) as opened:
        members = {name: opened.read(name) for name in opened.namelist()}
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        for member, content in members.items():
            opened.writestr(member, content)
    assert_refused("is damaged, larger than 1 GiB, or not a state_dict")


def test_a_huge_one_is_refused(saved, assert_refused):
    os.truncate(saved, 2**36)
    assert_refused("is damaged, larger than 1 GiB, or not a state_dict")


@pytest.mark.parametrize("at", [10, 100, 1000, 5000, -1000, -100, -10])
def test_damaged_ones_are_read_or_refused(saved, read, at, check_message):
    content = bytearray(saved.read_bytes())
    for length in (at % len(content), len(content)):
        content[at] ^= 0xFF
        saved.write_bytes(content[:length])
        try:
            read()
        except UsageError as error:
            check_message(str(error))
