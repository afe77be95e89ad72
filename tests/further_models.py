"""Tiny random models of the families beside Qwen-VL: transformers' own classes with their real processor classes."""

import json

import torch
import transformers
from conftest import quick
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel
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


MERGES = ["c a", "ca t", "Ġ cat", "r e", "re d", "Ġ red", "Ġ t", "h e", "t he", "d o", "do g", "Ġ dog"]
INTERN_TEMPLATE = (  # as in OpenGVLab/InternVL3-1B-hf
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(folder, special, **more):
    """A tokenizer of Qwen2's class with these special tokens, the first of which ends an answer."""
    words = sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES] + special
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    config = {"eos_token": special[0], "pad_token": special[1], "unk_token": None, "bos_token": None}
    config |= {"tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": special[1:]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | more))
    return AutoTokenizer.from_pretrained(folder)


def intern_tokenizer(folder):
    extra = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    extra |= {"video_token": "<video>"}
    special = ["<|im_end|>", "<|endoftext|>", "<|im_start|>", *extra.values()]
    return byte_tokenizer(folder, special, extra_special_tokens=extra)


def intern_processor(tokenizer, **tiles):
    """One tile of 6 x 6 image tokens, of 84 pixels, where the published one has 16 x 16 on 448."""
    size = {"height": 84, "width": 84}
    images = transformers.GotOcr2ImageProcessor(size=size, **(tiles or {"max_patches": 1}))
    videos = transformers.InternVLVideoProcessor(size=size)
    make = transformers.InternVLProcessor
    return make(images, tokenizer, videos, image_seq_length=36, chat_template=INTERN_TEMPLATE)


def tiled_processor(tokenizer):
    """Up to six tiles, and a thumbnail behind them."""
    return intern_processor(tokenizer, max_patches=6)


def intern_config(tokenizer):
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.InternVLConfig(
        text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(tokenizer)},
        vision_config=vision | {"image_size": [84, 84], "patch_size": [7, 7]},
        image_seq_length=36,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        tie_word_embeddings=False,
    )


