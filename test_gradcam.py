"""Smooth Grad-CAM of a Qwen2.5-VL from the command line: which parts of a photo an answer comes from.

Exit code 0: everything that was asked for is written. 2: the request cannot be met as it stands (a wrong flag, photo,
model folder or layer, an answer that is empty or not finite), with one line that says why. 1: anything else, such as
memory that ran out, or a photo of a list that cannot be explained. Of a photo, nothing is written unless everything is.

The flags stand first: torch and transformers, which take seconds to load, are imported once they are known to be good.
"""

import argparse
import csv
import functools
import glob
import hashlib
import io
import json
import logging
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the run without more ado, until `main` can tidy up

HERE = Path(__file__).resolve().parent
FOLDERS = {  # of each mode
    "single": "single",
    "grid": "grid",
    "multi": "multilayer",
    "comparative": "comparative",
    "words": "words",
    "evaluate": "evaluate",
    "flow": "flow",
    "knockout": "knockout",
}
WITH_LAYERS = ("grid", "multi", "words", "evaluate", "flow")
OF_PHOTOS = ("flow", "knockout")  # modes of one or several photos
MODES_OF_FLAG = {  # flags that act in some modes only
    "--layer": ("single",),
    **dict.fromkeys(("--layers", "--layer_range"), WITH_LAYERS),
    "--words": ("words",),
    **dict.fromkeys(("--target", "--target_occurrence"), [mode for mode in FOLDERS if mode != "words"]),
    "--contrast": [mode for mode in FOLDERS if mode not in ("words", "knockout")],
    **dict.fromkeys(
        ("--num_samples", "--noise_std", "--seed", "--method", "--score", "--rules", "--tap"),
        [mode for mode in FOLDERS if mode != "knockout"],
    ),
    **dict.fromkeys(("--colormap", "--opacity", "--upsample"), [mode for mode in FOLDERS if mode != "knockout"]),
    "--heatmaps": ("grid", "comparative"),
    "--scale": ("grid", "multi", "comparative", "words", "flow"),
    "--save_raw": [mode for mode in FOLDERS if mode not in ("words", *OF_PHOTOS)],
    "--recompute": [mode for mode in FOLDERS if mode != "knockout"],
    "--mask": ("evaluate", "knockout"),
    **dict.fromkeys(("--baseline", "--steps", "--randomize", "--compare"), ("evaluate",)),
    **dict.fromkeys(("--attention_maps", "--taps"), ("flow",)),
    **dict.fromkeys(("--window", "--keep", "--answers"), ("knockout",)),
}
OF_ONE_PHOTO = ("--mask", "--answers", "--randomize")  # cannot act beside a list
NO_MATTER = ("output_dir", "quiet", "verbose", "overwrite", "image_path", "photos", "listed", "device", "batch_size")
NO_MATTER += ("recompute",)  # to what a list's results are, beyond rounding
ASKED_BY_LIST = (
    "--image_path",
    "--prompt",
    "--answer",
    "--max_new_tokens",
    "--target",
    "--target_occurrence",
    "--mask",
)
RUNS_AT_ONCE = 8  # of evaluate and knockout mode, where --batch_size is auto
LAYER_NAMES = ("auto", "early", "middle", "late", "all")
CHOICES = {  # as the modules have them, whose import takes too long for --help
    "score": ("logit", "logprob"),
    "method": ("gradcam", "hirescam", "product", "paper"),
    "rules": ("attnlrp", "detached", "plain"),
    "tap": ("input", "output", "post_attention_layernorm"),
    "baseline": ("blur", "mean", "black"),
    "colormap": ("plasma", "inferno", "magma", "viridis", "cividis", "turbo", "jet"),
    "upsample": ("smooth", "cells"),
    "scale": ("map", "word", "all"),
    "width": ("page", "column"),
    "format": ("pdf", "svg"),
}
PATH_FLAGS = ("image_path", "model_path", "output_dir", "mask", "answers")
LOOK = ("colormap", "opacity", "upsample", "scale")
SETTINGS = ("num_samples", "noise_std", "seed", "tap", "score", "contrast", "method", "rules")  # flags of the same name
EXAMPLES = """examples:
  python test_gradcam.py --mode single --layer 27
  python test_gradcam.py --mode grid --layers all --num_samples 3
  python test_gradcam.py --mode multi --layers 6 12 18 27 --method hirescam --score logprob
  python test_gradcam.py --mode knockout --target dog --window 9
"""


# flags


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, as for every other bad input
        self.exit(2, f"{self.prog}: error: {message}\n")


def _layers(text: str) -> list[int | str]:
    """[name], or the indices of "6,12,18" and "0-3"."""
    text, found = text.strip(), []
    if text in LAYER_NAMES:
        return [text]
    for part in text.split(","):
        ends = re.fullmatch(r"(-?\d{1,4})(?:-(-?\d{1,4}))?", part.strip())
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (0, -1)
        if last < first or (first < 0) != (last < 0):
            names = ", ".join(LAYER_NAMES)
            raise argparse.ArgumentTypeError(f"{text!r} is none of {names}, no index, and no list such as 6,12 or 0-3")
        found += range(first, last + 1)
    return found


def _batch_size(text: str) -> int | str:
    """The word auto, or a whole number."""
    if text != "auto" and not re.fullmatch(r"-?\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be auto, or a whole number from 1 on")
    return text if text == "auto" else int(text)


