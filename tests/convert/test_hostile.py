"""Two hundred damaged and hostile checkpoints through the whole command: an error in one line, or a sound model.

Each case is made from its kind and number alone. Whatever comes: no traceback, nothing beside OUT, nothing run, no
hang, and no more memory than a small checkpoint takes.
"""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import zipfile

import mlx.core as mx
import pytest
from helpers import TINY_FOLDER
from rodimus_mlx.cli.app import main
from rodimus_mlx.convert.convert import convert
from rodimus_mlx.convert.schemes import Scheme
from synthetic import ARCHITECTURES, View, random_tensors, state_dict_pickle, write_checkpoint

from rodimus_mlx.loading import load_model

CASES = 18  # of each kind
SECONDS = 60  # far beyond what a case takes; the alarm ends a hang
MEMORY = 500 << 20  # bytes that all cases of a kind may add to the process
CONFIG = {**ARCHITECTURES["miniature"], "d_model": 32, "vocab_size": 262}
BIN, SAFETENSORS = "pytorch_model.bin", "model.safetensors"

pytestmark = pytest.mark.filterwarnings("ignore")


def write_source(folder, container):
    """A sound checkpoint with a tokenizer: official in either container, or one of ours with quantized weights."""
    if container == "quantized":
        write_source(folder.with_name("full"), "safetensors")
        convert(folder.with_name("full"), folder, scheme=Scheme(4, 32))
        shutil.rmtree(folder.with_name("full"))
        return
    write_checkpoint(folder, CONFIG, random_tensors(CONFIG, "float32"), container)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TINY_FOLDER / name, folder)


# Mutations: each changes a folder in place, by a random generator of its own.