GEMMA_TEMPLATE = (  # as in google/gemma-3-4b-it
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' }}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def gemma_tokenizer(folder):
    """Steps as in google/gemma-3-4b-it: blanks as U+2581, none before a text, bytes as a fallback."""
    merges = [("c", "a"), ("ca", "t"), ("▁", "cat"), ("r", "e"), ("re", "d"), ("▁", "red"), ("h", "e"), ("t", "he")]
    merges += [("d", "o"), ("do", "g"), ("▁", "dog")]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    words = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    words += [chr(code) for code in range(33, 127)] + ["".join(pair) for pair in merges]
    model = models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    extra = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    special += [*extra.values(), "<start_of_turn>", "<end_of_turn>"]
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    config |= {"pad_token": "<pad>", "extra_special_tokens": extra, "add_bos_token": True, **extra}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(folder)


def gemma_processor(tokenizer):
    """6 x 6 image tokens, each of 2 x 2 patches, on 84 pixels, where the published one has 16 x 16 on 896."""
    images = transformers.Gemma3ImageProcessor(
        size={"height": 84, "width": 84}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return transformers.Gemma3Processor(images, tokenizer, chat_template=GEMMA_TEMPLATE, image_seq_length=36)


def gemma_config(tokenizer):
    """Two layers with a sliding window that is shorter than the prompt, and two without."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 84, "patch_size": 7, "model_type": "siglip_vision_model"}
    text = {"vocab_size": len(tokenizer), "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 48}
    text |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "pad_token_id": 0}
    return transformers.Gemma3Config(
        text_config=TEXT | text,
        vision_config=vision,
        mm_tokens_per_image=36,
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
    )


GLM_TEMPLATE = (  # as in zai-org/GLM-4.1V-9B-Thinking
    "[gMASK]<sop>\n{% for message in messages %}<|{{ message['role'] }}|>\n{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<|begin_of_image|><|image|><|end_of_image|>"
    "{% elif item['type'] == 'video' %}<|begin_of_video|><|video|><|end_of_video|>"
    "{% else %}{{ item['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def glm_tokenizer(folder):
    special = ["<|user|>", "<|endoftext|>", "[gMASK]", "<sop>", "<|assistant|>"]
    for kind in ("image", "video"):
        special += [f"<|begin_of_{kind}|>", f"<|{kind}|>", f"<|end_of_{kind}|>"]
    return byte_tokenizer(folder, special)


def glm_processor(tokenizer):
    size = {"shortest_edge": 2 * 84 * 84, "longest_edge": 2 * 200 * 28 * 28}  # of two frames
    images, videos = transformers.Glm4vImageProcessor(size=size), transformers.Glm4vVideoProcessor()
    return transformers.Glm4vProcessor(images, tokenizer, videos, chat_template=GLM_TEMPLATE)


def glm_config(tokenizer):
    ids = {f"{kind}_token_id": tokenizer.convert_tokens_to_ids(f"<|{kind}|>") for kind in ("image", "video")}
    for kind in ("image", "video"):
        ids[f"{kind}_start_token_id"] = tokenizer.convert_tokens_to_ids(f"<|begin_of_{kind}|>")
        ids[f"{kind}_end_token_id"] = tokenizer.convert_tokens_to_ids(f"<|end_of_{kind}|>")
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0, "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    return transformers.Glm4vConfig(
        text_config=TEXT | {"vocab_size": len(tokenizer), "rope_scaling": rope, "pad_token_id": None},
        vision_config=vision | {"image_size": 84, "patch_size": 14},
        tie_word_embeddings=False,
        **ids,
    )


ONEVISION_TEMPLATE = (  # as in llava-hf/llava-onevision-qwen2-0.5b-ov-hf
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PINPOINTS = [[84 * rows, 84 * columns] for rows in range(1, 4) for columns in range(1, 4)]


def onevision_tokenizer(folder):
    extra = {"image_token": "<image>", "video_token": "<video>"}
    return byte_tokenizer(folder, ["<|im_end|>", "<|endoftext|>", "<|im_start|>", *extra.values()])


def onevision_processor(tokenizer):
    """Tiles of 6 x 6 image tokens, of 84 pixels, and no more than those of four; as published: 27 x 27, 384, nine."""
    size = {"height": 84, "width": 84}
    images = transformers.LlavaOnevisionImageProcessor(
        size=size, image_grid_pinpoints=PINPOINTS, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    more = {"num_image_tokens": 36, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_4"}
    videos = transformers.LlavaOnevisionVideoProcessor(size=size)
    return transformers.LlavaOnevisionProcessor(images, tokenizer, videos, chat_template=ONEVISION_TEMPLATE, **more)


def onevision_config(tokenizer):
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 84, "patch_size": 14, "model_type": "siglip_vision_model", "vision_use_head": False}
    ids = {f"{kind}_token_index": tokenizer.convert_tokens_to_ids(f"<{kind}>") for kind in ("image", "video")}
    return transformers.LlavaOnevisionConfig(
        text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(tokenizer)},
        vision_config=vision,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_4",
        **ids,
    )


MAKERS = {
    "llava_onevision": (
        onevision_tokenizer,
        onevision_processor,
        onevision_config,
        transformers.LlavaOnevisionForConditionalGeneration,
    ),
    "glm4v": (glm_tokenizer, glm_processor, glm_config, transformers.Glm4vForConditionalGeneration),
    "gemma3": (gemma_tokenizer, gemma_processor, gemma_config, transformers.Gemma3ForConditionalGeneration),
    "llava": (llama_tokenizer, llava_processor, llava_config, transformers.LlavaForConditionalGeneration),
    "internvl": (intern_tokenizer, intern_processor, intern_config, transformers.InternVLForConditionalGeneration),
    "internvl tiles": (intern_tokenizer, tiled_processor, intern_config, transformers.InternVLForConditionalGeneration),
}


def keep_float64(model):
    """PyTorch's norms in the place of those of transformers, which compute in float32."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                eps = child.variance_epsilon if hasattr(child, "variance_epsilon") else child.eps
                setattr(module, name, nn.RMSNorm(child.weight.shape, eps=eps))


def make_model(family, tokenizer, dtype=torch.float64):
    """Always with the same random weights, as if the norms were trained."""
    *_, config, model = MAKERS[family]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = model(config(tokenizer))
        if dtype == torch.float64:
            keep_float64(model)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            elif "norm" in name or "bias" in name:
                nn.init.normal_(parameter, float("weight" in name), 0.2)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return quick(model).to(dtype).eval()
