"""The flags of the command line, and whether they can act together. Needs no torch, which takes seconds to load.

A flag stands in one place, `make_parser`, with its type, the modes in which it acts, and what it does.
"""

import argparse
import glob
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from common.flag_types import LAYER_NAMES, to_count, to_layers, to_opacity, to_path, to_rate, to_text, to_words
from common.terminal import plain

__all__ = [
    *("CHOICES", "EXAMPLES", "FOLDERS", "LAYER_NAMES", "MODES_OF_FLAG", "OF_ANSWERS", "OF_PHOTOS", "OneLineParser"),
    *("make_parser", "parse_args"),
]

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
MAPS = tuple(mode for mode in FOLDERS if mode != "knockout")  # modes with maps
OF_PHOTOS = ("flow", "knockout")  # modes of one or several photos
OF_PICTURES = ("single", "grid", "words")  # modes that explain several pictures of one prompt
CHOICES = {  # as the modules have them, whose import takes too long for --help
    "score": ("logit", "logprob"),
    "method": ("auto", "needed", "gradcam", "hirescam", "product", "paper", "parent", "attention", "rollout", "chefer"),
    "rules": ("attnlrp", "detached", "plain"),
    "tap": ("input", "output", "post_attention_layernorm"),
    "part": ("answer", "thinking", "all"),
    "baseline": ("blur", "mean", "black"),
    "colormap": ("plasma", "inferno", "magma", "viridis", "cividis", "turbo", "jet"),
    "upsample": ("smooth", "cells"),
    "scale": ("map", "word", "all"),
    "width": ("page", "column"),
    "format": ("pdf", "svg"),
}
ONE_PROMPT = ("--together", "--video", "--fps")
CANNOT = {  # mode: {flag: what to do in its place}
    "single": {"--layers": "use --layer", "--layer_range": "use --layer"},
    "comparative": dict.fromkeys(
        ("--layer", "--layers", "--layer_range"), "early, middle and late layers are chosen automatically"
    )
    | dict.fromkeys(ONE_PROMPT, "use --mode grid"),
    "multi": dict.fromkeys(ONE_PROMPT, "use --mode grid, which takes the same layers"),
    "evaluate": dict.fromkeys(ONE_PROMPT, "what is measured is of one photo"),
    "words": {
        "--target": "use --words",
        "--target_occurrence": "use --words",
        "--save_raw": "maps.npz is always written",
    },
    "flow": {
        **dict.fromkeys(ONE_PROMPT, "each photo is read in a prompt of its own"),
        "--save_raw": "information_flow.npz is always written",
    },
    "knockout": {
        **dict.fromkeys(("--layer", "--layers", "--layer_range"), "every layer is tried"),
        **dict.fromkeys(ONE_PROMPT, "each photo is read in a prompt of its own"),
        "--save_raw": "knockout.npz is always written",
    },
}
OF_A_LIST = ("--image_path", "--prompt", "--messages", "--answer", "--target", "--target_occurrence", "--mask")
OF_ANSWERS = ("--hide_from", "--synonyms", "--fastv", "--removed")  # flags that need --answers
NO_GRADIENT = ("--tap", "--rules", "--score", "--recompute", "--prompt_words", "--taps")
LOOKS = ("attention", "rollout")  # methods without a gradient
OF_HEADS = ("attention",)  # methods that --head acts on


def _without(method: str, flags: tuple[str, ...], why: str) -> tuple:
    """Of TOGETHER: flags that cannot be combined with a method."""
    return f"--method {method}", lambda args: args.method == method, flags, why


