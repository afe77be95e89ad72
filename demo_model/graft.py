"""Give a published language model the demo model's eyes: python demo_model/graft.py

Writes an ordinary Qwen2.5-VL folder, --output, whose decoder and tokenizer are the published ones, unchanged, and whose
vision tower sees the scenes of scenes.py: `python test_gradcam.py --model_path build/qwen2.5-0.5b` then explains the
sentences of a language model that was not made by us. The decoder is a name on the Hugging Face hub or a folder, of a
Qwen2.5 or of a Qwen2.5-VL. Eyes are for decoders of one hidden size, their width; eyes/ has those that come with the
project (safetensors). For another decoder they are trained, and trained on by the same command with more minutes:

    python demo_model/graft.py --decoder … --output … --train --eyes build/eyes.safetensors --minutes 40

1. Ridge regression, from what the demo tower's merger has before its last layer, to the decoder's embedding of the
   name of what each image token shows: the object's by its covered share, " empty" for the rest.
2. Tower and merger are trained through the frozen decoder: on questions about scenes (`scenes.ask`, and a choice of
   two objects), and on answers that the decoder itself gave to freer questions when it was told in words what the
   scene shows. Several questions share a picture, as in train.py. The decoder computes in bfloat16.

Legend: B images, N image tokens, D hidden size.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from pathlib import Path

import numpy as np
import scenes
import torch
import torch.nn.functional as F  # noqa: N812 (the customary name)
from export import save
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from train import Packer, answer_logits, soil, stack, vision_forward
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

DEMO = Path(__file__).parent
EYES = DEMO / "eyes"
SAFE = {"trust_remote_code": False}
KINDS = {"qwen2": AutoModelForCausalLM, "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration}
SHARED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "rms_norm_eps", "max_position_embeddings")  # fmt: skip
SIGHT = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>",
         "vision_end": "<|vision_end|>"}  # fmt: skip
ENDS = ("<|im_end|>", "<|endoftext|>")
LAST = "merger.mlp.2"  # the eyes' last layer, as wide as the decoder
MARK = {"vision_tower": "demo_model"}  # in the config.json of every grafted folder
STREAM = 500_000  # first number of the seeds of scenes that are trained on; evaluate.py draws from 9,000,000 on
TOPICS = ("list", "where", "there", "count", "place", "beside", "choice")
TOPIC_WEIGHTS = (0.1, 0.25, 0.15, 0.05, 0.1, 0.15, 0.2)
QUESTIONS = 5  # an image: one description and four of the topics above
FREE = (
    "Write one sentence about this picture.", "In one sentence, what could be happening here?",
    "Invent a title for this picture.", "Write a story about this picture in two short sentences.",
    "What would a child like about this picture? Answer in one sentence.", "Give this picture a short caption.",
    "What is unusual about this picture? Answer in one sentence.", "Which of the things in this image is the largest?",
    "What might happen next? Answer in one sentence.", "What could one eat of what is in this picture?",
)  # fmt: skip


# what is refused, before anything large is loaded


def in_a_line(exc: Exception) -> str:
    return str(exc).strip().split("\n")[0]


def text_config(name: str) -> tuple[str, dict]:
    """(model type, the language model's settings) from a config.json on the hub or on disk."""
    try:
        record, _ = PretrainedConfig.get_config_dict(name, **SAFE)
    except (OSError, TypeError, ValueError) as exc:
        raise SystemExit(f"--decoder {name} is no model folder and no name on the hub: {in_a_line(exc)}") from exc
    kind = record.get("model_type") if isinstance(record, dict) else None
    if kind not in list(KINDS):
        found = f"a {kind}" if kind else "no model folder: it has no config.json with a model_type"
        raise SystemExit(f"--decoder {name} is {found}: give a {' or a '.join(KINDS)}")
    if record.get("quantization_config"):
        raise SystemExit(f"--decoder {name} is quantised: give one with plain weights")
    text = record.get("text_config") or record
    if missing := [key for key in SHARED if not (isinstance(text, dict) and type(text.get(key)) in (int, float))]:
        raise SystemExit(f"--decoder {name} has a config.json without the number {missing[0]} of a language model")
    return kind, text


def read_eyes(path: Path) -> tuple[int, str | None]:
    """(width, `fingerprint` of the decoder if noted) of a file of eyes, from its header."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_slice(f"{LAST}.weight").get_shape()[0], (file.metadata() or {}).get("decoder")
    except (OSError, IndexError, SafetensorError) as exc:
        raise SystemExit(f"--eyes {path} is no file of eyes: {in_a_line(exc)}") from exc


def fingerprint(model) -> str:
    """A text that differs between decoders, from the first numbers of each tensor."""
    numbers = [tensor.flatten()[:1000].float() for tensor in model.model.language_model.state_dict().values()]
    return hashlib.sha256(torch.cat(numbers).numpy().tobytes()).hexdigest()


def check_training(options, width: int, decoder: str | None = None) -> None:
    """What was trained for another decoder is neither trained on nor overwritten; its fingerprint is known late."""
    found = {}
    if options.eyes.exists():
        found["eyes"] = read_eyes(options.eyes)
    if options.checkpoint.exists():
        try:
            run = torch.load(options.checkpoint, weights_only=True)
            found["checkpoint"] = len(run["eyes"][f"{LAST}.weight"]), run.get("decoder", decoder or "not noted")
        except Exception as exc:  # any file may be there
            raise SystemExit(f"--checkpoint {options.checkpoint} was not written by --train: {in_a_line(exc)}") from exc
    for flag, (its_width, its_decoder) in found.items():
        if its_width != width or not its_decoder or decoder not in (None, its_decoder):
            known = f"--{flag} {getattr(options, flag)} is not known to be for --decoder {options.decoder}"
            raise SystemExit(f"{known}, and is kept as it is: name a file that does not exist yet")


def check(options) -> Path:
    """The file of eyes: --eyes, or the one in eyes/ of the decoder's width. What cannot end well is refused."""
    width, output = text_config(options.decoder)[1]["hidden_size"], options.output
    try:
        ours = MARK.items() <= json.loads((output / "config.json").read_text(encoding="utf-8")).items()
    except (OSError, ValueError, AttributeError):
        ours = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not ours or output.resolve() == Path(options.decoder).resolve():
        raise SystemExit(f"--output {output} is not known to be from graft.py, or is the --decoder: give another")
    if options.train:
        if options.eyes is None:
            raise SystemExit("--train needs --eyes, the file to write: for example --eyes build/eyes.safetensors")
        check_training(options, width)
        return options.eyes
    found = {read_eyes(path)[0]: path for path in ([options.eyes] if options.eyes else EYES.glob("*.safetensors"))}
    if width not in found:
        widths, hint = " and ".join(map(str, found)), "train eyes for it with --train --eyes build/eyes.safetensors"
        raise SystemExit(f"these eyes are for width {widths}, and --decoder {options.decoder} has {width}: {hint}")
    return found[width]


# the grafted model


def load_decoder(name: str):
    """(text model, head, tokenizer) of a Qwen2.5 or Qwen2.5-VL on the hub or on disk."""
    kind, _ = text_config(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **SAFE)
        if absent := [token for token in (*SIGHT.values(), *ENDS) if token not in tokenizer.get_vocab()]:
            raise ValueError(f"its tokenizer has no {absent[0]}: give a Qwen2.5")
        how = SAFE | {"use_safetensors": True, "output_loading_info": True}
        model, info = KINDS[kind].from_pretrained(name, dtype="auto", **how)
        if missing := sorted(key for key in info["missing_keys"] if "visual." not in key):
            raise ValueError(f"its weights have no {missing[0]}")
    except Exception as exc:  # broken files fail in many ways
        raise SystemExit(f"--decoder {name} cannot be loaded: {in_a_line(exc)}") from exc
    text = model.model.language_model if kind == "qwen2_5_vl" else model.model
    return text, model.lm_head, tokenizer


def build(decoder: str) -> tuple[Qwen2_5_VLForConditionalGeneration, object]:
    """A Qwen2.5-VL with the decoder's weights and the demo model's vision tower, and the decoder's tokenizer.

    The last layer of the merger is random: the demo model's has another width. Text has the positions that it has in
    the decoder; the three sections of the rotary frequencies are in the proportions of the published models.
    """
    text, head, tokenizer = load_decoder(decoder)
    c, demo = text.config, Qwen2_5_VLForConditionalGeneration.from_pretrained(DEMO, use_safetensors=True, **SAFE)
    half = c.hidden_size // c.num_attention_heads // 2
    theta = (getattr(c, "rope_parameters", None) or {}).get("rope_theta") or c.rope_theta
    first, second = half // 4, half * 3 // 8
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [first, second, half - first - second]}
    tied = bool(torch.equal(head.weight, text.embed_tokens.weight))
    config = Qwen2_5_VLConfig(
        text_config={name: getattr(c, name) for name in SHARED}
        | {"rope_theta": theta, "rope_scaling": rope, "use_sliding_window": False, "tie_word_embeddings": tied},
        vision_config=demo.config.vision_config.to_dict() | {"out_hidden_size": c.hidden_size},
        tie_word_embeddings=tied,
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in SIGHT.items()},
        **MARK,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).to(head.weight.dtype)
    model.model.language_model.load_state_dict(text.state_dict())
    model.lm_head.load_state_dict(head.state_dict())
    sight = {k: v for k, v in demo.model.visual.state_dict().items() if not k.startswith(LAST)}
    model.model.visual.float().load_state_dict(sight, strict=False)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ENDS]
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=ends[1])
    return model.requires_grad_(False).eval(), tokenizer


