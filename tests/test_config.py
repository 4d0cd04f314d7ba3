"""config.json of every format: what is read, what is written back, what is refused in one clear line."""

import copy
import json
import math

import pytest
from helpers import GOLDEN_NAMES, GOLDENS, config_dict
from rodimus_mlx.convert.mapping import expected_shapes

from rodimus_mlx.config import RodimusConfig, align8
from rodimus_mlx.errors import RodimusError


def again(config):
    """The config after a turn through a file."""
    return RodimusConfig.from_dict(json.loads(json.dumps(config.to_dict())))


def edited(name, path, value):
    """A golden's config.json with one key set, `table.key` for one in a table."""
    *table, key = path.split(".")
    config = config_dict(name)
    (config[table[0]] if table else config)[key] = value
    return config


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_goldens_survive_writing(name):
    config = RodimusConfig.from_dict(config_dict(name))
    assert again(config) == config


def test_official_config():
    config = RodimusConfig.from_dict(config_dict("plus_bin"))
    assert config == RodimusConfig(
        block_type="rodimus_plus",
        d_model=128,
        n_layer=2,
        vocab_size=300,
        d_inner=256,
        mem_size=32,
        d_conv=4,
        input_gate_low_rank=16,
        normalize_epsilon=1e-5,
        norm_epsilon=1e-5,
        num_heads=4,
        num_heads_k=1,
        num_heads_v=4,
        d_ffn=176,
        window_size=16,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        max_position_embeddings=64,
    )
    assert (config.head_dim, config.window_keys, config.rope_dims) == (32, 9, 32)


def test_fla_config_is_the_same_model():
    """plus_fla is plus_bin in the other format; only the tokens' ids and the length differ in its config."""
    fla = RodimusConfig.from_dict(config_dict("plus_fla")).to_dict()
    official = RodimusConfig.from_dict(config_dict("plus_bin")).to_dict()
    for key in ("bos_token_id", "eos_token_id", "max_position_embeddings"):
        del fla[key], official[key]
    assert fla == official


def test_defaults_of_the_official_code():
    config = RodimusConfig.from_dict({"d_model": 2048, "n_layer": 24, "vocab_size": 126464, "norm_epsilon": 1e-5})
    assert (config.block_type, config.mem_size, config.d_inner, config.d_conv) == ("rodimus", 64, 4096, 4)
    assert (config.input_gate_low_rank, config.normalize_epsilon) == (32, 1e-12)
    assert (config.tie_word_embeddings, config.residual_in_fp32) == (False, True)


@pytest.mark.parametrize("absent", [{}, {"num_heads": None, "num_heads_k": None, "num_heads_v": None}])
def test_heads_by_width(absent):
    config = RodimusConfig.from_dict(
        {
            "block_type": "rodimus_plus",
            "d_model": 2048,
            "n_layer": 24,
            "vocab_size": 126464,
            "norm_epsilon": 1e-5,
            "attn_cfg": absent,
        }
    )
    assert (config.num_heads, config.num_heads_k, config.num_heads_v, config.head_dim) == (16, 1, 16, 128)
    assert config.d_ffn == 2736


@pytest.mark.parametrize(("x", "expected"), [(1, 8), (8, 8), (8.9, 8), (9, 16), (2730.67, 2736), (4096.0, 4096)])
def test_align8(x, expected):
    assert align8(x) == expected


@pytest.mark.parametrize(("d_model", "ratio"), [(48, 1.3), (128, 4 / 3), (3072, 4 / 3), (40, 2.71), (56, 1 / 3)])
def test_widths_survive_writing(d_model, ratio):
    """Ratios are written where the official format has no widths; they must give the same widths again."""
    changes = {"mixer_cfg": {"expand_ratio": ratio}, "attn_cfg": {"ffn_expand_ratio": ratio}}
    config = RodimusConfig.from_dict(config_dict("plus_bin", d_model=d_model, **changes))
    assert again(config) == config


@pytest.mark.parametrize(
    ("window", "keys"), [(16, 9), (17, 9), (1, 1), (2, 2), (4096, 2049), (0, None), (-1, None), (None, None)]
)
def test_official_window(window, keys):
    config = RodimusConfig.from_dict(edited("plus_bin", "attn_cfg.window_size", window))
    assert config.window_keys == keys
    assert again(config) == config


