"""Every architecture that transformers knows, made tiny from its own default config."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded

import torch
import transformers as hf
from special_models import SPECIAL, STAND_IN
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

hf.logging.set_verbosity_error()

# What counts something and not features, by name: the first pattern that is found in a config's key gives its value,
# where that is a larger number.
COUNTS = [
    (r"num_experts_per_tok|top_?k$|num_selected|moe_topk|moe_k$|n(um)?(_expert)?_group$", 2),
    (r"topk_group", 1),
    (r"experts$", 4),
    (r"num_\w*(layers|blocks|stages_layers)$|n_layers?$|\w+_layers$|num_hidden_(?!size)\w+$|depth$", 2),
    (r"codebook_size|^bins$", 64),
    (r"vocab_size|num_embeddings|\w+_vocab\w*size", 99),
    (r"max_\w*position\w*|n_positions|n_ctx|max_source_positions|max_\w*seq\w*len\w*|seq_length", 64),
    (r"num_queries|num_query\w*|num_latents|queries$", 8),
]
KEY_HEADS = r"num_(key_value|kv)_heads|n_kv_heads|num_\w*kv_heads"
# And what counts features. The rotations' sizes come first: a pattern for `dim` would take them.
FEATURES = [
    (
        r"(intermediate|ffn|ff|inner|feedforward|mlp|fc|expert)_?\w*(size|dim|channels)$|d_ff|d_inner|n_inner|ff?n_dim$|hidden_dim$",
        64,
    ),
    (r"head_dim|d_kv|head_size|qk_\w+_dim|v_head_dim|\w+_head_dim|d_head|rotary_dim|(lora_rank|_rank)$", 8),
    (KEY_HEADS, 2),
    (r"\bn?_?(num_)?\w*heads$|n_head$|\w+_heads$", 4),
]
WIDTHS = [
    (r"image_size|img_size|base_channels", 32),
    (r"num_filters", 8),
    (
        r"(hidden|embed|embedding|model|d_model|n_embd|emb|projection|proj|text|vision|conv)_?\w*(size|dim|channels)?$",
        32,
    ),
]
# What is a number of features, in any config.
WIDE = re.compile(
    r"size|dim|channels|channel_list|width|rank|planes|filters|features|units|d_model|d_ff|d_kv|d_head|d_inner|n_embd|n_inner|mrope_section"
)
NARROW = re.compile(
    r"vocab|image|img|patch|window|kernel|(?<![a-z])num_(?!channels|filters)|(?<![a-z])n_(?!embd|inner)|max_|length|seq|position|batch|chunk|group|"
    r"codebook_size|stride|rate|context|grid|pool|block_size|factor|^in_channels|num_channels|_id$|time|bin|mel|feat_"
)
# Which follow from others.
LEFT_OUT = {
    "stage_names",
    "out_features",
    "out_indices",
    "_out_features",
    "_out_indices",
    "per_layer_config",
    "qk_head_dim",
}
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
ATTEMPTS = ("fixed", 8, 32)  # sizes of our own, then every width an eighth or a part of 32
LARGEST = 12_000_000  # parameters


def architectures() -> list[str]:
    """The model types that an Auto class makes a model of."""
    return [name for name in CONFIG_MAPPING_NAMES if class_of(name)]


def class_of(name: str) -> str | None:
    """The class that stands for a model type: its base model, or the first that has a head."""
    tables = [getattr(modeling_auto, t) for t in dir(modeling_auto) if re.fullmatch(r"MODEL_\w*MAPPING_NAMES", t)]
    found = [table[name] for table in [modeling_auto.MODEL_MAPPING_NAMES, *tables] if name in table]
    names = [each for entry in found for each in ([entry] if isinstance(entry, str) else entry)]
    return next((each for each in names if hasattr(hf, each)), names[0] if names else None)


class Smaller:
    """Makes the values of a config small, to sizes of our own, or each width to a part of it.

    The parts leave sums, products and equalities of widths true; our own sizes leave those that equal the hidden size.
    """

    def __init__(self, attempt: Any, config: dict[str, Any]) -> None:
        self.part = None if attempt == "fixed" else attempt
        self.hidden = set(hidden_sizes(config))

    def number(self, key: str, value: int) -> int:
        """A number, by its key."""
        if re.search(r"_(token_)?(id|ids|index)$", key):
            return value % 50
        if re.search("kernel|stride", key):
            return value
        width = WIDE.search(key) and not NARROW.search(key)
        patterns = (
            COUNTS if self.part else [*FEATURES, *COUNTS, (r".", 32) if width and value in self.hidden else (), *WIDTHS]
        )
        for pattern, size in filter(None, patterns):
            if re.search(pattern, key):
                return min(value, size)
        if self.part and width and value % self.part == 0:
            return value // self.part
        while self.part and re.search(r"image_size|img_size", key) and value > 256 and value % 2 == 0:
            value //= 2
        return value

    def value(self, key: str, value: Any, kept: tuple[int, list[int]] = (0, [])) -> Any:
        """Any value, by its key; `kept` are the layers that are left, of how many."""
        if key == "head_dim" and not self.part and not isinstance(value, dict):
            return 8
        if isinstance(value, bool) or value is None or "feat_extract" in key:
            return value
        if isinstance(value, int):
            return len(kept[1]) if key in LAYERS and kept[1] else self.number(key, value)
        if key.endswith("mrope_section") and not self.part:
            return [2, 1, 1]
        if isinstance(value, list | tuple) and value and len(value) == kept[0]:
            return type(value)(value[n] for n in kept[1])  # such as the types of layers
        if isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
            few = "heads" in key and not self.part
            return type(value)(min(v, 2) if few else self.number(key, v) for v in value)
        if isinstance(value, dict):
            kept, stages = kept_layers(value), has_stages(value)
            out = {*LAYERS, "stage_names", "_out_features", "_out_indices"} if stages else LEFT_OUT
            found = {k: self.value(str(k), v, kept) for k, v in value.items() if k not in out}
            alike = [k for k in found if re.search(KEY_HEADS, str(k)) and value[k] == value.get("num_attention_heads")]
            return found | {k: found["num_attention_heads"] for k in alike}  # as many as queries, where they are that
        return value


def hidden_sizes(config: dict[str, Any]) -> Iterator[int]:
    """Those of a config and of the configs in it."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from hidden_sizes(value)
        elif key in ("hidden_size", "d_model") and isinstance(value, int):
            yield value