def _opacity(text: str) -> float | None:
    """None of "value", the number of "fixed:0.5"."""
    if text == "value":
        return None
    number = re.fullmatch(r"fixed:(\d*\.?\d+)", text)
    if number is None or float(number[1]) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be value, or fixed:0.5 with a number from 0 to 1")
    return float(number[1])


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
        help="one layer, a range, chosen layers, thirds compared, every word of the answer, measures of the maps, what "
        "the answer reads of the photo by layer, or what it needs",
    )
    layers = {"type": _layers, "nargs": "+", "metavar": "LAYERS"}
    add("--layer", type=int, help="single mode: index, negative ones count from the end (default: the middle layer)")
    add("--layers", **layers, help=f"{', '.join(WITH_LAYERS)} mode: {', '.join(LAYER_NAMES)}, or layer indices")
    add("--layer_range", **layers, help="the same (default: auto, six layers)")
    add("--model_path", default=str(HERE / "demo_model"), help="model folder, or a name on the Hugging Face hub")
    add(
        "--image_path",
        nargs="+",
        default=[str(HERE / "demo.jpeg")],
        metavar="IMAGE_PATH",
        help="photo to explain, or a list of them: a folder, a glob, a .jsonl of {image, prompt?, answer?, target?, "
        "contrast?, mask? | box? | segmentation?}, several photos (one figure of all in flow and knockout mode)",
    )
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
    add(
        "--method",
        choices=CHOICES["method"],
        default="gradcam",
        help="gradients pooled, each token's own, their product, or the paper's formula to the letter",
    )
    add("--score", choices=CHOICES["score"], help="what is summed over the explained tokens (default: logit)")
    add(
        "--rules",
        choices=CHOICES["rules"],
        help="how gradients pass the decoder: AttnLRP's rules, only norms detached, or plain (default: attnlrp; of "
        "method paper: plain)",
    )
    add("--tap", choices=CHOICES["tap"], help="where a layer is read (default: input; of paper: the last)")
    add("--colormap", choices=CHOICES["colormap"], default="plasma", help="of the maps; jet is what papers often show")
    add(
        "--opacity",
        type=_opacity,
        default="value",
        help="of the colours over the photo: value (cold areas stay photo), or the same everywhere, such as fixed:0.5",
    )
    add("--upsample", choices=CHOICES["upsample"], default="smooth", help="cells: the image tokens as they are")
    add(
        "--scale",
        choices=CHOICES["scale"],
        default="map",
        help="what has full colour: the maximum of each map, of a word's maps, or of all",
    )
    add("--heatmaps", action="store_true", help="grid, comparative mode: grids show each layer's heatmap too")
    add(
        "--width",
        choices=CHOICES["width"],
        default="page",
        help="of figures in print: both columns of a paper (7.2 inches) or one (3.3); no text is below 6 points there",
    )
    add("--format", choices=CHOICES["format"], nargs="+", default=[], help="of figures, written beside the PNG")
    add("--max_pixels", type=int, default=1_000_000, help="cap on the photo's pixels; never raises the model's own")
    add(
        "--mask",
        help="evaluate mode, knockout with --window: image of the photo's size, white where the explained object is",
    )
    add("--baseline", choices=CHOICES["baseline"], default="blur", help="evaluate mode: what removed image tokens show")
    add("--steps", type=int, default=64, help="evaluate mode: steps of insertion and deletion")
    add(
        "--batch_size",
        type=_batch_size,
        default="auto",
        help="noisy copies through the model at once, fewer where memory runs out (auto: as many as it has room for); "
        f"evaluate, knockout mode: runs at once too (auto: {RUNS_AT_ONCE})",
    )
    add("--recompute", action="store_true", help="recompute activations in the backward: slower, for less memory")
    add("--randomize", action="store_true", help="evaluate mode: also re-draw the weights of a copy, and compare maps")
    add("--compare", action="store_true", help="evaluate mode: measure the maps of all methods beside each other")
    add("--attention_maps", action="store_true", help="flow mode: also draw attention between all positions")
    add("--taps", action="store_true", help="flow mode: also draw the maps at every module where a layer can be read")
    add("--window", type=int, help="knockout mode: also block image, question and answer in so many layers around each")
    add("--keep", type=int, help="knockout mode: also leave so many image tokens, those with most attention, visible")
    add("--answers", help="knockout mode: a .jsonl of {image, prompt, answer}; the accuracy is measured over it")
    add("--save_raw", action="store_true", help="also write maps.npz: raw maps, tokens, answer, settings")
    add("--overwrite", action="store_true", help="of a list: explain again what is there already")
    add("--quiet", action="store_true", help="no progress bar")
    add("--verbose", action="store_true", help="what the libraries report, and the traceback of an error")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags (of the command line for None), once it is known that each can act; else SystemExit with code 2."""
    argv = sys.argv[1:] if argv is None else argv
    argv = [f" {word}" if re.fullmatch(r"-\d+[,-][-,\d]*", word) else word for word in argv]  # a list, and no flag
    parser = make_parser()
    args = parser.parse_args(argv)
    args.listed = any(map(is_list, args.image_path)) or (len(args.image_path) > 1 and args.mode not in OF_PHOTOS)
    try:
        check_flags(args, {word.split("=")[0] for word in argv})
    except ValueError as exc:
        parser.error(str(exc))
    args.image_path, args.photos = args.image_path[0], args.image_path
    return args


def is_list(path: str) -> bool:
    """Whether a path names several photos: a folder, a .jsonl, or a glob that is no file's name."""
    there = os.path.exists(path)  # noqa: PTH110  (which a name too long for any file system does not raise from)
    return Path(path).suffix == ".jsonl" or (Path(path).is_dir() if there else glob.has_magic(path))


