"""The demo model's configuration, tokenizer and processor, and how they are saved for transformers 4.57 and 5."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import scenes
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
MIN_PIXELS, MAX_PIXELS = 49 * 784, 196 * 784  # 49 to 196 image tokens of 28 x 28 pixels, the sizes trained on
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# Qwen2's own division of text into words, so that its tokenizer class reads our vocabulary as it was made.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(folder: Path):
    """A byte-level BPE tokenizer whose vocabulary is learned from questions and answers on scenes."""
    rng = np.random.default_rng(0)
    text = ["system\nYou are a helpful assistant.\nuser\nassistant\n"] * 50
    for seed in range(1500):
        scene = scenes.make_scene(seed, size=(280, 280))
        for topic in ("describe", "list", "where", "there", "count", "place", "beside"):
            text.extend(scenes.ask(scene, rng, topic))
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(text, trainers.BpeTrainer(vocab_size=1000, min_frequency=20, initial_alphabet=alphabet))
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    learned = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(learned["vocab"], ensure_ascii=False))
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in learned["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "bos_token": None,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "model_max_length": 32768,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return AutoTokenizer.from_pretrained(folder)


def build_processor(folder: Path) -> Qwen2_5_VLProcessor:
    """The real processor classes with our vocabulary and image sizes; its files are written to `folder`."""
    tokenizer = build_tokenizer(folder)
    common = {
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_PIXELS,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
        "processor_class": "Qwen2_5_VLProcessor",
    }
    image = {"image_processor_type": "Qwen2VLImageProcessor", **common}
    video = {"video_processor_type": "Qwen2VLVideoProcessor", **common}
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=2))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor.from_pretrained(folder),
        tokenizer,
        Qwen2VLVideoProcessor.from_pretrained(folder),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(layers: int, tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL with random weights, hidden size 96 in both towers."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text = {
        "vocab_size": -(-len(tokenizer) // 8) * 8,
        "hidden_size": 96,
        "intermediate_size": 144,
        "num_hidden_layers": layers,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "max_window_layers": layers,
        "rms_norm_eps": 1e-6,
        # Lower than usual: the slowest of eight rotary frequencies still has to tell columns of a small image apart.
        "rope_theta": 20.0,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": True,
        "initializer_range": 0.06,
    }
    vision = {
        "depth": 4,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_heads": 3,
        "out_hidden_size": 96,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
        "initializer_range": 0.06,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        initializer_range=0.06,
    )
    config._attn_implementation = "sdpa"
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        pad_token_id=ids["<|endoftext|>"],
    )
    return model


def save(model, folder: Path) -> None:
    """Weights as safetensors, and a config.json that transformers 4.57 reads as well as 5."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text = config["text_config"]
    rope = text.get("rope_parameters") or text["rope_scaling"]
    text["rope_theta"] = rope["rope_theta"] = rope.get("rope_theta", text.get("rope_theta"))
    text["rope_scaling"] = {"type": "mrope", "rope_type": "default", "mrope_section": rope["mrope_section"]}
    text["tie_word_embeddings"] = config["tie_word_embeddings"] = bool(model.config.tie_word_embeddings)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
