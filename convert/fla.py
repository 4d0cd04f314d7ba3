"""config.json in flash-linear-attention's (fla's) format."""

from __future__ import annotations

from typing import Any

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.errors import RodimusError


def fla_config(config: RodimusConfig) -> dict[str, Any]:
    """The inverse of reading fla's config.

    Raises:
        RodimusError: fla has no such model; the option is named.
    """
    c = config
    limits = {
        "mixer_cfg.expand_ratio": c.d_inner == 2 * c.d_model,
        "use_scale_embedding": not c.use_scale_embedding,
        "use_norm_embedding": not c.use_norm_embedding,
        "attn_cfg.num_heads_k": c.num_heads_k in (0, 1),
        "attn_cfg.num_heads_v": c.num_heads_v == c.num_heads,
        "attn_cfg.rotary_emb_dim": not c.has_attention or c.rope_dims == c.head_dim,
    }
    for option, fits in limits.items():
        if not fits:
            raise RodimusError(f"the fla format has no {option} like this model's")
    result: dict[str, Any] = {
        "model_type": "rodimus",
        "architectures": ["RodimusForCausalLM"],
        "block_type": c.block_type,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layer,
        "vocab_size": c.vocab_size,
        "expand_ratio": c.mem_size,
        "input_gate_low_rank": c.input_gate_low_rank,
        "use_short_conv": True,
        "conv_size": c.d_conv,
        "norm_eps": c.norm_epsilon,
        "k_norm_eps": c.normalize_epsilon,
        "hidden_act": "swish",
        "residual_in_fp32": c.residual_in_fp32,
        "tie_word_embeddings": c.tie_word_embeddings,
        "max_position_embeddings": c.max_position_embeddings,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": list(c.eos_token_id) if isinstance(c.eos_token_id, tuple) else c.eos_token_id,
    }
    if c.has_attention:
        result["intermediate_size"] = c.d_ffn
        result["ska_attn"] = {
            "num_heads": c.num_heads,
            "window_size": c.window_keys,
            "rope_theta": c.rotary_emb_base,
            "qkv_bias": False,
            "qk_norm": False,
        }
    return {key: value for key, value in result.items() if value is not None}
