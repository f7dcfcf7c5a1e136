"""Weights from files: the right ones to the bit, every other refused in one line."""

import json
import os
import re
import struct
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from cnn_jax.errors import UsageError
from cnn_jax.formats import pytorch, safetensors
from cnn_jax.formats.safetensors import encode
from cnn_jax.formats.state_dict import flatten
from cnn_jax.formats.weights import open_weights

FORMS = [safetensors, pytorch]


@pytest.fixture
def image_shape():
    return 16, 20, 1


@pytest.mark.parametrize("form", FORMS)
def test_out_and_in_again_is_the_same_to_the_bit(path, read, network, form):
    path.write_bytes(form.to_bytes(network))
    params = read()
    jax.tree.map(np.testing.assert_array_equal, params, network.params)
    assert all(array.dtype == np.float32 for array in jax.tree.leaves(params))


def test_the_file_tells_what_it_is(path, network):
    path.write_bytes(safetensors.to_bytes(network))
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
        names = set(file.keys())
    assert names == {f"{layer}.{name}" for layer in network.params for name in ("kernel", "bias")}
    assert json.loads(metadata["class_names"]) == list(network.class_names)
    assert json.loads(metadata["image_shape"]) == [16, 20, 1]
    assert (metadata["model"], metadata["format"]) == ("cnn", "flax")


def test_numbers_lie_where_they_can_be_used_in_place(network):
    content = safetensors.to_bytes(network)
    assert struct.unpack("<Q", content[:8])[0] % 8 == 0


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_are_rounded_to_float32(path, read, network, arrays, dtype):
    rounded = {name: array.astype(dtype) for name, array in arrays.items()}
    save_file(rounded, path)
    params = flatten({"params": read()})
    jax.tree.map(np.testing.assert_array_equal, params, rounded)
    assert all(array.dtype == np.float32 for array in params.values())


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e300])
def test_numbers_that_are_none_are_refused(path, arrays, number, assert_refused):
    arrays["fc2.kernel"] = arrays["fc2.kernel"].astype(np.float64)
    arrays["fc2.kernel"][3, 5] = number
    save_file(arrays, path)
    assert_refused(r"fc2\.kernel in .* contains infinity or NaN: set --init-from to other weights")


def test_differences_are_told(path, arrays, assert_refused):
    arrays["conv1.kernel"] = np.zeros((3, 3, 1, 6), np.float32)
    arrays["x\n\x1b[3m"] = arrays.pop("out.bias")
    path.write_bytes(encode(arrays, {}))
    assert_refused(
        r"do not match this network for 16x20x1 images: "
        r"conv1\.kernel has shape \[3, 3, 1, 6\] instead of \[5, 5, 1, 6\], out\.bias \[3\] is missing, "
        r"x\\n\\x1b\[3m \[3\] is unexpected; set",
    )


def test_of_many_differences_a_few_are_told(path, assert_refused):
    path.write_bytes(encode({f"layer{i}.{'x' * 1000}": np.zeros((1,) * 30, np.float32) for i in range(100)}, {}))
    assert_refused(r"conv1\.bias \[6\] is missing, .*, and 106 more; set --init-from to weights of the same network")


def test_weights_for_other_images_in_pytorchs_names_are_told(path, network, in_pytorch, assert_refused):
    state_dict = in_pytorch(network)
    path.write_bytes(encode(state_dict | {"fc1.weight": np.zeros((120, 192), np.float32)}, {}))
    assert_refused(r"images: fc1\.weight has shape \[120, 192\] instead of \[120, 24\]; set")


def test_whole_numbers_are_refused(path, arrays, assert_refused):
    save_file({name: array.astype(np.int64) for name, array in arrays.items()}, path)
    assert_refused(r"conv1\.bias has dtype I64 instead of float32, .*, and 6 more")


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 7, b"\0" * 8, b"GIF89a", b"\xff" * 100, b"\x80\x02.", b"[" * 5000, struct.pack("<Q", 2**20) + b"{"],
)
def test_what_is_no_such_file_is_refused(path, content, assert_refused):
    path.write_bytes(content)
    assert_refused(
        "(contains no weights|is damaged or not a safetensors file): set --init-from to a run directory, a safetensors"
    )


