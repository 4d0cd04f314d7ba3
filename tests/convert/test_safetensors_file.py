"""safetensors files: good ones read exactly, malformed ones end in one line."""

import json

import mlx.core as mx
import numpy as np
import pytest
from rodimus_mlx.convert.safetensors_file import read_safetensors

from rodimus_mlx.errors import RodimusError


def write(path, header, data=bytes(24)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def refused(path) -> str:
    with pytest.raises(RodimusError) as caught:
        read_safetensors(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


DTYPES = [mx.float32, mx.float16, mx.bfloat16, mx.int64, mx.int32, mx.int16, mx.int8, mx.uint32, mx.uint8, mx.bool_]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_mlx_saves(tmp_path, dtype):
    array = mx.arange(15).reshape(3, 5).astype(dtype)
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"w": array, "scalar": mx.array(2.5)}, {"format": "mlx"})
    found = read_safetensors(tmp_path / "a.safetensors")
    assert found.keys() == {"w", "scalar"}
    assert found["w"].dtype == dtype and mx.array_equal(found["w"].read(), array)
    assert mx.array_equal(mx.concatenate(list(found["w"].blocks(max_bytes=6))), array)
    assert found["scalar"].read().item() == 2.5


def test_float64_is_read_as_float32(tmp_path):
    header = {"w": {"dtype": "F64", "shape": [3], "data_offsets": [0, 24]}}
    tensor = read_safetensors(write(tmp_path / "a.safetensors", header, np.array([1.0, 2.5, -3.0]).tobytes()))["w"]
    assert tensor.dtype == mx.float32 and tensor.read().tolist() == [1.0, 2.5, -3.0]


def tensor(shape=(2, 3), offsets=(0, 24), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


MALFORMED = {
    "not JSON": b"{",
    "not UTF-8": b'{"\xff": 1}',
    "nested too deeply": b"[" * 200_000,
    "a number of a million digits": b'{"w": ' + b"9" * 1_000_000 + b"}",
    "a list": [],
    "a tensor that is a list": {"w": []},
    "no dtype": {"w": {"shape": [2, 3], "data_offsets": [0, 24]}},
    "unknown dtype": {"w": tensor(dtype="F8_E4M3", offsets=(0, 6))},
    "shape that is a text": {"w": {**tensor(), "shape": "23"}},
    "shape of texts": {"w": tensor(shape=("2", "3"))},
    "shape of booleans": {"w": tensor(shape=(True, True), offsets=(0, 4))},
    "negative shape": {"w": tensor(shape=(-2, -3))},
    "huge shape": {"w": tensor(shape=(2**40, 2**40))},
    "shape and offsets that disagree": {"w": tensor(shape=(2, 4))},
    "offsets beyond the file": {"w": tensor(offsets=(8, 32))},
    "offsets backwards": {"w": tensor(offsets=(24, 0))},
    "negative offsets": {"w": tensor(offsets=(-8, 16))},
    "three offsets": {"w": tensor(offsets=(0, 12, 24))},
    "overlapping tensors": {"v": tensor((3,), (0, 12)), "w": tensor((3,), (8, 20))},
    "a name twice": b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "w": 1}',
}


@pytest.mark.parametrize("header", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed(tmp_path, header):
    refused(write(tmp_path / "a.safetensors", header))


OTHER_FILES = {
    "empty": (b"", "is empty"),
    "seven bytes": (bytes(7), "not a safetensors file"),
    "length beyond the file": (b"\xff" * 8 + b"{}", "not a safetensors file"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
}


@pytest.mark.parametrize("data, expected", OTHER_FILES.values(), ids=OTHER_FILES.keys())
def test_other_file(tmp_path, data, expected):
    (tmp_path / "a.safetensors").write_bytes(data)
    assert expected in refused(tmp_path / "a.safetensors")


def test_header_too_long_to_be_true(tmp_path):
    with open(tmp_path / "a.safetensors", "wb") as file:
        file.write((1 << 30).to_bytes(8, "little"))
        file.truncate((1 << 30) + 100)  # sparse: no disk used
    refused(tmp_path / "a.safetensors")


def test_cut_short_anywhere(goldens, tmp_path):
    data = (goldens / "rodimus" / "model.safetensors").read_bytes()
    for keep in (1, 8, 3000, len(data) // 2, len(data) - 1):
        (tmp_path / "a.safetensors").write_bytes(data[:keep])
        refused(tmp_path / "a.safetensors")
