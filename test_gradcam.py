"""Smooth Grad-CAM of a Qwen2.5-VL from the command line: which parts of a photo an answer comes from.

Exit code 0: everything that was asked for is written. 2: the request cannot be met as it stands (a wrong flag, photo,
model folder or layer, an answer that is empty or not finite), with one line that says why. 1: anything else, such as
memory that ran out. Nothing is written unless everything is.
"""

import argparse
import csv
import importlib.metadata
import io
import json
import logging
import math
import os
import re
import sys
import traceback
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, PretrainedConfig

from smooth_gradcam import (
    BASELINES,
    METHODS,
    NORMS,
    SCORES,
    ExplanationError,
    Faithfulness,
    TokenMaps,
    area,
    choose_words,
    compute_token_maps,
    compute_word_maps,
    find_target,
    get_model_layers,
    insertion_deletion,
    load_mask,
    load_rgb,
    localization,
    randomized_maps,
    resolve_layers,
    spearman,
    ssim,
    word_tokens,
)
from visualization_utils import (
    LAYER_RANGES,
    draw_comparative,
    draw_faithfulness,
    draw_grid,
    draw_multilayer,
    draw_randomization,
    draw_single,
    draw_words,
    earlier_files,
    name_words,
    output_folder,
    representative_thirds,
    select_layers,
    show_progress,
)

HERE = Path(__file__).resolve().parent
FOLDERS = {  # of each mode
    "single": "single",
    "grid": "grid",
    "multi": "multilayer",
    "comparative": "comparative",
    "words": "words",
    "evaluate": "evaluate",
}
LAYER_FLAGS = {
    "single": "--layer",
    "grid": "--layer_range",
    "multi": "--layers",
    "words": "--layers",
    "evaluate": "--layers",
}
MODES_OF_FLAG = {  # flags that act in some modes only
    "--layer": ("single",),
    "--layer_range": ("grid",),
    "--layers": ("multi", "words", "evaluate"),
    "--words": ("words",),
    **dict.fromkeys(("--target", "--target_occurrence", "--contrast"), [mode for mode in FOLDERS if mode != "words"]),
    "--save_raw": [mode for mode in FOLDERS if mode != "words"],
    **dict.fromkeys(("--mask", "--baseline", "--steps", "--batch_size", "--randomize"), ("evaluate",)),
}
UNLIKELY = 0.01  # probability below which the verdict says that there is nothing to measure
SHARE = 0.1  # of the image, whose removal the verdict of evaluate mode speaks of
PATH_FLAGS = ("image_path", "model_path", "output_dir", "mask")
MODEL_TYPES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
MAX_ASPECT = 200  # beyond it the processor refuses a photo
TARGET_SETTINGS = ("target", "target_occurrence", "contrast")  # flags that are keywords of compute_token_maps
MAP_SETTINGS = ("num_samples", "noise_std", "seed", "max_new_tokens", "answer", "tap", "score", "method", "norms")
PACKAGES = ("torch", "transformers", "numpy", "pillow", "matplotlib")  # whose versions --save_raw notes
EXAMPLES = """examples:
  python test_gradcam.py --mode single --layer 27
  python test_gradcam.py --mode grid --layer_range all --num_samples 3
  python test_gradcam.py --mode multi --layers 6 12 18 27 --method hirescam --score logprob
"""


def single_layer_visualization(
    model,
    processor,
    image,
    prompt,
    layer_idx=-1,
    num_samples=10,
    noise_std=0.15,
    save_dir="cam_results_single",
    *,
    quiet=False,
    **settings,
):
    """Explain the answer at one decoder layer, and write the photo, heatmap, overlay and a figure of the three.

    `image` is a path or PIL image, `layer_idx` counts from the end if negative; `settings` are further keywords of
    `compute_token_maps`. Writes original_image.png,
    heatmap.png, superimposed_result.png and visualization.png.

    Returns {"superimposed", "heatmap": uint8 RGB (height, width, 3), "cam": the raw map, float32 (H, W), "layer": its
    index, "answer", "target": what was explained}. A layer without gradient has grey panels and a zero map. Raises
    what `compute_token_maps` raises, and OSError if the folder cannot be written.
    """
    (layer,) = resolve_layers([layer_idx], get_model_layers(model)[1])
    settings |= {"num_samples": num_samples, "noise_std": noise_std, "progress": show_progress(quiet)}
    with output_folder(save_dir) as write:
        token_maps = compute_token_maps(model, processor, image, prompt, [layer], **settings)
        result, files = draw_single(image, token_maps)
        write(files)
    return result | {"layer": layer, "answer": token_maps.answer, "target": token_maps.target}