TOGETHER = [  # flags that cannot be combined with another: (that one, whether it is there, the flags, why)
    (
        "--compare",
        lambda args: args.compare,
        ("--method", "--head", "--randomize", "--save_raw"),
        "all methods are measured",
    ),
    *(_without(name, ("--prompt_words",), "its gradients follow no rules") for name in ("paper", "parent")),
    *(_without(name, NO_GRADIENT, "attention takes no gradient, and is read in the layer itself") for name in LOOKS),
    *(_without(name, ("--contrast",), "attention is the same whichever word follows") for name in LOOKS),
    _without("chefer", ("--tap", "--rules", "--prompt_words", "--taps"), "it has gradients of attention alone"),
    _without("chefer", ("--contrast",), "relevance that is cut at zero has no difference"),
    ("--answers", lambda args: args.answers is not None, OF_A_LIST, "the list has the photos, prompts and answers"),
    ("a list of photos", lambda args: args.listed, ("--mask", "--answers", "--randomize"), "they are of one photo"),
    ("--answer", lambda args: args.answer is not None, ("--max_new_tokens",), "nothing is generated"),
    ("--prompt_words", lambda args: args.prompt_words, ("--tap", "--rules"), "relevance needs their defaults"),
    ("--messages", lambda args: args.messages is not None, ("--prompt", "--system"), "the messages have both"),
    (
        "--video",
        lambda args: args.video is not None,
        ("--image_path", "--together", "--messages"),
        "the video alone stands before the question",
    ),
]
EXAMPLES = """examples:
  python test_gradcam.py --mode single --layer 27
  python test_gradcam.py --mode grid --layers all --num_samples 3
  python test_gradcam.py --mode multi --layers 6 12 18 27 --method hirescam --score logprob
  python test_gradcam.py --mode knockout --target dog --window 9
"""


