"""Train the demo model from nothing: python demo_model/train.py --minutes 120

A Qwen2.5-VL of the real classes learns composed scenes in three stages, each a share of the time:

1. vision: the vision tower alone learns which object covers each image token, and which place that object has;
2. core: the tower and a language model of 7 decoder layers learn questions and answers;
3. full: the language model is grown to 28 layers. In front of each core layer go three copies of it whose output
   projections are zero, so that the growth changes no answer (progressive stacking, Gong et al., ICML 2019;
   zero-initialised residual branches, Zhang et al., ICLR 2019); then all layers train on.

Several questions share an image: each sees the image and itself only (a 4-D mask; positions start again after the
image), so none can copy from another's answer. The forward below is the model's own arithmetic on the model's own
weights, for batches of one image size; `check_forward` compares it with transformers' before training starts.

Runs on CPU or one GPU. The checkpoint (build/demo_checkpoint.pt) is resumed; --output gets the model and processor.

Legend: B images, P patches of one image, N image tokens, L tokens of one packed sequence, D hidden size.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections import deque
from pathlib import Path

import numpy as np
import scenes
import torch
import torch.nn.functional as F  # noqa: N812 (the customary name)
from export import IMAGE_MEAN, IMAGE_STD, build_model, build_processor, save

STAGES = {"vision": 0.16, "core": 0.50, "full": 0.34}  # shares of --minutes
CORE_LAYERS, FULL_LAYERS = 7, 28
TOPICS = ("where", "there", "count", "place", "beside", "list", "strange")
TOPIC_WEIGHTS = (0.34, 0.26, 0.05, 0.05, 0.2, 0.06, 0.04)  # by how hard they are to learn
QUESTIONS = 6  # an image: one description and five of the topics above
WINDOW = 4  # image tokens along one side of an attention window: 112 pixels / 28


# data: scenes and packed questions, made in processes of their own


class Packer:
    """Turns questions on one image into one packed sequence."""

    def __init__(self, tokenizer):
        def ids(text):
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        self.ids = ids
        self.head = ids(
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        )
        self.image_pad, self.vision_end = ids("<|image_pad|>")[0], ids("<|vision_end|>")
        self.names = [ids(f" {kind}")[0] for kind in scenes.KINDS]
        self.turn, self.end = ids("<|im_end|>\n<|im_start|>assistant\n"), ids("<|im_end|>")

    def pack(self, pairs, h, w):
        """ids, positions (3, L), segment (0: seen by all), and whether the token is part of an answer."""
        start = len(self.head)
        after = start + max(h, w)
        ids = self.head + [self.image_pad] * (h * w) + self.vision_end
        row, column = np.divmod(np.arange(h * w), w)
        positions = [np.tile(np.arange(start), (3, 1))]
        positions.append(start + np.stack([np.zeros(h * w, int), row, column]))
        positions.append(np.full((3, 1), after))
        segment, learn = [0] * len(ids), [0] * len(ids)
        for number, (question, answer) in enumerate(pairs, 1):
            asked, said = self.ids(question) + self.turn, self.ids(answer) + self.end
            ids = ids + asked + said
            positions.append(np.tile(after + 1 + np.arange(len(asked) + len(said)), (3, 1)))
            segment += [number] * (len(asked) + len(said))
            learn += [0] * len(asked) + [1] * len(said)
        return np.array(ids), np.concatenate(positions, 1), np.array(segment), np.array(learn)


def make_batch(packer, seed, batch_size):
    """One batch of one image size, as numpy arrays (uint8 images: they travel between processes)."""
    rng = np.random.default_rng(seed)
    size = scenes.random_size(rng)
    h, w = size[0] // scenes.TOKEN, size[1] // scenes.TOKEN
    images, kinds, places, packed = [], [], [], []
    for number in range(batch_size):
        scene = scenes.make_scene((*seed, number), size=size)
        cells = scene.cells()  # -1 background, -2 undecided
        kind = np.array([scenes.KINDS.index(thing.kind) for thing in scene.objects] + [-100, len(scenes.KINDS)])
        place = np.array([thing.place for thing in scene.objects] + [-100, -100])
        images.append(soil(rng, scene.image))
        kinds.append(kind[cells].ravel())
        places.append(place[cells].ravel())
        topics = ["describe", *rng.choice(TOPICS, QUESTIONS - 1, p=TOPIC_WEIGHTS)]
        packed.append(packer.pack([scenes.ask(scene, rng, topic) for topic in topics], h, w))
    return stack(packed) | {
        "grid": (h, w),
        "names": packer.names,
        "images": np.stack(images),
        "kinds": np.stack(kinds),
        "places": np.stack(places),
    }


def stack(packed):
    """Packed sequences as arrays of one length, a multiple of 16: those of `answer_logits`."""
    length = -(-max(len(ids) for ids, *_ in packed) // 16) * 16
    pad = [length - len(ids) for ids, *_ in packed]
    return {
        "ids": np.stack([np.pad(ids, (0, p)) for (ids, *_), p in zip(packed, pad, strict=True)]),
        "positions": np.stack([np.pad(x, ((0, 0), (0, p))) for (_, x, *_), p in zip(packed, pad, strict=True)], 1),
        "segment": np.stack([np.pad(x, (0, p), constant_values=-1) for (*_, x, _), p in zip(packed, pad, strict=True)]),
        "learn": np.stack([np.pad(x, (0, p)) for (*_, x), p in zip(packed, pad, strict=True)]),
    }


def soil(rng, image):
    """A third of the images get noise of up to a tenth of the range, so that noisy copies are nothing foreign."""
    if rng.random() > 0.33:
        return image
    noise = rng.standard_normal((64, image.shape[1], 3), np.float32) * (255 * rng.uniform(0, 0.1))
    noise = np.tile(noise, (-(-image.shape[0] // 64), 1, 1))[: image.shape[0]]
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def produce(queue, tokenizer, seed, worker, workers, batch_size):
    import cv2

    cv2.setNumThreads(1)
    packer, number = Packer(tokenizer), worker
    while True:
        queue.put(make_batch(packer, (seed, number), batch_size))
        number += workers


# forward: the model's arithmetic for a batch of one image size


def rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def norm(x, module):
    return F.rms_norm(x, (x.shape[-1],), module.weight, getattr(module, "variance_epsilon", None) or module.eps)


def patches(images, device):
    """uint8 (B, H, W, 3) -> normalised (B, P, 3 * 14 * 14), patches grouped by 2 x 2 image token."""
    b, height, width, _ = images.shape
    x = torch.from_numpy(images).to(device).float() / 255
    x = (x - torch.tensor(IMAGE_MEAN, device=device)) / torch.tensor(IMAGE_STD, device=device)
    x = x.view(b, height // 28, 2, 14, width // 28, 2, 14, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)  # b h w 2 2 C 14 14
    return x.reshape(b, -1, 3 * 14 * 14)


def vision_forward(visual, images, grid):
    """(B, H, W, 3) uint8 -> image tokens (B, N, D). A still image is stored twice in time: the kernels are summed."""
    h, w = grid
    weight = visual.patch_embed.proj.weight
    x = F.linear(patches(images, weight.device), weight.sum(2).flatten(1))  # (B, P, D)
    row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    window = (row // WINDOW * w + column // WINDOW).flatten().repeat_interleave(4).to(x.device)
    outside = torch.zeros(len(window), len(window), device=x.device)
    outside.masked_fill_(window[:, None] != window[None], float("-inf"))
    row = (2 * row[..., None] + torch.tensor([0, 0, 1, 1])).flatten()
    column = (2 * column[..., None] + torch.tensor([0, 1, 0, 1])).flatten()
    heads = visual.blocks[0].attn.num_heads
    quarter = x.shape[-1] // heads // 4
    frequency = 1.0 / 10000 ** (torch.arange(quarter) / quarter)
    angle = torch.cat([row[:, None] * frequency, column[:, None] * frequency], -1).repeat(1, 2).to(x.device)
    cos, sin = angle.cos(), angle.sin()
    for index, block in enumerate(visual.blocks):
        q, k, v = block.attn.qkv(norm(x, block.norm1)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if index in visual.fullatt_block_indexes else outside
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, attn_mask=mask)
        x = x + block.attn.proj(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp(norm(x, block.norm2))
    x = norm(x, visual.merger.ln_q)
    return visual.merger.mlp(x.reshape(len(x), h * w, -1))


def language_forward(text, x, positions, mask):
    """Embeddings (B, L, D), positions (3, B, L), additive mask (B, 1, L, L) -> final hidden states (B, L, D)."""
    rotary = text.rotary_emb
    angle = positions[..., None].float() * rotary.inv_freq.to(x.device)  # (3, B, L, head / 2)
    rope = getattr(text.config, "rope_parameters", None) or text.config.rope_scaling  # transformers 4
    section = rope["mrope_section"]
    angle = torch.cat([part[i] for i, part in enumerate(angle.split(section, -1))], -1).repeat(1, 1, 2)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    for layer in text.layers:
        attention, y = layer.self_attn, norm(x, layer.input_layernorm)
        q, k, v = (
            project(y).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        k, v = (z.repeat_interleave(attention.num_key_value_groups, 1) for z in (rotate(k, cos, sin), v))
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, attn_mask=mask)
        x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        x = x + layer.mlp(norm(x, layer.post_attention_layernorm))
    return norm(x, text.norm)


def batch_mask(segment):
    """A token sees what came before it of its own segment and of segment 0. (B, L) -> additive (B, 1, L, L)."""
    length = segment.shape[1]
    same = segment[:, :, None] == segment[:, None, :]
    seen = (same | (segment[:, None, :] == 0)) & torch.ones(length, length, device=segment.device).tril().bool()
    return torch.zeros(seen.shape, device=segment.device).masked_fill_(~seen, float("-inf"))[:, None]


def answer_logits(model, batch, tokens, device):
    """Logits at the positions that predict answer tokens, and those tokens."""
    ids, positions, segment, learn = (
        torch.from_numpy(batch[name]).to(device) for name in ("ids", "positions", "segment", "learn")
    )
    x = model.model.language_model.embed_tokens(ids).clone()
    start = int((ids[0] == model.config.image_token_id).nonzero()[0])
    x = torch.cat([x[:, :start], tokens, x[:, start + tokens.shape[1] :]], 1)
    x = language_forward(model.model.language_model, x, positions, batch_mask(segment))
    here = learn[:, 1:].bool()
    return model.lm_head(x[:, :-1][here]), ids[:, 1:][here]


@torch.no_grad()
def check_forward(model, tokenizer):
    """The forward above must agree with transformers' own; raises AssertionError with the difference if not."""
    packer = Packer(tokenizer)
    for number in range(3):
        batch = make_batch(packer, (10**6, number), 1)
        first = np.isin(batch["segment"][0], (0, 1))  # the image and the first question
        batch |= {name: batch[name][..., first] for name in ("ids", "segment", "learn", "positions")}
        h, w = batch["grid"]
        tokens = vision_forward(model.model.visual, batch["images"], batch["grid"])
        ours, _ = answer_logits(model, batch, tokens, tokens.device)
        pixels = patches(batch["images"], tokens.device)[0].view(-1, 3, 1, 196).repeat(1, 1, 2, 1).flatten(1)
        ids = torch.from_numpy(batch["ids"]).to(tokens.device)
        theirs = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            pixel_values=pixels,
            image_grid_thw=torch.tensor([[1, 2 * h, 2 * w]], device=tokens.device),
        ).logits[0, :-1][torch.from_numpy(batch["learn"])[0, 1:].bool()]
        difference = (ours - theirs).abs().max().item()
        assert difference < 1e-3, f"the training forward differs from transformers' by {difference}"