# the command line


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, as for every other bad input
        self.exit(2, f"{self.prog}: error: {message}\n")


def _layer_or_range(text: str) -> int | str:
    if text in LAYER_RANGES:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(LAYER_RANGES)}, and no index") from None


def make_parser() -> argparse.ArgumentParser:
    """All flags, their defaults and what they do."""
    parser = _Parser(
        prog="test_gradcam.py",
        description="Show where in a photo the answer of a Qwen2.5-VL comes from (Smooth Grad-CAM).",
        epilog=EXAMPLES,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--mode",
        choices=FOLDERS,
        default="single",
        help="one layer, a range, chosen layers, thirds compared, every word of the answer, or measures of the maps",
    )
    add("--layer", type=int, default=-1, help="single mode: layer index, negative ones count from the end")
    add("--layers", type=int, nargs="+", help="multi, words and evaluate mode: layer indices (default: six)")
    add(
        "--layer_range",
        type=_layer_or_range,
        nargs="+",
        default="auto",
        help=f"grid mode: {', '.join(LAYER_RANGES)}, or layer indices",
    )
    add("--model_path", default=str(HERE / "demo_model"), help="model folder, or a name on the Hugging Face hub")
    add("--image_path", default=str(HERE / "demo.jpeg"), help="photo to explain")
    add("--prompt", default="Describe the main content in this image in detail.", help="question about the photo")
    add("--num_samples", type=int, default=10, help="noisy copies: 3-5 preview, 10 standard, 20-50 high quality")
    add("--noise_std", type=float, default=0.15, help="noise in shares of the pixel range; 0 is plain Grad-CAM")
    add("--output_dir", default="cam_results", help="each mode writes to a folder of its own in this one")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps, or map to spread the model over all devices")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="auto: the checkpoint's")
    add("--seed", type=int, default=0, help="of the noise")
    add("--max_new_tokens", type=int, default=128, help="where the generated answer is cut off")
    add("--answer", help="explain this text in place of the generated answer")
    add("--words", default="content", help='words mode: content, all, or the words themselves: "dog,apple"')
    add("--target", help="explain only this word or phrase of the answer")
    add("--target_occurrence", type=int, default=1, help="which one, where the answer has the target several times")
    add("--contrast", help="explain the target's score minus that of this text in its place")
    add("--score", choices=SCORES, default="logit", help="what is summed over the explained tokens")
    add("--method", choices=METHODS, default="gradcam", help="gradients pooled, each token's own, or the mean of both")
    add(
        "--norms",
        choices=NORMS,
        default="frozen",
        help="gradients with the norms' denominators held constant, or plain",
    )
    add("--tap", choices=("input", "output"), default="input", help="side of a layer that is read")
    add("--max_pixels", type=int, default=1_000_000, help="cap on the photo's pixels; never raises the model's own")
    add("--mask", help="evaluate mode: image of the photo's size, white where the explained object is")
    add("--baseline", choices=BASELINES, default="blur", help="evaluate mode: what removed image tokens show")
    add("--steps", type=int, default=64, help="evaluate mode: steps of insertion and deletion")
    add("--batch_size", type=int, default=8, help="evaluate mode: pictures run through the model at once")
    add("--randomize", action="store_true", help="evaluate mode: also re-draw the weights of a copy, and compare maps")
    add("--save_raw", action="store_true", help="also write maps.npz: raw maps, tokens, answer, settings")
    add("--quiet", action="store_true", help="no progress bar")
    add("--verbose", action="store_true", help="what the libraries report, and the traceback of an error")
    return parser


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The flags, once it is known that each can act. Raises ValueError, or SystemExit as argparse does."""
    args = make_parser().parse_args(argv)
    given = {word.split("=")[0] for word in argv}
    for flag, modes in MODES_OF_FLAG.items():
        if flag in given and args.mode not in modes:
            instead = "use --words" if flag.startswith("--target") else "it cannot act"
            if flag == "--save_raw":
                instead = "maps.npz is always written"
            if flag in LAYER_FLAGS.values():
                own = LAYER_FLAGS.get(args.mode)
                instead = f"use {own}" if own else "early, middle and late layers are chosen by itself"
            raise ValueError(f"{flag} acts in {', '.join(modes)} mode only; in {args.mode} mode {instead}")
    if args.noise_std == 0 and "--num_samples" in given and args.num_samples > 1:
        raise ValueError(f"--num_samples {args.num_samples} cannot act beside --noise_std 0: all copies would be equal")
    if args.answer is not None and "--max_new_tokens" in given:
        raise ValueError("--max_new_tokens cannot act beside --answer: nothing is generated")
    if isinstance(args.layer_range, list) and any(isinstance(part, str) for part in args.layer_range):
        if len(args.layer_range) > 1:
            raise ValueError(f"--layer_range takes one of {', '.join(LAYER_RANGES)}, or layer indices, not both or two")
        args.layer_range = args.layer_range[0]
    return args


# what can be checked before the model is loaded


def check_values(args: argparse.Namespace) -> None:
    """Raises ValueError naming the flag, its value and what is valid."""
    for flag in ("num_samples", "max_new_tokens", "max_pixels", "target_occurrence", "steps", "batch_size"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} {getattr(args, flag)} must be 1 or more")
    if not (math.isfinite(args.noise_std) and args.noise_std >= 0):
        raise ValueError(f"--noise_std {args.noise_std} must be finite and 0 or more (0.1 is 10 % of the pixel range)")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed {args.seed} must be 0 to {2**63 - 1}")
    for flag in ("prompt", "answer", "target", "contrast", "words", *PATH_FLAGS):
        text = getattr(args, flag)
        if text is not None and not text.strip():
            raise ValueError(f"--{flag} {text!r} is empty: give a {'path' if flag in PATH_FLAGS else 'text'}")
        if text is not None and any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"--{flag} {text!r} is not valid text in the terminal's encoding")
    if args.contrast is not None and args.target is None:
        raise ValueError(f"--contrast {args.contrast!r} needs a --target, whose place it takes")
    if args.contrast is not None and args.contrast == args.target:
        raise ValueError(f"--contrast {args.contrast!r} is the target itself: their difference is zero everywhere")
    if args.answer is not None or args.target is None:
        find_target(args.answer or "", args.target, args.target_occurrence)
    if args.words not in ("content", "all"):
        if not all(word.strip() for word in args.words.split(",")):
            raise ValueError(f"--words {args.words!r} has an empty word: give content, all, or words such as dog,apple")
        if args.answer is not None:
            choose_words(args.answer, [], args.words)


def load_photo(path: str) -> Image.Image:
    """The photo as RGB, the right way up. Raises ValueError if it is none or far too long for the processor."""
    photo = load_rgb(path)
    if max(photo.size) > MAX_ASPECT * min(photo.size):
        raise ValueError(
            f"{path} is {photo.width} x {photo.height} pixels: sides up to 1 : {MAX_ASPECT} can be processed"
        )
    return photo


def read_mask(path: str | None, size: tuple[int, int]) -> np.ndarray | None:
    """The object's pixels, if there is a --mask. Raises ValueError naming it."""
    if path is None:
        return None
    try:
        return load_mask(path, size)
    except ValueError as exc:
        raise ValueError(f"--mask {path}: {exc}") from exc