# the parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of all other bad input, that cannot steer the terminal."""

    def error(self, message):
        self.exit(2, plain(f"{self.prog}: error: {message}") + "\n")


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, tuple[str, ...]]]:
    """The parser, and {flag: the modes in which it acts} of flags that do not act in all of them."""
    parser, modes_of = OneLineParser(
        prog="test_gradcam.py",
        description="Show where in a photo the answer of a Qwen2.5-VL comes from (Smooth Grad-CAM).",
        epilog=EXAMPLES,
        formatter_class=_HelpFormatter,
    ), {}  # fmt: skip

    def add(flag, *modes, **options):
        name = flag.removeprefix("--")
        if name in CHOICES:
            options["choices"] = CHOICES[name]
        parser.add_argument(flag, **options)
        if modes:
            modes_of[flag] = modes

    add(
        "--mode",
        choices=FOLDERS,
        default="grid",
        help="one layer, a range, chosen layers, thirds compared, every word of the answer, measures of the maps, what "
        "the answer reads of the photo by layer, or what it needs",
    )
    with_layers = ("grid", "multi", "words", "evaluate", "flow")
    layers = {"type": to_layers, "nargs": "+", "metavar": "LAYERS"}
    add("--layer", "single", type=int, help="index, negative ones count from the end (default: the middle layer)")
    add("--layers", *with_layers, **layers, help=f"{', '.join(LAYER_NAMES)}, or layer indices")
    add("--layer_range", *with_layers, **layers, help="the same (default: auto, six layers; in multi mode four)")
    default_model = str(HERE / "demo_model")
    add("--model_path", type=to_path, default=default_model, help="model or LoRA adapter folder, or a name on the hub")
    add(
        "--image_path",
        type=to_path,
        nargs="+",
        default=[str(HERE / "demo.jpeg")],
        metavar="IMAGE_PATH",
        help="photo to explain, or a list of them: a folder, a glob, a .jsonl of {image, prompt? | messages?, answer?, "
        "target?, contrast?, mask? | box? | segmentation?}, several photos (one figure of all in flow, knockout mode)",
    )
    together = "read the photos of --image_path in one prompt, and explain them as one"
    add("--together", *OF_PICTURES, action="store_true", help=together)
    video = "an MP4, MOV, WebM, MKV or AVI file, in the place of photos"
    add("--video", *OF_PICTURES, type=to_path, help=video)
    add("--fps", *OF_PICTURES, type=to_rate, default=2.0, help="of --video: how many frames of a second are read")
    prompt = "Describe the main content in this image in detail."
    add("--prompt", type=to_text, default=prompt, help="question about the photo")
    add("--system", type=to_text, help="system prompt, in the place of the chat template's own")
    messages = "a JSON file of chat messages, with pictures of their own, in the place of --prompt"
    add("--messages", type=to_path, help=messages)
    copies = "noisy copies, 2 to 2.5 forward passes each: 3-5 preview, 10 standard, 20-50 high quality"
    add("--num_samples", *MAPS, type=int, default=10, help=copies)
    noise = "noise in shares of the pixel range; 0 is plain Grad-CAM"
    add("--noise_std", *MAPS, type=float, default=0.15, help=noise)
    output = "each mode writes to a folder of its own in this one"
    add("--output_dir", type=to_path, default="cam_results", help=output)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps, or map to spread the model over all devices")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="auto: the checkpoint's")
    add("--seed", *MAPS, type=int, default=0, help="of the noise")
    add("--max_new_tokens", type=to_count, default=128, help="where the generated answer is cut off")
    add("--answer", type=to_text, help="explain this text in place of the generated answer")
    add("--words", "words", type=to_words, default="content", help='content, all, or the words themselves: "dog,apple"')
    asked = "also show what each word takes from each word of the prompt"
    add("--prompt_words", "words", action="store_true", help=asked)
    targeted = tuple(mode for mode in FOLDERS if mode != "words")
    add("--target", *targeted, type=to_text, help="explain only this word or phrase of the answer")
    which = "which one, where the answer has the target several times"
    add("--target_occurrence", *targeted, type=to_count, default=1, help=which)
    part = "of a reasoning model's answer: what stands behind </think>, before it, or all (default: answer; words: all)"
    add("--part", help=part)
    contrasted = tuple(mode for mode in MAPS if mode != "words")
    contrast = "explain the target's score minus that of this text in its place"
    add("--contrast", *contrasted, type=to_text, help=contrast)
    method = (
        "gradients pooled (gradcam), the same on the image tokens alone that the words need (needed), each token's own "
        "(hirescam), the product of the first and the last, Grad-CAM exactly as published (paper), or as the paper's "
        "code draws it (parent); auto: needed for a word or phrase, gradcam for a whole answer and in flow mode. "
        "attention: where the words' positions look, rollout: through all layers, weaker "
        "evidence than the others; chefer: relevance x attention"
    )
    add("--method", *MAPS, default="auto", help=method)
    head = "of --method attention: one head of each layer, in the place of their mean"
    add("--head", *MAPS, type=int, help=head)
    add("--score", *MAPS, default="logit", help="what is summed over the explained tokens")
    add(
        "--rules",
        *MAPS,
        help="how gradients pass the decoder: AttnLRP's rules, only norms detached, or plain (default: attnlrp; of "
        "methods paper and parent: plain)",
    )
    add("--tap", *MAPS, help="where a layer is read (default: input; of paper and parent: the last)")
    add("--colormap", *MAPS, default="plasma", help="of the maps; jet is what papers often show")
    add(
        "--opacity",
        *MAPS,
        type=to_opacity,
        default="value",
        help="of the colours over the photo: value (cold areas stay photo), or the same everywhere, such as fixed:0.5",
    )
    add("--upsample", *MAPS, default="smooth", help="cells: the image tokens as they are")
    scaled = ("grid", "multi", "comparative", "words", "flow")
    scale = "what has full colour: the maximum of each map, of a word's maps, or of all"
    add("--scale", *scaled, default="map", help=scale)
    add("--heatmaps", "grid", "comparative", action="store_true", help="grids show each layer's heatmap too")
    add(
        "--width",
        default="page",
        help="of figures in print: both columns of a paper (7.2 inches) or one (3.3); no text is below 6 points there",
    )
    add("--format", nargs="+", default=[], help="of figures, written beside the PNG")
    pixels = "cap on the photo's pixels; never raises the model's own"
    add("--max_pixels", type=to_count, default=1_000_000, help=pixels)
    mask = "image of the photo's size, white where the explained object is (flow: for --heads; knockout: --window)"
    add("--mask", "evaluate", "flow", "knockout", type=to_path, help=mask)
    add("--baseline", "evaluate", default="blur", help="what removed image tokens show")
    add("--steps", "evaluate", type=to_count, default=64, help="of insertion and deletion")
    batch = "noisy copies that go through the model at once (default: 1); in evaluate and knockout mode, runs too (8)"
    add("--batch_size", type=to_count, help=batch)
    recompute = "recompute activations in the backward: slower, for less memory"
    add("--recompute", *MAPS, action="store_true", help=recompute)
    add("--randomize", "evaluate", action="store_true", help="also re-draw the weights of a copy, and compare maps")
    add("--compare", "evaluate", action="store_true", help="measure the maps of all methods beside each other")
    add("--attention_maps", "flow", action="store_true", help="also draw attention between all positions")
    add("--heads", "flow", action="store_true", help="also draw where every head looks: layers x heads")
    add("--taps", "flow", action="store_true", help="also draw the maps at every module where a layer can be read")
    window = "also block image, question and answer in so many layers around each"
    add("--window", "knockout", type=to_count, help=window)
    keep = "also leave so many image tokens, those with most attention, visible"
    add("--keep", "knockout", type=to_count, help=keep)
    answers = "a .jsonl of {image, prompt, answer | answers | objects, choices?, task?}: answers are scored over it"
    add("--answers", "knockout", type=to_path, help=answers)
    hidden = "of --answers: also answer with the image hidden from each of these layers on"
    add("--hide_from", "knockout", **layers, help=hidden)
    synonyms = "of --answers with objects: a file of their names (default: COCO's, studies/coco_names.txt)"
    add("--synonyms", "knockout", type=to_path, help=synonyms)
    pruned = "of --answers: also answer with image tokens removed from each of these layers on, as FastV does"
    add("--fastv", "knockout", **layers, help=pruned)
    share = "of --fastv: how many of them, in percent"
    add("--removed", "knockout", type=float, nargs="+", metavar="PERCENT", help=share)
    raw = ("single", "grid", "multi", "comparative", "evaluate")
    add("--save_raw", *raw, action="store_true", help="also write maps.npz: raw maps, tokens, answer, settings")
    add("--overwrite", action="store_true", help="of a list: replace results that are there already")
    add("--quiet", action="store_true", help="no progress bar")
    add("--verbose", action="store_true", help="what the libraries report, and the traceback of an error")
    return parser, modes_of