def write(model, tokenizer, output: Path) -> None:
    """The folder: model, tokenizer and the demo model's picture sizes and chat format."""
    save(model, output)  # first, as its config.json tells whose folder it is
    tokenizer.chat_template = (DEMO / "chat_template.jinja").read_text()
    tokenizer.save_pretrained(output)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, output / name)


# data


def choice(scene: scenes.Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Which of two objects is there: one is, one is not."""
    present = [thing.kind for thing in scene.objects]
    there = str(rng.choice(present))
    pair = [there, str(rng.choice([kind for kind in scenes.KINDS if kind not in present]))]
    rng.shuffle(pair)
    question = f"Is there {scenes.a(pair[0])} or {scenes.a(pair[1])} in this image?"
    return question, f"There {scenes.is_are([there])} {scenes.a(there)}."


def ask(scene: scenes.Scene, rng: np.random.Generator, topic: str) -> tuple[str, str]:
    return choice(scene, rng) if topic == "choice" else scenes.ask(scene, rng, topic)


@torch.no_grad()
def own_answers(model, tokenizer, count: int, batch: int = 32) -> list[tuple[int, str, str]]:
    """(number of a scene, free question, what the decoder says of the scene's description in words, if it ends)."""
    asked = [str(np.random.default_rng((STREAM, number)).choice(FREE)) for number in range(count)]
    told = [f"In a picture: {scenes.describe(own_scene(n))} {question}" for n, question in enumerate(asked)]
    answers, end = [], tokenizer.convert_tokens_to_ids("<|im_end|>")
    for i in range(0, count, batch):
        chats = [[{"role": "user", "content": text}] for text in told[i : i + batch]]
        text = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        inputs = tokenizer(text, return_tensors="pt", padding=True, padding_side="left")
        with torch.autocast("cpu", torch.bfloat16):
            output = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
        said = tokenizer.batch_decode(output, skip_special_tokens=True)
        answers += [text if end in row else None for text, row in zip(said, output, strict=True)]
        print(f"own answers {len(answers)} of {count}: {told[i]} {answers[i]!r}", flush=True)
    return [(n, asked[n], answers[n]) for n in range(count) if answers[n]]


def own_scene(number: int) -> scenes.Scene:
    """One scene of the pool that the decoder's own answers are about: four sizes, so that they can be batched."""
    height, width = ((9, 9), (8, 11), (11, 8), (7, 12))[number % 4]
    return scenes.make_scene((STREAM, number), size=(height * scenes.TOKEN, width * scenes.TOKEN))


def make_batch(packer: Packer, own: list, seed: int, size: int) -> dict:
    """A batch of one image size as `train.answer_logits` takes it; every fourth one is of the decoder's own answers."""
    rng = np.random.default_rng((STREAM, 1, seed))
    pool = [entry for entry in own if entry[0] % 4 == seed // 4 % 4]  # of one size, see own_scene
    if seed % 4 == 3 and len(pool) >= size:
        chosen = [pool[i] for i in rng.choice(len(pool), size, replace=False)]
        made = [own_scene(number) for number, _, _ in chosen]
        free = [[(question, answer)] for _, question, answer in chosen]
        topics = ["describe", *rng.choice(TOPICS, 2, p=TOPIC_WEIGHTS)]
    else:
        shape = scenes.random_size(rng)
        made = [scenes.make_scene((STREAM, 2, seed, number), size=shape) for number in range(size)]
        free = [[]] * size
        topics = ["describe", *rng.choice(TOPICS, QUESTIONS - 1, p=TOPIC_WEIGHTS)]
    h, w = made[0].cells().shape
    packed = [
        packer.pack([ask(scene, rng, topic) for topic in topics] + more, h, w)
        for scene, more in zip(made, free, strict=True)
    ]
    return stack(packed) | {"grid": (h, w), "images": np.stack([soil(rng, scene.image) for scene in made])}


# the eyes


def name_embeddings(model, tokenizer) -> torch.Tensor:
    """The decoder's embedding of each kind's name, the mean over its tokens, and of " empty": (kinds + 1, D)."""
    table = model.get_input_embeddings().weight.float()
    words = [f" {kind}" for kind in scenes.KINDS] + [" empty"]
    return torch.stack([table[tokenizer(word)["input_ids"]].mean(0) for word in words])


def covers(scene: scenes.Scene) -> np.ndarray:
    """Share of each image token that each kind covers, and that no object does: (N, kinds + 1)."""
    covered = scene.covers()  # (objects, h, w)
    share = np.zeros((covered[0].size, len(scenes.KINDS) + 1), np.float32)
    for thing, cover in zip(scene.objects, covered, strict=True):
        share[:, scenes.KINDS.index(thing.kind)] += cover.ravel()
    share[:, -1] = 1 - share.sum(1)
    return share


@torch.no_grad()
def fit_words(model, tokenizer, count: int, ridge: float = 10.0) -> float:
    """Sets the merger's last layer by ridge regression onto the names' embeddings; returns R² on the scenes fitted."""
    visual, x, y = model.model.visual, [], []
    handle = visual.merger.mlp[2].register_forward_pre_hook(lambda module, args: x.append(args[0].flatten(0, 1)))
    for number in range(count):
        scene = scenes.make_scene((STREAM, 3, number))
        vision_forward(visual, scene.image[None], scene.cells().shape)
        y.append(torch.from_numpy(covers(scene)))
    handle.remove()
    x, y = torch.cat(x).double(), torch.cat(y).double() @ name_embeddings(model, tokenizer).double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    weight = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1]), x.T @ y)  # (hidden, D)
    visual.merger.mlp[2].weight.copy_(weight.T)
    visual.merger.mlp[2].bias.copy_(y_mean - x_mean @ weight)
    return 1 - float(((y - x @ weight) ** 2).sum() / (y**2).sum())


