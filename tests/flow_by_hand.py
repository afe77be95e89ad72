"""What the tests of flow, knockout and decoder share: the texts of a reading, its groups and its full attention."""

import copy

import torch
from test_core import forced_by_hand

from smooth_gradcam import find_target

LAYERS = 3  # of the model


GROUPS = ["system", "image", "user", "answer"]


def prompt_length(reading):
    return reading.inputs["input_ids"].shape[1]


def full_attention(reading):
    """Attention (K, heads, L, L) as transformers gives it of one plain forward of the whole."""
    model = copy.deepcopy(reading.model)
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        output = model(**forced_by_hand(reading.inputs, reading.tokens), output_attentions=True)
    return torch.cat(output.attentions).numpy()


def chosen(reading, word):
    """The span of the word, None for all, and the positions that predict its tokens."""
    span = word and find_target(reading.answer, word)
    part = reading.tokens_of(span) if span else range(len(reading.tokens))
    return span, [prompt_length(reading) - 1 + i for i in part]


def names_by_hand(reading):
    """The group of each of the L positions."""
    ids = reading.inputs["input_ids"][0].tolist()
    seen = [token == reading.model.config.image_token_id for token in ids]
    first, count = seen.index(True), sum(seen)
    user = len(ids) - first - count - 1
    return ["system"] * first + ["image"] * count + ["user"] * user + ["answer"] * (1 + len(reading.tokens))
