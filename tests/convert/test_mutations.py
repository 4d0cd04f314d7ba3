"""Random damage to small checkpoints ends in a clear error or a load of the right shapes, never in a traceback."""

import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rodimus_mlx.convert.checkpoint import open_checkpoint
from rodimus_mlx.convert.mapping import expected_shapes
from rodimus_mlx.convert.weights import plan_weights
from synthetic import ARCHITECTURES, from_arrays, write_checkpoint

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.errors import RodimusError, RodimusWarning

EXAMPLES = 150
EDGE = 4000  # names, headers and directories are within this many bytes of either end
FILES = {"bin": "pytorch_model.bin", "safetensors": "model.safetensors"}
BOUNDED = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

positions = st.one_of(st.integers(0, EDGE), st.integers(-EDGE, -1), st.integers(0, 2**31))
edits = st.lists(st.tuples(positions, st.integers(0, 255)), min_size=1, max_size=4)


def load(folder) -> None:
    """Load as far as it goes; only a RodimusError may come out, and what loads has the config's shapes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RodimusWarning)  # NaN weights, an untied head
        try:
            checkpoint = open_checkpoint(folder)
            plan = plan_weights(checkpoint, RodimusConfig.from_dict(checkpoint.config))
            shapes = {weight.name: weight.read().shape for weight in plan.weights}
        except RodimusError as error:
            assert str(error) and "\n" not in str(error)
            return
    assert shapes == expected_shapes(plan.config)


@pytest.fixture(params=FILES)
def folder(tmp_path, arrays, request):
    arrays["lm_head.weight"] = arrays["model.embeddings.weight"]
    write_checkpoint(tmp_path, ARCHITECTURES["miniature"], from_arrays(arrays), request.param)
    return tmp_path, tmp_path / FILES[request.param]


@BOUNDED
@given(edits=edits)
def test_changed_bytes(folder, edits):
    path, file = folder
    good = file.read_bytes()
    data = bytearray(good)
    for position, value in edits:
        data[position % len(data)] = value
    try:
        file.write_bytes(data)
        load(path)
    finally:
        file.write_bytes(good)


@BOUNDED
@given(keep=positions, more=st.binary(max_size=40))
def test_cut_and_extended(folder, keep, more):
    path, file = folder
    good = file.read_bytes()
    try:
        file.write_bytes(good[: keep % len(good)] + more)
        load(path)
    finally:
        file.write_bytes(good)


@BOUNDED
@given(edits=edits)
def test_changed_config(folder, edits):
    path, _ = folder
    file = path / "config.json"
    good = file.read_bytes()
    data = bytearray(good)
    for position, value in edits:
        data[position % len(data)] = value
    try:
        file.write_bytes(data)
        load(path)
    finally:
        file.write_bytes(good)