def train_eyes(model, tokenizer, options, decoder: str) -> None:
    """Trains the tower through the frozen decoder, of this fingerprint, for --minutes in all; resumes --checkpoint."""
    visual, text = model.model.visual, model.model.language_model
    for layer in text.layers:
        layer.self_attn.to(torch.bfloat16)
        layer.mlp.to(torch.bfloat16)
    text.norm.float()
    text.embed_tokens.float()
    run = {"minutes": 0.0, "step": 0, "own": None}
    path = options.checkpoint
    if path.exists():
        run = torch.load(path, weights_only=True)
        visual.load_state_dict(run["eyes"])
    else:
        print(f"ridge regression onto the words: R² {fit_words(model, tokenizer, options.fitted):.2f}", flush=True)
        run["own"] = own_answers(model, tokenizer, options.own)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.bfloat16), requires_grad=False)
    packer, last = Packer(tokenizer), time.monotonic()
    merger = list(visual.merger.parameters())
    rest = [p for name, p in visual.named_parameters() if not name.startswith("merger.")]
    groups = [{"params": merger, "rate": 1e-3}, {"params": rest, "rate": 2e-4}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    visual.requires_grad_(True)
    if "optimizer" in run:
        optimizer.load_state_dict(run["optimizer"])
    recent, saved_at = [], last
    while run["minutes"] < options.minutes:
        factor = min(1.0, (run["step"] + 1) / 20) * max(0.02, 1 - run["minutes"] / options.minutes)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        batch = make_batch(packer, run["own"], run["step"], options.batch_size)
        tokens = vision_forward(visual, batch["images"], batch["grid"])
        with torch.autocast("cpu", torch.bfloat16):
            logits, answer = answer_logits(model, batch, tokens, "cpu")
        loss = F.cross_entropy(logits.float(), answer)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(visual.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append((loss.item(), (logits.argmax(-1) == answer).float().mean().item()))
        now = time.monotonic()
        run["minutes"], run["step"], last = run["minutes"] + (now - last) / 60, run["step"] + 1, now
        if run["step"] % 20 == 0:
            loss, right = np.mean(recent, 0)
            print(f"{run['minutes']:.1f} min step {run['step']} loss {loss:.3f} right {right:.3f}", flush=True)
            recent.clear()
        if now - saved_at > 60 or run["minutes"] >= options.minutes:
            saved_at = now
            run |= {"eyes": visual.state_dict(), "optimizer": optimizer.state_dict(), "decoder": decoder}
            torch.save(run, path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--decoder", default="Qwen/Qwen2.5-0.5B-Instruct", help="Qwen2.5 or Qwen2.5-VL, hub or folder")
    parser.add_argument("--output", type=Path, default=Path("build/qwen2.5-0.5b"))
    parser.add_argument("--eyes", type=Path, help="those in eyes/ of the decoder's width, if not given")
    parser.add_argument("--train", action="store_true", help="train eyes for the decoder and write them to --eyes")
    parser.add_argument("--minutes", type=float, default=40.0, help="training time in all")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures a step")
    parser.add_argument("--fitted", type=int, default=400, help="scenes of the ridge regression")
    parser.add_argument("--own", type=int, default=320, help="answers of the decoder's own that are trained on")
    parser.add_argument("--checkpoint", type=Path, default=Path("build/graft_checkpoint.pt"))
    return parser.parse_args()


def main():
    options = parse()
    eyes = check(options)
    torch.manual_seed(0)
    if options.train:
        model, tokenizer = build(options.decoder)
        decoder = fingerprint(model)
        check_training(options, model.config.text_config.hidden_size, decoder)
        for path in (eyes, options.checkpoint):
            path.parent.mkdir(parents=True, exist_ok=True)
        train_eyes(model, tokenizer, options, decoder)
        weights = {name: value.contiguous() for name, value in model.model.visual.state_dict().items()}
        save_file(weights, eyes, {"decoder": decoder})
    model, tokenizer = build(options.decoder)
    model.model.visual.load_state_dict(load_file(eyes))
    write(model, tokenizer, options.output)
    print(f"wrote {options.output} with {eyes}")


if __name__ == "__main__":
    main()
