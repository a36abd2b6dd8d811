"""Every architecture that transformers knows, made tiny from its own default config, and something to feed it."""

from __future__ import annotations

import inspect
import itertools
import os
import re
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

hf.logging.set_verbosity_error()

# Sizes by name: the first pattern that is found in a config's key gives its value, where that is a larger number.
SIZES = [
    (
        r"(intermediate|ffn|ff|inner|feedforward|mlp|fc|expert)_?\w*(size|dim|channels)$|d_ff|d_inner|n_inner|ff?n_dim$|hidden_dim$",
        64,
    ),
    (r"head_dim|d_kv|head_size|qk_\w+_dim|v_head_dim|\w+_head_dim|d_head", 8),
    (r"rotary_dim", 8),
    (r"(lora_rank|_rank)$", 8),
    (r"num_(key_value|kv)_heads|n_kv_heads|num_\w*kv_heads", 2),
    (r"\bn?_?(num_)?\w*heads$|n_head$|\w+_heads$", 4),
    (r"num_experts_per_tok|top_?k$|num_selected|topk_group|moe_topk", 2),
    (r"experts$|n_group", 4),
    (r"num_\w*(layers|blocks|stages_layers)$|n_layers?$|\w+_layers$|num_hidden_\w+$|depth$", 2),
    (r"codebook_size|^bins$", 64),
    (r"vocab_size|num_embeddings|\w+_vocab\w*size", 99),
    (r"max_\w*position\w*|n_positions|n_ctx|max_source_positions|max_\w*seq\w*len\w*|seq_length", 64),
    (r"image_size|img_size", 32),
    (r"num_queries|num_query\w*|num_latents|queries$", 8),
    (
        r"(hidden|embed|embedding|model|d_model|n_embd|emb|projection|proj|text|vision|conv)_?\w*(size|dim|channels)?$",
        32,
    ),
]
# Which follow from others.
LEFT_OUT = {"stage_names", "out_features", "out_indices", "_out_features", "_out_indices", "per_layer_config"}
SPECIAL: dict[str, dict[str, Any]] = {}


def architectures() -> list[str]:
    """The model types that an Auto class makes a model of."""
    return [name for name in CONFIG_MAPPING_NAMES if class_of(name)]


def class_of(name: str) -> str | None:
    """The class that stands for a model type: its base model, or the first that has a head."""
    tables = [getattr(modeling_auto, t) for t in dir(modeling_auto) if t.endswith("_MAPPING_NAMES")]
    for table in [modeling_auto.MODEL_MAPPING_NAMES, *tables]:
        if name in table and table is not CONFIG_MAPPING_NAMES:
            return table[name] if isinstance(table[name], str) else table[name][0]
    return None


def shrunk(key: str, value: Any, layers: int | None = None) -> Any:
    """A value of a config, made small."""
    if key == "head_dim" and not isinstance(value, dict):
        return 8
    if isinstance(value, bool) or value is None or "feat_extract" in key:
        return value
    if isinstance(value, int):
        small = next((s for pattern, s in SIZES if re.search(pattern, key)), value)
        return value % 50 if re.search(r"_(token_)?(id|ids|index)$", key) else min(value, small)
    if key.endswith("mrope_section"):
        return [2, 1, 1]
    if isinstance(value, list | tuple) and value and len(value) == layers:
        return type(value)([value[0], value[-1]])  # such as the types of layers
    if isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
        return type(value)(min(v, 2) if "heads" in key else shrunk(key, v) for v in value)
    if isinstance(value, dict):
        sizes = [value[k] for k in ("num_hidden_layers", "num_layers", "n_layer") if isinstance(value.get(k), int)]
        return {k: shrunk(str(k), v, *sizes[:1]) for k, v in value.items() if k not in LEFT_OUT}
    return value


