"""The flags of the command line, and whether they can act together. Needs no torch, which takes seconds to load."""

import argparse
import glob
import os
import re
import sys
from pathlib import Path

from common.terminal import plain

__all__ = ["parse_args"]
HERE = Path(__file__).resolve().parents[1]
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
        self.exit(2, plain(f"{self.prog}: error: {message}") + "\n")


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
    if (bare := next((word for word in argv if re.fullmatch(r"(--\w+=)?--", word)), None)) is not None:
        parser.error(f"{bare} gives no value")  # argparse would take it for an empty list
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
    if args.contrast is not None and args.contrast.strip() == args.target.strip():
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