def flip_bits(folder, rng):
    file = weights_of(folder)
    data = bytearray(file.read_bytes())
    ends = rng.random() < 0.8  # where names, shapes and offsets are
    for _ in range(rng.randint(1, 8)):
        place = rng.choice([rng.randrange(3000), -rng.randrange(1, 3000)]) if ends else rng.randrange(len(data))
        data[place] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def truncate(folder, rng):
    file = rng.choice([path for path in folder.iterdir() if path.is_file()])
    size = file.stat().st_size
    with open(file, "r+b") as opened:
        opened.truncate(rng.choice([0, 1, 7, 8, size // 2, size - 1, rng.randrange(size)]))


def swap_names(folder, rng):
    def change(header):
        a, b = rng.sample([name for name in header if name != "__metadata__"], 2)
        header[a], header[b] = header[b], header[a]

    edit_header(folder, change)


def rename(folder, rng):
    def change(header):
        name = rng.choice([name for name in header if name != "__metadata__"])
        new = ["model.layers.99.x.weight", "../../evil", "", "a" * 100_000, "\u0000", name.upper(), "lm_head.weight"]
        header[rng.choice(new)] = header.pop(name)

    edit_header(folder, change)


def wrong_dtypes(folder, rng):
    def change(header):
        entry = header[rng.choice([name for name in header if name != "__metadata__"])]
        entry["dtype"] = rng.choice(["F16", "BF16", "I32", "U8", "BOOL", "F64", "F8_E4M3", "X", None, 7, ["F32"]])

    edit_header(folder, change)


def huge_shapes(folder, rng):
    sizes = [2**31, 2**40, 2**62, 2**63, 10**30, -1, 0, 1.5, "8", None, True]

    def change(header):
        entry = header[rng.choice([name for name in header if name != "__metadata__"])]
        key = rng.choice(["shape", "data_offsets"])
        values = entry[key]
        values[rng.randrange(len(values))] = rng.choice(sizes)
        if rng.random() < 0.3:
            entry[key] = values * rng.choice([0, 2, 5000])

    edit_header(folder, change)


def hostile_header(folder, rng):
    file = weights_of(folder)
    length = rng.choice([0, 2**63, 2**64 - 1, 16 << 20, file.stat().st_size])
    text = rng.choice([b"[" * 100_000, b'{"a":' * 100_000, b"{}", b"null", b"{" + b'"a":1,' * 50_000, b"\xff\xfe"])
    start = struct.pack("<Q", rng.choice([length, len(text)])) + text
    file.write_bytes(start + file.read_bytes()[len(start) :])


def index_tricks(folder, rng):
    (folder.parent / "outside.safetensors").write_bytes((folder / SAFETENSORS).read_bytes())
    names = ["../outside.safetensors", str(folder.parent / "outside.safetensors"), "a/../../outside.safetensors"]
    names += ["C:\\outside.safetensors", "..\\outside.safetensors", "model.safetensors\0", "", ".", "config.json"]
    names += [
        "absent.safetensors",
        7,
        None,
        ["model.safetensors"],
        {"a": 1},
        "x" * 5000 + ".safetensors",
        "\ud800.safetensors",
    ]
    weight_map = {"model.embeddings.weight": SAFETENSORS, "model.norm_f.weight": rng.choice(names)}
    whole = [{"weight_map": weight_map}, {"weight_map": rng.choice([None, [], "x", {}])}, [], {}, 5]
    index = whole[0] if rng.random() < 0.7 else rng.choice(whole)
    (folder / f"{SAFETENSORS}.index.json").write_text(json.dumps(index))


def hostile_config(folder, rng):
    values = [None, True, 0, -1, 2.5, 1e308, 2**70, 10**400, "", "x", [], {}, [1], {"a": {"b": []}}, float("nan")]
    config = json.loads((folder / "config.json").read_text())
    tables = [config, *(value for value in config.values() if isinstance(value, dict))]
    table = rng.choice(tables)
    if rng.random() < 0.8:
        table[rng.choice(sorted(table))] = rng.choice(values)
    else:
        table[rng.choice(["new", "__class__", "quantization", "auto_map", "model_file"])] = rng.choice(values)
    text = json.dumps(config)
    (folder / "config.json").write_text(text if rng.random() < 0.9 else rng.choice(["[" * 10**5, text[:-1], "\0", "5"]))


def hostile_quantization(folder, rng):
    config = json.loads((folder / "config.json").read_text())
    values = [None, True, False, 0, -4, 2, 3, 8, 64, 10**9, 2**70, "4", [], {}, {"bits": 8, "group_size": 32}, "mxfp4"]
    table = config["quantization"]
    keys = [*table, "model.embeddings", "model.layers.0.mixer.fc", "model.layers.0.mixer.qkgt_proj", "absent"]
    for _ in range(rng.randint(1, 2)):
        table[rng.choice(keys)] = rng.choice(values)
    if rng.random() < 0.2:
        config["quantization"] = rng.choice(values)
    (folder / "config.json").write_text(json.dumps(config))


def hostile_tokenizer(folder, rng):
    file = folder / rng.choice(["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
    if rng.random() < 0.5:
        data = bytearray(file.read_bytes())
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(data)
        return
    content = json.loads(file.read_text())
    content[rng.choice(sorted(content))] = rng.choice([None, 5, [], {}, "x", -1, True, ["a"], 2**70])
    file.write_text(json.dumps(content))


class Runs:
    """Unpickling it makes the file `ran` beside the source."""

    def __init__(self, path, call):
        self.path, self.call = path, call

    def __reduce__(self):
        if self.call == "exec":
            return exec, (f"open({str(self.path)!r}, 'w')",)
        return (os.mkdir if self.call == "mkdir" else os.system), (
            str(self.path) if self.call == "mkdir" else f"touch {self.path}",
        )


def hostile_pickle(folder, rng):
    file = folder / BIN
    ran = folder.parent / "ran"
    with zipfile.ZipFile(file) as archive:
        good = archive.read("pytorch_model/data.pkl")
    place = rng.randrange(2, len(good))
    made = [
        pickle.dumps({"w": Runs(ran, rng.choice(["exec", "mkdir", "system"]))}, rng.randrange(2, 6)),
        good[:-1] + pickle.dumps(Runs(ran, "system"), 2)[2:-1] + b"0.",
        b"\x80\x02" + b"(" * rng.choice([10, 10**6]) + b".",
        b"\x80\x02" + b"]q\x00" + b"h\x00a" * 10**5 + b".",
        good[:place] + bytes(rng.randrange(256) for _ in range(rng.randint(1, 9))) + good[place:],
        good.replace(b"FloatStorage", rng.choice([b"LongStorage ", b"BoolStorage ", b"XXXXXStorage", b"load        "])),
        good.replace(b"ctorch\n", b"cposix\n", 1),
        b"",
        good[: rng.randrange(len(good))],
        b"\x80\x02}(X\x01\x00\x00\x00w\x8b\xff\xff\xff\x7f" + b"\x01" * 100 + b"u.",
    ]
    rewrite_zip(file, {"pytorch_model/data.pkl": rng.choice(made)})


def hostile_zip(folder, rng):
    file = folder / BIN
    choice = rng.randrange(7)
    if choice == 0:
        rewrite_zip(file, {}, compression=zipfile.ZIP_DEFLATED)
    elif choice == 1:
        rewrite_zip(file, {f"../../{'x' * rng.randrange(9)}evil": b"x", "/etc/evil": b"x", "a/../../b": b"x"})
    elif choice == 2:
        rewrite_zip(file, {"other/data.pkl": b"\x80\x02}."})
    elif choice == 3:
        rewrite_zip(file, {"pytorch_model/byteorder": rng.choice([b"big", b"", b"x" * 10**6])})
    elif choice == 4:
        storage = {"0": View("float32", "0", 2**62, (2**31, 2**31), (2**31, 1))}
        whole = {
            "w": storage["0"],
            "v": View("float32", "0", 4, (2**30,), (0,)),
            "u": View("float32", "0", 4, (4,), (-1,)),
        }
        rewrite_zip(file, {"pytorch_model/data.pkl": state_dict_pickle({rng.choice("wvu"): whole[rng.choice("wvu")]})})
    else:  # the directory at the end: sizes, offsets and counts
        data = bytearray(file.read_bytes())
        for _ in range(rng.randint(1, 4)):
            start = len(data) - rng.randrange(22, 2500)
            data[start : start + 4] = rng.choice([b"\xff" * 4, bytes(4), struct.pack("<I", rng.randrange(2**32))])
        file.write_bytes(data)


KINDS = {
    "bits of a .bin": (flip_bits, "bin"),
    "bits of a .safetensors": (flip_bits, "safetensors"),
    "bits of quantized weights": (flip_bits, "quantized"),
    "truncated files": (truncate, "bin"),
    "swapped names": (swap_names, "safetensors"),
    "new names": (rename, "safetensors"),
    "wrong dtypes": (wrong_dtypes, "safetensors"),
    "wrong dtypes of quantized weights": (wrong_dtypes, "quantized"),
    "huge shapes": (huge_shapes, "safetensors"),
    "headers": (hostile_header, "safetensors"),
    "indexes": (index_tricks, "safetensors"),
    "configs": (hostile_config, "bin"),
    "quantization tables": (hostile_quantization, "quantized"),
    "tokenizers": (hostile_tokenizer, "safetensors"),
    "pickles": (hostile_pickle, "bin"),
    "zips": (hostile_zip, "bin"),
}
assert len(KINDS) * CASES >= 200


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The sound checkpoints, made once; by container."""
    root = tmp_path_factory.mktemp("sound")
    for container in ("bin", "safetensors", "quantized"):
        write_source(root / container, container)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_hostile(kind, sound, tmp_path, capsys):
    mutate, container = KINDS[kind]
    before = peak_memory()
    for number in range(CASES):
        place = tmp_path / str(number)
        shutil.copytree(sound / container, place / "source")
        mutate(place / "source", random.Random(f"{kind} {number}"))
        ours = {path: stamp(path) for path in place.rglob("*")}
        options = ["--bits", "4", "--group-size", "32"] if container != "quantized" else ["--dequantize"]
        with alarm():
            status = main(["convert", str(place / "source"), str(place / "out"), *options])
        check(status, place, capsys.readouterr(), f"{kind} {number}")
        left = {path: stamp(path) for path in place.rglob("*") if not path.is_relative_to(place / "out")}
        assert left == ours, f"{kind} {number}: something was changed or left behind"
        shutil.rmtree(place)
    assert peak_memory() - before < MEMORY


def test_the_sound_ones_convert(sound, tmp_path):
    """Else the others would fail for another reason than the damage."""
    for container in ("bin", "safetensors", "quantized"):
        options = ["--bits", "4", "--group-size", "32"] if container != "quantized" else ["--dequantize"]
        assert main(["convert", str(sound / container), str(tmp_path / container), *options]) == 0


def check(status, place, printed, case):
    errors = [line for line in printed.err.splitlines() if not line.startswith("Warning: ")]
    if status == 0:
        assert not errors, case
        model, _ = load_model(place / "out")
        mx.eval(model.parameters())
        assert model(mx.array([[1, 2, 3]])).shape == (1, 3, model.args.vocab_size), case
    else:
        assert status == 1, case
        assert len(errors) == 1 and errors[0].startswith("Error: ") and len(errors[0]) < 1500, (case, errors)
        assert not (place / "out").exists(), case


def weights_of(folder):
    return next(folder / name for name in (BIN, SAFETENSORS) if (folder / name).exists())


def edit_header(folder, change):
    """Change a safetensors file's header, its numbers left as they are."""
    file = folder / SAFETENSORS
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def rewrite_zip(file, members, compression=zipfile.ZIP_STORED):
    """The same archive with some members replaced or added."""
    with zipfile.ZipFile(file) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in {**content, **members}.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)


def stamp(path):
    return path.stat().st_mtime_ns if path.is_file() else None


class alarm:
    """Ends a hang with an error."""

    def __enter__(self):
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
        signal.alarm(SECONDS)

    def __exit__(self, *_):
        signal.alarm(0)


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)
