"""Convert a synthetic checkpoint of a released architecture to 4 bit: rate, peak memory, and what a kill leaves.

    python tests/measure_convert.py FOLDER --arch 4b --format bin --dtype float32 --kills 10

The source's file is also copied, in the same run, for the rate to be set against. FOLDER needs room for the file
twice; the source stays there for the next run unless --remove is given.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from synthetic import ARCHITECTURES, REPEATS_HEAD, random_tensors, write_checkpoint

COMMAND = [sys.executable, "-c", "import sys; from rodimus_mlx.cli.app import main; sys.exit(main())", "convert"]
GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", choices=["1.6b", "4b", "1.4b", "tiny"], default="4b")
    parser.add_argument("--format", choices=["bin", "safetensors"], default="bin")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--remove", action="store_true", help="remove the source at the end")
    args = parser.parse_args()
    source, out = args.folder / f"{args.arch}-{args.format}-{args.dtype}", args.folder / "out"
    if not source.exists():
        config = ARCHITECTURES[args.arch]
        tensors = random_tensors(config, args.dtype, args.arch in REPEATS_HEAD)
        write_checkpoint(source, config, tensors, args.format, args.dtype)
    file = max(source.iterdir(), key=lambda path: path.stat().st_size)
    size = file.stat().st_size
    print(f"{args.arch}, {args.dtype}, {file.name}: {size:,} bytes; {os.cpu_count()} cores")

    copying = copy(file, args.folder / "copy")
    print(f"copying the file: {copying:.1f} s, {size / copying / 1e6:.0f} MB/s")
    converting, peak = convert(source, out, file)
    summary = check(out, args.arch)
    print(f"converting it to 4 bit: {converting:.1f} s, {size / converting / 1e6:.0f} MB/s read; {summary}")
    print(f"rate against copying: {copying / converting:.0%}; peak memory of the process: {peak / GIB:.2f} GiB")
    shutil.rmtree(out)

    rng = random.Random(args.seed)
    fastest = converting  # the source is in memory by now
    for number in range(1, args.kills + 1):
        moment = rng.uniform(0.02, 1.0) * fastest
        state, ran = kill(source, out, moment, args.arch)
        fastest = min(fastest, ran) if state == "complete" else fastest
        print(f"kill {number} after {ran:.1f} s: OUT is {state}", flush=True)
    if args.kills:
        convert(source, out, file)
        left = sorted(path.name for path in args.folder.iterdir() if path != source)
        print(f"then run to the end: {check(out, args.arch)}; beside the source there is {', '.join(left)}")
        shutil.rmtree(out)
    if args.remove:
        shutil.rmtree(source)


def copy(file: Path, to: Path) -> float:
    """Seconds to copy a file and have it on the disk."""
    forget(file)
    start = time.perf_counter()
    shutil.copyfile(file, to)
    with open(to, "rb") as copied:
        os.fsync(copied.fileno())
    seconds = time.perf_counter() - start
    to.unlink()
    return seconds


def convert(source: Path, out: Path, file: Path) -> tuple[float, int]:
    """Seconds that the command takes, and its process's largest resident set in bytes."""
    forget(file)
    start = time.perf_counter()
    process = subprocess.Popen([*COMMAND, str(source), str(out), "--bits", "4"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    assert status == 0, "the conversion failed"
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def kill(source: Path, out: Path, moment: float, arch: str) -> tuple[str, float]:
    """Start the command and kill it; what became of OUT, and after how many seconds it was over."""
    start = time.perf_counter()
    process = subprocess.Popen([*COMMAND, str(source), str(out), "--bits", "4"], stdout=subprocess.DEVNULL)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    seconds = time.perf_counter() - start
    if not out.exists():
        return "absent", seconds
    check(out, arch)
    shutil.rmtree(out)
    return "complete", seconds


def check(out: Path, arch: str) -> str:
    """Open OUT, every tensor of it checked against the config; fails unless it is complete."""
    from rodimus_mlx.convert.checkpoint import open_checkpoint
    from rodimus_mlx.convert.mapping import count_parameters
    from rodimus_mlx.convert.weights import plan_weights

    from rodimus_mlx.config import RodimusConfig

    checkpoint = open_checkpoint(out)
    plan = plan_weights(checkpoint, RodimusConfig.from_dict(checkpoint.config))
    parameters = count_parameters(plan.config)
    assert parameters == count_parameters(RodimusConfig.from_dict(ARCHITECTURES[arch]))
    assert json.loads((out / "config.json").read_text())["quantization"]["bits"] == 4 and (out / "README.md").exists()
    size = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    return f"{parameters:,} parameters in {size:,} bytes, {8 * size / parameters:.3f} bits per weight"


def forget(file: Path) -> None:
    """Have the system drop a file from its memory, where it can be asked to."""
    if hasattr(os, "posix_fadvise"):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