@pytest.mark.parametrize(("window", "keys"), [(9, 9), (2, 2), (1, 1), (1024, 1024), (None, None)])
def test_fla_window_counts_keys(window, keys):
    config = RodimusConfig.from_dict(edited("plus_fla", "ska_attn.window_size", window))
    assert config.window_keys == keys
    assert again(config) == config


@pytest.mark.parametrize(("dims", "rotated"), [(-1, 32), (0, 0), (2, 2), (32, 32)])
def test_rotated_features(dims, rotated):
    config = RodimusConfig.from_dict(edited("plus_bin", "attn_cfg.rotary_emb_dim", dims))
    assert config.rope_dims == rotated
    assert again(config) == config


def test_several_end_tokens():
    config = RodimusConfig.from_dict(edited("plus_bin", "eos_token_id", [1, 5]))
    assert config.eos_token_id == (1, 5)
    assert config.to_dict()["eos_token_id"] == [1, 5]
    assert again(config) == config


@pytest.mark.parametrize(("heads_k", "heads_v"), [(1, 4), (2, 4), (4, 1), (2, 2)])
def test_head_counts(heads_k, heads_v):
    config = RodimusConfig.from_dict(config_dict("plus_bin", attn_cfg={"num_heads_k": heads_k, "num_heads_v": heads_v}))
    assert expected_shapes(config)["model.layers.0.attn.qkv_proj.weight"] == ((4 + heads_k + heads_v) * 32, 128)
    assert again(config) == config


REFUSED = [
    # an official config
    ("plus_bin", "model_type", "llama", "model_type"),
    ("plus_bin", "block_type", "mamba", "block_type"),
    ("plus_bin", "block_type", ["rodimus"], "block_type"),
    ("plus_bin", "d_model", None, "d_model"),
    ("plus_bin", "d_model", 128.0, "d_model"),
    ("plus_bin", "n_layer", 0, "n_layer"),
    ("plus_bin", "n_layer", True, "n_layer"),
    ("plus_bin", "vocab_size", "300", "vocab_size"),
    ("plus_bin", "norm_epsilon", None, "norm_epsilon"),
    ("plus_bin", "norm_epsilon", -1e-5, "norm_epsilon"),
    ("plus_bin", "norm_epsilon", float("nan"), "norm_epsilon"),
    ("plus_bin", "mixer_cfg", ["mem_size"], "mixer_cfg"),
    ("plus_bin", "attn_cfg", 4, "attn_cfg"),
    ("plus_bin", "mixer_cfg.mem_size", 0, "mem_size"),
    ("plus_bin", "mixer_cfg.expand_ratio", "2", "expand_ratio"),
    ("plus_bin", "mixer_cfg.d_conv", 0, "d_conv"),
    ("plus_bin", "mixer_cfg.input_gate_low_rank", 0.5, "input_gate_low_rank"),
    ("plus_bin", "mixer_cfg.input_gate_low_rank", "all", "input_gate_low_rank"),
    ("plus_bin", "mixer_cfg.new_option", 1, "new_option"),
    ("plus_bin", "mixer_cfg.causal", False, "mixer_cfg.causal"),
    ("plus_bin", "attn_cfg.new_option", 1, "new_option"),
    ("plus_bin", "attn_cfg.causal", False, "attn_cfg.causal"),
    ("plus_bin", "attn_cfg.softmax_scale", 0.1, "attn_cfg.softmax_scale"),
    ("plus_bin", "attn_cfg.rotary_emb_scale_base", 512, "attn_cfg.rotary_emb_scale_base"),
    ("plus_bin", "attn_cfg.rotary_emb_interleaved", True, "attn_cfg.rotary_emb_interleaved"),
    ("plus_bin", "attn_cfg.ffn_expand_ratio", 0, "ffn_expand_ratio"),
    ("plus_bin", "attn_cfg.num_heads", 3, "num_heads"),
    ("plus_bin", "attn_cfg.num_heads", -4, "num_heads"),
    ("plus_bin", "attn_cfg.num_heads", "4", "num_heads"),
    ("plus_bin", "attn_cfg.num_heads_k", 3, "num_heads_k"),
    ("plus_bin", "attn_cfg.num_heads_v", 8, "num_heads_v"),
    ("plus_bin", "attn_cfg.rotary_emb_dim", 7, "rotary_emb_dim"),
    ("plus_bin", "attn_cfg.rotary_emb_dim", 34, "rotary_emb_dim"),
    # an fla config
    ("plus_fla", "hidden_size", "128", "hidden_size"),
    ("plus_fla", "num_hidden_layers", None, "num_hidden_layers"),
    ("plus_fla", "expand_ratio", 2.0, "expand_ratio"),
    ("plus_fla", "norm_eps", None, "norm_eps"),
    ("plus_fla", "use_short_conv", False, "use_short_conv"),
    ("plus_fla", "hidden_act", "gelu", "hidden_act"),
    ("plus_fla", "attn", {"layers": [0], "num_heads": 4}, "attn"),
    ("plus_fla", "ska_attn", "yes", "ska_attn"),
    ("plus_fla", "ska_attn.qkv_bias", True, "ska_attn.qkv_bias"),
    ("plus_fla", "ska_attn.qk_norm", True, "ska_attn.qk_norm"),
    ("plus_fla", "ska_attn.num_heads", 3, "num_heads"),
]