MODES_OF_FLAG = make_parser()[1]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags (of the command line for None), once it is known that each can act; else SystemExit with code 2."""
    argv = own_words() if argv is None else argv
    argv = [f" {word}" if re.fullmatch(r"-\d+[,-][-,\d]*", word) else word for word in argv]  # a list, and no flag
    parser, _ = make_parser()
    if (bare := next((word for word in argv if re.fullmatch(r"(--\w+=)?--", word)), None)) is not None:
        parser.error(f"{bare} gives no value")  # argparse would take it for an empty list
    known = vars(parser.parse_args([]))
    argv = ["=".join([_in_full(word.split("=")[0], known), *word.split("=")[1:]]) for word in argv]
    args, given = parser.parse_args(argv), {word.split("=")[0] for word in argv}
    several = len(args.image_path) > 1 and args.mode not in OF_PHOTOS and not args.together
    args.listed = several or any(map(is_list, args.image_path))
    try:
        args.notes = check_flags(args, given)
    except ValueError as exc:
        parser.error(str(exc))
    args.photo_given = "--image_path" in given
    args.image_path, args.photos = args.image_path[0], args.image_path
    return args


def _in_full(word: str, known: Iterable[str]) -> str:
    """The only flag that begins with a word of the command line, or else the word.

    A flag with a further part, such as --prompt_words, is not meant by the beginning of the flag without it.
    """
    flags = [f"--{name}" for name in known if word.startswith("--") and f"--{name}".startswith(word)]
    flags = [flag for flag in flags if not any(flag.startswith(f"{other}_") for other in flags)]
    return flags[0] if len(flags) == 1 else word


def own_words() -> list[str]:
    """The words of the command line, without a notebook kernel's own: -f FILE.json and --Class.name=value."""
    if "ipykernel" not in sys.modules:
        return sys.argv[1:]
    words = []
    for word in sys.argv[1:]:
        if words[-1:] == ["-f"] and word.endswith(".json"):
            words.pop()
        elif not re.match(r"--f=.*\.json$|--\w+\.\w+=", word):
            words.append(word)
    return words


def is_list(path: str) -> bool:
    """Whether a path names several photos: a folder, a .jsonl, or a glob that is no file's name."""
    there = os.path.exists(path)  # noqa: PTH110  (which a name too long for any file system does not raise from)
    return Path(path).suffix == ".jsonl" or (Path(path).is_dir() if there else glob.has_magic(path))