def make(name: str) -> nn.Module:
    """The model of a type: always the same one, in eval mode, none of its weights zero."""
    torch.manual_seed(1)
    config_class = CONFIG_MAPPING[name]
    small = shrunk("", config_class().to_dict())
    small.pop("model_type", None)
    config = config_class.from_dict({**small, **SPECIAL.get(name, {})})
    for part in parts_of(config):
        rope = getattr(part, "rope_parameters", None)
        if isinstance(rope, dict) and "rope_type" in rope and WITH_SECTIONS.search(name):
            rope.setdefault("mrope_section", [1, 1, 0] if "v_moe" in name else [2, 1, 1])
        if hasattr(part, "qk_rope_head_dim") and hasattr(part, "head_dim"):
            part.head_dim = part.qk_rope_head_dim
    config._attn_implementation = config._experts_implementation = "eager"
    model = getattr(hf, class_of(name))(config).to(torch.get_default_dtype()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.is_meta:
                values = torch.nan_to_num(parameter).clamp_(-2, 2)
                parameter.copy_(values + 0.05 * torch.randn(parameter.shape))
    return model


# Whose rotations are cut into sections, of default sizes that a small head lacks.
WITH_SECTIONS = re.compile(r"glm|qwen2|paddleocr|colqwen")


def parts_of(config: Any) -> list[Any]:
    """A config and the configs in it."""
    return [config, *(each for v in vars(config).values() if hasattr(v, "to_dict") for each in parts_of(v))]


class Feed:
    """Inputs for a model: the first of a few sets that its forward takes."""

    def __init__(self, model: nn.Module, batch: int) -> None:
        self.model, self.batch, self.config = model, batch, model.config
        self.inputs: dict[str, Tensor] = {}
        errors = []
        for names, style in itertools.product(self._sets(), range(3)):
            try:
                self.inputs = {name: self._tensor(name, style) for name in names}
                with torch.no_grad():
                    torch.manual_seed(0)
                    model(**self.inputs)
                return
            except Exception as error:
                errors.append(error)
        raise errors[0]

    def __call__(self, part: slice) -> dict[str, Tensor]:
        """The inputs for a part of the batch."""
        return {
            name: x[len(x) * part.start // self.batch : len(x) * part.stop // self.batch]
            if isinstance(x, Tensor) and x.dim()
            else x
            for name, x in self.inputs.items()
        }

    def _sets(self) -> list[list[str]]:
        parameters = inspect.signature(self.model.forward).parameters
        needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        main = getattr(self.model, "main_input_name", "input_ids")
        known = [n for n in KNOWN if n in parameters]
        first = [n for n in (main, *[k for k in known if k.startswith("decoder_input_i")]) if n in parameters]
        sets = [[*needed, *first], [*needed, *first, "attention_mask"], [*needed, "input_ids"], [*needed, *known]]
        sets += [[*needed, n] for n in known]
        return [list(dict.fromkeys(names)) for names in sets if all(n in parameters for n in names)]

    def _tensor(self, name: str, style: int) -> Any:
        """Something to be an argument of this name; there are some styles."""
        b, channels = self.batch, self.of("num_channels", 0) or self.of("in_channels", 3)
        if name in ("hidden_states", "pixel_values") and "grid_thw" in inspect.signature(self.model.forward).parameters:
            patch = self.of("patch_size", 14)
            return wave(b * 16, channels * self.of("temporal_patch_size", 1) * patch * patch)
        if name in ("pixel_values", "image", "images", "pixel_values_images"):
            return wave(b, channels, *self.sides()) if style < 2 else wave(b, 1, channels, *self.sides())
        if name in ("pixel_values_videos", "video"):
            return wave(b, self.of("num_frames", 4), channels, *self.sides())
        if name in ("past_values", "future_values"):
            return wave(b, self.of("context_length", 32), self.of("num_input_channels", 1))
        mels = next((v for key in MELS if (v := self.of(key, 0))), 80)
        if name in ("input_values", "audio_values", "waveform", "raw_input_values"):
            return (wave(b, 1600), wave(b, 1, 1600), wave(b, self.of("max_length", 64), mels))[style]
        if name in ("input_features", "audio_features", "spectrogram", "input_mel"):
            length = 2 * self.of("max_source_positions", 16)
            return (wave(b, mels, length), wave(b, length, mels), wave(b, 1, length, mels))[style]
        if name == "bbox":
            return torch.arange(b * 8 * 4).view(b, 8, 4) % 3 + torch.tensor([1, 1, 10, 10])
        if name in ("hidden_states", "inputs_embeds", "encoder_hidden_states", "query_embeds"):
            return wave(b, 8, self.of("hidden_size", 32))
        if name in ("grid_thw",):
            return torch.tensor([[1, 4, 4]] * b)
        if "mask" in name:
            return torch.ones(b, 8, dtype=torch.long)
        return torch.arange(8 * b).mul(7).remainder(40).add(5).view(b, 8)

    def of(self, key: str, default: Any) -> Any:
        """A value of the config, or of a part of it."""
        return next((v for part in parts_of(self.config) if isinstance(v := getattr(part, key, None), int)), default)

    def sides(self) -> tuple[int, int]:
        """Height and width of an image."""
        sides = next((v for part in parts_of(self.config) if (v := getattr(part, "image_size", None))), 32)
        return (sides, sides) if isinstance(sides, int) else tuple(sides)[-2:]


KNOWN = (
    "input_ids decoder_input_ids attention_mask pixel_values pixel_values_videos input_values input_features bbox "
    "inputs_embeds hidden_states grid_thw past_values query_embeds"
).split()
MELS = "num_mel_bins num_mel_bands input_feat_per_channel feature_size mel_bins n_mels input_size".split()


def wave(*shape: int) -> Tensor:
    """Numbers between -1 and 1, none like another."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.get_default_dtype()).mul(0.7).sin().view(shape)
