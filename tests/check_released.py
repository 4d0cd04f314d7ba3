"""Every released checkpoint as a synthetic file of its architecture, dtype and container, converted to 4 bit.

    python tests/check_released.py FOLDER [--only coder-1.6b-chat ...]

Checks names, shapes and counts, and that every tensor and the logits equal those of a model loaded whole and quantized
in memory. FOLDER needs 25 GB of disk, the 4B 15 GB of memory.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import time
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from quantized import quantized_in_memory
from rodimus_mlx.convert.convert import convert
from rodimus_mlx.convert.mapping import count_parameters, expected_shapes
from rodimus_mlx.convert.schemes import choose, make_scheme
from synthetic import ARCHITECTURES, random_tensors, write_checkpoint

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.loading import load_model

# name: architecture, container, dtype, whether the file repeats the tied head
RELEASED = {
    "coder-1.6b-base": ("1.6b", "bin", "float32", True),
    "coder-1.6b-chat": ("1.6b", "safetensors", "bfloat16", True),
    "coder-4b-base": ("4b", "bin", "float32", False),
    "coder-4b-chat": ("4b", "safetensors", "bfloat16", False),
    "coder-1b6-20241001": ("1.6b", "safetensors", "bfloat16", False),
    "plus-1b6-20241001": ("1.6b", "safetensors", "float16", False),
    "rodimus-1b4-20241001": ("1.4b", "safetensors", "float16", False),
}
TOKENS = mx.array([[11, 5000, 126079, 3, 77, 77, 90001, 42]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", choices=RELEASED, default=list(RELEASED))
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)  # where logits are the same to the last bit from run to run
    for name in args.only:
        check(name, args.folder / name, args.folder / f"{name}-4bit")
        gc.collect()
        mx.clear_cache()


def check(name: str, source: Path, out: Path) -> None:
    arch, container, dtype, repeats_head = RELEASED[name]
    config = ARCHITECTURES[arch]
    write_checkpoint(source, config, random_tensors(config, dtype, repeats_head), container, dtype)
    start = time.perf_counter()
    summary = convert(source, out, scheme=make_scheme(4))
    seconds = time.perf_counter() - start
    wanted = RodimusConfig.from_dict(config)
    assert summary.parameters == count_parameters(wanted)
    model, _ = load_model(source, dtype=mx.bfloat16 if dtype == "float32" else None)
    weights = dict(tree_flatten(model.parameters()))
    del model
    assert {n: tuple(array.shape) for n, array in weights.items()} == expected_shapes(wanted)
    expected = quantized_in_memory(wanted, weights, choose(wanted, make_scheme(4), "default"))
    found, _ = load_model(out)
    ours, theirs = (dict(tree_flatten(each.parameters())) for each in (found, expected))
    assert ours.keys() == theirs.keys()
    for each, array in ours.items():
        assert array.dtype == theirs[each].dtype and mx.array_equal(array, theirs[each]), each
    assert mx.array_equal(found(TOKENS), expected(TOKENS))
    print(
        f"{name}: {summary.parameters:,} parameters, {len(ours)} tensors and the logits equal, "
        f"{summary.bits_per_weight:.3f} bits per weight, {seconds:.0f} s",
        flush=True,
    )
    shutil.rmtree(source)
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
