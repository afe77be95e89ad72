"""Tiny random models of each family, and oracles: no hook and no rule of the core."""

import copy
import inspect

import pytest
import torch
import transformers
from conftest import CHAT_TEMPLATE, SPECIAL, _keep_float64, quick
from torch import nn

from smooth_gradcam import get_model_layers

PROMPT = "What is it?"
ANSWER = "the red cat 猫"


FAMILIES = ("qwen2_vl", "qwen3_vl", "qwen3_vl_moe")
ALL = (*FAMILIES, "qwen2_5_vl")  # where its own tests have nothing
CLASSES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
CLASSES["qwen3_vl_moe"] = "Qwen3VLMoe"
SIDES = {"qwen2_vl": 28, "qwen2_5_vl": 28, "qwen3_vl": 32, "qwen3_vl_moe": 32}  # pixels of an image token


LAYERS = 5


TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "max_position_embeddings": 1024}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 1, 1]}}
OF_FAMILY = {
    "qwen2_vl": (
        {"use_sliding_window": False},
        {"depth": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 2},
    ),
    "qwen2_5_vl": (
        {"use_sliding_window": False},
        {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
        | {"fullatt_block_indexes": [1], "window_size": 112},
    ),
    "qwen3_vl": (
        {"head_dim": 8},
        {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
        | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
    ),
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
OF_FAMILY["qwen3_vl_moe"] = EXPERTS, OF_FAMILY["qwen3_vl"][1]


of_all = pytest.mark.parametrize("family", ALL, indirect=True)


def make_processor(family, tokenizer):
    """As the published checkpoints have it: Qwen3-VL's patches are 16 pixels wide, its pixels go from -1 to 1."""
    side = SIDES[family]
    images = {"min_pixels": 4 * side**2, "max_pixels": 200 * side**2}
    if family.startswith("qwen3_vl"):
        images = {"size": {"shortest_edge": 4 * side**2, "longest_edge": 200 * side**2}}
        images |= {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    videos = {"size": {"shortest_edge": 4 * side**2, "longest_edge": 800 * side**2}}
    name = CLASSES[family].removesuffix("Moe")
    videos = getattr(transformers, f"{name.replace('2_5_', '2')}VideoProcessor")(**videos)
    make = getattr(transformers, f"{name}Processor")
    return make(transformers.Qwen2VLImageProcessor(**images), tokenizer, videos, chat_template=CHAT_TEMPLATE)


def make_random(family, tokenizer, dtype=torch.float64):
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in SPECIAL}
    text, vision = OF_FAMILY[family]
    config = getattr(transformers, f"{CLASSES[family]}Config")(
        text_config=TEXT | text | {"vocab_size": len(tokenizer)},
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = getattr(transformers, f"{CLASSES[family]}ForConditionalGeneration")(config)
        if dtype == torch.float64:
            _keep_float64(model)
            if "Moe" in CLASSES[family] and hasattr(model, "set_experts_implementation"):  # transformers 5
                model.set_experts_implementation("eager")  # the usual kernel has no float64
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            elif "norm" in name or "bias" in name:  # as if they were trained
                nn.init.normal_(parameter, float("weight" in name), 0.2)
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return quick(model).to(dtype).eval()


def decoder(model):
    return get_model_layers(model)[0]


def norm_with(norm, denominator):
    """An RMSNorm's forward in its own dtype, x / denominator(x)."""
    return lambda x: norm.weight * (x / denominator((x.square().mean(-1, keepdim=True) + norm.eps).sqrt()))


def layer_norm_with(norm, denominator):
    def forward(x):
        spread = denominator((x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt())
        return norm.weight * ((x - x.mean(-1, keepdim=True)) / spread) + norm.bias

    return forward


def half(x, part=0.5):
    return part * x + (1 - part) * x.detach()


def experts_by_the_rules(block):
    """All experts for all tokens, weighted by the shares of each token's best, which are constants."""
    weight, experts = block.gate.weight, block.experts
    first, last = experts.gate_up_proj, experts.down_proj
    if first.shape[1] == weight.shape[1] != first.shape[2]:  # transformers 4
        first, last = first.mT, last.mT

    def forward(x):
        shares = (x @ weight.T).softmax(-1, dtype=torch.float32)  # whatever the model's dtype
        shares = shares * (shares >= shares.sort(-1).values[..., -EXPERTS["num_experts_per_tok"], None])
        shares = (shares / shares.sum(-1, keepdim=True)).to(x)
        gate, up = torch.einsum("...c,eic->...ei", x, first).chunk(2, dim=-1)
        product = half(gate * (experts.act_fn(gate) / gate).detach()) * half(up)
        result = torch.einsum("...e,...ei,eci->...c", shares.detach(), product, last)
        return (result, None) if isinstance(block.gate, nn.Linear) else result  # transformers 4 gives the logits, too

    return forward


def mlp_by_the_rules(mlp):
    if hasattr(mlp, "experts"):
        return experts_by_the_rules(mlp)

    def forward(x):
        if hasattr(mlp, "gate_up_proj"):  # GLM-4V
            (gate, up), act = mlp.gate_up_proj(x).chunk(2, dim=-1), mlp.activation_fn
        else:
            gate, up, act = mlp.gate_proj(x), mlp.up_proj(x), mlp.act_fn
        return mlp.down_proj(half(gate * (act(gate) / gate).detach()) * half(up))

    return forward


def attention_by_the_rules(attention):
    """Softmax attention whose products share their relevance half and half; rotations are those of the model."""
    module = inspect.getmodule(type(attention))
    of_three = hasattr(module, "apply_multimodal_rotary_pos_emb")  # Qwen2-VL in transformers 4

    def turned(q, k, cos, sin):
        if of_three and cos.dim() == 4:
            section = (attention.config.rope_scaling or {})["mrope_section"]
            return module.apply_multimodal_rotary_pos_emb(q, k, cos, sin, section)
        return module.apply_rotary_pos_emb(q, k, cos, sin)

    def forward(hidden_states, position_embeddings, attention_mask=None, **_):
        q, k, v = (
            proj(hidden_states).unflatten(-1, (-1, attention.head_dim))
            for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = turned(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.transpose(1, 2).repeat_interleave(groups, 1)
        scores = half(q) @ half(k).transpose(2, 3) * attention.scaling
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        if attention_mask is not None:  # of sliding windows, and pictures whose tokens see each other
            hidden = ~attention_mask if attention_mask.dtype == torch.bool else attention_mask < 0
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        mixed = half(weights) @ half(v)
        return attention.o_proj(mixed.transpose(1, 2).flatten(2)), None

    return forward


def by_the_book(model, rules):
    """A copy of the model whose plain gradients are those of the rules."""
    model = copy.deepcopy(model)
    constant = (lambda size: size) if rules == "plain" else torch.Tensor.detach
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = norm_with(module, constant)
        elif type(module) is nn.LayerNorm:
            module.forward = layer_norm_with(module, constant)
    for layer in decoder(model) if rules == "attnlrp" else ():
        layer.mlp.forward = mlp_by_the_rules(layer.mlp)
        layer.self_attn.forward = attention_by_the_rules(layer.self_attn)
    return model


def autograd(model, reading, modules, answer, at_input=True):
    """{module's place in the list: (features, gradient)} of the answer's logits: full graph, full logits."""
    ids = reading.inputs["input_ids"].new_tensor([answer])
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    more |= dict.fromkeys(("mm_token_type_ids", "token_type_ids"), torch.zeros_like(ids))  # the latter: Gemma 3
    inputs = {
        name: torch.cat([value, more[name]], dim=1) if name in more else value for name, value in reading.inputs.items()
    }
    seen = {}

    def keep(i, tensor):
        seen[i] = tensor.clone()
        return seen[i].clone()  # that nothing is added to in place

    handles = []
    for i, module in enumerate(modules):
        if at_input:
            hook = lambda m, args, i=i: (keep(i, args[0]), *args[1:])  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
        else:

            def hook(m, args, out, i=i):
                return (keep(i, out[0]), *out[1:]) if isinstance(out, tuple) else keep(i, out)

            handles.append(module.register_forward_hook(hook))
    logits = model(**inputs, use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    start = reading.inputs["input_ids"].shape[1] - 1
    score = sum(logits[start + i, token] for i, token in enumerate(answer))
    gradients = torch.autograd.grad(score, list(seen.values()), allow_unused=True)
    return {
        i: (a.detach(), torch.zeros_like(a) if g is None else g)
        for (i, a), g in zip(seen.items(), gradients, strict=True)
    }


def map_by_hand(features, gradient, method):
    """(N, C) x 2 -> (N,): the formulas once more."""
    features, gradient = features.numpy(), gradient.numpy()
    if method == "paper":
        return (features * gradient.mean(0)).sum(1).clip(0)
    size = (features**2).mean(1, keepdims=True) ** 0.5
    features, gradient = features / size - (features / size).mean(0), gradient * size
    own = (features * gradient).sum(1).clip(0)
    pooled = (features * (own[:, None] * gradient).sum(0) / own.sum()).sum(1).clip(0)
    return {"gradcam": pooled, "hirescam": own, "product": (pooled**3 * own) ** 0.25}[method]
