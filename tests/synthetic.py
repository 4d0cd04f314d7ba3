"""Make checkpoints of a released model's exact architecture and container, with random weights.

    python tests/synthetic.py OUT --arch 1.6b --format bin --dtype float32

The numbers come from one small random pool, so gigabytes take seconds; they are small enough for a finite forward
pass and mean nothing. Shapes are written out here by hand, not taken from the package under test.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

POOL = 1 << 22  # numbers
SCALE = 0.02

_SHARED: dict[str, Any] = {
    "model_type": "rodimus",
    "architectures": ["RodimusForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_rodimus.RodimusConfig"},
    "norm_epsilon": 1e-5,
    "residual_in_fp32": True,
    "use_scale_embedding": False,
    "use_norm_embedding": False,
}
_RELEASED: dict[str, Any] = {
    **_SHARED,
    "vocab_size": 126464,
    "bos_token_id": 126080,
    "eos_token_id": 126081,
    "max_position_embeddings": 4096,
}


def _mixer(mem_size: int = 64, **more: Any) -> dict[str, Any]:
    return {"expand_ratio": 2.0, "input_gate_low_rank": "auto", "mem_size": mem_size, "mode": "fused_chunk", **more}


def _attention(heads: int, window: int) -> dict[str, Any]:
    return {
        "ffn_expand_ratio": 4 / 3,
        "num_heads": heads,
        "num_heads_k": 1,
        "num_heads_v": heads,
        "rotary_emb_dim": -1,
        "rotary_emb_scale_base": None,
        "window_size": window,
    }


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "1.6b": {
        **_RELEASED,
        "block_type": "rodimus_plus",
        "d_model": 2048,
        "n_layer": 24,
        "mixer_cfg": _mixer(normalize_epsilon=1e-5),
        "attn_cfg": _attention(16, 4096),
        "tie_word_embeddings": True,
    },
    "4b": {
        **_RELEASED,
        "block_type": "rodimus_plus",
        "d_model": 3072,
        "n_layer": 32,
        "mixer_cfg": _mixer(normalize_epsilon=1e-5),
        "attn_cfg": _attention(24, 4096),
        "tie_word_embeddings": False,
    },
    "1.4b": {
        **_RELEASED,
        "block_type": "rodimus",
        "d_model": 2048,
        "n_layer": 48,
        "mixer_cfg": _mixer(),
        "attn_cfg": {},
        "tie_word_embeddings": True,
    },
    "tiny": {
        **_SHARED,
        "vocab_size": 300,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "max_position_embeddings": 64,
        "block_type": "rodimus_plus",
        "d_model": 64,
        "n_layer": 2,
        "mixer_cfg": _mixer(16, normalize_epsilon=1e-5),
        "attn_cfg": _attention(4, 16),
        "tie_word_embeddings": True,
    },
    "miniature": {  # a few kilobytes, mostly names and headers
        **_SHARED,
        "vocab_size": 11,
        "block_type": "rodimus_plus",
        "d_model": 8,
        "n_layer": 1,
        "mixer_cfg": _mixer(4, normalize_epsilon=1e-5),
        "attn_cfg": _attention(2, 16),
        "tie_word_embeddings": True,
    },
}
REPEATS_HEAD = {"1.6b", "tiny"}  # released files that hold lm_head.weight beside the embedding it is tied to

# dtype -> (torch's storage class, safetensors' code, numpy's type of the bytes)
_DTYPES = {
    "float64": ("DoubleStorage", "F64", "<f8"),
    "float32": ("FloatStorage", "F32", "<f4"),
    "float16": ("HalfStorage", "F16", "<f2"),
    "bfloat16": ("BFloat16Storage", "BF16", "<u2"),
    "int64": ("LongStorage", "I64", "<i8"),
}


class Tensor(NamedTuple):
    """A row-major tensor whose bytes come in pieces."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[bytes]]

    @property
    def count(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.count * np.dtype(_DTYPES[self.dtype][2]).itemsize


class View(NamedTuple):
    """A tensor of a PyTorch file: a strided view of a storage."""

    dtype: str
    key: str  # of the storage
    count: int  # numbers in the storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0


def official_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an official state dict, in the order of the released files; no redundant head."""
    d, vocab, n = config["d_model"], config["vocab_size"], config["mixer_cfg"]["mem_size"]
    inner, rank = 2 * d, max(d // 64, 16)
    layer: dict[str, tuple[int, ...]] = {
        "mixer_norm.weight": (d,),
        "mixer.act_norm.weight": (inner,),
        "mixer.fc.weight": (2 * inner, d),
        "mixer.out_proj.weight": (d, inner),
        "mixer.inner_mixer.residual_weight": (inner,),
        "mixer.inner_mixer.short_conv.conv1d.weight": (inner, 1, 4),
        "mixer.inner_mixer.short_conv.conv1d.bias": (inner,),
        "mixer.inner_mixer.in_proj.weight": (2 * n, inner),
        "mixer.inner_mixer.ch_gate_proj.0.weight": (rank, inner),
        "mixer.inner_mixer.ch_gate_proj.1.weight": (inner, rank),
        "mixer.inner_mixer.ch_gate_proj.1.bias": (inner,),
        "mixer.inner_mixer.mem_gate_proj.weight": (2 * n, inner),
        "mixer.inner_mixer.mem_gate_proj.bias": (2 * n,),
    }
    if config["block_type"] == "rodimus_plus":
        head = d // config["attn_cfg"]["num_heads"]
        ffn = (int(d * config["attn_cfg"]["ffn_expand_ratio"]) + 7) // 8 * 8
        layer |= {
            "attn_norm.weight": (d,),
            "attn.q_proj.weight": (d, d),
            "attn.k_proj.weight": (head, d),
            "attn.v_proj.weight": (d, d),
            "attn.out_proj.weight": (d, d),
            "ffn_norm.weight": (d,),
            "ffn.fc.weight": (2 * ffn, d),
            "ffn.out_proj.weight": (d, ffn),
        }
    layers = {f"model.layers.{i}.{name}": shape for i in range(config["n_layer"]) for name, shape in layer.items()}
    head_shape = {} if config["tie_word_embeddings"] else {"lm_head.weight": (vocab, d)}
    return {"model.embeddings.weight": (vocab, d), **layers, "model.norm_f.weight": (d,), **head_shape}


def random_tensors(config: dict[str, Any], dtype: str, repeat_head: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """A state dict for a config: weights of about 0.02, norms and residual weights of about 1."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(POOL, dtype=np.float32) * np.float32(SCALE)
    pools = [_encode(noise, dtype), _encode(noise + 1, dtype)]

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        pool = pools[name.endswith(("norm.weight", "norm_f.weight", "residual_weight"))]
        start = int(rng.integers(POOL))
        count = int(np.prod(shape, dtype=np.int64))
        return Tensor(dtype, shape, lambda: _tiled(pool, start, count))

    tensors = {name: tensor(name, shape) for name, shape in official_shapes(config).items()}
    if repeat_head:
        tensors["lm_head.weight"] = tensors["model.embeddings.weight"]
    return tensors


def from_arrays(arrays: dict[str, np.ndarray], dtype: str | None = None) -> dict[str, Tensor]:
    """Tensors that hold given arrays; ``dtype`` "bfloat16" says that they hold bfloat16 as uint16."""
    result = {}
    for name, array in arrays.items():
        data = np.ascontiguousarray(array).tobytes()
        result[name] = Tensor(dtype or array.dtype.name, array.shape, lambda data=data: [data])  # type: ignore[misc]
    return result


def write_checkpoint(
    out: Path, config: dict[str, Any], tensors: dict[str, Tensor], format: str = "safetensors", dtype: str = "float32"
) -> None:
    """A folder with config.json and one weight file."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}, indent=2))
    if format == "bin":
        write_bin(out / "pytorch_model.bin", tensors)
    else:
        write_safetensors(out / "model.safetensors", tensors)


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end + tensor.nbytes]
        header[name] = {"dtype": _DTYPES[tensor.dtype][1], "shape": list(tensor.shape), "data_offsets": offsets}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.writelines(tensor.pieces())


def write_bin(path: Path, tensors: dict[str, Tensor]) -> None:
    """One PyTorch file, each tensor in a storage of its own."""
    views = {
        name: View(tensor.dtype, str(i), tensor.count, tensor.shape, _row_major(tensor.shape))
        for i, (name, tensor) in enumerate(tensors.items())
    }
    write_torch_zip(path, state_dict_pickle(views), {str(i): tensor for i, tensor in enumerate(tensors.values())})


def write_torch_zip(
    path: Path, pickle: bytes, storages: dict[str, Tensor], byte_order: bytes = b"little", compression: int = 0
) -> None:
    """The zip that torch.save writes: uncompressed, members aligned to 64 bytes, zip64 where needed."""
    members: list[tuple[str, int, Callable[[], Iterable[bytes]]]] = [
        ("data.pkl", len(pickle), lambda: [pickle]),
        (".format_version", 1, lambda: [b"1"]),
        (".storage_alignment", 2, lambda: [b"64"]),
        ("byteorder", len(byte_order), lambda: [byte_order]),
        *((f"data/{key}", tensor.nbytes, tensor.pieces) for key, tensor in storages.items()),
        ("version", 2, lambda: [b"3\n"]),
    ]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, size, pieces in members:
            info = zipfile.ZipInfo(f"{path.stem}/{name}")
            info.compress_type = compression
            info.file_size = size
            start = archive.fp.tell() + 30 + len(info.filename) + 4  # type: ignore[union-attr]
            padding = -start % 64
            info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            with archive.open(info, "w") as member:
                for piece in pieces():
                    member.write(piece)


def state_dict_pickle(views: dict[str, View]) -> bytes:
    """The pickle of a dict of tensors, in the instructions (protocol 2) that torch.save uses."""
    body = b"".join(_text(name) + tensor_pickle(view) for name, view in views.items())
    return b"\x80\x02}(" + body + b"u."


def tensor_pickle(view: View) -> bytes:
    """torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, False, OrderedDict())"""
    storage = _global("torch", _DTYPES[view.dtype][0])
    identity = b"(" + _text("storage") + storage + _text(view.key) + _text("cpu") + _int(view.count) + b"tQ"
    hooks = _global("collections", "OrderedDict") + b")R"
    arguments = identity + _int(view.offset) + _tuple(view.shape) + _tuple(view.strides) + b"\x89" + hooks
    return _global("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _int(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _tuple(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape)))


def _encode(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype("<u2")
    return values.astype(_DTYPES[dtype][2])


def _tiled(pool: np.ndarray, start: int, count: int) -> Iterator[bytes]:
    while count:
        piece = pool[start : start + count]
        yield piece.view(np.uint8).data
        start, count = 0, count - len(piece)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a synthetic checkpoint of a released architecture.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="tiny")
    parser.add_argument("--format", choices=["bin", "safetensors"], default="safetensors")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = ARCHITECTURES[args.arch]
    tensors = random_tensors(config, args.dtype, args.arch in REPEATS_HEAD, args.seed)
    write_checkpoint(args.out, config, tensors, args.format, args.dtype)


if __name__ == "__main__":
    main()
