"""Collect the small model's text: Python source under permissive licences, deduplicated, split by whole modules.

    python build_data.py OUT [--stdlib FOLDER ...] [--wheels FOLDER]

Reads the standard libraries given (the running Python's by default; of several versions, each module's newest) and the
wheels of sources.txt (fetched by pip, never installed). Writes train.jsonl, valid.jsonl and heldout.jsonl, one module a
line as {"text", "path", "package", "group"}, and sources.json, which lists every package with its licence and size.
The same inputs give the same files. Standard library and numpy only.
"""

from __future__ import annotations

import argparse
import ast
import email
import hashlib
import json
import re
import subprocess
import sys
import sysconfig
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
TARGET = ("any", "manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_27_x86_64", "manylinux_2_28_x86_64")
TARGET_PYTHON = "3.12"  # wheels are chosen for one platform, so that every machine reads the same text

FILE_BYTES = (300, 200_000)
PACKAGE_BYTES = 2_200_000  # of one package, so that none sets the tone; the standard library has no limit
SKIP_FOLDERS = {"test", "tests", "testing", "_test", "_tests", "idle_test", "testdata"}
SKIP_FOLDERS |= {"vendor", "_vendor", "vendored", "_vendored", "extern", "externals", "_external", "ensurepip"}
SKIP_FOLDERS |= {"third_party", "thirdparty", "site-packages", "dist-packages", "__pycache__"}
SKIP_FOLDERS |= {"encodings", "pydoc_data", "locale", "locales"}  # tables
SKIP_NAMES = re.compile(r"(^test_|_test\.py$|^tests\.py$|^conftest\.py$|_pb2(_grpc)?\.py$|^_?version\.py$)")
GENERATED = re.compile(r"(?i)do not (edit|modify)|auto-?\s?generated|generated (by|from|with|using)|@generated")
RECIPROCAL = re.compile(
    r"GNU (Lesser |Affero )?General Public|\b[AL]?GPL|Mozilla Public License|\bMPL\b|Creative Commons"
)
HEAD = 3000  # characters at a file's start in which such notes stand
PERMISSIVE = re.compile(r"MIT|BSD|Apache|Python Software Foundation|\bPSF|\bISC")

SIMILAR = 0.6  # share of lines in common (Jaccard, estimated) from which two modules are one
HASHES, BANDS = 64, 16
LONG_LINE = 30  # characters from which a line says something by itself
CONTAINED = 0.4  # a module is not held out if training has more of its long lines than this
HELDOUT_SHARE, VALID_SHARE = 0.007, 0.004  # of the modules of training packages


@dataclass(frozen=True)
class Module:
    """One source file."""

    path: str  # inside its package
    package: str
    text: str
    group: str  # "module": of a package in training; "package": of one held out whole