def test_what_is_no_file_is_refused(path, assert_refused):
    assert_refused("there is no file .*weights: set --init-from to a run directory, a safetensors file")
    path.mkdir()
    assert_refused("there is no file .*weights")
    path.rmdir()
    os.mkfifo(path)  # nobody ever writes into it
    assert_refused("there is no file .*weights")


def test_a_name_too_long_is_refused():
    with pytest.raises(UsageError, match=r"cannot read x+: File name too long"):
        open_weights(Path("x" * 300))


def test_of_a_huge_file_the_header_alone_is_read(path, assert_refused):
    """64 GiB, of which the file system stores next to nothing."""
    header = json.dumps({"out.bias": {"dtype": "F32", "shape": [2**34], "data_offsets": [0, 2**36]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + 2**36)
    assert_refused(r"is missing, .*, and 6 more; set")


def altered(header):
    """A header of which up to three parts are replaced, renamed, left out or doubled."""
    extremes = st.sampled_from((0, 1, 4, 2**15, 2**31 - 1, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, -1, 0.5, "4"))
    numbers = st.integers(0, 200) | extremes
    changes = {
        "dtype": st.sampled_from(("F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "C64", "X", 3, None)),
        "shape": st.lists(numbers, max_size=5),
        "data_offsets": st.lists(numbers, min_size=1, max_size=3),
    }
    names = st.sampled_from(("__metadata__", "x\ny", "\u2028", "\x1b[3m", "", "conv1.weight", "x" * 5000))

    @st.composite
    def alter(draw):
        copy = json.loads(json.dumps(header))
        for _ in range(draw(st.integers(1, 3))):
            name = draw(st.sampled_from(sorted(copy)))
            match draw(st.sampled_from(("part", "part", "renamed", "left out", "doubled"))):
                case "part" if name != "__metadata__":
                    part = draw(st.sampled_from(sorted(changes)))
                    copy[name] = {**copy[name], part: draw(changes[part])}
                case "renamed":
                    copy[draw(names)] = copy.pop(name)
                case "left out" if len(copy) > 1:
                    del copy[name]
                case "doubled":
                    copy[f"{name}2"] = copy[name]
        return copy

    return alter()


def damaged(content):
    """Up to four places where some bytes, or all that follow, are replaced by others, or by none."""

    @st.composite
    def damage(draw):
        copy = bytearray(content)
        for _ in range(draw(st.integers(1, 4))):
            # In the header as often as in all the rest.
            start = draw(st.integers(0, 1500) | st.integers(0, len(copy)))
            end = draw(st.sampled_from((start, start + 1, start + 8, len(copy))))
            copy[start:end] = draw(st.binary(max_size=8) | st.sampled_from((b"\0" * 8, b"\xff" * 8, b"0", b"[", b'"')))
        return bytes(copy)

    return damage()


def test_mutated_files_are_read_or_refused(make_run, tmp_path, check_message):
    run = make_run((16, 16, 1))
    variables = jax.device_get(run.state.variables)
    content = encode(flatten(variables), {"format": "flax"})
    size = struct.unpack("<Q", content[:8])[0]
    header, numbers = json.loads(content[8 : 8 + size]), content[8 + size :]
    outcomes = set()

    def with_header(header):
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + numbers

    @settings(max_examples=300, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(damaged(content) | altered(header).map(with_header))
    def attempt(content):
        path = tmp_path / "weights"
        path.write_bytes(content)
        try:
            read = open_weights(path).variables("cnn", variables, (16, 16, 1))
            assert all(np.isfinite(array).all() for array in jax.tree.leaves(read))
            outcomes.add("read")
        except UsageError as error:
            check_message(str(error))
            outcomes.add(re.search("contains no|damaged|do not match|infinity|$", str(error))[0])

    attempt()
    assert outcomes >= {"read", "damaged", "do not match"}