# training


def grow(model, tokenizer):
    """The same function with FULL_LAYERS decoder layers: each core layer behind copies of it that add nothing yet."""
    grown = build_model(FULL_LAYERS, tokenizer)
    state, core = grown.state_dict(), model.state_dict()
    every = FULL_LAYERS // CORE_LAYERS
    for name in state:
        source = name
        if ".language_model.layers." in name:
            head, tail = name.split(".layers.")
            index, tail = tail.split(".", 1)
            source = f"{head}.layers.{int(index) // every}.{tail}"
            if int(index) % every != every - 1 and tail in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
                state[name] = torch.zeros_like(core[source])
                continue
        state[name] = core[source].clone()
    grown.load_state_dict(state)
    return grown


def build_optimizers(model, heads, stage, muon_rate, adam_rate):
    """Muon for the matrices inside the blocks (Jordan et al., 2024), AdamW for everything else."""
    matrices, others = [], []
    for name, parameter in [*model.named_parameters(), *heads.named_parameters()]:
        if stage == "vision" and "language_model" in name or name == "lm_head.weight":
            continue
        inner = parameter.ndim == 2 and (".blocks." in name or ".layers." in name or ".merger." in name)
        (matrices if inner else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def naming_loss(model, tokens, kinds, names):
    """Brings an object's image tokens near the word for it: what a question names is then easy to find."""
    on = (kinds >= 0) & (kinds < len(scenes.KINDS))
    words = model.model.language_model.embed_tokens.weight[torch.as_tensor(names, device=tokens.device)]
    tokens = F.layer_norm(tokens[on], tokens.shape[-1:])
    return F.cross_entropy(tokens @ words.T, kinds[on])


def losses(model, heads, batch, stage, device):
    """The training loss and what is worth showing of it."""
    tokens = vision_forward(model.model.visual, batch["images"], batch["grid"])  # (B, N, D)
    kinds, places = (torch.from_numpy(batch[name]).to(device) for name in ("kinds", "places"))
    by_kind, by_place = heads(tokens).float().split((len(scenes.KINDS) + 1, len(scenes.PLACES)), -1)
    loss = F.cross_entropy(by_kind.flatten(0, 1), kinds.flatten())
    loss = loss + 0.5 * F.cross_entropy(by_place.flatten(0, 1), places.flatten())
    on = places >= 0
    shown = {
        "cells": (by_kind.argmax(-1) == kinds)[on].float().mean().item(),
        "places": (by_place.argmax(-1) == places)[on].float().mean().item(),
    }
    if stage != "vision":
        logits, answer = answer_logits(model, batch, tokens, device)
        said = F.cross_entropy(logits.float(), answer)
        loss = said + 0.3 * (loss + naming_loss(model, tokens, kinds, batch["names"]))
        shown["answer"] = said.item()
        shown["tokens"] = (logits.argmax(-1) == answer).float().mean().item()
    return loss, shown


def rate(spent, step, stage):
    """Warm-up over 50 steps; the first two stages cool down a little at their end, the last one all the way."""
    warm = min(1.0, (step + 1) / 50)
    if stage == "full":
        return warm * max(0.02, min(0.7, 1.1 * (1 - spent)))
    return warm * (1.0 if spent < 0.7 else 1.0 - 0.6 * (spent - 0.7) / 0.3)


def run_stage(run, model, heads, stage, queue, device, options):
    minutes = STAGES[stage] * options.minutes
    optimizers = build_optimizers(model, heads, stage, options.muon_rate, options.adam_rate)
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    if run["optimizers"]:
        for optimizer, state in zip(optimizers, run["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    recent, last = deque(maxlen=50), time.monotonic()
    shown_at = saved_at = last
    while run["minutes"] < minutes:
        factor = rate(run["minutes"] / minutes, run["step"], stage)
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, value in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = value * factor
        batch = queue.get()
        with torch.autocast("cpu" if device == "cpu" else "cuda", torch.bfloat16, enabled=options.bfloat16):
            loss, shown = losses(model, heads, batch, stage, device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*model.parameters(), *heads.parameters()], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append(shown)
        now = time.monotonic()
        run["minutes"], run["step"], last = run["minutes"] + (now - last) / 60, run["step"] + 1, now
        if now - shown_at > 30:
            shown_at = now
            means = {name: float(np.mean([entry[name] for entry in recent])) for name in recent[-1]}
            print(f"{stage} {run['minutes']:.1f}/{minutes:.0f} min step {run['step']}", end=" ")
            print(" ".join(f"{name} {value:.4f}" for name, value in means.items()), flush=True)
        if now - saved_at > 120:
            saved_at = now
            checkpoint(run, model, heads, stage, optimizers, options)
    checkpoint(run, model, heads, stage, optimizers, options)


def checkpoint(run, model, heads, stage, optimizers, options):
    run |= {"stage": stage, "model": model.state_dict(), "heads": heads.state_dict()}
    run["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    options.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    partial = options.checkpoint.with_suffix(".partial")
    torch.save(run, partial)
    partial.replace(options.checkpoint)


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=120.0, help="training time over the three stages")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--muon_rate", type=float, default=3e-3)
    parser.add_argument("--adam_rate", type=float, default=3e-3)
    parser.add_argument("--checkpoint", type=Path, default=Path("build/demo_checkpoint.pt"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    return parser.parse_args()


def main():
    options = parse()
    torch.manual_seed(options.seed)
    tokenizer = build_processor(options.output).tokenizer
    run = {"stage": "vision", "minutes": 0.0, "step": 0, "optimizers": None}
    if options.checkpoint.exists():
        run = torch.load(options.checkpoint, map_location=options.device, weights_only=True)
    stages = list(STAGES)[list(STAGES).index(run["stage"]) :]
    layers = FULL_LAYERS if run["stage"] == "full" else CORE_LAYERS
    model = build_model(layers, tokenizer).to(options.device)
    heads = torch.nn.Linear(model.config.text_config.hidden_size, len(scenes.KINDS) + 1 + len(scenes.PLACES))
    heads = heads.to(options.device)
    if "model" in run:
        model.load_state_dict(run.pop("model"))
        heads.load_state_dict(run.pop("heads"))
    check_forward(model, tokenizer)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue(4)
    stream = options.seed * 1000 + run["step"]  # a resumed run sees new scenes
    for worker in range(options.workers):
        arguments = (queue, tokenizer, stream, worker, options.workers, options.batch_size)
        context.Process(target=produce, args=arguments, daemon=True).start()
    for stage in stages:
        if stage != run["stage"]:
            run |= {"stage": stage, "minutes": 0.0, "step": 0, "optimizers": None}
            if stage == "full":
                model = grow(model.cpu(), tokenizer).to(options.device)
        run_stage(run, model, heads, stage, queue, options.device, options)
    save(model.cpu(), options.output)
    print(f"saved to {options.output}")


if __name__ == "__main__":
    main()
