"""Relevance at the layers' inputs against LXT (LRP-eXplains-Transformers), the authors' own code of AttnLRP.

Where `lxt` is installed and can be imported (version 2.1 with transformers 4.57), its patches are compared; everywhere,
its rules as its source has them, written down here once more. Unlike ours they divide gradients inside of the attention
function, behind the rotation, and behind the product of the gated MLP.
"""

import functools

import pytest
import torch
from conftest import make_image
from family_models import autograd, decoder, make_processor, make_random
from further_models import MAKERS, make_model
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from common.passes import watched_passes
from smooth_gradcam import Settings, explain, noisy_passes, read

CODE = {"llava": modeling_llama, "internvl": modeling_qwen2, "gemma3": modeling_gemma3}
CODE |= {"qwen2_5_vl": modeling_qwen2_5_vl}  # for which LXT has no table, but one can be given


@pytest.fixture(params=CODE)
def family(request):
    return request.param


@pytest.fixture
def reading(request, family, tmp_path):
    """In float32, with the norms of transformers, which are those that LXT patches."""
    if family in MAKERS:
        tokenizer = MAKERS[family][0](tmp_path)
        model, processor = make_model(family, tokenizer, torch.float32), MAKERS[family][1](tokenizer)
    else:
        tokenizer = request.getfixturevalue("tokenizer")
        model, processor = make_random(family, tokenizer, torch.float32), make_processor(family, tokenizer)
    model.set_attn_implementation("eager")
    return read(model, processor, make_image(168, 112), "What is it?", "the red cat")


class Divided(torch.autograd.Function):
    """`divide_gradient` of lxt/efficient/rules.py."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient / ctx.factor, None


class Identity(torch.autograd.Function):
    """`identity_rule_implicit` of the same file."""

    @staticmethod
    def forward(ctx, f, x):
        y = f(x)
        ctx.save_for_backward(y / (x + 1e-10))
        return y

    @staticmethod
    def backward(ctx, gradient):
        return None, ctx.saved_tensors[0] * gradient


def attention_of(forward, module, query, key, value, *args, **kwargs):
    """`wrap_attention_forward` of lxt/efficient/patches.py."""
    query, key, value = Divided.apply(query, 4), Divided.apply(key, 4), Divided.apply(value, 2)
    return forward(module, query, key, value, *args, **kwargs)


def gated_mlp(self, x):
    """`gated_mlp_forward`."""
    gate = Identity.apply(self.act_fn, self.gate_proj(x))
    return self.down_proj(Divided.apply(gate * self.up_proj(x), 2))


def rms_norm(self, x):
    """`rms_norm_forward`."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).detach())


def gemma_norm(self, x):
    """`gemma3_norm` of lxt/efficient/models/gemma3.py."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps).detach()


def restated(family, layer, monkeypatch):
    code = CODE[family]
    attention = functools.partial(attention_of, code.eager_attention_forward)
    monkeypatch.setattr(code, "eager_attention_forward", attention)
    monkeypatch.setattr(type(layer.mlp), "forward", gated_mlp)
    method, rule = ("_norm", gemma_norm) if family == "gemma3" else ("forward", rms_norm)
    monkeypatch.setattr(type(layer.input_layernorm), method, rule)


def original(family, layer, monkeypatch):
    efficient = pytest.importorskip("lxt.efficient", exc_type=ImportError)
    from lxt.efficient import patches
    from lxt.efficient.models import DEFAULT_MAP

    code, norm, mlp = CODE[family], type(layer.input_layernorm), type(layer.mlp)
    rules = {norm: patches.rms_norm_forward, mlp: patches.gated_mlp_forward}
    rules = {part: functools.partial(patches.patch_method, rule) for part, rule in rules.items()}
    table = DEFAULT_MAP.get(code, rules | {code: patches.patch_attention})
    for part in table.keys() - {code}:
        for method in {"forward", "_norm"} & {*vars(part)}:
            monkeypatch.setattr(part, method, getattr(part, method))  # so that it is put back
    for name in ("eager_attention_forward", "ALL_ATTENTION_FUNCTIONS"):
        monkeypatch.setattr(code, name, getattr(code, name))
    efficient.monkey_patch(code, table)


def relevance(pairs, reading):
    """(K, N): the sum over the channels of features times gradients, at the image tokens of each layer."""
    return torch.stack([(a * g).sum(-1)[0, reading.positions] for a, g in pairs.values()])


@pytest.mark.parametrize("patch", [restated, original])
def test_relevance_of_image_tokens_is_that_of_lxt(family, reading, patch, monkeypatch):
    layers, own = decoder(reading.model), {}
    settings = {rules: Settings(use_smooth=False, rules=rules) for rules in ("attnlrp", "plain")}
    for rules in settings:
        pairs = {}
        passes = watched_passes(noisy_passes, pairs.update)
        explain(reading, [(0, len(reading.answer))], range(len(layers)), settings[rules], passes=passes)
        own[rules] = relevance(pairs, reading)
    patch(family, layers[1], monkeypatch)
    theirs = relevance(autograd(reading.model, reading, layers, reading.tokens), reading)
    largest = theirs.abs().amax(1)  # (K,)
    reached = largest > 1e-6  # the last layers of a tiny model may leave next to nothing
    assert reached.sum() >= len(layers) - 1
    apart = {rules: ((one - theirs).abs().amax(1) / largest)[reached] for rules, one in own.items()}
    assert apart["attnlrp"].max() < 1e-4
    assert apart["plain"].min() > 0.05  # what differs is seen