@pytest.mark.parametrize(("name", "path", "value", "named"), REFUSED, ids=[f"{p}={v}" for _, p, v, _ in REFUSED])
def test_refused_in_one_line(name, path, value, named):
    with pytest.raises(RodimusError) as caught:
        RodimusConfig.from_dict(edited(name, path, value))
    message = str(caught.value)
    assert message.startswith("config.json: ")
    assert named in message
    assert "\n" not in message


# What JSON can hold in place of any value; nan and inf are Python's own addition to it.
LEAVES = [None, True, False, 0, 1, -1, 3, 2.5, -2.0, 1e300, math.nan, math.inf, 2**70, 10**400, "", "x", [], {}]
LEAVES += [[1], ["a"], [None], {"a": 1}]


def paths(table, *above):
    """Every key of a config, and of its tables."""
    for key, value in table.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from paths(value, *above, key)


def replaced(table, path, value):
    """A copy with one value replaced."""
    table = copy.deepcopy(table)
    inner = table
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return table


EVERY_KEY = {
    "plus_bin": {
        "ffn_padding": 0,
        "eos_token_id": [1, 2],
        "mixer_cfg": {"d_conv": 4},
        "attn_cfg": {"rotary_emb_base": 10000.0},
    },
    "plus_fla": {"intermediate_size": 176, "hidden_ratio": 1.5, "conv_size": 4, "ska_attn": {"rope_theta": 10000.0}},
}


@pytest.mark.parametrize("name", EVERY_KEY)
def test_any_value_in_any_place_is_read_or_refused_in_one_line(name):
    config = config_dict(name, **EVERY_KEY[name])
    for path in paths(config):
        for value in LEAVES:
            try:
                read = RodimusConfig.from_dict(replaced(config, path, value))
            except RodimusError as error:
                assert "\n" not in str(error) and len(str(error)) < 400
            else:
                assert again(read) == read and isinstance(hash(read), int)


@pytest.mark.parametrize("key", ["d_model", "n_layer", "vocab_size", "norm_epsilon"])
def test_missing_key_is_named(key):
    config = config_dict("plus_bin")
    del config[key]
    with pytest.raises(RodimusError, match=f"{key} is missing"):
        RodimusConfig.from_dict(config)


def test_not_a_rodimus_config():
    with pytest.raises(RodimusError, match="is this the config of a Rodimus model"):
        RodimusConfig.from_dict({})


def test_fla_says_nothing_of_what_is_usual():
    """Keys that fla's files leave out mean what fla's own config class assumes."""
    config = json.loads((GOLDENS / "plus_fla" / "config.json").read_text())
    for key in ("tie_word_embeddings", "block_type"):
        del config[key]
    del config["ska_attn"]["window_size"]
    parsed = RodimusConfig.from_dict(config)
    assert parsed.tie_word_embeddings and parsed.has_attention and parsed.window_keys == 1024
    config["ska_attn"]["rope_scaling"] = 2
    with pytest.raises(RodimusError, match="ska_attn has options that are not supported: rope_scaling"):
        RodimusConfig.from_dict(config)
