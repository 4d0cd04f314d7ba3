"""Converting: the folder that comes out, and that nothing comes out when something goes wrong."""

import errno
import fcntl
import json
import os
import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model
from rodimus_mlx.convert import folder as folder_module
from rodimus_mlx.convert.checkpoint import open_checkpoint
from rodimus_mlx.convert.convert import convert
from rodimus_mlx.convert.schemes import make_scheme
from rodimus_mlx.convert.weights import read_weights
from rodimus_mlx.convert.writer import Spec, sharded_writer
from synthetic import ARCHITECTURES, from_arrays, random_tensors, write_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.errors import RodimusError
from rodimus_mlx.tokenizer import CHAT_TEMPLATE

CONFIG = ARCHITECTURES["miniature"]
END = "<|endoftext|>"


def write_tokenizer(folder, settings=None):
    """A byte-level tokenizer with the class name of a tokenizer that nobody here has."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*letters, END])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    own = {"tokenizer_class": "TheirTokenizer", "auto_map": {"AutoTokenizer": ["their.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**own, "eos_token": END, **(settings or {})}))


@pytest.fixture
def source(tmp_path, arrays):
    """A small official checkpoint with a tokenizer, so that converting it warns of nothing."""
    write_checkpoint(tmp_path / "source", CONFIG, from_arrays(arrays), "bin")
    write_tokenizer(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def only_source_left(tmp_path) -> bool:
    return [path.name for path in tmp_path.iterdir()] == ["source"]


def test_weights_and_config(source, out):
    summary = convert(source, out)
    before, after = open_checkpoint(source), open_checkpoint(out)
    config = RodimusConfig.from_dict(before.config)
    assert RodimusConfig.from_dict(after.config) == config
    expected = dict(read_weights(before, config))
    assert after.tensors.keys() == expected.keys()
    assert all(mx.array_equal(after.tensors[name].read(), expected[name]) for name in expected)
    assert all(mx.array_equal(array, expected[name]) for name, array in mx.load(str(out / "model.safetensors")).items())
    assert (summary.format, summary.dtype, summary.files) == ("official", "float32", ("model.safetensors",))
    assert summary.weight_bytes == 4 * summary.parameters == sum(tensor.nbytes for tensor in after.tensors.values())


@pytest.mark.parametrize("golden", ["plus_bin", "plus_fla", "plus_untied_sharded", "rodimus"])
def test_goldens_give_the_same_logits(goldens, out, golden):
    with pytest.warns(UserWarning, match=r"no tokenizer\.json"):
        summary = convert(goldens / golden, out)
    assert not summary.has_tokenizer and not (out / "chat_template.jinja").exists()
    model, _ = load_model(out, trust_remote_code=True)  # stock mlx-lm, by the shim
    data = np.load(goldens / golden / "golden.npz")
    # bfloat16 weights are computed in bfloat16: 8 bits of mantissa; float32 ones to a few ulps of the largest logit
    tolerance = 3e-2 if summary.dtype == "bfloat16" else 1e-5
    logits = np.array(model(mx.array(data["tokens"])).astype(mx.float32), dtype=np.float64)
    assert np.linalg.norm(logits - data["logits_f64"]) <= tolerance * np.linalg.norm(data["logits_f64"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(source, out, dtype):
    assert convert(source, out, dtype).dtype == dtype
    checkpoint = open_checkpoint(out)
    assert checkpoint.config["torch_dtype"] == dtype
    assert {tensor.stored for tensor in checkpoint.tensors.values()} == {dtype}


def test_converting_again_changes_no_weight(source, out):
    convert(source, out, "bfloat16")
    assert convert(out, out.with_name("again")).format == "ours"
    assert (out / "model.safetensors").read_bytes() == (out.with_name("again") / "model.safetensors").read_bytes()
    assert (out / "config.json").read_bytes() == (out.with_name("again") / "config.json").read_bytes()


def test_quantized_weights_are_kept(source, out):
    config = {**CONFIG, "d_model": 32}
    write_checkpoint(source, config, random_tensors(config, "float32"), "bin")
    convert(source, out, scheme=make_scheme(3, 32))
    with pytest.raises(RodimusError, match="is quantized"):
        convert(out, out.with_name("again"), "float16")
    convert(out, out.with_name("again"))
    before, after = (open_checkpoint(folder) for folder in (out, out.with_name("again")))
    assert before.config == after.config and before.tensors.keys() == after.tensors.keys()
    assert all(mx.array_equal(after.tensors[name].read(), tensor.read()) for name, tensor in before.tensors.items())


def test_tokenizer(source, out):
    (source / "tokenizer.model").write_bytes(b"copied as it is")
    assert convert(source, out).has_tokenizer
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (out / "tokenizer.model").read_bytes() == b"copied as it is"
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "auto_map" not in settings
    assert settings["is_chat_model"] is False
    assert (out / "chat_template.jinja").read_text() == CHAT_TEMPLATE


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_own_chat_template_is_kept(source, out, place):
    if place == "chat_template.jinja":
        (source / place).write_text("theirs")
    else:
        write_tokenizer(source, {"chat_template": "theirs"})
    convert(source, out)
    assert (out / "chat_template.jinja").exists() == (place == "chat_template.jinja")
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert "theirs" in (settings.get("chat_template"), (source / place).read_text())
    assert settings["is_chat_model"] is True


def test_generation_config(source, out):
    convert(source, out)
    end = Tokenizer.from_file(str(source / "tokenizer.json")).token_to_id(END)
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [end]}


def test_own_generation_config_is_kept(source, out):
    (source / "generation_config.json").write_text('{"eos_token_id": 7}')
    convert(source, out)
    assert (out / "generation_config.json").read_text() == '{"eos_token_id": 7}'


def test_model_card_of_a_local_folder(source, out):
    convert(source, out, "float16")
    card = (out / "README.md").read_text()
    assert "library_name: mlx" in card and "- rodimus" in card and "# source for MLX" in card
    assert "license:" not in card and "base_model:" not in card and str(source.parent) not in card
    assert "--model out --trust-remote-code" in card and "float16" in card


def test_model_card_of_a_hub_snapshot(source, tmp_path, out):
    """The hub's cache: files are links into blobs/, the path holds the id."""
    snapshot = tmp_path / "models--an-org--A-Model" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        (snapshot / path.name).symlink_to(path)
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# A Model\n")
    (snapshot / "LICENSE").write_text("the license")
    convert(snapshot, out)
    card = (out / "README.md").read_text()
    assert (
        "\nlicense: apache-2.0\n" in card and "\nbase_model: an-org/A-Model\n" in card and "# A-Model for MLX" in card
    )
    assert (out / "LICENSE").read_text() == "the license"
    assert not any(path.is_symlink() for path in out.iterdir())