@contextmanager
def claim_folder(args: argparse.Namespace):
    """The mode's folder, for this run alone: see `output_folder`. Raises ValueError if it cannot be written."""
    folder = Path(args.output_dir, FOLDERS[args.mode])
    with ExitStack() as stack:
        try:
            thirds = ("early", "middle", "late") if args.mode == "comparative" else ()
            write = stack.enter_context(output_folder(folder, thirds))
        except BlockingIOError:
            raise
        except OSError as exc:
            reason = exc.strerror or exc
            raise ValueError(f"--output_dir: {folder} cannot be written ({reason}): choose another folder") from exc
        except ValueError as exc:
            raise ValueError(f"--output_dir: {exc}") from exc
        yield write


def resolve_device(name: str) -> str:
    """A device that is there: auto is cuda if there is one, else cpu. Raises ValueError."""
    if name == "map":
        return name
    cuda = torch.cuda.device_count()
    there = ["cpu", *["cuda"] * (cuda > 0), *(f"cuda:{i}" for i in range(cuda))]
    there += ["mps"] * torch.backends.mps.is_available()
    if name == "auto":
        return "cuda" if cuda else "cpu"
    if name not in there:
        raise ValueError(f"--device {name} is not there: choose auto, map, {', '.join(there)}")
    return name