def check_flags(args: argparse.Namespace, given: set[str]) -> None:
    """What can be known of the flags without a model. Raises ValueError naming the flag and what is valid."""
    for flag, modes in MODES_OF_FLAG.items():
        if flag in given and args.mode not in modes:
            instead = "use --words" if flag.startswith("--target") else "it cannot act"
            if flag == "--save_raw":
                instead = "an .npz is always written"
            if flag.startswith("--layer"):
                thirds = "early, middle and late layers are chosen automatically"
                own = {"single": "use --layer", "comparative": thirds, "knockout": "every layer is tried"}
                instead = own.get(args.mode, "use --layers")
            raise ValueError(f"{flag} acts in {', '.join(modes)} mode only; in {args.mode} mode {instead}")
    if args.layers and args.layer_range:
        raise ValueError("--layers and --layer_range say the same: give one of them")
    flag = "--layer_range" if args.layer_range else "--layers"
    args.layers = [part for parts in args.layers or args.layer_range or [["auto"]] for part in parts]
    if len(args.layers) > 1 and any(isinstance(part, str) for part in args.layers):
        raise ValueError(f"{flag} takes one of {', '.join(LAYER_NAMES)}, or layer indices, not both or two")
    counts = (
        "num_samples",
        "max_new_tokens",
        "max_pixels",
        "target_occurrence",
        "steps",
        "batch_size",
        "window",
        "keep",
    )
    for flag in counts:
        value = getattr(args, flag)
        if value is not None and value != "auto" and not 1 <= value < 2**63:
            raise ValueError(f"--{flag} {value} must be 1 or more, and below 2^63")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed {args.seed} must be 0 to {2**63 - 1}")
    if not 0 <= args.noise_std <= 1:
        raise ValueError(f"--noise_std {args.noise_std} must be 0 to 1 (0.15 is 15 % of the pixel range)")
    if args.noise_std == 0 and "--num_samples" in given and args.num_samples > 1:
        raise ValueError(f"--num_samples {args.num_samples} cannot act beside --noise_std 0: all copies would be equal")
    for flag in ("--method", "--randomize", "--save_raw"):
        if args.compare and flag in given:
            raise ValueError(f"{flag} cannot act beside --compare, which measures all methods")
    for flag in ASKED_BY_LIST:
        if args.answers is not None and flag in given:
            raise ValueError(f"{flag} cannot act beside --answers: the list has the photos, prompts and answers")
    for flag in OF_ONE_PHOTO if args.listed else ():
        if flag in given:
            raise ValueError(f"{flag} cannot act beside a list of photos (--image_path {args.image_path[0]})")
    if args.overwrite and not args.listed:
        raise ValueError("--overwrite acts on a list of photos only: what one photo writes is always replaced")
    if len(set(args.image_path)) < len(args.image_path):
        raise ValueError(f"--image_path has a photo twice: {max(args.image_path, key=args.image_path.count)}")
    if args.mask is not None and args.mode == "knockout":
        if args.window is None:
            raise ValueError("--mask needs --window in knockout mode: it tells whose attention is blocked")
        if len(args.image_path) > 1:
            raise ValueError("--mask is of one photo: give one --image_path")
    if args.answer is not None and "--max_new_tokens" in given:
        raise ValueError("--max_new_tokens cannot act beside --answer: nothing is generated")
    texts = [(flag, getattr(args, flag)) for flag in ("prompt", "answer", "target", "contrast", "words", *PATH_FLAGS)]
    texts = [(flag, text) for flag, text in texts if flag != "image_path"]
    for flag, text in texts + [("image_path", path) for path in args.image_path]:
        if text is not None and not text.strip():
            raise ValueError(f"--{flag} {text!r} is empty: give a {'path' if flag in PATH_FLAGS else 'text'}")
        if text is not None and any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"--{flag} {text!r} is not valid text in the terminal's encoding")
        if text is not None and flag in PATH_FLAGS:
            check_path(flag, text)
    if args.words not in ("content", "all") and not all(word.strip() for word in args.words.split(",")):
        raise ValueError(f"--words {args.words!r} has an empty word: give content, all, or words such as dog,apple")
    if args.target is None and args.target_occurrence > 1:
        raise ValueError(f"--target_occurrence {args.target_occurrence} needs a --target")
    if args.contrast is not None and args.target is None:
        raise ValueError(f"--contrast {args.contrast!r} needs a --target, whose place it takes")
    if args.contrast is not None and args.contrast == args.target:
        raise ValueError(f"--contrast {args.contrast!r} is the target itself: their difference is zero everywhere")


def check_path(flag: str, path: str) -> None:
    """Raises ValueError for a path that no file system takes, or that cannot be looked at."""
    try:
        os.stat(path)  # noqa: PTH116  (Path.stat is no better, and a name on the hub is no path)
    except (FileNotFoundError, NotADirectoryError):
        return  # told where it is opened
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise ValueError(f"--{flag} {path[:100]!r} is not a usable path: {reason}") from exc


if __name__ == "__main__":
    parse_args()  # --help and mistyped flags are answered here

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor, PretrainedConfig  # noqa: E402
from transformers.utils import cached_file  # noqa: E402

from smooth_gradcam import (  # noqa: E402
    FAMILIES,
    SUPPORTED,
    ExplanationError,
    ExplanationWarning,
    Look,
    Reading,
    Settings,
    SmoothQwenGradCAM,  # noqa: F401  (users import it from here)
    TokenMaps,
    compute_token_maps,
    explain,
    find_target,
    get_model_layers,
    load_rgb,
    read,
    resolve_layers,
)
from visualization_utils import (  # noqa: E402
    PAGE,
    PLAIN,
    Paper,
    check_drawing,
    comparative_layers,
    create_comparative_analysis,  # noqa: F401  (users import it from here)
    create_layer_comparison_grid,  # noqa: F401
    draw_comparative,
    draw_grid,
    draw_multilayer,
    draw_single,
    other_files,
    output_folder,
    select_layers,
    show_progress,
    to_csv,
    visualize_multiple_layers,  # noqa: F401
    write_files,
)

MAX_ASPECT = 200  # beyond it the processor refuses a photo
HEIC = (b"heic", b"heix", b"hevc", b"hevx", b"mif1", b"msf1")  # brands of the files that phones write
PACKAGES = ("torch", "transformers", "numpy", "pillow", "matplotlib")  # whose versions --save_raw notes


