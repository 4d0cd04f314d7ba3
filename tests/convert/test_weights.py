"""Weights as the model gets them: cast, joined, checked for NaN, untied where the file says so."""

import mlx.core as mx
import numpy as np
import pytest
from rodimus_mlx.convert.checkpoint import open_checkpoint
from rodimus_mlx.convert.mapping import expected_shapes, map_weights
from rodimus_mlx.convert.weights import plan_weights, read_weights
from synthetic import ARCHITECTURES, from_arrays, write_checkpoint

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.errors import RodimusError, RodimusWarning

CONFIG = ARCHITECTURES["miniature"]
EMBEDDING, HEAD = "model.embeddings.weight", "lm_head.weight"


@pytest.fixture(params=["bin", "safetensors"])
def checkpoint_of(tmp_path, request):
    """Write arrays as a checkpoint in either container and open it."""

    def write(arrays, **more):
        write_checkpoint(tmp_path, CONFIG, {**from_arrays(arrays), **more}, request.param)
        checkpoint = open_checkpoint(tmp_path)
        return checkpoint, RodimusConfig.from_dict(checkpoint.config)

    return write


def test_same_as_mapping_in_memory(checkpoint_of, arrays):
    checkpoint, config = checkpoint_of(arrays)
    found = dict(read_weights(checkpoint, config))
    expected = map_weights({name: mx.array(array) for name, array in arrays.items()}, config)
    assert list(found) == list(expected_shapes(config))
    assert all(mx.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_cast(checkpoint_of, arrays, dtype):
    found = dict(read_weights(*checkpoint_of(arrays), dtype))
    assert {array.dtype for array in found.values()} == {dtype}
    expected = mx.array(arrays[EMBEDDING]).astype(dtype)
    assert mx.array_equal(found[EMBEDDING], expected)


def test_blocks_make_up_the_whole(checkpoint_of, arrays):
    for weight in plan_weights(*checkpoint_of(arrays), mx.float16).weights:
        blocks = list(weight.blocks(max_bytes=100))
        assert mx.array_equal(mx.concatenate(blocks), weight.read())
        assert len(blocks) > 1 or weight.read().nbytes <= 100


def test_joined_parts_of_different_dtypes(checkpoint_of, arrays):
    name = "model.layers.0.attn.q_proj.weight"
    arrays[name] = arrays[name].astype(np.float16)
    found = dict(read_weights(*checkpoint_of(arrays)))["model.layers.0.attn.qkv_proj.weight"]
    assert found.dtype == mx.float32 and mx.array_equal(found[:8], mx.array(arrays[name]).astype(mx.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_is_warned_of_by_name(checkpoint_of, arrays, value):
    arrays["model.layers.0.ffn.out_proj.weight"][3, 5] = value
    with pytest.warns(RodimusWarning, match=r"model\.layers\.0\.ffn\.out_proj\.weight has NaN or infinite") as caught:
        list(read_weights(*checkpoint_of(arrays)))
    assert len(caught) == 1


def test_overflow_of_float16_is_warned_of(checkpoint_of, arrays):
    arrays["model.norm_f.weight"][0] = 1e6
    checkpoint, config = checkpoint_of(arrays)
    with pytest.warns(RodimusWarning, match=r"model\.norm_f\.weight"):
        list(read_weights(checkpoint, config, mx.float16))
    list(read_weights(checkpoint, config, mx.bfloat16))  # in range: no warning, which would be an error here


def test_redundant_head_is_dropped(checkpoint_of, arrays):
    checkpoint, config = checkpoint_of({**arrays, HEAD: arrays[EMBEDDING].copy()})
    plan = plan_weights(checkpoint, config)
    assert plan.config is config and HEAD not in [weight.name for weight in plan.weights]


def test_head_that_differs_unties_the_model(checkpoint_of, arrays):
    head = arrays[EMBEDDING].copy()
    head[-1, -1] = np.nextafter(head[-1, -1], np.float32(9))
    checkpoint, config = checkpoint_of({**arrays, HEAD: head})
    with pytest.warns(RodimusWarning, match=r"lm_head\.weight differs from model\.embeddings\.weight.*untied"):
        plan = plan_weights(checkpoint, config)
    assert not plan.config.tie_word_embeddings
    assert mx.array_equal({weight.name: weight.read() for weight in plan.weights}[HEAD], mx.array(head))


def test_head_of_another_shape_is_refused(checkpoint_of, arrays):
    checkpoint, config = checkpoint_of({**arrays, HEAD: arrays[EMBEDDING][1:]})
    with pytest.warns(RodimusWarning, match="untied"), pytest.raises(RodimusError, match=r"lm_head.weight has shape"):
        plan_weights(checkpoint, config)


def test_whole_numbers_are_no_weights(checkpoint_of, arrays):
    arrays["model.norm_f.weight"] = arrays["model.norm_f.weight"].astype(np.int64)
    with pytest.raises(RodimusError, match=r"model\.norm_f\.weight has dtype int64"):
        plan_weights(*checkpoint_of(arrays))