def main() -> None:
    """Build everything; prints what each step kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--stdlib", type=Path, nargs="*", help="lib/python3.* folders")
    parser.add_argument("--wheels", type=Path, help="folder of wheels (default: OUT/wheels)")
    args = parser.parse_args()
    stdlib = args.stdlib or [Path(sysconfig.get_path("stdlib"))]
    wheels = args.wheels or args.out / "wheels"
    for folder in (args.out, wheels):
        folder.mkdir(parents=True, exist_ok=True)

    modules = list(standard_library(stdlib))
    versions = " ".join(folder.name.removeprefix("python") for folder in sorted(stdlib, key=_version))
    packages = [{"package": "python", "version": versions, "licence": "PSF-2.0", "share": "train"}]
    for name, version, licence, share in read_sources(HERE / "sources.txt"):
        wheel = fetch(name, version, wheels)
        check_licence(name, wheel)
        packages.append({"package": name, "version": version, "licence": licence, "share": share})
        modules += capped(wheel_modules(name, wheel, "package" if share == "heldout" else "module"))
    print(f"{len(modules)} modules, {megabytes(modules):.1f} MB, after filtering")

    modules = distinct(modules)
    print(f"{len(modules)} modules, {megabytes(modules):.1f} MB, after deduplication")
    train, valid, heldout = split(modules)
    for name, part in (("train", train), ("valid", valid), ("heldout", heldout)):
        write(args.out / f"{name}.jsonl", part)
        print(f"{name}: {len(part)} modules, {megabytes(part):.2f} MB")
    for package in packages:
        own = [m for m in modules if m.package == package["package"]]
        package.update(modules=len(own), megabytes=round(megabytes(own), 3))
    (args.out / "sources.json").write_text(json.dumps(packages, indent=1) + "\n")


def read_sources(file: Path) -> list[tuple[str, str, str, str]]:
    """(name, version, licence, share) of each package in sources.txt."""
    lines = [line.split() for line in file.read_text().splitlines() if line and not line.startswith("#")]
    return [(*requirement.split("=="), licence, share) for requirement, licence, share in lines]


def fetch(name: str, version: str, folder: Path) -> Path:
    """The package's wheel in `folder`, fetched by pip if it is not there."""
    start = f"{name.replace('-', '_')}-{version}-"

    def found() -> list[Path]:
        return [file for file in folder.glob("*.whl") if file.name.lower().startswith(start)]

    if not found():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
        command += [word for platform in TARGET for word in ("--platform", platform)]
        command += ["--implementation", "cp", "--python-version", TARGET_PYTHON, f"{name}=={version}"]
        subprocess.run(command, check=True)
    if len(found()) != 1:
        sys.exit(f"Error: {folder} must hold one wheel {start}*.whl, not {len(found())}")
    return found()[0]


def check_licence(name: str, wheel: Path) -> None:
    """End with a message unless the wheel itself states permissive licences only."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(file for file in archive.namelist() if file.endswith(".dist-info/METADATA"))
        fields = email.message_from_bytes(archive.read(metadata))
    classifiers = [str(c) for c in fields.get_all("Classifier", []) if str(c).startswith("License ::")]
    stated = str(fields.get("License-Expression") or "; ".join(classifiers) or str(fields.get("License") or "")[:300])
    if not PERMISSIVE.search(stated) or RECIPROCAL.search(stated):
        sys.exit(f"Error: {name} states the licence {stated!r}, which is not known as permissive")


def standard_library(folders: list[Path]) -> Iterator[Module]:
    """Modules of every version given, each path once, from the newest version that has it."""
    seen = set()
    for folder in sorted(folders, key=_version, reverse=True):
        if not folder.is_dir():
            sys.exit(f"Error: {folder} is not a folder")
        for file in sorted(folder.rglob("*.py")):
            path = file.relative_to(folder).as_posix()
            if path in seen or not wanted(path):
                continue
            text = readable(file.read_bytes())
            if text is not None:
                seen.add(path)
                yield Module(path, "python", text, "module")


def _version(folder: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", folder.name))


def wheel_modules(name: str, wheel: Path, group: str) -> Iterator[Module]:
    """Modules of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for path in sorted(archive.namelist()):
            if path.endswith(".py") and wanted(path):
                text = readable(archive.read(path))
                if text is not None:
                    yield Module(path, name, text, group)


def wanted(path: str) -> bool:
    """Whether a path looks like a module that someone wrote, and not like a test or another project's copy."""
    *folders, name = path.lower().split("/")
    return not SKIP_FOLDERS & set(folders) and not SKIP_NAMES.search(name)


def readable(raw: bytes) -> str | None:
    """The text of a file that is Python, hand-written, and free of licences other than its package's; else None."""
    if not FILE_BYTES[0] <= len(raw) <= FILE_BYTES[1]:
        return None
    try:
        text = raw.decode("utf-8").replace("\r\n", "\n").removeprefix("\ufeff")
    except UnicodeDecodeError:
        return None
    if GENERATED.search(text[:HEAD]) or RECIPROCAL.search(text[:HEAD]) or "<|" in text or "\r" in text or "\0" in text:
        return None
    return text if looks_written(text) and parses(text) else None