def check_flags(args: argparse.Namespace, given: set[str]) -> list[str]:
    """Whether flags can act in the mode, and together; returns notes on those that others leave nothing to do.

    Raises ValueError naming the flag and what is valid.
    """
    notes = []
    for flag in given & set(MODES_OF_FLAG):
        if args.mode not in (modes := MODES_OF_FLAG[flag]):
            instead = CANNOT.get(args.mode, {}).get(flag) or ("use --layers" if flag == "--layer" else "it cannot act")
            raise ValueError(f"{flag} acts in {', '.join(modes)} mode only; in {args.mode} mode {instead}")
    for other, there, flags, why in TOGETHER:
        if there(args) and (flag := next((flag for flag in flags if flag in given), None)):
            raise ValueError(f"{flag} cannot be combined with {other}: {why}")
    if args.layers and args.layer_range:
        notes.append("--layers and --layer_range are both given: the layers are those of --layers")
    flag = "--layers" if args.layers else "--layer_range"
    args.layers = [part for parts in args.layers or args.layer_range or [] for part in parts]  # none: the mode's own
    if len(args.layers) > 1 and any(isinstance(part, str) for part in args.layers):
        raise ValueError(f"{flag} takes one of {', '.join(LAYER_NAMES)}, or layer indices, not both or two")
    args.layer_range = next((part for part in args.layers if isinstance(part, str)), args.layers or "auto")
    if args.noise_std == 0 and "--num_samples" in given and args.num_samples > 1:
        notes.append(f"--num_samples {args.num_samples}: without noise, copies would be equal, so one is made")
    if args.overwrite and not args.listed:
        raise ValueError("--overwrite acts on a list of photos only: what one photo writes is always replaced")
    if len(set(args.image_path)) < len(args.image_path):
        raise ValueError(f"--image_path has a photo twice: {max(args.image_path, key=args.image_path.count)}")
    if args.together and (args.listed or len(args.image_path) < 2):
        raise ValueError(f"--together needs two photos or more, each with its path: --image_path is {args.image_path}")
    if "--fps" in given and args.video is None:
        raise ValueError(f"--fps {args.fps:g} needs --video, whose frames it counts")
    if args.mask is not None and args.mode in OF_PHOTOS:
        if args.mode == "knockout" and args.window is None:
            raise ValueError("--mask needs --window in knockout mode: it tells whose attention is blocked")
        if args.mode == "flow" and not args.heads:
            raise ValueError("--mask needs --heads in flow mode: it tells which heads look at the object")
        if len(args.image_path) > 1:
            raise ValueError("--mask is of one photo: give one --image_path")
    if args.head is not None and args.method not in OF_HEADS:
        raise ValueError(f"--head needs --method {' or '.join(OF_HEADS)}: no other map is that of a head")
    for flag in OF_ANSWERS:
        if flag in given and args.answers is None:
            raise ValueError(f"{flag} needs --answers, the list whose answers are scored")
    for name in ("hide_from", "fastv"):
        parts = [part for parts in getattr(args, name) or [] for part in parts]
        if len(parts) > 1 and any(isinstance(part, str) for part in parts):
            raise ValueError(f"--{name} takes one of {', '.join(LAYER_NAMES)}, or layer indices, not both or two")
        setattr(args, name, parts)
    if bool(args.fastv) != bool(args.removed):
        raise ValueError("--fastv and --removed need each other: from which layers on, and how many percent")
    if wrong := [share for share in args.removed or [] if not 0 < share < 100]:
        raise ValueError(f"--removed {wrong[0]:g} must be a percentage between 0 and 100")
    if args.target is None and args.target_occurrence > 1:
        raise ValueError(f"--target_occurrence {args.target_occurrence} needs a --target")
    if args.contrast is not None and args.target is None:
        raise ValueError(f"--contrast {args.contrast!r} needs a --target, whose place it takes")
    if args.contrast is not None and args.contrast.strip() == args.target.strip():
        raise ValueError(f"--contrast {args.contrast!r} is the target itself: their difference is zero everywhere")
    return notes