def count_layers(model_path: str) -> int:
    """Decoder layers of the checkpoint, from its config.json. Raises ValueError if it is no Qwen-VL."""
    folder = Path(model_path)
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"--model_path {model_path} is no model folder: it has no config.json")
    if not folder.exists() and (folder.is_absolute() or len(folder.parts) > 2 or model_path.startswith(".")):
        raise ValueError(f"--model_path {model_path} does not exist: give a model folder or a name on the hub")
    try:
        config, _ = PretrainedConfig.get_config_dict(model_path)
    except (OSError, ValueError) as exc:
        missing = "neither a folder nor a name on the hub that can be reached"
        raise ValueError(f"--model_path {model_path} is {'unreadable' if folder.exists() else missing}: {exc}") from exc
    if not isinstance(config, dict):
        raise ValueError(f"--model_path {model_path} has a config.json that is no record")
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(
            f"--model_path {model_path} is of type {kind}, no vision-language model: {', '.join(MODEL_TYPES)}"
        )
    layers = {**config, **config.get("text_config", {})}.get("num_hidden_layers")
    if not isinstance(layers, int):
        raise ValueError(f"--model_path {model_path} has a config.json without num_hidden_layers")
    return layers


def choose_layers(args: argparse.Namespace, total: int) -> list[int] | dict[str, list[int]]:
    """The layers that the mode explains, of each third in comparative mode. Raises ValueError."""
    if args.mode == "single":
        return resolve_layers([args.layer], total)
    if args.mode == "comparative":
        return representative_thirds(total)
    return select_layers(args.layer_range if args.mode == "grid" else args.layers or "auto", total)


# model


def cap_pixels(image_processor, max_pixels: int) -> None:
    """Lower the processor's cap on a photo's pixels, never raise it. Raises ValueError below one image token."""
    side = image_processor.patch_size * image_processor.merge_size
    if max_pixels < side * side:
        raise ValueError(f"--max_pixels {max_pixels} is less than one image token: give {side * side} or more")
    size = dict(image_processor.size)
    longest = min(size["longest_edge"], max_pixels)  # in pixels, whatever the names say
    shortest = min(size["shortest_edge"], longest)
    image_processor.size = type(image_processor.size)(shortest_edge=shortest, longest_edge=longest)
    if hasattr(image_processor, "max_pixels"):  # transformers 4 keeps them twice
        image_processor.min_pixels, image_processor.max_pixels = shortest, longest


def refuse_foreign_code(model_path: str, error: Exception) -> None:
    """Raises ValueError, in our words, if transformers failed because the checkpoint wants to run code of its own."""
    if "trust_remote_code" in str(error):
        raise ValueError(
            f"--model_path {model_path} wants to run code of its own (auto_map), which this tool never does: use a "
            "checkpoint of transformers' own classes"
        ) from error


def load_processor(model_path: str, max_pixels: int):
    """The model's processor, capped. Raises ValueError if it is missing or not one of a vision-language model."""
    try:
        processor = AutoProcessor.from_pretrained(model_path, trust_remote_code=False)
    except Exception as exc:  # transformers raises anything here, from OSError to ImportError
        refuse_foreign_code(model_path, exc)
        raise ValueError(f"--model_path {model_path} lacks a processor that can be loaded: {exc}") from exc
    for part in ("image_processor", "tokenizer", "chat_template"):
        if getattr(processor, part, None) is None:
            raise ValueError(f"--model_path {model_path} lacks a processor that can be loaded: there is no {part}")
    if processor.image_token not in processor.tokenizer.get_vocab():  # transformers 5 makes do with an empty one
        raise ValueError(f"--model_path {model_path} lacks its tokenizer: it has no {processor.image_token}")
    cap_pixels(processor.image_processor, max_pixels)
    return processor


