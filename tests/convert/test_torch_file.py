"""PyTorch files: good ones read exactly, hostile ones run nothing and end in one line."""

import os
import pickle
import zipfile

import mlx.core as mx
import numpy as np
import pytest
from rodimus_mlx.convert.checkpoint import open_checkpoint
from rodimus_mlx.convert.torch_file import read_torch
from synthetic import (
    View,
    from_arrays,
    state_dict_pickle,
    tensor_pickle,
    write_bin,
    write_torch_zip,
)

from rodimus_mlx.errors import RodimusError

STORAGE = np.arange(24, dtype=np.float32)
NAME = b"X\x01\x00\x00\x00w"  # the name "w", pickled


def write_views(path, views, storage=STORAGE, **options):
    write_torch_zip(path, state_dict_pickle(views), from_arrays({"0": storage}), **options)
    return path


def write_pickle(path, data):
    write_torch_zip(path, data, from_arrays({"0": STORAGE}))
    return path


def refused(path) -> str:
    with pytest.raises(RodimusError) as caught:
        read_torch(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


def test_golden_equals_its_safetensors_twin(goldens):
    ours = open_checkpoint(goldens / "plus_bin").tensors
    twin = open_checkpoint(goldens / "plus_fla").tensors
    joined = mx.concatenate(
        [twin["model.layers.1.mixer.up_proj.weight"].read(), twin["model.layers.1.mixer.gate_proj.weight"].read()]
    )
    assert mx.array_equal(ours["model.layers.1.mixer.fc.weight"].read(), joined)
    assert mx.array_equal(ours["model.embeddings.weight"].read(), twin["model.embeddings.weight"].read())


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64"])
def test_dtypes(tmp_path, dtype):
    array = (np.arange(12).reshape(3, 4) - 5).astype(dtype)
    write_bin(tmp_path / "a.bin", from_arrays({"w": array}))
    found = read_torch(tmp_path / "a.bin")["w"].read()
    assert np.array_equal(np.array(found), array)
    assert (
        found.dtype == {"float64": mx.float32, "float32": mx.float32, "float16": mx.float16, "int64": mx.int64}[dtype]
    )


def test_bfloat16_bits(tmp_path):
    bits = np.array([0x3F80, 0xC000, 0x7F80, 0x0001], dtype=np.uint16)  # 1, -2, infinity, the smallest
    write_bin(tmp_path / "a.bin", from_arrays({"w": bits}, "bfloat16"))
    found = read_torch(tmp_path / "a.bin")["w"].read()
    assert found.dtype == mx.bfloat16
    assert np.array_equal(np.array(found.view(mx.uint16)), bits)


VIEWS = {
    "contiguous": (View("float32", "0", 24, (4, 6), (6, 1)), STORAGE.reshape(4, 6)),
    "transposed": (View("float32", "0", 24, (6, 4), (1, 6)), STORAGE.reshape(4, 6).T),
    "with an offset": (View("float32", "0", 24, (2, 3), (6, 1), 8), STORAGE.reshape(4, 6)[1:3, 2:5]),
    "every other row": (View("float32", "0", 24, (2, 6), (12, 1)), STORAGE.reshape(4, 6)[::2]),
    "scalar": (View("float32", "0", 24, (), (), 5), STORAGE[5]),
    "empty": (View("float32", "0", 24, (0, 3), (3, 1)), np.zeros((0, 3), np.float32)),
    "stride of a single row": (View("float32", "0", 24, (1, 5), (99, 1)), STORAGE[:5].reshape(1, 5)),
}


@pytest.mark.parametrize("view, expected", VIEWS.values(), ids=VIEWS.keys())
def test_views_of_a_shared_storage(tmp_path, view, expected):
    tensor = read_torch(write_views(tmp_path / "a.bin", {"w": view}))["w"]
    assert np.array_equal(np.array(tensor.read()), expected)
    if expected.ndim:
        assert np.array_equal(np.array(tensor.read(1, 2)), expected[1:2])
        assert np.array_equal(np.array(mx.concatenate(list(tensor.blocks(max_bytes=16)))), expected)


def test_what_torch_writes_around_a_state_dict(tmp_path):
    """An OrderedDict with the attribute _metadata, parameters, and memo instructions of newer protocols."""
    tensor = tensor_pickle(VIEWS["contiguous"][0])
    ordered = b"ccollections\nOrderedDict\n)R"
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + tensor + b"\x88" + ordered + b"tR"
    body = b"(" + NAME + parameter + b"\x94u"
    metadata = b"}\x8c\x09_metadata" + ordered + b"sb"
    data = b"\x80\x04\x95" + bytes(8) + ordered + body + metadata + b"."
    found = read_torch(write_pickle(tmp_path / "a.bin", data))
    assert np.array_equal(np.array(found["w"].read()), STORAGE.reshape(4, 6))


# Nothing may run: each of these would make the file `ran`.


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_malicious_pickle_is_refused_by_name(tmp_path, protocol):
    data = pickle.dumps({"w": Malicious(tmp_path / "ran")}, protocol)
    expected = "DICT" if protocol == 0 else "system"  # protocol 0 writes dicts as torch.save never does
    assert expected in refused(write_pickle(tmp_path / "a.bin", data))
    assert not (tmp_path / "ran").exists()


NAMED = {
    "GLOBAL": (b"cos\nsystem\n.", "os.system"),
    "STACK_GLOBAL": (b"\x8c\x08builtins\x8c\x04eval\x93.", "builtins.eval"),
    "INST": (b"(ios\nsystem\n.", "os.system"),
    "a torch function": (b"ctorch.hub\nload\n.", "torch.hub.load"),
    "OBJ": (b"(o.", "OBJ"),
    "NEWOBJ": (b"}}\x81.", "NEWOBJ"),
    "EXT1": (b"\x82\x01.", "EXT1"),
    "PERSID": (b"Pstorage\n.", "PERSID"),
    "an instruction that does not exist": (b"\xff.", "ff"),
    "newline in a name": (b"cos\\nx\nsy\rstem\n.", r"sy\\rstem"),
}


@pytest.mark.parametrize("data, name", NAMED.values(), ids=NAMED.keys())
def test_refused_by_name(tmp_path, data, name):
    assert name.replace("\\\\", "\\") in refused(write_pickle(tmp_path / "a.bin", b"\x80\x02" + data))


DEEP = b")" + b"\x85" * 200_000
HOSTILE = {
    "nothing": b"",
    "no end": b"\x80\x02}",
    "nested key": b"}(" + DEEP + b")u.",
    "nested value": b"}(" + NAME + DEEP + b"u.",
    "nested name of a global": DEEP + DEEP + b"\x93.",
    "doubling value": b"}(" + NAME + b")" + b"q\x00h\x00\x86" * 100 + b"u.",
    "memo index of gigabytes": b"}r\xff\xff\xff\xff(" + NAME + b"h\x00u.",
    "bytearray of gigabytes": b"\x96" + b"\xff" * 7 + b"\x7f.",
    "text of gigabytes": b"X\xff\xff\xff\xff.",
    "text of exabytes": b"\x8d" + b"\xff" * 7 + b"\x7f.",
    "number of gigabytes": b"\x8b\xff\xff\xff\x7f.",
    "not UTF-8": b"X\x01\x00\x00\x00\xff.",
    "protocol of the future": b"\x80\x09}.",
    "stack underflow": b"\x87.",
    "mark underflow": b"t.",
    "name without an end": b"cos",
    "calls a tuple": b"))R.",
    "calls a text": NAME + b")R.",
    "attributes of a tuple": b")}b.",
    "sets items of a list": b"](" + NAME + b"Nu.",
    "odd number of items": b"}(" + NAME + b"u.",
    "appends to a dict": b"}Na.",
    "itself in itself": b"]q\x00h\x00a.",
    "a list": b"].",
    "storage of another kind": b"(" + NAME * 5 + b"tQ.",
    "storage that is no tuple": b"NQ.",
    "tensor of nothing": b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "tensor of texts": b"ctorch._utils\n_rebuild_tensor_v2\n(" + NAME * 6 + b"tR.",
    "parameter of nothing": b"ctorch._utils\n_rebuild_parameter\n)R.",
    "not a tensor": b"}(" + NAME + b"K\x01u.",
    "key that is a number": b"}(K\x01K\x02u.",
    "name twice": b"}(" + NAME + b"N" + NAME + b"Nu.",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_pickle(tmp_path, data):
    refused(write_pickle(tmp_path / "a.bin", data))


BAD_VIEWS = {
    "longer than its storage": View("float32", "0", 24, (5, 5), (5, 1)),
    "offset beyond": View("float32", "0", 24, (4,), (1,), 21),
    "stride beyond": View("float32", "0", 24, (2,), (24,)),
    "storage longer than its bytes": View("float32", "0", 25, (25,), (1,)),
    "wider dtype than its bytes": View("float64", "0", 24, (24,), (1,)),
    "storage that is not there": View("float32", "7", 24, (24,), (1,)),
    "storage outside the archive": View("float32", "../data.pkl", 24, (24,), (1,)),
    "expanded": View("float32", "0", 24, (1000, 24), (0, 1)),
    "huge": View("float32", "0", 24, (2**31, 2**31), (0, 0)),
    "huge strides": View("float32", "0", 24, (2, 2), (2**61, 2**61)),
    "beyond 64 bits": View("float32", "0", 24, (2**70,), (1,)),
    "negative": View("float32", "0", 24, (-1,), (1,)),
    "negative stride": View("float32", "0", 24, (3,), (-1,), 5),
    "shape and strides of different lengths": View("float32", "0", 24, (3, 3), (1,)),
}


@pytest.mark.parametrize("view", BAD_VIEWS.values(), ids=BAD_VIEWS.keys())
def test_view_out_of_bounds(tmp_path, view):
    refused(write_views(tmp_path / "a.bin", {"w": view}))


def test_big_endian(tmp_path):
    message = refused(write_views(tmp_path / "a.bin", {"w": VIEWS["contiguous"][0]}, byte_order=b"big"))
    assert "big-endian" in message


def test_compressed(tmp_path):
    path = write_views(tmp_path / "a.bin", {"w": VIEWS["contiguous"][0]}, compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refused(path)


def test_before_pytorch_1_6(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.")
    assert "torch.save(torch.load(" in refused(tmp_path / "a.bin")


OTHER_FILES = {
    "empty": (b"", "empty"),
    "text": (b"hello", "not a PyTorch file"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    "start of a zip": (b"PK\x03\x04" + bytes(100), "cut short"),
}


@pytest.mark.parametrize("data, expected", OTHER_FILES.values(), ids=OTHER_FILES.keys())
def test_other_file(tmp_path, data, expected):
    (tmp_path / "a.bin").write_bytes(data)
    assert expected in refused(tmp_path / "a.bin")


def test_other_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("hello.txt", "hello")
    assert "data.pkl" in refused(tmp_path / "a.bin")


def test_cut_short_anywhere(goldens, tmp_path):
    data = (goldens / "plus_bin" / "pytorch_model.bin").read_bytes()
    for keep in (0, 1, 30, 5000, len(data) // 2, len(data) - 23, len(data) - 1):
        (tmp_path / "a.bin").write_bytes(data[:keep])
        refused(tmp_path / "a.bin")


def test_cut_short_after_opening(tmp_path):
    path = write_views(tmp_path / "a.bin", {"w": VIEWS["contiguous"][0]})
    tensor = read_torch(path)["w"]
    path.write_bytes(path.read_bytes()[: tensor.offset + 8])
    with pytest.raises(RodimusError, match="ended early"):
        tensor.read()


# Forged directories: `good` is a zip of two members, data.pkl and storage 0, whose directory entries get edited.


@pytest.fixture
def good(tmp_path):
    return write_views(tmp_path / "a.bin", {"w": VIEWS["contiguous"][0]})


def entry(data: bytearray, name: bytes) -> int:
    """Where the directory entry of a member starts."""
    return data.rindex(b"PK\x01\x02", 0, data.rindex(name))


def forge(path, name: bytes, at: int, value: int, size: int = 4) -> None:
    data = bytearray(path.read_bytes())
    start = entry(data, name) + at
    data[start : start + size] = value.to_bytes(size, "little")
    path.write_bytes(data)


FORGED = {
    "overlaps another member": (42, 0),
    "beyond the file": (42, 0x7FFFFFFF),
    "not a member": (42, 7),
    "huge": (24, 0x7FFFFFFF),
    "sizes that differ": (20, 4),
    "an unknown compression": (10, 99),
    "encrypted": (8, 1),
}


@pytest.mark.parametrize("at, value", FORGED.values(), ids=FORGED.keys())
def test_forged_member(good, at, value):
    forge(good, b"a/data/0", at, value, 2 if at < 12 else 4)
    refused(good)


def test_member_longer_than_the_file(good):
    for at in (20, 24):
        forge(good, b"a/data/0", at, 0x7FFFFFFF)
    assert "leaves the file" in refused(good)


def test_forged_directory_size(good):
    data = bytearray(good.read_bytes())
    end = data.rindex(b"PK\x05\x06")
    data[end + 12 : end + 20] = b"\xff\xff\xff\x7f" * 2
    good.write_bytes(data)
    refused(good)


def test_huge_pickle_is_not_read(tmp_path):
    assert "too large" in refused(write_pickle(tmp_path / "a.bin", state_dict_pickle({}) + bytes(5 << 20)))