def single_layer_visualization(
    model, processor, image, prompt, layer_idx=-1, num_samples=10, noise_std=0.15, save_dir="cam_results_single",
    *, quiet=False, look=PLAIN, paper=PAGE, **settings,
):  # fmt: skip
    """Explain the answer at one decoder layer, and write the photo, heatmap, overlay and a figure of the three.

    `layer_idx` counts from the end if negative; `image` and `settings` (further keywords) are those of
    `compute_token_maps`. Writes original_image.png, heatmap.png, superimposed_result.png and visualization.png.

    Returns {"superimposed", "heatmap": uint8 RGB (height, width, 3), "cam": the raw map, float32 (H, W), "layer": its
    index, "answer", "target": what was explained}. A layer without a map has grey panels and zeros. Raises what
    `compute_token_maps` and `output_folder` raise.
    """
    check_drawing(look, paper)
    (layer,) = resolve_layers([layer_idx], get_model_layers(model)[1])
    settings |= {"num_samples": num_samples, "noise_std": noise_std, "progress": show_progress(quiet)}
    with output_folder(save_dir) as write:
        token_maps = compute_token_maps(model, processor, image, prompt, [layer], **settings)
        result, files = draw_single(image, token_maps, look, paper)
        write(files)
    return result | {"layer": layer, "answer": token_maps.answer, "target": token_maps.target}


# photo, folder, device


def load_photo(path: str) -> Image.Image:
    """The photo as RGB, the right way up. Raises ValueError if it is none or far too long for the processor."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", path):
        raise ValueError(f"--image_path {path[:100]} is an address: download the photo, and give its file")
    if Path(path).is_file():
        try:
            with Path(path).open("rb") as file:
                head = file.read(12)
        except OSError as exc:
            raise ValueError(f"--image_path {path} cannot be read: {exc.strerror}") from exc
        if head[4:8] == b"ftyp" and head[8:12] in HEIC:
            raise ValueError(f"--image_path {path} is a HEIC photo: convert it to JPEG, e.g. with pillow-heif")
    try:
        photo = load_rgb(path)
    except ValueError as exc:
        raise ValueError(f"--image_path: {exc}") from exc
    if max(photo.size) > MAX_ASPECT * min(photo.size):
        size = f"{photo.width} x {photo.height} pixels"
        raise ValueError(f"--image_path: {path} is {size}: sides up to 1 : {MAX_ASPECT} can be processed")
    return photo


def read_mask(path: str, size: tuple[int, int]) -> np.ndarray:
    """The object's pixels. Raises ValueError naming the flag."""
    from studies.faithfulness import load_mask

    try:
        return load_mask(path, size)
    except ValueError as exc:
        raise ValueError(f"--mask {path}: {exc}") from exc


def check_answer(args: argparse.Namespace) -> None:
    """Raises ValueError if the given answer does not hold what is to be explained."""
    if args.mode != "words":
        find_target(args.answer, args.target, args.target_occurrence)
    elif args.words not in ("content", "all"):
        from studies.words import choose_words

        choose_words(args.answer, [], args.words)


def resolve_device(name: str) -> str:
    """A device that is there: auto is cuda if there is one, else cpu. Raises ValueError."""
    if name == "map":
        return name
    cuda = torch.cuda.device_count()
    there = ["cpu"] + (["cuda", *(f"cuda:{i}" for i in range(cuda))] if cuda else [])
    if torch.backends.mps.is_available():
        there.append("mps")
    if name == "auto":
        return "cuda" if cuda else "cpu"
    if name not in there:
        raise ValueError(f"--device {name} is not there: choose auto, map, {', '.join(there)}")
    return name


def count_layers(model_path: str) -> int:
    """Decoder layers of the checkpoint, from its config.json. Raises ValueError if it is of no supported family."""
    folder, name = Path(model_path), f"--model_path {model_path}"
    try:
        if folder.exists() and not (folder / "config.json").is_file():
            raise ValueError(f"{name} is no model folder: it has no config.json")
        if not folder.exists() and (folder.is_absolute() or len(folder.parts) > 2 or model_path.startswith(".")):
            raise ValueError(f"{name} does not exist: give a model folder or a name on the hub")
        config, _ = PretrainedConfig.get_config_dict(model_path)
    except PermissionError as exc:
        raise ValueError(f"{name} cannot be read: {exc.strerror}") from exc
    except (OSError, TypeError, AttributeError, RecursionError) as exc:  # of a config that is no record, too
        missing = "neither a folder nor a name on the hub that can be reached"
        raise ValueError(f"{name} is {'unreadable' if folder.exists() else missing}: {exc}") from exc
    text = config.get("text_config", {}) if isinstance(config, dict) else None
    if not isinstance(text, dict):
        raise ValueError(f"{name} is unreadable: its config.json holds no record where one should be")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{name} is of type {kind}, which is not supported: {SUPPORTED}")
    for part in (config, text, config.get("vision_config") or {}):
        if "/" in f"{part.get('_attn_implementation')} {part.get('attn_implementation')}":
            raise ValueError(f"{name} wants attention code from a hub, which this tool never runs: take that out")
    layers = {**config, **text}.get("num_hidden_layers")
    if type(layers) is not int or not 1 <= layers < 10_000:
        raise ValueError(f"{name} has a config.json with num_hidden_layers {layers!r}: it must be 1 or more")
    return layers


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


