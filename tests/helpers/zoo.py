"""Tiny models that nobody here wrote, unchanged: Hugging Face's, made from small configs, and torch's transformers."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded

from typing import NamedTuple

import torch
import transformers as hf
from torch import nn

hf.logging.set_verbosity_error()

TEXT = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {**SIZES, **TEXT, "max_position_embeddings": 16}
LLAMA = {**BERT, "num_key_value_heads": 1}
HALVES = {"layers": 2, "ffn_dim": 32, "attention_heads": 2}
BART = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in HALVES.items()}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
PATCHES = {"image_size": 8, "patch_size": 4}
# What transformers calls the feed-forward linears of a layer.
OF_BERT = r"\.layer\.\d\.(intermediate|output)\.dense"
OF_LLAMA = r"\.layers\.\d\.mlp\.(gate|up|down)_proj"
OF_BART = r"\.layers\.\d\.fc[12]"
OF_BLOOM = r"\.\d\.mlp\.dense_(h_to_4h|4h_to_h)"


class Model(NamedTuple):
    """How to make a model, how many linears of its are feed-forward, and a pattern that finds them by name.

    Attributes:
        reads: what its forward takes: `"text"`, `"pairs"` of texts, `"images"` or `"features"`.
    """

    make: object
    linears: int
    pattern: str
    reads: str = "text"


class Decoder(nn.TransformerDecoder):
    def forward(self, x):
        return super().forward(x, x.flip(1))


def encoder(layer=nn.TransformerEncoderLayer, stack=nn.TransformerEncoder):
    return lambda: stack(layer(16, 2, 32, batch_first=True), 2)


def text(name, config, linears, pattern):
    return Model(lambda: getattr(hf, name)(getattr(hf, name.split("For")[0] + "Config")(**config)), linears, pattern)


def gpt2(**more):
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **TEXT, **more))


def llama(**more):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, **more))


MODELS = {
    "albert": text("AlbertForMaskedLM", {**BERT, "embedding_size": 8}, 2, r"\.ffn(_output)?"),
    "bart": Model(
        lambda: hf.BartForConditionalGeneration(
            hf.BartConfig(d_model=16, **BART, **TEXT, decoder_start_token_id=0, forced_eos_token_id=0)
        ),
        *(8, OF_BART, "pairs"),
    ),
    "bert": text("BertForMaskedLM", BERT, 4, OF_BERT),
    "bloom": text("BloomForCausalLM", {"hidden_size": 16, "n_layer": 2, "n_head": 2, **TEXT}, 4, OF_BLOOM),
    "deberta-v2": text(
        "DebertaV2ForMaskedLM", {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, 4, OF_BERT
    ),
    "distilbert": text(
        "DistilBertForSequenceClassification",
        {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 40, "max_position_embeddings": 16},
        *(4, r"\.ffn\.lin[12]"),
    ),
    "electra": text("ElectraForPreTraining", {**BERT, "embedding_size": 16}, 4, OF_BERT),
    "falcon": text(
        "FalconForCausalLM",
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **TEXT},
        *(4, OF_BLOOM),
    ),
    "gemma3": Model(lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**LLAMA, head_dim=8)), 6, OF_LLAMA),
    "gpt2": Model(gpt2, 4, r"\.h\.\d\.mlp\.c_(fc|proj)"),
    "gpt-neox": text("GPTNeoXForCausalLM", BERT, 4, OF_BLOOM),
    "llama": Model(llama, 6, OF_LLAMA),
    "mistral": text("MistralForCausalLM", LLAMA, 6, OF_LLAMA),
    "mpnet": text("MPNetForMaskedLM", BERT, 4, OF_BERT),
    "opt": text(
        "OPTForCausalLM",
        {**TEXT, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"max_position_embeddings": 16, "word_embed_proj_dim": 16},
        *(4, OF_BART),
    ),
    "phi": text("PhiForCausalLM", BERT, 4, r"\.layers\.\d\.mlp\.fc[12]"),
    "qwen3": text("Qwen3ForCausalLM", {**LLAMA, "head_dim": 8}, 6, OF_LLAMA),
    "roberta": text("RobertaForSequenceClassification", BERT, 4, OF_BERT),
    "swin-v2": Model(
        lambda: hf.Swinv2ForImageClassification(
            hf.Swinv2Config(image_size=8, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2)
        ),
        *(4, r"\.blocks\.0\.(intermediate|output)\.dense", "images"),
    ),
    "t5": Model(
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, **TEXT)), 8, r"\.DenseReluDense\.w[io]", "pairs"
    ),
    "t5 gated": Model(
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, **TEXT, feed_forward_proj="gated-gelu")),
        *(12, r"\.DenseReluDense\.w(i_[01]|o)", "pairs"),
    ),
    "torch decoder": Model(encoder(nn.TransformerDecoderLayer, Decoder), 4, r"layers\.\d\.linear[12]", "features"),
    "torch encoder": Model(encoder(), 4, r"layers\.\d\.linear[12]", "features"),
    "vit": Model(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZES, **PATCHES)),
        *(4, r"\.layers\.\d\.mlp\.fc[12]", "images"),
    ),
    "xlnet": Model(
        lambda: hf.XLNetLMHeadModel(hf.XLNetConfig(d_model=16, n_layer=2, n_head=2, d_inner=32, **TEXT)),
        *(4, r"\.ff\.layer_[12]"),
    ),
}

TOKENS = torch.arange(24).mul(7).remainder(40).view(4, 6)
MASK = torch.ones(4, 6, dtype=torch.long)
MASK[1, 4:] = MASK[2, 5:] = 0


def made(name, dtype=torch.float64):
    """The model of a name: always the same one, in eval mode."""
    torch.manual_seed(1)
    return MODELS[name].make().to(dtype).eval()


def call(name, model, part=slice(None)):
    """The outputs of a model for a part of a batch of four."""
    dtype = next(model.parameters()).dtype
    match MODELS[name].reads:
        case "images":
            return model(torch.linspace(-1, 1, 768, dtype=dtype).view(4, 3, 8, 8)[part])[0]
        case "features":
            return model(torch.linspace(-1, 1, 384, dtype=dtype).view(4, 6, 16).sin()[part])
    more = {"decoder_input_ids": TOKENS.flip(0)[part]} if MODELS[name].reads == "pairs" else {}
    return model(input_ids=TOKENS[part], attention_mask=MASK[part], **more)[0]
