"""What some architectures need that no general rule gives: values of their configs, and classes that stand in."""

from __future__ import annotations

from typing import Any

RESNET = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 24, 32, 40],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
QWEN4_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
COHERE_ROPE = {
    "full_attention": None,
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}
# By model types: `made` goes to the config's class, `small` over the values that were made small.
_CONFIGS: dict[str, dict[str, Any]] = {
    "autoformer informer time_series_transformer": {
        "made": {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2, 3]},
        "small": {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    },
    "conditional_detr dab-detr deformable_detr detr table-transformer omdet-turbo": {
        "made": {"use_timm_backbone": False, "backbone_config": RESNET}
    },
    "upernet maskformer": {"small": {"backbone_config": RESNET}},
    "bamba granitemoehybrid": {"small": {"mamba_n_heads": 8, "mamba_d_head": 8}},
    "falcon_h1": {"small": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64}},
    "apertus1p5": {
        "small": {
            "text_config": {"vocab_size": 300},
            "audio_config": {"codebook_size": 64},
            "vision_config": {"codebook_size": 64},
            "image_token_offset": 100,
            "audio_token_offset": 164,
        }
    },
    "bros": {
        "small": {
            "hidden_size": 256,
            "intermediate_size": 128,
            "dim_bbox_sinusoid_emb_2d": 64,
            "dim_bbox_sinusoid_emb_1d": 8,
            "dim_bbox_projection": 64,
        }
    },
    "blt": {"small": {"encoder_hash_byte_group_vocab": 99}},
    "chameleon": {"made": {"vocabulary_map": {"<image>": 4, **{f"IMGIMG{c}Z": n for n, c in enumerate("ABCDEFGH")}}}},
    "cohere_compass": {"small": {"text_config": {"rope_parameters": COHERE_ROPE}}},
    "cohere_compass_text": {"small": {"rope_parameters": COHERE_ROPE}},
    "cvt": {"small": {"depth": [1, 2, 3]}},
    "csm": {"small": {"codec_config": {"upsample_groups": 32}}},
    "dbrx": {"small": {"attn_config": {"rope_theta": 1e4}}},
    "deepseek_ocr2": {"small": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}}},
    "diffusion_gemma": {"made": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}}},
    "dory": {
        "small": {
            "num_hidden_layers": 6,
            "n_input_layers": 2,
            "n_recurrent_layers": 2,
            "n_output_layers": 2,
            "layer_types": None,
        }
    },
    "deepseek_v2": {"made": {"num_experts_per_tok": 2}},
    "dots1": {"made": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1}},
    "chmv2 depth_anything prompt_depth_anything tipsv2_dpt zoedepth": {
        "small": {"backbone_config": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}}
    },
    "efficientloftr": {
        "made": {"hidden_size": 32, "num_attention_heads": 8, "out_features": [8, 8, 16, 32]},
        "small": {"out_features": [8, 8, 16, 32], "num_attention_heads": 8, "num_key_value_heads": 8},
    },
    "emu3": {"made": {"vocabulary_map": {"<image>": 4, **{f"<|visual token {n:06}|>": 5 + n for n in range(8)}}}},
    "ernie4_5_vl_moe": {"small": {"text_config": {"rope_parameters": {"mrope_section": [1, 1, 2]}}}},
    "esm": {"made": {"vocab_size": 33, "mask_token_id": 4, "pad_token_id": 1}},
    "gemma3n_text": {"small": {"num_kv_shared_layers": 0}},
    "glm5_next_text": {"small": {"index_topk": 16, "index_kpool": 4}},
    "glm5_next": {"small": {"text_config": {"index_topk": 16, "index_kpool": 4}}},
    "granite4_vision": {"made": {"deepstack_layer_map": [[-1, 0]]}},
    "hunyuan_vl": {"small": {"text_config": {"rope_parameters": {"mrope_section": [1, 1, 1, 1]}}}},
    "hunyuan_vl_text": {"small": {"rope_parameters": {"mrope_section": [1, 1, 1, 1]}}},
    "jamba": {"small": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}},
    "led longformer": {"small": {"attention_window": [8, 8]}},
    "lfm2_moe": {"small": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}},
    "mimi mimi_decoder": {"small": {"upsample_groups": 32}},
    "mistral_large4": {"small": {"text_config": {"kv_source_layers": [0, 1]}}},
    "mistral_large4_text": {"small": {"kv_source_layers": [0, 1]}},
    "molmo2": {"small": {"adapter_config": {"vision_feature_layer": [1, 0]}}},
    "moonshine_streaming": {"small": {"num_key_value_heads": 4}},
    "neomme": {"small": {"head_dim": 16}},
    "nemotron": {"made": {"num_key_value_heads": 48}},
    "perceiver": {"small": {"d_latents": 32, "d_model": 32, "num_latents": 8, "num_self_attends_per_block": 2}},
    "pocket_tts_audio_tokenizer pocket_tts_audio_tokenizer_decoder": {"small": {"upsample_groups": 32}},
    "qwen3_omni_moe": {"small": {"talker_config": {"text_config": {"shared_expert_intermediate_size": 64}}}},
    "qwen4_exp": {"made": {"text_config": QWEN4_INDEXER}},
    "qwen4_exp_text": {"made": QWEN4_INDEXER},
    "recurrent_gemma": {"small": {"intermediate_size": 128}},
    "seggpt": {"small": {"image_size": [64, 32]}},
    "shieldgemma2": {"small": {"yes_token_index": 5, "no_token_index": 6}},
    "step3p7": {"small": {"text_config": {"sliding_window": 8}}},
    "t5gemma2_encoder": {"small": {"text_config": {"dropout_rate": 0.0}}},
    "xmod": {"small": {"default_language": "en_XX"}},
}
# Classes that stand in for a base model that cannot be made from the architecture's config.
STAND_IN = {
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
}
SERIES = {
    "past_values": (19,),
    "past_time_features": (19, 0),
    "past_observed_mask": ("ones", 19),
    "future_values": (8,),
    "future_time_features": (8, 0),
}
# Inputs that no general rule gives, by model types: each a shape behind the batch, or what it holds and then the shape.
_INPUTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "autoformer informer time_series_transformer": SERIES,
    "bros": {"input_ids": ("ids", 8), "bbox": (8, 4)},
    "decision_transformer": {
        "states": (8, 17),
        "actions": (8, 4),
        "rewards": (8, 1),
        "returns_to_go": (8, 1),
        "timesteps": ("count", 8),
        "attention_mask": ("ones", 8),
    },
    "idefics": {
        "input_ids": ("ids", 8),
        "attention_mask": ("ones", 8),
        "pixel_values": (1, 3, "image_size", "image_size"),
        "image_attention_mask": ("ones", 8, 1),
    },
    "jev": {
        "input_ids": ("ids", 8),
        "marks": ("count", 4),
        "num_options": ("ones", 4),
        "question_type_ids": ("zeros", 4),
    },
    "layoutlmv3": {"input_ids": ("ids", 8), "bbox": ("ids", 8, 4)},
    "musicgen musicgen_melody": {"input_ids": ("ids", 8), "decoder_input_ids": ("ids", "num_codebooks", 8)},
    "oneformer": {"pixel_values": (3, 64, 64), "task_inputs": ("ids", "task_seq_len")},
    "lxmert": {"input_ids": ("ids", 8), "visual_feats": (6, "visual_feat_dim"), "visual_pos": (6, 4)},
    "perceiver": {"inputs": (16, "d_model")},
    "pix2struct": {"flattened_patches": (16, 770), "attention_mask": ("ones", 16), "decoder_input_ids": ("ids", 8)},
    "qwen3_asr_encoder": {"input_features": ("num_mel_bins", 100), "input_features_mask": ("ones", 100)},
    "seggpt": {"pixel_values": (3, 32, 32), "prompt_pixel_values": (3, 32, 32), "prompt_masks": (3, 32, 32)},
    "speech-encoder-decoder": {"input_values": (1600,), "decoder_input_ids": ("ids", 8)},
    "speecht5": {"input_values": (8, "hidden_size"), "decoder_input_values": (8, "hidden_size")},
    "timesfm": {"past_values": (64,), "past_values_padding": ("zeros", 64), "freq": ("zeros", 1)},
    "udop": {"input_ids": ("ids", 8), "bbox": (8, 4), "decoder_input_ids": ("ids", 8)},
    "vilt": {"input_ids": ("ids", 8), "pixel_values": (3, 32, 32), "pixel_mask": ("ones", 32, 32)},
}

SPECIAL = {name: what for names, what in _CONFIGS.items() for name in names.split()}
INPUTS = {name: what for names, what in _INPUTS.items() for name in names.split()}