def check_shards(model_path: str) -> None:
    """Raises ValueError if the index of the weights names files that are no safetensors of the same folder."""
    index = "model.safetensors.index.json"
    with suppress(OSError):  # transformers tells what is missing
        path = Path(model_path, index) if Path(model_path).is_dir() else cached_file(model_path, index)
        try:
            names = set(json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"].values())
            foreign = next((name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)), None)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
            raise ValueError(f"--model_path {model_path} has an unreadable {index}: {exc}") from exc
        if foreign is not None:
            raise ValueError(
                f"--model_path {model_path} keeps weights in {foreign}: only safetensors of its own folder are "
                "opened, as pickles (.bin, .pt) can run code"
            )


def load_model(model_path: str, device: str, dtype: str):
    """The model in evaluation mode. Raises ValueError if weights are missing: they would be random."""
    where = {"device_map": "auto"} if device == "map" else {}
    check_shards(model_path)
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
    except Exception as exc:  # a config can make transformers raise anything
        refuse_foreign_code(model_path, exc)
        raise ValueError(
            f"--model_path {model_path} has weights that are damaged (a git-lfs pointer?) or do not fit its config: "
            f"{type(exc).__name__}: {exc}"
        ) from exc
    if info["missing_keys"]:
        raise ValueError(f"--model_path {model_path} lacks weights, such as {sorted(info['missing_keys'])[0]}")
    if unknown := sorted(info["unexpected_keys"]):
        about = f"--model_path {model_path} has {len(unknown)} weights that its config.json does not know: {unknown[0]}"
        if any(re.search(r"\b(layers|blocks)\.\d+\.", key) for key in unknown):
            raise ValueError(f"{about}, ...: the model would be cut short")
        warnings.warn(about, ExplanationWarning, stacklevel=2)
    return (model if where else model.to(device)).eval()


# the run