def looks_written(text: str) -> bool:
    """Not minified, no table of numbers or names: lines of usual length, mostly letters, not noise, not pattern."""
    lines = text.splitlines()
    longest, mean = max(map(len, lines)), len(text) / len(lines)
    letters = sum(map(str.isalpha, text)) / len(text)
    digits = sum(map(str.isdigit, text)) / len(text)
    ascii_share = sum(map(str.isascii, text)) / len(text)
    packed = len(zlib.compress(text.encode(), 6)) / len(text.encode())
    short = len(text) < 2000  # a short file compresses badly whatever it says
    return (
        longest <= 400
        and mean <= 80
        and letters >= 0.4
        and digits <= 0.1
        and ascii_share >= 0.97
        and (short or 0.1 <= packed <= 0.55)
    )


def parses(text: str) -> bool:
    """Whether it is Python 3."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


def capped(modules: Iterator[Module]) -> list[Module]:
    """Modules of one package up to PACKAGE_BYTES, chosen by their path's hash, in the order of their paths."""
    total, kept = 0, []
    for module in sorted(modules, key=lambda m: draw(m.path)):
        total += len(module.text.encode())
        if total > PACKAGE_BYTES:
            break
        kept.append(module)
    return sorted(kept, key=lambda m: m.path)


def draw(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def distinct(modules: list[Module]) -> list[Module]:
    """Without copies and near-copies: of similar modules the first is kept (minhash over distinct stripped lines)."""
    rng = np.random.default_rng(0)
    factors = rng.integers(1, 2**63, HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    rows = HASHES // BANDS
    buckets: dict[tuple[int, bytes], list[int]] = {}
    kept: list[Module] = []
    sketches: list[np.ndarray] = []
    for module in modules:
        lines = {line.strip() for line in module.text.splitlines()}
        keys = np.array([line_key(line) for line in lines if len(line) > 3] or [0], np.uint64)
        mixed = keys[:, None] * factors  # wraps: multiplicative hashing, compared by the high bits
        sketch = (mixed ^ (mixed >> np.uint64(29))).min(axis=0)
        bands = [(band, sketch[band * rows : (band + 1) * rows].tobytes()) for band in range(BANDS)]
        near = {other for band in bands for other in buckets.get(band, ())}
        if any(np.mean(sketches[other] == sketch) >= SIMILAR for other in near):
            continue
        for band in bands:
            buckets.setdefault(band, []).append(len(kept))
        kept.append(module)
        sketches.append(sketch)
    return kept


def line_key(line: str) -> int:
    """64 bits of a line's hash."""
    return int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "big")


def split(modules: list[Module]) -> tuple[list[Module], list[Module], list[Module]]:
    """(train, valid, heldout): whole modules by their path's hash, and whole packages, held out.

    A module of a training package that training contains in good part goes to training after all; one of a held-out
    package goes nowhere.
    """
    train, candidates = [], []
    for module in modules:
        chosen = module.group == "package" or draw(f"{module.package}/{module.path}") < HELDOUT_SHARE + VALID_SHARE
        (candidates if chosen else train).append(module)
    known = {line_key(line) for module in train for line in long_lines(module.text)}
    valid, heldout = [], []
    for module in candidates:
        lines = long_lines(module.text)
        contained = sum(line_key(line) in known for line in lines) / max(len(lines), 1)
        if contained > CONTAINED:
            train += [module] if module.group == "module" else []
        elif module.group == "module" and draw(f"{module.package}/{module.path}") < VALID_SHARE:
            valid.append(module)
        else:
            heldout.append(module)
    return train, valid, heldout


def long_lines(text: str) -> set[str]:
    """Distinct stripped lines of some length."""
    return {line for line in map(str.strip, text.splitlines()) if len(line) >= LONG_LINE}


def megabytes(modules: list[Module]) -> float:
    """Size of the texts in UTF-8."""
    return sum(len(module.text.encode()) for module in modules) / 1e6


def write(file: Path, modules: list[Module]) -> None:
    """One JSON object a line; training modules in an order that mixes the packages."""
    with file.open("w", encoding="utf-8") as out:
        for module in sorted(modules, key=lambda m: draw(f"{m.package}/{m.path}")):
            record = {"text": module.text, "path": module.path, "package": module.package, "group": module.group}
            out.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