def kept_layers(config: dict[str, Any]) -> tuple[int, list[int]]:
    """How many layers a config has, and which of them are to stay: one of each kind, at least two."""
    count = next((config[k] for k in LAYERS if isinstance(config.get(k), int)), 0)
    if count < 2 or has_stages(config):
        return 0, []
    lists = [v for v in config.values() if isinstance(v, list) and len(v) == count and isinstance(v[0], str)]
    kinds = list(zip(*lists, strict=True))
    ends = [0, count - 1]
    if not kinds or len({kinds[0], kinds[-1]}) == len(set(kinds)):
        return count, ends
    return count, sorted(kinds.index(kind) for kind in dict.fromkeys(kinds))[:4]


def has_stages(config: dict[str, Any]) -> bool:
    """Whether its layers are counted stage by stage."""
    return isinstance(config.get("depths", config.get("depth")), list | tuple)


def config_of(name: str, attempt: Any) -> Any:
    """The small config of a model type."""
    config_class = CONFIG_MAPPING[name]
    special = SPECIAL.get(name, {})
    values = config_class(**special.get("made", {})).to_dict()
    values = merged(Smaller(attempt, values).value("", values), special.get("small", {}))
    values.pop("model_type", None)
    config = config_class.from_dict(values)
    for part in parts_of(config):
        part.use_cache = False  # a cache that is written in place stops the backward
        rope = getattr(part, "rope_parameters", None)
        if attempt == "fixed" and isinstance(rope, dict) and "rope_type" in rope and WITH_SECTIONS.search(name):
            rope.setdefault("mrope_section", [1, 1, 0] if "v_moe" in name else [2, 1, 1])
        if attempt == "fixed" and {"qk_rope_head_dim", "head_dim"} <= vars(part).keys():
            with contextlib.suppress(Exception):  # some have one for each layer
                part.head_dim = part.qk_rope_head_dim
    config._attn_implementation = config._experts_implementation = "eager"
    return config


def merged(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Values with others put over them, also in dicts inside."""
    inside = {
        k: merged(values[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(values.get(k), dict)
    }
    return {**values, **over, **inside}


def make(name: str, attempt: Any = "fixed") -> nn.Module:
    """The model of a type: always the same one, in eval mode, none of its weights zero."""
    torch.manual_seed(1)
    config = config_of(name, attempt)
    model_class = getattr(hf, STAND_IN.get(name) or class_of(name))
    with at_most(LARGEST * (5 if attempt == "fixed" else 1)):  # some have parts that no size of ours reaches
        model = model_class(config).to(torch.get_default_dtype()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.is_meta:
                values = torch.nan_to_num(parameter).clamp_(-2, 2)
                parameter.copy_(values + 0.05 * torch.randn(parameter.shape))
    return model


@contextlib.contextmanager
def at_most(count: int) -> Iterator[None]:
    """Modules made inside have no more parameters than that together, or it raises."""
    register, held = nn.Module.register_parameter, 0

    def counted(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal held
        held += 0 if parameter is None else parameter.numel()
        if held > count:
            raise MemoryError(f"more than {count:,} parameters")
        register(module, name, parameter)

    nn.Module.register_parameter = counted
    try:
        yield
    finally:
        nn.Module.register_parameter = register


# Whose rotations are cut into sections, of default sizes that a small head lacks.
WITH_SECTIONS = re.compile(r"glm|qwen2|paddleocr|colqwen")


def parts_of(config: Any) -> list[Any]:
    """A config and the configs in it."""
    return [config, *(each for v in vars(config).values() if hasattr(v, "to_dict") for each in parts_of(v))]