def raw_arrays(token_maps: TokenMaps, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """What --save_raw writes: maps (layers, H, W) float32 and all it takes to know what they are; JSON for records."""
    from importlib.metadata import version

    records = ("grid", "prompt", "answer", "tokens", "target", "target_span", "target_tokens")
    asked = ("mode", "model_path", "image_path", "max_pixels", "dtype", "max_new_tokens")
    asked = {name: getattr(args, name) for name in asked}
    return {name: np.array(getattr(token_maps, name)) for name in records} | {
        "maps": np.stack(list(token_maps.maps.values())),
        "layers": np.array(list(token_maps.maps)),
        "no_gradient": np.array(sorted(token_maps.no_gradient), dtype=int),
        "seed": np.array(token_maps.settings.seed),
        "settings": np.array(json.dumps(asdict(token_maps.settings) | asked)),
        "versions": np.array(json.dumps({name: version(name) for name in PACKAGES})),
    }


def choose_layers(args: argparse.Namespace, total: int) -> list[int] | dict[str, list[int]]:
    """The layers that the mode explains, of each third in comparative mode. Raises ValueError."""
    if args.mode == "comparative":
        return comparative_layers(total)
    layers = args.layers
    if args.mode == "single":
        layers = [total // 2 if args.layer is None else args.layer]
    try:
        return select_layers(layers[0] if isinstance(layers[0], str) else layers, total)
    except ValueError as exc:
        raise ValueError(f"--layer{'' if args.mode == 'single' else 's'}: {exc}") from exc


class Asked(NamedTuple):
    """A question about a photo, and the answer that is to be explained, the model's own for None."""

    name: str
    photo: Image.Image
    prompt: str
    answer: str | None
    where: str = ""  # in a list


def asked_by(args: argparse.Namespace) -> list[Asked]:
    """What is to be read: a photo, several, or the list of --answers. Raises ValueError naming flag, file and line."""
    if args.answers is None:
        paths = args.photos
        names = [Path(path).name for path in paths]
        names = names if len(set(names)) == len(names) else paths
        photos = map(load_photo, paths)
        return [Asked(name, photo, args.prompt, args.answer) for name, photo in zip(names, photos, strict=True)]
    path, found = Path(args.answers), []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise ValueError(f"--answers {path} cannot be read: {exc}") from exc
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"--answers {path}, line {number}"
            record = read_record(line, where)
            try:
                photo = load_photo(str(path.parent / record["image"]))
            except ValueError as exc:
                raise ValueError(f"{where}: {str(exc).removeprefix('--image_path').lstrip(': ')}") from exc
            found.append(Asked(record["image"], photo, record["prompt"], record["answer"], where))
    if not found:
        raise ValueError(f"--answers {path} is empty: give lines of {RECORD}")
    return found


RECORD = '{"image": "a.jpg", "prompt": "Is there a dog?", "answer": "Yes"}'


def read_record(line: str, where: str) -> dict[str, str]:
    """Image, prompt and answer of a line. Raises ValueError saying where it stands and what would be valid."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"{where} is no JSON ({exc}): give {RECORD}") from exc
    for name in ("image", "prompt", "answer"):
        text = record.get(name) if isinstance(record, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where} has no text for {name!r}: give {RECORD}")
    return record


def read_all(args: argparse.Namespace, model, processor, asked: list[Asked]) -> list[Reading]:
    """A reading of each. Raises ValueError, for a list with the line."""
    readings = []
    for one in asked:
        try:
            readings.append(read(model, processor, one.photo, one.prompt, one.answer, args.max_new_tokens))
        except ValueError as exc:
            raise ValueError(f"{one.where}: {exc}" if one.where else str(exc)) from exc
    return readings


class Done(NamedTuple):
    """What a run has to say."""

    answers: dict[str, str]  # of each photo, the model's or a given one
    paths: list[Path]
    lines: list[str]
    code: int = 0


def run(args: argparse.Namespace) -> Done:
    """Check, load, explain, draw and write."""
    if args.listed:
        return run_list(args)
    asked = asked_by(args)
    mask = None if args.mask is None else read_mask(args.mask, asked[0].photo.size)
    if args.answer is not None:
        check_answer(args)
    device = resolve_device(args.device)
    layers = choose_layers(args, count_layers(args.model_path))
    subfolders = layers if args.mode == "comparative" else ()
    with output_folder(Path(args.output_dir, FOLDERS[args.mode]), subfolders, "--output_dir") as write:
        processor = load_processor(args.model_path, args.max_pixels)
        model = load_model(args.model_path, device, args.dtype)
        readings = read_all(args, model, processor, asked)
        files, lines = explain_readings(args, readings, [one.name for one in asked], layers, mask)
        answers = {one.name: reading.answer for one, reading in zip(asked, readings, strict=True) if not args.answers}
        return Done(answers, write(files), lines)


def explain_readings(args, readings: list[Reading], names: list[str], layers, mask) -> tuple[dict, list[str]]:
    """({file name: content}, lines to be said) of the mode, of one photo or of several together."""
    if args.mode == "knockout":
        return sever_photos(args, readings, names, mask)
    settings = Settings(**{name: getattr(args, name) for name in SETTINGS})
    if args.mode == "flow":
        return trace_photos(args, readings, names, layers, settings)
    if args.mode == "words":
        return explain_words(args, readings[0], layers, settings)
    return explain_target(args, readings[0], layers, settings, mask)


# a list of photos


def model_identity(model_path: str) -> str:
    """What tells a model from another: of a folder its files of text and, of each tensor, both ends; of a name on the
    hub, its revision.
    """
    folder, state = Path(model_path), hashlib.sha256()
    if not folder.is_dir():
        return f"{model_path} {PretrainedConfig.get_config_dict(model_path)[0].get('_commit_hash')}"
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".txt"):
            state.update(path.read_bytes())
        elif path.suffix == ".safetensors":
            for part in tensor_ends(path):
                state.update(part)
    return state.hexdigest()


def tensor_ends(path: Path, most: int = 2**15) -> Iterator[bytes]:
    """The header of a safetensors file, and the first and last bytes of each tensor; a damaged one ends early."""
    with path.open("rb") as file, suppress(ValueError, LookupError, TypeError, AttributeError):
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, path.stat().st_size))
        yield header
        for name, tensor in json.loads(header).items():
            if name != "__metadata__":
                start, end = tensor["data_offsets"]
                for at in (start, max(start, end - most)):
                    file.seek(8 + length + at)
                    yield file.read(min(most, end - at))


def as_flags(exc: Exception) -> str:
    """The message in one line, with the names of flags for those of arguments."""
    message = " ".join(str(exc).split()) or type(exc).__name__
    flags = "prompt|answer|target|target_occurrence|contrast|words|keep|window"
    return re.sub(rf"(^|: )({flags})=", r"\1--\2 ", message)


def asked_of(args: argparse.Namespace, item) -> argparse.Namespace:
    """The flags as they are for an item of a list. Raises ValueError for what it asks and the mode cannot do."""
    own = {name: getattr(item, name) for name in ("prompt", "answer", "target", "contrast")}
    acting = {name for name in own if args.mode in MODES_OF_FLAG.get(f"--{name}", FOLDERS)}
    own = {name: own[name] for name in acting if own[name] is not None}  # a list serves modes without targets, too
    asked = argparse.Namespace(**vars(args) | own | {"image_path": str(item.image), "photos": [str(item.image)]})
    if asked.contrast is not None and asked.target is None:
        raise ValueError(f"a contrast {asked.contrast!r} needs a target, whose place it takes")
    return asked


def run_list(args: argparse.Namespace) -> Done:
    """Explain each photo of a list in a folder of its own; what is whole already is left as it is."""
    from importlib.metadata import version

    from studies.faithfulness import object_mask
    from studies.photo_list import RESULTS, Processes, read_list, work_off

    try:
        items = read_list(args.photos)
    except ValueError as exc:
        raise ValueError(f"--image_path: {exc}") from exc
    processes = Processes(cpu=args.device == "cpu" or not torch.cuda.is_available())
    device = processes.device if args.device == "auto" else resolve_device(args.device)
    layers = choose_layers(args, count_layers(args.model_path))
    thirds = layers if args.mode == "comparative" else ()
    settings = {name: value for name, value in vars(args).items() if name not in NO_MATTER}
    settings["model_path"] = model_identity(args.model_path)
    versions = {name: version(name) for name in PACKAGES}

    @functools.cache
    def loaded():  # once there is something to do
        processor = load_processor(args.model_path, args.max_pixels)
        return load_model(args.model_path, device, args.dtype), processor

    def explain_item(item, photo):
        start, asked = time.monotonic(), asked_of(args, item)
        reading = read(*loaded(), photo, asked.prompt, asked.answer, asked.max_new_tokens)
        wanted = args.mode == "evaluate" or (args.mode == "knockout" and args.window is not None)
        mask = object_mask(item.object, photo.size) if item.object and wanted else None
        if args.mode == "evaluate":
            files, lines = benchmark_photo(asked, reading, layers, mask)
        else:
            files, lines = explain_readings(asked, [reading], [item.image.name], layers, mask)
        about = {
            "name": item.name,
            "image": str(item.image),
            "model": args.model_path,
            "prompt": reading.prompt,
            "answer": reading.answer,
        }
        about |= {"mode": args.mode, "said": lines, "seconds": round(time.monotonic() - start, 3)}
        about |= tables_of(files) | {"settings": settings, "versions": versions}
        return about, files

    folder, start = Path(args.output_dir, FOLDERS[args.mode]), time.monotonic()
    quiet, args.quiet = args.quiet, True  # one bar for all
    records, before = work_off(
        items, folder, settings, processes, lambda item: load_photo(str(item.image)), explain_item,
        subfolders=thirds, overwrite=args.overwrite, quiet=quiet,
        reason_of=lambda exc: as_flags(exc).removeprefix("--image_path: "),
        tell=lambda line: print(f"test_gradcam.py: {line}", file=sys.stderr, flush=True),
    )  # fmt: skip
    if not processes.first:
        return Done({}, [], [])
    failed = [record for record in records if "error" in record]
    now = len(records) - len(failed) - before
    lines = [f"{len(items)} photos: {now} explained in {time.monotonic() - start:.0f} s, {before} were whole already"]
    lines[0] += f", {len(failed)} failed: see {RESULTS}" if failed else ""
    left_out = sum(any(line.startswith("left out: ") for line in record.get("said", ())) for record in records)
    lines += [f"{left_out} left out: the model does not say the target"] if left_out else []
    paths = [(folder / RESULTS).resolve()]
    if args.mode == "evaluate":
        tables, said = benchmark_tables(args, records)
        paths, lines = paths + write_files(folder, tables), lines + said
    return Done({}, paths, lines, 1 if failed else 0)


def tables_of(files: dict[str, object]) -> dict:
    """What of a photo's files goes into the record of a list: words with their probabilities, rows of tables."""
    tables = {name: files[name] for name in files if name.endswith(".csv")}
    found = {"measures": {name: list(csv.DictReader(io.StringIO(text))) for name, text in tables.items()}}
    if "words.json" in files:
        found["words"] = json.loads(files["words.json"])["words"]
    return found


def benchmark_photo(args, reading: Reading, layers, mask) -> tuple[dict, list[str]]:
    """The same of evaluate mode over a list: the measures of every method and layer, and the maps of one method.

    A target that the model's own answer does not have is no failure of the photo: it is left out.
    """
    from studies.faithfulness import benchmark_rows

    try:
        span = find_target(reading.answer, args.target, args.target_occurrence)
    except ValueError:
        if args.answer is not None:
            raise
        return {}, [f"left out: the model does not say {args.target!r}"]
    tokens = reading.tokens_of(span)
    spans = [span, *(reading.spans[i] for i in tokens)] if mask is not None and len(tokens) > 1 else [span]
    methods, asked = CHOICES["method"] if args.compare else [args.method], {n: getattr(args, n) for n in SETTINGS}
    maps = {
        method: explain(reading, spans, layers, Settings(**asked | {"method": method}), **passing(args))
        for method in methods
    }
    options = {name: getattr(args, name) for name in ("steps", "baseline", "seed")}
    options["batch_size"] = runs_at_once(args)
    rows, given = benchmark_rows(reading, maps, mask, **options), maps[methods[0]][0]
    figures = draw_grid(reading.photo, given, **drawing(args))[1]
    files = {name: draw for name, draw in figures.items() if name.startswith("layer_comparison_grid")}
    return files | {"scores.csv": to_csv(rows)}, [f"explained: {given.target!r} at layer {', '.join(map(str, layers))}"]


def benchmark_tables(args, records: list[dict]) -> tuple[dict, list[str]]:
    """({file name: content}, the table in lines) of evaluate mode over a list."""
    from studies.benchmark import basis, summarise, to_latex, to_table

    def numbers(row):
        return {k: v if k in ("method", "layer") else float(v) for k, v in row.items() if v or k == "layer"}

    found = [
        (record["image"], [numbers(row) for row in record["measures"]["scores.csv"]])
        for record in records
        if "scores.csv" in record.get("measures", {})
    ]
    if not found:
        return {}, ["no word could be measured, so there is no table"]
    table = summarise(found)
    photos = len({photo for photo, _ in found})
    caption = f"{len(found)} words in {photos} photos; {basis(table)}95 % of 1000 resamples of the photos"
    return {"benchmark.csv": to_csv(table), "benchmark.tex": to_latex(table, caption)}, [caption, *to_table(table)]


# one photo, or several together


def drawing(args: argparse.Namespace) -> dict[str, Look | Paper]:
    """How maps and figures are to look."""
    look = Look(**{name: getattr(args, name) for name in LOOK})
    return {"look": look, "paper": Paper(args.width, tuple(dict.fromkeys(args.format)), args.heatmaps)}


def passing(args: argparse.Namespace) -> dict[str, int | str | bool]:
    """How the noisy copies pass the model: keywords of `explain`."""
    return {"batch_size": args.batch_size, "recompute": args.recompute}


def runs_at_once(args: argparse.Namespace) -> int:
    """How many runs of evaluate and knockout mode pass the model at once."""
    return RUNS_AT_ONCE if args.batch_size == "auto" else args.batch_size


def explain_target(args, reading, layers, settings, mask) -> tuple[dict, list[str]]:
    """({file name: content}, lines to be said) of every mode that explains one part of the answer."""
    chosen = sum(layers.values(), []) if isinstance(layers, dict) else layers
    span = find_target(reading.answer, args.target, args.target_occurrence)
    if args.compare:
        return compare_methods(args, reading, span, chosen, mask)
    (token_maps,) = explain(reading, [span], chosen, settings, show_progress(args.quiet), **passing(args))
    what = "the whole answer" if token_maps.target == reading.answer else repr(token_maps.target)
    if settings.contrast is not None:
        what += f" rather than {settings.contrast!r}"
    count = f"{len(token_maps.target_tokens)} of {len(reading.tokens)} tokens"
    lines = [f"explained: {what} ({count}) at layer {', '.join(map(str, chosen))}"]
    if args.mode == "single" and args.layer is None:
        lines[0] += f", the middle one of {get_model_layers(reading.model)[1]}: --layer chooses another"
    consequence = "it is left out" if args.mode == "evaluate" else "its pictures are grey panels"
    lines += [f"layer {layer} has no map ({why}): {consequence}" for layer, why in token_maps.blank.items()]
    if args.mode == "evaluate":
        from studies.faithfulness import evaluate

        options = {name: getattr(args, name) for name in ("steps", "baseline", "seed", "randomize", "quiet")}
        options |= {"batch_size": runs_at_once(args), "copies": passing(args)}
        files, measured = evaluate(reading, token_maps, mask, **drawing(args), **options)
        lines += measured
    elif args.mode == "comparative":
        files = draw_comparative(reading.photo, token_maps, layers, **drawing(args))[1]
    else:
        draw = {"single": draw_single, "grid": draw_grid, "multi": draw_multilayer}[args.mode]
        files = draw(reading.photo, token_maps, **drawing(args))[1]
    if args.save_raw:
        files["maps.npz"] = raw_arrays(token_maps, args)
    return files, lines


def compare_methods(args, reading, span, layers, mask) -> tuple[dict, list[str]]:
    """The same of evaluate mode with --compare: every method with the settings that are given, or its own."""
    from studies.faithfulness import compare

    asked, maps = {name: getattr(args, name) for name in SETTINGS}, {}
    for method in CHOICES["method"]:
        settings = Settings(**asked | {"method": method})
        (maps[method],) = explain(reading, [span], layers, settings, show_progress(args.quiet), **passing(args))
    options = {name: getattr(args, name) for name in ("steps", "baseline", "seed", "quiet")}
    options["batch_size"] = runs_at_once(args)
    files, lines = compare(reading, maps, mask, **drawing(args), **options)
    return files, [f"explained: {reading.answer[slice(*span)]!r} at layer {', '.join(map(str, layers))}", *lines]


def explain_words(args, reading, layers, settings) -> tuple[dict, list[str]]:
    """The same of words mode."""
    from studies.words import draw_words, map_words, name_words, word_tokens

    word_maps = map_words(reading, args.words, layers, settings, show_progress(args.quiet), **passing(args))
    measured, name = word_tokens(reading, word_maps), Path(args.image_path).name
    files = draw_words(reading.photo, name, word_maps, *measured, **drawing(args))[1]
    lines = [f"explained: {', '.join(name_words(word_maps))} at layer {', '.join(map(str, layers))}"]
    for layer in layers:
        if all(layer in word.blank for word in word_maps):
            why = word_maps[0].blank[layer]
            lines.append(f"layer {layer} has no map of any word ({why}): its pictures are grey panels")
    return files, lines


def find_targets(args, readings, names) -> list[tuple[int, int]]:
    """The explained span of each answer. Raises ValueError naming the photo."""
    spans = []
    for reading, name in zip(readings, names, strict=True):
        try:
            spans.append(find_target(reading.answer, args.target, args.target_occurrence))
        except ValueError as exc:
            raise exc if len(readings) == 1 else ValueError(f"{name}: {exc}") from exc
    return spans


def trace_photos(args, readings, names, layers, settings) -> tuple[dict, list[str]]:
    """The same of flow mode."""
    from studies.information_flow import trace

    spans = find_targets(args, readings, names)
    options = {"attention_map": args.attention_maps, "taps": args.taps, "quiet": args.quiet} | passing(args)
    return trace(readings, names, spans, layers, settings, **options, **drawing(args))


def sever_photos(args, readings, names, mask) -> tuple[dict, list[str]]:
    """The same of knockout mode."""
    from studies.information_flow import sever

    spans = [None] * len(readings) if args.target is None else find_targets(args, readings, names)
    options = {name: getattr(args, name) for name in ("window", "keep", "quiet")}
    options["batch_size"] = runs_at_once(args)
    options["paper"] = drawing(args)["paper"]
    return sever(readings, names, spans, mask=mask, accuracy=args.answers is not None, **options)


ANSWERS_SHOWN = 10


def report(answers: dict[str, str], paths: list[Path], lines: list[str]) -> None:
    """Print the answers, what is to be said of them, and the files."""
    here = Path.cwd()
    for name, answer in list(answers.items())[:ANSWERS_SHOWN]:
        print(f"answer: {answer}" if len(answers) == 1 else f"{name}: {answer}")
    if len(answers) > ANSWERS_SHOWN:
        print(f"… and {len(answers) - ANSWERS_SHOWN} more answers")
    for line in [*lines, *(f"wrote {path.relative_to(here) if path.is_relative_to(here) else path}" for path in paths)]:
        print(line)
    if others := other_files(paths):
        print(f"beware: {others[0].parent} holds files of another run too: {len(others)} such as {others[0].name}")


@contextmanager
def quietly(verbose: bool):
    """Inside, the libraries report nothing unless asked to; our own warnings take one line each."""
    with warnings.catch_warnings():
        if not verbose:
            transformers.logging.set_verbosity_error()
            transformers.logging.disable_progress_bar()
            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
            warnings.simplefilter("ignore")
        warnings.simplefilter("always", ExplanationWarning)
        usual = warnings.showwarning

        def show(message, category, *where, **options):
            if issubclass(category, ExplanationWarning):
                print(f"test_gradcam.py: warning: {message}", file=sys.stderr)
            else:
                usual(message, category, *where, **options)

        warnings.showwarning = show
        yield


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # an answer in a script that the terminal lacks is no error
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    args = parse_args(argv)
    try:
        with quietly(args.verbose):
            done = run(args)
    except KeyboardInterrupt:
        return 130
    except Exception as exc:
        if args.verbose:
            traceback.print_exc()
        print(f"test_gradcam.py: error: {as_flags(exc)}", file=sys.stderr)
        return 2 if isinstance(exc, (ValueError, ExplanationError)) else 1
    try:
        report(*done[:3])
        if sys.stdout is not None:  # closed from the start
            sys.stdout.flush()
    except OSError as exc:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
        if not isinstance(exc, BrokenPipeError):  # else whoever reads the output has read enough
            print(f"test_gradcam.py: error: the files are written, but not this report: {exc}", file=sys.stderr)
            return 1
    return done.code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves nothing half done, as Ctrl-C
    sys.exit(main())