def load_model(model_path: str, device: str, dtype: str):
    """The model in evaluation mode. Raises ValueError if weights are missing: they would be random."""
    where = {"device_map": "auto"} if device == "map" else {}
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            model_path, dtype=dtype, output_loading_info=True, trust_remote_code=False, use_safetensors=True, **where
        )
    except torch.OutOfMemoryError:
        raise
    except OSError as exc:
        raise ValueError(
            f"--model_path {model_path} lacks its weights as safetensors; pickles (.bin, .pt) can run code and are "
            f"never opened: {exc.strerror or 'save it with model.save_pretrained(...) where you trust it'}"
        ) from exc
    except (SafetensorError, RuntimeError, ValueError) as exc:
        refuse_foreign_code(model_path, exc)
        raise ValueError(
            f"--model_path {model_path} has weights that are damaged (a git-lfs pointer?) or do not fit its config: "
            f"{exc}"
        ) from exc
    if info["missing_keys"]:
        raise ValueError(f"--model_path {model_path} lacks weights, such as {sorted(info['missing_keys'])[0]}")
    return (model if where else model.to(device)).eval()


# what is written


def raw_arrays(token_maps: TokenMaps, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """What --save_raw writes: maps (layers, H, W) float32 and all it takes to know what they are; JSON for records."""
    records = ("grid", "prompt", "answer", "tokens", "target", "target_span", "target_tokens")
    asked = {name: getattr(args, name) for name in ("mode", "model_path", "image_path", "max_pixels", "dtype")}
    return {name: np.array(getattr(token_maps, name)) for name in records} | {
        "maps": np.stack(list(token_maps.maps.values())),
        "layers": np.array(list(token_maps.maps)),
        "no_gradient": np.array(sorted(token_maps.no_gradient), dtype=int),
        "seed": np.array(token_maps.settings["seed"]),
        "settings": np.array(json.dumps(token_maps.settings | asked)),
        "versions": np.array(json.dumps({name: importlib.metadata.version(name) for name in PACKAGES})),
    }


def draw(mode: str, photo: Image.Image, token_maps: TokenMaps, layers) -> dict[str, np.ndarray]:
    """{file name: picture} of a mode that draws maps."""
    if mode == "comparative":
        return draw_comparative(photo, token_maps, layers)[1]
    return {"single": draw_single, "grid": draw_grid, "multi": draw_multilayer}[mode](photo, token_maps)[1]


# evaluate mode


def score_rows(token_maps: TokenMaps, measured: Faithfulness, mask: np.ndarray | None) -> list[dict]:
    """The measures of each layer with a gradient, then of the random orders' mean: rows of scores.csv."""

    def row(layer, insertion, deletion):
        areas = [area(curve, measured.shares) for curve in (insertion, deletion)]
        return {
            "layer": layer,
            "insertion": areas[0],
            "deletion": areas[1],
            "difference": areas[0] - areas[1],
            "probability": float(deletion[0]),
            "without_hottest_10_percent": float(deletion[np.abs(measured.shares - SHARE).argmin()]),
            "baseline_picture": float(deletion[-1]),
        }

    rows = [row(layer, measured.insertion[layer], measured.deletion[layer]) for layer in measured.insertion]
    for part in rows if mask is not None else []:
        part |= localization(token_maps.maps[part["layer"]], mask)
    return [*rows, row("random", measured.random_insertion.mean(0), measured.random_deletion.mean(0))]


def randomization_rows(staged: dict[int, TokenMaps]) -> list[dict]:
    """Likeness of each layer's map to the given one after each stage: rows of randomization.csv."""
    given = staged[0]
    return [
        {
            "redrawn_layers": number,
            "layer": layer,
            "spearman": spearman(cam, token_maps.maps[layer]),
            "ssim": ssim(cam, token_maps.maps[layer]),
        }
        for number, token_maps in staged.items()
        for layer, cam in given.maps.items()
        if layer not in given.no_gradient
    ]


def _number(value: float, digits: int = 2) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"  # no minus zero


def to_csv(rows: list[dict]) -> str:
    """Rows as comma-separated text with a head; what a row lacks is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: _number(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if abs(share) >= 0.1 or abs(share) < 0.0005 else f"{100 * share:.1f} %"


def verdict(rows: list[dict], measured: Faithfulness) -> list[str]:
    """What the measures say about each layer's map, and in sum, in words."""
    *layers, random = rows
    probability = random["probability"]
    lines = [f"the model gives the explained tokens a mean probability of {probability:.3f}"]

    def cost(row):
        lost = (probability - row["without_hottest_10_percent"]) / (probability or 1)
        return (
            f"costs the answer {_percent(abs(lost))}" if lost > -0.0005 else f"gives the answer {_percent(-lost)} more"
        )

    for row in layers:
        line = f"layer {row['layer']}: removing the hottest 10 % of the image {cost(row)} of its probability; "
        line += f"a random 10 % {cost(random)}"
        if "energy" in row:
            place = "on" if row["pointing"] else "next to" if row["near"] else "off"
            line += f"; the maximum lies {place} the object, {_percent(row['energy'])} of the map inside it"
        lines.append(line)
    best = max(layers, key=lambda row: row["difference"])
    pairs = zip(measured.random_insertion, measured.random_deletion, strict=True)
    chance = [area(insertion - deletion, measured.shares) for insertion, deletion in pairs]
    beaten = sum(row["difference"] > max(chance) for row in layers)
    lines.append(
        f"most faithful: layer {best['layer']}, insertion {_number(best['insertion'])} - deletion "
        f"{_number(best['deletion'])} = {_number(best['difference'])}; {len(chance)} random orders: "
        f"{_number(min(chance))} to {_number(max(chance))}"
    )
    lines.append(
        f"{beaten} of {len(layers)} maps beat every random order"
        + ("" if beaten == len(layers) else ": do not rely on the others")
    )
    if probability < UNLIKELY:
        lines.append(
            "beware: the model would hardly say this of the photo, so there is little that a map could explain"
        )
    elif random["baseline_picture"] > 0.5 * probability:
        kept = _percent(random["baseline_picture"] / probability)
        lines.append(
            f"beware: on the baseline picture alone the answer keeps {kept} of its probability: that much is not from "
            "the photo, and no map can score high"
        )
    return lines


def randomization_verdict(rows: list[dict]) -> str:
    """In words, how much of the maps is left when all weights are re-drawn."""
    last = max(row["redrawn_layers"] for row in rows)
    likeness = [row["spearman"] for row in rows if row["redrawn_layers"] == last]
    mean = float(np.mean(likeness))
    depends = (
        "the maps depend on what the model has learned" if mean < 0.5 else "beware: the maps hardly need the model"
    )
    return f"with all weights re-drawn the maps keep a mean rank correlation of {_number(mean)}: {depends}"


def evaluate(model, processor, photo, token_maps: TokenMaps, mask, args) -> tuple[dict[str, object], list[str]]:
    """({file name: picture or text}, verdict) of the maps. Raises ExplanationError if no layer has a gradient."""
    if set(token_maps.maps) <= token_maps.no_gradient:
        raise ExplanationError("no layer has a gradient, so there is no map to evaluate")
    measured = insertion_deletion(
        model,
        processor,
        photo,
        token_maps,
        steps=args.steps,
        baseline=args.baseline,
        batch_size=args.batch_size,
        seed=args.seed,
        extra_shares=[SHARE],
        progress=show_progress(args.quiet, "orders of the image tokens", "order"),
    )
    rows = score_rows(token_maps, measured, mask)
    files = {"faithfulness.png": draw_faithfulness(photo, token_maps, measured, rows), "scores.csv": to_csv(rows)}
    lines = [*verdict(rows, measured), f"cost: {measured.forwards} pictures run through the model"]
    if args.randomize:
        bar = show_progress(args.quiet, "weights re-drawn", "stage")
        staged = randomized_maps(model, processor, photo, token_maps, seed=args.seed, progress=bar)
        likeness = randomization_rows(staged)
        files["randomization.png"] = draw_randomization(photo, staged, likeness)
        files["randomization.csv"] = to_csv(likeness)
        lines.append(randomization_verdict(likeness))
    return files, lines


# the run


def explain_words(model, processor, photo, layers, write, args, settings) -> tuple[str, list[Path], list[str]]:
    """Words mode, once everything is loaded; returns what `run` does."""
    word_maps = compute_word_maps(model, processor, photo, args.prompt, layers, words=args.words, **settings)
    probabilities, tokens = word_tokens(model, processor, photo, word_maps)
    files = draw_words(photo, Path(args.image_path).name, word_maps, probabilities, tokens)[1]
    words = ", ".join(name_words(word_maps))
    lines = [f"explained: {words} at layer {', '.join(map(str, layers))}"]
    grey = frozenset.intersection(*(word.no_gradient for word in word_maps))
    lines += [_without_map(layer, args.mode) for layer in sorted(grey)]
    return word_maps[0].answer, write(files), lines


def run(args: argparse.Namespace) -> tuple[str, list[Path], list[str]]:
    """Check, load, explain, draw and write; returns the answer, the files, and what is to be said."""
    check_values(args)
    photo = load_photo(args.image_path)
    mask = read_mask(args.mask, photo.size)
    device = resolve_device(args.device)
    layers = choose_layers(args, count_layers(args.model_path))
    with claim_folder(args) as write:
        return explain(args, photo, mask, device, layers, write)


def explain(args, photo, mask, device, layers, write) -> tuple[str, list[Path], list[str]]:
    """Load, explain, draw and write, once all flags are known to be good; returns what `run` does."""
    processor = load_processor(args.model_path, args.max_pixels)
    model = load_model(args.model_path, device, args.dtype)
    settings = {name: getattr(args, name) for name in MAP_SETTINGS} | {"progress": show_progress(args.quiet)}
    if args.mode == "words":
        return explain_words(model, processor, photo, layers, write, args, settings)
    chosen = sum(layers.values(), []) if isinstance(layers, dict) else layers
    targets = {name: getattr(args, name) for name in TARGET_SETTINGS}
    token_maps = compute_token_maps(model, processor, photo, args.prompt, chosen, **settings, **targets)
    if args.mode == "evaluate":
        files, lines = evaluate(model, processor, photo, token_maps, mask, args)
    else:
        files, lines = draw(args.mode, photo, token_maps, layers), []
    lines = [*explained(token_maps, args.mode), *lines]
    if args.save_raw:
        files["maps.npz"] = raw_arrays(token_maps, args)
    return token_maps.answer, write(files), lines


def explained(token_maps: TokenMaps, mode: str) -> list[str]:
    """What was explained, in words."""
    scored, count = len(token_maps.target_tokens), len(token_maps.tokens)
    what = "the whole answer" if token_maps.target == token_maps.answer else repr(token_maps.target)
    if token_maps.settings["contrast"] is not None:
        what += f" rather than {token_maps.settings['contrast']!r}"
    layers = ", ".join(map(str, token_maps.maps))
    lines = [f"explained: {what} ({scored} of {count} tokens) at layer {layers}"]
    return lines + [_without_map(layer, mode) for layer in sorted(token_maps.no_gradient)]


def _without_map(layer: int, mode: str) -> str:
    so = "it is left out" if mode == "evaluate" else "its pictures are grey panels"
    return f"layer {layer}: no gradient reaches it there, so it has no map and {so}"


def report(answer: str, paths: list[Path], lines: list[str]) -> None:
    """Print the answer, what is to be said of it, and the files."""
    print(f"answer: {answer}")
    for line in lines:
        print(line)
    here = Path.cwd()
    for path in paths:
        print(f"wrote {path.relative_to(here) if path.is_relative_to(here) else path}")
    if left := earlier_files(paths):
        print(f"beware: {left[0].parent} holds files of an earlier run too: {len(left)} such as {left[0].name}")


def _hush() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):  # an answer in a script that the terminal lacks is no error
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        args = parse_args(argv)
        with warnings.catch_warnings():
            if not args.verbose:
                _hush()
            report(*run(args))
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output has read enough; the files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    except Exception as exc:
        if "--verbose" in argv:
            traceback.print_exc()
        message = " ".join(str(exc).split()) or type(exc).__name__
        message = re.sub(r"^(prompt|answer|target|target_occurrence|contrast|words)=", r"--\1 ", message)  # its flag
        print(f"test_gradcam.py: error: {message}", file=sys.stderr)
        return 2 if isinstance(exc, (ValueError, ExplanationError)) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