def test_progress(source, out):
    calls = []
    summary = convert(source, out, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (summary.weight_bytes, summary.weight_bytes)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls) and len(calls) > 1


def test_shards(tmp_path):
    arrays = {f"w{i}": mx.random.normal((5, 8)).astype(mx.bfloat16) for i in range(5)}
    arrays["odd"] = mx.arange(3, dtype=mx.uint8)
    specs = {name: Spec(array.dtype, array.shape) for name, array in arrays.items()}
    (tmp_path / "config.json").write_text("{}")
    with sharded_writer(tmp_path, specs, shard_bytes=200) as writer:
        for name in reversed(arrays):  # any order, in rows
            writer.write(name, arrays[name][:2])
            writer.write(name, arrays[name][2:])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 80 + 3
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert all((tmp_path / file).stat().st_size < 200 + 600 for file in writer.files)  # numbers and header
    found = open_checkpoint(tmp_path).tensors
    assert all(mx.array_equal(found[name].read(), array) for name, array in arrays.items())
    for file in writer.files:
        assert all(mx.array_equal(array, arrays[name]) for name, array in mx.load(str(tmp_path / file)).items())


def test_writer_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="incomplete"), sharded_writer(tmp_path, {"w": Spec(mx.float32, (2, 2))}) as w:
        for wrong in (mx.zeros((1, 3)), mx.zeros((3, 2)), mx.zeros((1, 2), mx.float16)):
            with pytest.raises(ValueError, match="do not continue"):
                w.write("w", wrong)


