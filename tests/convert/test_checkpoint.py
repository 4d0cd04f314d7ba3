"""Checkpoint folders: which files are read, and what is said of folders that are none."""

import json
import shutil

import pytest
from rodimus_mlx.convert.checkpoint import open_checkpoint
from synthetic import ARCHITECTURES, from_arrays, write_bin, write_checkpoint, write_safetensors

from rodimus_mlx.errors import RodimusError


def refused(folder) -> str:
    with pytest.raises(RodimusError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message
    return message


@pytest.fixture
def tensors(arrays):
    return from_arrays(arrays)


@pytest.fixture
def folder(tmp_path, tensors):
    """A sound checkpoint in one safetensors file."""
    write_checkpoint(tmp_path / "model", ARCHITECTURES["miniature"], tensors)
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path, goldens):
    """A copy of a golden of two shards."""
    shutil.copytree(goldens / "plus_untied_sharded", tmp_path / "sharded", ignore=shutil.ignore_patterns("*.npz"))
    (tmp_path / "sharded").chmod(0o755)
    for path in (tmp_path / "sharded").iterdir():
        path.chmod(0o644)
    return tmp_path / "sharded"


def edit_index(folder, edit):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def test_one_safetensors_file(folder, arrays):
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config["d_model"] == 8
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == {
        name: array.shape for name, array in arrays.items()
    }


def test_safetensors_before_bin(folder):
    (folder / "pytorch_model.bin").write_bytes(b"would be refused")
    assert [path.name for path in open_checkpoint(folder).files] == ["model.safetensors"]


def test_bin(folder, tensors):
    (folder / "model.safetensors").unlink()
    write_bin(folder / "pytorch_model.bin", tensors)
    (folder / "training_args.bin").write_bytes(b"not weights")
    assert open_checkpoint(folder).tensors.keys() == tensors.keys()


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_shards_without_an_index(folder, tensors, kind):
    (folder / "model.safetensors").unlink()
    stem, write = ("pytorch_model", write_bin) if kind == "bin" else ("model", write_safetensors)
    names = list(tensors)
    for i, part in enumerate((names[:5], names[5:]), 1):
        write(folder / f"{stem}-0000{i}-of-00002.{kind}", {name: tensors[name] for name in part})
    assert open_checkpoint(folder).tensors.keys() == tensors.keys()
    (folder / f"{stem}-00001-of-00002.{kind}").unlink()
    assert f"missing {stem}-00001-of-00002.{kind}" in refused(folder)


def test_shards_with_an_index(sharded):
    assert len(open_checkpoint(sharded).tensors) == 45


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert "missing model-00002-of-00002.safetensors" in refused(sharded)


def test_tensor_of_the_index_that_no_shard_holds(sharded):
    edit_index(sharded, lambda names: names.update(lost=names["lm_head.weight"]))
    assert "lost" in refused(sharded)


def test_tensor_in_two_shards(sharded, tensors):
    write_safetensors(sharded / "more.safetensors", {"model.norm_f.weight": tensors["model.norm_f.weight"]})
    edit_index(sharded, lambda names: names.update({"x": "more.safetensors"}))
    message = refused(sharded)
    assert "model.norm_f.weight" in message and "more.safetensors" in message


OUTSIDE = ["../model.safetensors", "/etc/passwd", "a/../../b.safetensors", "..\\b.safetensors", "C:\\b.safetensors"]
OUTSIDE += ["\\\\host\\b.safetensors", "", "config.json", "a\0.safetensors", "folder"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_index_that_leads_elsewhere(sharded, name):
    (sharded.parent / "model.safetensors").write_bytes(b"must not be read")
    edit_index(sharded, lambda names: names.update({"lm_head.weight": name}))
    assert "inside the folder" in refused(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": None}], ids=str)
def test_index_without_a_map(sharded, weight_map):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "weight_map" in refused(sharded)


def test_not_a_folder(tmp_path):
    assert "not a folder" in refused(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    assert "not a folder" in refused(tmp_path / "file")


def test_folder_without_config(tmp_path):
    assert "no config.json" in refused(tmp_path)


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "no weights" in refused(folder)


def test_weights_without_tensors(folder):
    write_safetensors(folder / "model.safetensors", {})
    assert "no tensors" in refused(folder)


UNREADABLE = {
    "empty": b"",
    "blank": b" \n",
    "cut short": b'{"d_model": 8',
    "not UTF-8": b'{"a": "\xff"}',
    "a list": b"[1]",
    "nested": b"[" * 100_000,
}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_unreadable_config(folder, content):
    (folder / "config.json").write_bytes(content)
    assert "config.json" in refused(folder)


def test_empty_weight_file(folder):
    (folder / "model.safetensors").write_bytes(b"")
    assert "model.safetensors is empty" in refused(folder)
