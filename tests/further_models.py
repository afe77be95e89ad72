"""Tiny random models of the families beside Qwen-VL: transformers' own classes with their real processor classes."""

import json

import torch
import transformers
from conftest import _keep_float64, quick
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import nn
from transformers import AutoTokenizer

LAYERS = 4
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "max_position_embeddings": 2048}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2}

LLAVA_TEMPLATE = (  # as in llava-hf/llava-1.5-7b-hf
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def llama_tokenizer(folder):
    """Steps and files as in llava-hf/llava-1.5-7b-hf: blanks as U+2581, one before each text, bytes as a fallback."""
    merges = [("c", "a"), ("ca", "t"), ("▁", "cat"), ("r", "e"), ("re", "d"), ("▁", "red"), ("▁", "t"), ("h", "e")]
    merges += [("▁t", "he"), ("▁", "d"), ("o", "g"), ("▁d", "og")]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    words += [chr(code) for code in range(33, 127)] + ["".join(pair) for pair in merges]
    model = models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config |= {"pad_token": "<pad>", "add_bos_token": True, "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(folder)


def llava_processor(tokenizer, images=None):
    """A square of 6 x 6 image tokens, 84 pixels wide, where the published one has 24 x 24 on 336."""
    images = images or transformers.CLIPImageProcessor(
        size={"shortest_edge": 84}, crop_size={"height": 84, "width": 84}
    )
    more = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return transformers.LlavaProcessor(images, tokenizer, chat_template=LLAVA_TEMPLATE, **more)


def llava_config(tokenizer):
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"image_size": 84, "patch_size": 14, "projection_dim": 16}
    return transformers.LlavaConfig(
        text_config=TEXT | {"model_type": "llama", "vocab_size": len(tokenizer)},
        vision_config=vision | {"model_type": "clip_vision_model"},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )


MAKERS = {"llava": (llama_tokenizer, llava_processor, llava_config, transformers.LlavaForConditionalGeneration)}


def make_model(family, tokenizer, dtype=torch.float64):
    """Always with the same random weights, as if the norms were trained."""
    *_, config, model = MAKERS[family]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = model(config(tokenizer))
        if dtype == torch.float64:
            _keep_float64(model)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            elif "norm" in name or "bias" in name:
                nn.init.normal_(parameter, float("weight" in name), 0.2)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return quick(model).to(dtype).eval()
