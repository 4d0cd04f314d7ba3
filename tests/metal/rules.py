"""Rules for a kernel's text that a CPU compiler cannot see: of Metal, of CUDA, and of how MLX reads it."""

from __future__ import annotations

import re
from pathlib import Path

from rodimus_mlx.kernels.launch import Kernel

ATTRIBUTES = re.compile(
    r"\w*(?:thread|threads|threadgroup|threadgroups|simdgroup|simdgroups|quadgroup|quadgroups)"
    r"_(?:position|index|per|execution)_\w+|\bgrid_(?:size|origin)\b"
)
TYPES = r"(?:float|half|float16_t|bfloat16_t|int|uint|ushort|bool|u?int\d+_t|size_t|auto|[A-Z])"
UNPLACED = re.compile(rf"(?:^|[(,;{{]\s*)(?:const\s+)?{TYPES}\s*(?:const\s*)?[*&]\s*\w+\s*[,)=;]", re.MULTILINE)

RULES = [
    # pattern, what is wrong
    (
        re.compile(r"\b(?:float|half|bfloat|int|uint)[234]\b"),
        "vector types differ on CUDA: load4 and store4, or scalars",
    ),
    (re.compile(r"\[[&=]?\w*\]\s*\("), "no lambdas: Metal has none"),
    (re.compile(r"\bdouble\b|\blong\b|\bstd::"), "no double, long or std:: on Metal"),
    (re.compile(r"\b(?:bfloat|__\w+)\b"), "bfloat16_t, and no name of one backend alone"),
    (
        re.compile(r"\bmetal::|\bmem_flags\b|\bthreadIdx\b|\bblockIdx\b"),
        "a name of one backend: the prologues have another",
    ),
    (re.compile(r"\w_(?:strides|ndim)\b"), "MLX adds arguments for x_strides and x_ndim; x_shape alone is used here"),
    (ATTRIBUTES, "thread attributes belong to launch.py: tid, lane, simd_id, group, threads, group_count"),
    (
        re.compile(r"\b(?:device|constant|threadgroup|thread)\b"),
        "address spaces are DEVICE, CONSTANT, THREADGROUP, THREAD",
    ),
    (re.compile(r"\bTHREADGROUP\s+\w+\s+\w+\s*\["), "threadgroup arrays by TG_ARRAY"),
    (re.compile(r'["\']'), "no strings or characters"),
]


def faults(path: Path, *, is_body: bool) -> list[str]:
    """Every rule that a body or a helpers file breaks, as `line: what is wrong: the line`."""
    raw = path.read_bytes()
    if any(byte > 126 for byte in raw):
        return [f"{path.name}: not ASCII"]
    text = without_comments(raw.decode())
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, message in RULES:
            if pattern.search(line):
                found.append(f"{path.name}:{number}: {message}: {line.strip()}")
        if not is_body and UNPLACED.search(line):
            found.append(f"{path.name}:{number}: a pointer or reference without an address space: {line.strip()}")
    return found + misplaced(path, text, is_body)


def misplaced(path: Path, text: str, is_body: bool) -> list[str]:
    """Threadgroup arrays inside braces, which Metal refuses, and constants without an address space."""
    found, depth = [], 0
    for number, line in enumerate(text.splitlines(), 1):
        if "TG_ARRAY" in line and (depth > 0 or not is_body):
            found.append(f"{path.name}:{number}: threadgroup arrays stand at the body's top: {line.strip()}")
        if not is_body and depth == 0 and re.match(r"(?:static\s+|const\s+|constexpr\s+)+\w+\s+\w+\s*[=\[]", line):
            found.append(f"{path.name}:{number}: a constant here is CONSTANT constexpr: {line.strip()}")
        depth += line.count("{") - line.count("}")
    return found


def without_comments(text: str) -> str:
    """The text with comments blanked, lines kept."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", lambda match: "\n" * match.group().count("\n"), text, flags=re.DOTALL)


def kernel_faults(kernel: Kernel) -> list[str]:
    found = faults(kernel.body, is_body=True)
    for helper in kernel.helpers:
        found += faults(helper, is_body=False)
    return found
