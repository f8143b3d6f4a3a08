"""Tiny random twins of every architecture in conf/model, for tests without network.

`AutoConfig.for_model(architecture, **TWINS[architecture])` builds alone, and on top of the `config` of a file in
conf/model: all keys of a file that fix a shape or a token id are set here again. Every linear layer's width is a
multiple of 64, as bitsandbytes' blocks need; special tokens lie inside the vocabulary of 512.
"""

VOCAB_SIZE = 512
_TOKENS = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WIDTHS = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
# Grouped queries: two of them share a key.
_LLAMA = {**_TOKENS, **_WIDTHS, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512}
_FUSED = {name: value for name, value in _LLAMA.items() if name != "head_dim"}

TWINS: dict[str, dict] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {**_FUSED, "max_window_layers": 2},
    "qwen3": {**_LLAMA, "max_window_layers": 2},
    "gemma": {**_LLAMA, "num_key_value_heads": 1, "head_dim": 64},
    # One layer with a window shorter than test rows, one without.
    "gemma2": {**_LLAMA, "query_pre_attn_scalar": 32, "sliding_window": 16},
    "gemma3_text": {
        **_LLAMA,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi": _FUSED,
    "phi3": {**_FUSED, "original_max_position_embeddings": 512},
    "falcon": {
        **_TOKENS,
        "hidden_size": 128,
        "ffn_hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "max_position_embeddings": 512,
    },
    # The width between the two layers of its MLP is 4 d_model, whatever expansion_ratio says.
    "mpt": {**_TOKENS, "d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
    "opt": {
        **_TOKENS,
        "hidden_size": 128,
        "word_embed_proj_dim": 128,
        "ffn_dim": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    },
    "gpt2": {**_TOKENS, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512},
    # Without the relative_* values DeBERTa v2's class builds another model than every published v3.
    "deberta-v2": {
        **_TOKENS,
        **_WIDTHS,
        "max_position_embeddings": 512,
        "relative_attention": True,
        "position_buckets": 32,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "pooler_hidden_size": 128,
    },
}