# What goes wrong: one line, and nothing left behind.


def test_unknown_dtype(source, out):
    with pytest.raises(RodimusError, match="dtype must be one of float32"):
        convert(source, out, "int8")


def test_occupied_out(source, out):
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(RodimusError, match="not empty"):
        convert(source, out)
    assert [path.name for path in out.iterdir()] == ["precious"]
    with pytest.raises(RodimusError, match="not a folder"):
        convert(source, out / "precious")
    assert (out / "precious").read_text() == "x"


def test_empty_out_is_filled(source, out):
    out.mkdir()
    convert(source, out)
    assert (out / "config.json").exists()


@pytest.mark.parametrize("inside", [".", "sub", "../source/sub"])
def test_out_inside_the_source(source, inside):
    before = sorted(source.iterdir())
    with pytest.raises(RodimusError, match=r"inside the source|not empty"):
        convert(source, source / inside)
    assert sorted(source.iterdir()) == before


def test_damaged_source_leaves_nothing(source, out, tmp_path):
    data = (source / "pytorch_model.bin").read_bytes()
    (source / "pytorch_model.bin").write_bytes(data[:-30])
    with pytest.raises(RodimusError, match="cut short"):
        convert(source, out / "deep" / "er")
    assert only_source_left(tmp_path)


def test_interrupt_leaves_nothing(source, out, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out / "deep" / "er", progress=interrupt)
    assert only_source_left(tmp_path)


def test_too_little_space_is_said_at_once(source, out, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "_free", lambda folder: 1000)
    with pytest.raises(RodimusError, match=r"not enough disk space.*bytes are needed, 1,000 are free"):
        convert(source, out)
    assert only_source_left(tmp_path)


@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename"])
def test_disk_that_fills_up_leaves_nothing(source, out, tmp_path, monkeypatch, call):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(RodimusError, match=r"not enough disk space"):
        convert(source, out)
    assert only_source_left(tmp_path)


def test_really_full_disk(source, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "none", disk]).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        free = folder_module._free
        monkeypatch.setattr(folder_module, "_free", lambda folder: 10**12)
        with pytest.raises(RodimusError, match="not enough disk space"):
            convert(source, disk / "out")
        monkeypatch.setattr(folder_module, "_free", free)
        with pytest.raises(RodimusError, match="not enough disk space"):
            convert(source, disk / "out")
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


def test_leftovers_of_killed_runs_are_cleared(source, out, tmp_path):
    for number in (1, 2):
        (tmp_path / f".out.partial-{number}").mkdir()
        (tmp_path / f".out.partial-{number}" / "half").write_text("x")
    living = os.open(tmp_path / ".out.partial-2", os.O_RDONLY)
    fcntl.flock(living, fcntl.LOCK_EX)
    try:
        convert(source, out)
    finally:
        os.close(living)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial-2", "out", "source"]


def test_out_taken_meanwhile(source, out):
    def take(done, total):
        out.mkdir(exist_ok=True)
        (out / "theirs").write_text("x")

    with pytest.raises(RodimusError, match="not empty"):
        convert(source, out, progress=take)
    assert [path.name for path in out.iterdir()] == ["theirs"]


def test_unwritable_place(source, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RodimusError, match="cannot be written"):
        convert(source, tmp_path / "file" / "out")


def test_source_is_left_as_it_was(source, out):
    copy = out.with_name("copy")
    shutil.copytree(source, copy)
    convert(source, out)
    assert all((copy / path.name).read_bytes() == path.read_bytes() for path in source.iterdir())
    assert len(list(copy.iterdir())) == len(list(source.iterdir()))
