"""Smooth Grad-CAM of a Qwen2.5-VL from the command line: which parts of a photo an answer comes from.

    flags -> Request                    what is asked for, made once
      -> photos, layers, folder         checked before the model is loaded
      -> Readings                       photo, prompt and answer, read once
      -> MODES[mode]                    {file name: content}, lines to be said
      -> files, report

Exit code 0: everything that was asked for is written. 2: the request cannot be met as it stands (a wrong flag, photo,
model folder or layer, an answer that is empty or not finite), with one line that says why. 1: anything else, such as
memory that ran out, or a photo of a list that cannot be explained. A failed run leaves no partial files.

The flags stand first: torch and transformers, which take seconds to load, are imported once they are known to be good.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the run without more ado, until `main` can tidy up

# ruff: noqa: E402  (importing takes time; torch takes seconds)
import argparse
import functools
import json
import logging
import os
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from common.flags import FOLDERS, OF_PHOTOS, parse_args

if __name__ == "__main__":
    parse_args()  # --help and mistyped flags are answered here

import numpy as np
import transformers
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration  # noqa: F401  (users import them from here)

from common.checkpoint import (
    count_heads,
    count_layers,
    load_model,
    load_processor,
    model_identity,
    model_named,
    resolve_device,
)
from common.evidence import (
    Evidence,
    departures_of_most,
    doubt_lines,
    evidence_lines,
    explain_by_methods,
    explain_with_evidence,
    joined,
    passed,
    warnings_of,
    with_method,
)
from common.families import seen
from common.files import other_files, output_folder
from common.messages import load_messages, paths_of, prompt_of, take_last
from common.notebook import Shown
from common.page import PAGE, Paper
from common.passes import passes_of, recomputed, vision_kept
from common.photos import explained_photo, load_mask, load_photo, object_mask, readable
from common.progress import answer_progress, forecast_copies, show_progress
from common.stopping import stoppable
from common.terminal import say
from smooth_gradcam import (
    METHODS,
    PLAIN,
    ExplanationError,
    ExplanationWarning,
    Look,
    Reading,
    Settings,
    SmoothQwenGradCAM,
    TokenMaps,
    compute_token_maps,
    find_target,
    get_model_layers,
    read,
    resolve_layers,
)
from visualization_utils import (
    check_drawing,
    comparative_layers,
    create_comparative_analysis,
    create_layer_comparison_grid,
    draw_comparative,
    draw_grid,
    draw_multilayer,
    draw_single,
    ninths,
    select_layers,
    visualize_multiple_layers,
)

__all__ = [  # users import the modules' own from here, too
    "SmoothQwenGradCAM",
    "create_comparative_analysis",
    "create_layer_comparison_grid",
    "get_model_layers",
    "main",
    "single_layer_visualization",
    "visualize_multiple_layers",
]

PACKAGES = ("torch", "transformers", "numpy", "pillow", "matplotlib")  # whose versions --save_raw notes
COMPARED = [method for method in METHODS if method != "auto"]
RUNS_AT_ONCE = 8  # of evaluate and knockout mode
ANSWERS_SHOWN = 10


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
    settings |= {"num_samples": num_samples, "noise_std": noise_std}
    settings = {"passes": passes_of(settings.get("contrast")), "by": explain_with_evidence} | settings
    settings = {"progress": show_progress(quiet)} | settings
    photo = explained_photo(image, prompt)
    with output_folder(save_dir, inputs=[image]) as write:
        given = None if image is None else photo
        token_maps = compute_token_maps(model, processor, given, prompt, [layer], **settings)
        result, files = draw_single(seen(model, processor, photo), token_maps, look, paper)
        write(files)
    about = {"layer": layer, "answer": token_maps.answer, "target": token_maps.target}
    return Shown(dict(result) | about, files["visualization.png"])


# what is asked for


class Request(NamedTuple):
    """The flags, and what is made of them: how maps are made, how they look, what figures are for."""

    args: argparse.Namespace
    settings: Settings
    look: Look
    paper: Paper

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Request":
        names = ("num_samples", "noise_std", "seed", "tap", "score", "contrast", "method", "rules", "head")
        settings = Settings(**{name: getattr(args, name) for name in names})
        look = Look(args.colormap, args.opacity, args.upsample, args.scale)
        return cls(args, settings, look, Paper(args.width, tuple(dict.fromkeys(args.format)), args.heatmaps))

    @property
    def drawing(self) -> dict[str, Look | Paper]:
        return {"look": self.look, "paper": self.paper}

    @property
    def copies(self) -> dict:
        """How the noisy copies pass the model: keywords of `explain`."""
        return {"batch_size": self.args.batch_size or 1, "passes": passes_of(self.settings.contrast)}

    @property
    def runs_at_once(self) -> int:
        return self.args.batch_size or RUNS_AT_ONCE

    def explain(self, reading: Reading, span, layers, settings: Settings) -> TokenMaps:
        """The maps of one part of the answer, those of several pictures as one."""
        progress = show_progress(self.args.quiet)
        maps = explain_with_evidence(reading, [span], layers, settings, progress, **self.copies)
        return joined(maps, len(reading.grids))[0]

    def forecast(self, reading: Reading, **counts: int) -> None:
        if not self.args.quiet:
            forecast_copies(reading, self.settings, **counts)


class Question(NamedTuple):
    """A question about a photo, and the answer that is to be explained, the model's own for None."""

    name: str
    photo: Image.Image  # or a list of them, or a video, see `studies/pictures.py`
    prompt: str | list  # or messages
    answer: str | None
    where: str = ""  # in a list
    truth: dict | None = None  # of a list's question, see studies/answers.py


def questions(args: argparse.Namespace) -> list[Question]:
    """What is to be read: a photo, several, or the list of --answers. Raises ValueError naming flag, file and line."""
    if args.together or args.video is not None:
        from studies.pictures import Source

        args.source = Source.of(args)
        return [Question(args.source.name, args.source.photo, prompt_of(args), args.answer)]
    if args.answers is None:
        names = [readable(Path(path).name) for path in args.photos]
        names = names if len(set(names)) == len(names) else [readable(path) for path in args.photos]
        photos = map(load_photo, args.photos)
        prompt = prompt_of(args)
        return [Question(name, photo, prompt, args.answer) for name, photo in zip(names, photos, strict=True)]
    from studies.answers import said_answer
    from studies.questions import read_questions

    found = []
    try:
        for item in read_questions(Path(args.answers)):
            try:
                photo = load_photo(str(item.image))
            except ValueError as exc:
                raise ValueError(f"{item.source}: {str(exc).removeprefix('--image_path').lstrip(': ')}") from exc
            own = argparse.Namespace(**vars(args) | {"prompt": item.prompt, "messages": item.messages})
            answer, where = said_answer(item.truth), f"--answers {item.source}"
            found.append(Question(item.name, photo, prompt_of(own), answer, where, item.truth))
    except ValueError as exc:
        raise ValueError(f"--answers {exc}") from exc
    return found


def read_mask(path: str, size: tuple[int, int]) -> np.ndarray:
    """The object's pixels. Raises ValueError naming the flag."""
    try:
        return load_mask(path, size)
    except ValueError as exc:
        raise ValueError(f"--mask {path}: {exc}") from exc


def seen_mask(path: str, model, processor, mask: np.ndarray) -> np.ndarray:
    """The object's pixels in what the model sees of the photo. Raises ValueError naming the flag."""
    try:
        return seen(model, processor, mask)
    except ValueError as exc:
        raise ValueError(f"--mask {path}: {exc}") from exc


def part_of(args: argparse.Namespace) -> str:
    """Which part of an answer is explained; of words, both the thinking and what stands behind it."""
    return args.part or ("all" if args.mode == "words" else "answer")


def check_answer(args: argparse.Namespace) -> None:
    """Raises ValueError if the given answer does not hold what is to be explained."""
    answer = unicodedata.normalize("NFC", args.answer)  # as the tokenizer composes it
    if args.mode != "words":
        find_target(answer, args.target, args.target_occurrence)
    elif args.words not in ("content", "all"):
        from studies.words import choose_words

        choose_words(answer, [], args.words)


def check_scores(args: argparse.Namespace, asked: list[Question]) -> dict[str, str]:
    """The names of objects. Raises ValueError naming the flag, or the line of the list with a wrong one."""
    from studies.answers import score
    from studies.chair import COCO_NAMES, read_names

    try:
        names = read_names(Path(args.synonyms or COCO_NAMES))
    except ValueError as exc:
        raise ValueError(f"--synonyms {exc}") from exc
    for one in asked:
        try:
            score("", one.truth, names)
        except ValueError as exc:
            raise ValueError(f"{one.where}: {exc} {args.synonyms or COCO_NAMES}: --synonyms gives another") from exc
    if all(one.answer is None for one in asked) and (
        flag := next((f for f in ("window", "keep") if getattr(args, f)), "")
    ):
        raise ValueError(f"--{flag} needs right answers, whose probability it is about: --answers has captions only")
    return names


def listed_layers(args: argparse.Namespace, name: str, total: int) -> list[int]:
    """The layers of --hide_from or --fastv. Raises ValueError naming the flag."""
    chosen = getattr(args, name)
    try:
        layers = select_layers(chosen[0] if isinstance(next(iter(chosen), 0), str) else chosen, total) if chosen else []
    except ValueError as exc:
        raise ValueError(f"--{name}: {exc}") from exc
    if name == "fastv" and 0 in layers:
        raise ValueError(f"--fastv: layer 0 cannot be the first with fewer tokens: give 1 to {total - 1}")
    return layers


def choose_layers(args: argparse.Namespace, total: int) -> list[int] | dict[str, list[int]]:
    """The layers that the mode explains, of each third in comparative mode. Raises ValueError."""
    if args.mode == "comparative":
        return comparative_layers(total)
    layers = args.layers or (ninths(total) if args.mode == "multi" else ["auto"])
    if args.mode == "single":
        layers = [total // 2 if args.layer is None else args.layer]
    try:
        return select_layers(layers[0] if isinstance(layers[0], str) else layers, total)
    except ValueError as exc:
        raise ValueError(f"--layer{'' if args.mode == 'single' else 's'}: {exc}") from exc


# the modes: of readings, their names, the layers and a mask ({file name: content}, lines, evidence of each photo)

Explained = tuple[dict[str, object], list[str], list[Evidence]]


def explain_target(request: Request, readings: list[Reading], names, layers, mask) -> Explained:
    """Every mode that explains one part of the answer of one photo."""
    args, (reading,) = request.args, readings
    chosen = sum(layers.values(), []) if isinstance(layers, dict) else layers
    span = find_target(reading, args.target, args.target_occurrence, part_of(args))
    if args.compare:
        return compare_methods(request, reading, span, chosen, mask)
    request.forecast(reading)
    token_maps = request.explain(reading, span, chosen, request.settings)
    what = "the whole answer" if token_maps.whole else repr(token_maps.target)
    if request.settings.contrast is not None:
        what += f" rather than {request.settings.contrast!r}"
    count = f"{len(token_maps.target_tokens)} of {len(reading.tokens)} tokens"
    lines = [f"explained: {what} ({count}) at layer {', '.join(map(str, chosen))}"]
    if args.mode == "single" and args.layer is None:
        lines[0] += f", the middle one of {get_model_layers(reading.model)[1]}: --layer chooses another"
    lines += evidence_lines(token_maps, chosen)
    consequence = "it is left out" if args.mode == "evaluate" else "its pictures are grey panels"
    lines += [f"layer {layer} has no map ({why}): {consequence}" for layer, why in token_maps.blank.items()]
    if args.mode == "evaluate":
        from studies.faithfulness_figures import evaluate

        options = measuring(request) | request.copies | {"randomize": args.randomize, "quiet": args.quiet}
        files, measured = evaluate(reading, token_maps, mask, **options)
        lines += measured
    elif args.mode == "comparative":
        files = draw_comparative(reading.photo, token_maps, layers, **request.drawing)[1]
    elif args.source is not None:
        from studies.pictures_figure import draw_pictures

        pictures = args.source.pictures(reading)
        lines += pictures.lines(token_maps)
        files = draw_pictures(pictures, token_maps, args.mode == "grid", **request.drawing)
    else:
        draw = {"single": draw_single, "grid": draw_grid, "multi": draw_multilayer}[args.mode]
        files = draw(reading.photo, token_maps, **request.drawing)[1]
    if args.save_raw:
        raw = raw_arrays(token_maps, args)
        files["maps.npz"] = raw if args.source is None else pictures.raw(token_maps, raw)
    return files, lines, [token_maps.evidence]


def raw_arrays(token_maps: TokenMaps, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """What --save_raw writes: maps (layers, H, W) float32 and all it takes to know what they are; JSON for records."""
    records = ("grid", "prompt", "answer", "tokens", "target", "target_span", "target_tokens")
    asked = ("mode", "model_path", "image_path", "max_pixels", "dtype", "max_new_tokens")
    asked = {name: getattr(args, name) for name in asked}
    return {name: np.array(getattr(token_maps, name)) for name in records} | {
        "maps": np.stack(list(token_maps.maps.values())),
        "layers": np.array(list(token_maps.maps)),
        "no_gradient": np.array(sorted(token_maps.no_gradient), dtype=int),
        "evidence": np.array(token_maps.evidence[:2]),  # p, p without the photo
        "likeness": np.array([token_maps.likeness.get(layer, np.nan) for layer in token_maps.maps]),
        "seed": np.array(token_maps.settings.seed),
        "settings": np.array(json.dumps(asdict(token_maps.settings) | asked)),
        "versions": np.array(json.dumps({name: version(name) for name in PACKAGES})),
    }


def measuring(request: Request) -> dict:
    """How evaluate mode measures and draws."""
    options = {name: getattr(request.args, name) for name in ("steps", "baseline", "seed")}
    return options | {"runs_at_once": request.runs_at_once} | request.drawing


def comparable(request: Request) -> list[str]:
    """The methods that --compare measures: with a contrast, those whose maps depend on it."""
    return [
        method
        for method in COMPARED
        if request.settings.contrast is None or METHODS[method].inert.get("contrast") is None
    ]


def compare_methods(request: Request, reading: Reading, span, layers, mask) -> Explained:
    """Evaluate mode with --compare: every method with the settings that are given, or its own."""
    from studies.faithfulness_figures import compare

    settings = {method: with_method(request.settings, method) for method in comparable(request)}
    request.forecast(reading, methods=len(set(map(passed, settings.values()))))
    progress = show_progress(request.args.quiet)
    results = explain_by_methods(reading, [span], layers, settings, progress, **request.copies)
    maps = {method: own for method, (own,) in results.items()}
    files, lines = compare(reading, maps, mask, quiet=request.args.quiet, **measuring(request))
    explained = f"explained: {reading.answer[slice(*span)]!r} at layer {', '.join(map(str, layers))}"
    first = next(iter(maps.values()))
    return files, [explained, *evidence_lines(first, layers), *lines], [first.evidence]


def measure_photo(request: Request, reading: Reading, layers, mask) -> Explained:
    """Evaluate mode, of a photo of a list."""
    from studies.benchmark import benchmark_photo

    args, methods = request.args, comparable(request) if request.args.compare else [request.settings.method]
    methods = {method: with_method(request.settings, method) for method in methods}
    word = (args.target, args.target_occurrence, part_of(args), args.answer is not None)
    return benchmark_photo(reading, layers, methods, *word, mask, **measuring(request), **request.copies)


def explain_words(request: Request, readings: list[Reading], names, layers, mask) -> Explained:
    """Words mode, whose words.json has the evidence of each word."""
    from studies.prompt_words import Relevances
    from studies.words import draw_words, map_words, name_words, word_tokens, words_of

    args, (reading,), (name,), drawing = request.args, readings, names, request.drawing
    copies = request.copies | {"part": part_of(args)} | ({"passes": Relevances()} if args.prompt_words else {})
    request.forecast(reading, parts=len(words_of(reading, args.words, part_of(args))))
    word_maps = map_words(reading, args.words, layers, request.settings, show_progress(args.quiet), **copies)
    word_maps = joined(word_maps, len(reading.grids))
    asked = copies["passes"].asked(reading, word_maps) if args.prompt_words else None
    shown = word_maps, *word_tokens(reading, word_maps)
    if args.source is None:
        files = draw_words(reading.photo, name, *shown, asked=asked, **drawing)[1]
    else:
        from studies.pictures_words import draw_picture_words

        files = draw_picture_words(args.source.pictures(reading), *shown, asked=asked, **drawing)
    named = dict(zip(name_words(word_maps), word_maps, strict=True))
    lines = [f"explained: {', '.join(named)} at layer {', '.join(map(str, layers))}"]
    warned = [*doubt_lines(named), departures_of_most(word_maps, layers)]
    lines += [f"warning: {text}" for text in warned if text]
    lines += [] if asked is None else asked.lines(list(named))
    for layer in layers:
        if all(layer in word.blank for word in word_maps):
            why = word_maps[0].blank[layer]
            lines.append(f"layer {layer} has no map of any word ({why}): its pictures are grey panels")
    return files, lines, []


def find_targets(args: argparse.Namespace, readings: list[Reading], names) -> list[tuple[int, int]]:
    """The explained span of each answer. Raises ValueError naming the photo."""
    spans = []
    for reading, name in zip(readings, names, strict=True):
        try:
            spans.append(find_target(reading, args.target, args.target_occurrence, part_of(args)))
        except ValueError as exc:
            if len(readings) == 1:
                raise
            raise ValueError(f"{name}: {exc}") from exc
    return spans


def trace_photos(request: Request, readings: list[Reading], names, layers, mask) -> Explained:
    """Flow mode."""
    from studies.flow_figures import trace

    args, spans = request.args, find_targets(request.args, readings, names)
    options = {"attention_map": args.attention_maps, "taps": args.taps, "quiet": args.quiet}
    files, lines, evidence = trace(
        readings, names, spans, layers, request.settings, **options, **request.copies, **request.drawing
    )
    if args.heads:
        from studies.heads_figures import heads

        drawn, found = heads(readings, names, spans, evidence[0], mask, **request.drawing)
        files, lines = files | drawn, lines + found
    return files, lines, evidence


def sever_photos(request: Request, readings: list[Reading], names, layers, mask, tasks=None) -> Explained:
    """Knockout mode; `tasks` are those of the questions of a list, or None for one that has none."""
    from studies.knockout_figures import sever

    args = request.args
    spans = [None] * len(readings) if args.target is None else find_targets(args, readings, names)
    options = {"window": args.window, "keep": args.keep, "quiet": args.quiet, "accuracy": args.answers is not None}
    options |= {"runs_at_once": request.runs_at_once, "paper": request.paper, "part": part_of(args)}
    return sever(readings, names, spans, mask=mask, tasks=tasks, **options)


def score_answers(request: Request, readings: list[Reading], asked: list[Question]) -> Explained:
    """Knockout mode with --answers: what is left of the right answers, and scores of those that the model gives."""
    from studies.answer_tables import answer_tables

    args, known = request.args, [i for i, one in enumerate(asked) if one.answer is not None]
    files, lines, evidence = {}, [], []
    if known:  # captions have no right answer
        names, tasks = [asked[i].name for i in known], [asked[i].truth.get("task") for i in known]
        files, lines, evidence = sever_photos(request, [readings[i] for i in known], names, None, None, tasks)
    given = readings, [one.name for one in asked], [one.truth for one in asked]
    options = {"max_new_tokens": args.max_new_tokens, "progress": show_progress(args.quiet, "answers", "answer")}
    tables, table = answer_tables(*given, args.hide_from, args.names, **options)
    if args.fastv:
        from studies.fastv import fastv_tables

        settings = [(layer, removed) for layer in args.fastv for removed in dict.fromkeys(args.removed)]
        own = fastv_tables(*given, settings, args.names, batch_size=request.runs_at_once, **options)
        tables, table = tables | own[0], table + own[1]
    return files | tables, lines + table, evidence


MODES = dict.fromkeys(("single", "grid", "multi", "comparative", "evaluate"), explain_target)
MODES |= {"words": explain_words, "flow": trace_photos, "knockout": sever_photos}


def explain_mode(request: Request, readings: list[Reading], names, layers, mask) -> Explained:
    """What the mode makes of one photo, or of several together."""
    with recomputed(readings[0].model) if request.args.recompute else nullcontext():
        return MODES[request.args.mode](request, readings, names, layers, mask)


# the run


class Done(NamedTuple):
    """What a run has to say."""

    answers: dict[str, str]  # of each photo, the model's or a given one
    paths: list[Path]
    lines: list[str]
    code: int = 0


def run(args: argparse.Namespace) -> Done:
    """Check, load, explain, draw and write."""
    request = Request.of(args)
    if args.head is not None and args.head not in range(heads := count_heads(args.model_path)):
        raise ValueError(f"--head {args.head} does not exist: each layer of the model has 0 to {heads - 1}")
    args.messages_file, args.source = args.messages, None
    if args.messages is not None:
        args.messages = load_messages(args.messages)
        if not (args.listed or args.photo_given) and (last := take_last(args.messages)):
            args.image_path, args.photos = last, [last]
    if args.listed:
        return explain_list(request)
    asked = questions(args)
    mask = None if args.mask is None else read_mask(args.mask, asked[0].photo.size)
    if args.answer is not None:
        check_answer(args)
    device = resolve_device(args.device)
    layers = choose_layers(args, count_layers(args.model_path))
    if args.answers is not None:
        args.names = check_scores(args, asked)
        total = count_layers(args.model_path)
        args.hide_from, args.fastv = (listed_layers(args, name, total) for name in ("hide_from", "fastv"))
    photos = (
        [*args.photos, args.video] if args.answers is None else [Path(args.answers).parent / one.name for one in asked]
    )
    inputs = [args.model_path, args.mask, args.answers, args.synonyms, args.messages_file, *photos]
    inputs += paths_of(args.messages)
    folder, subfolders = Path(args.output_dir, FOLDERS[args.mode]), layers if args.mode == "comparative" else ()
    with output_folder(folder, subfolders, "--output_dir", inputs) as write:
        with model_named(args.model_path):
            processor = load_processor(args.model_path, args.max_pixels)
            if args.source is not None:
                args.source.cap(processor, args.max_pixels)
            model = load_model(args.model_path, device, args.dtype)
            with vision_kept(model):
                readings = [read_question(one, model, processor, args) for one in asked]
                mask = mask if mask is None else seen_mask(args.mask, model, processor, mask)
                if args.answers is None:
                    files, lines, _ = explain_mode(request, readings, [one.name for one in asked], layers, mask)
                else:
                    files, lines, _ = score_answers(request, readings, asked)
        if args.source is None:
            lines = seen_lines(readings, [(one.name, one.photo.size) for one in asked]) + lines
        else:
            lines = args.source.seen_lines(readings[0]) + lines
        lines = cut_off_lines(readings, [one.name for one in asked]) + lines
        answers = {one.name: reading.answer for one, reading in zip(asked, readings, strict=True) if not args.answers}
        return Done(answers, write(files), lines)


def read_question(question: Question, model, processor, args: argparse.Namespace) -> Reading:
    """The reading of a question. Raises ValueError, for a list with the line."""
    try:
        with answer_progress(model, args.quiet, args.max_new_tokens), model_named(args.model_path):
            reader = read if args.source is None else args.source.read
            return reader(model, processor, question.photo, question.prompt, question.answer, args.max_new_tokens)
    except ValueError as exc:
        if not question.where:
            raise
        raise ValueError(f"{question.where}: {exc}") from exc


def cut_off_lines(readings: list[Reading], names: list[str]) -> list[str]:
    """A warning for each generated answer that has no end."""
    cut_off = {name: len(one.tokens) for name, one in zip(names, readings, strict=True) if one.cut_off}
    said = {name: f"the answer was cut off after {count} tokens: --max_new_tokens" for name, count in cut_off.items()}
    return warnings_of(said)


def seen_lines(readings: list[Reading], photos: list[tuple[str, tuple[int, int]]]) -> list[str]:
    """A line for each photo, (name, (width, height)), that the model's processor crops or pads."""
    said = {}
    for reading, (name, size) in zip(readings, photos, strict=True):
        shown = reading.photos[0].size
        how = "pads it to" if shown[0] > size[0] or shown[1] > size[1] else "shows the model only its middle,"
        what = f"the processor {how} {shown[0]} x {shown[1]} of {size[0]} x {size[1]} pixels: that is what is explained"
        said[name] = what if shown != size else ""
    return [line.replace("warning: ", "seen: ", 1) for line in warnings_of(said)]


def explain_list(request: Request) -> Done:
    """Explain each photo of a list in a folder of its own."""
    from studies.benchmark import benchmark_tables
    from studies.photo_list import run_list
    from studies.tasks import task_tables

    args = request.args
    layers = choose_layers(args, count_layers(args.model_path))
    chosen = None if args.device == "auto" else resolve_device(args.device)
    about = {"model": model_identity(args.model_path), "versions": {name: version(name) for name in PACKAGES}}

    @functools.cache
    def loaded(device):  # once there is something to do
        processor = load_processor(args.model_path, args.max_pixels)
        return load_model(args.model_path, device, args.dtype), processor

    @model_named(args.model_path)
    def explain_photo(asked, item, photo, device):
        model, processor = loaded(chosen or device)
        own = request._replace(args=asked, settings=replace(request.settings, contrast=asked.contrast))
        with vision_kept(model):
            reading = read(model, processor, photo, prompt_of(asked), asked.answer, asked.max_new_tokens)
            wanted = args.mode == "evaluate" or args.window is not None or args.heads
            mask = seen(model, processor, object_mask(item.object, photo.size)) if item.object and wanted else None
            names = [readable(item.image.name)]
            if args.mode == "evaluate":
                files, lines, evidence = measure_photo(own, reading, layers, mask)
            else:
                files, lines, evidence = explain_mode(own, [reading], names, layers, mask)
            said = cut_off_lines([reading], names) + seen_lines([reading], [(names[0], photo.size)])
            return reading, files, said + lines, evidence

    by_task = functools.partial(task_tables, args.mode, request.paper) if args.mode in OF_PHOTOS else None
    done = run_list(
        args, explain_photo, about, subfolders=layers if args.mode == "comparative" else (),
        reason_of=lambda exc: one_line(exc).removeprefix("--image_path: "),
        summary=benchmark_tables if args.mode == "evaluate" else by_task,
    )  # fmt: skip
    return Done(*done)


def one_line(exc: Exception) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__


def report(answers: dict[str, str], paths: list[Path], lines: list[str]) -> None:
    """Print the answers, what is to be said of them, and the files."""
    here = Path.cwd()
    for name, answer in list(answers.items())[:ANSWERS_SHOWN]:
        first, *rest = answer.split("\n")
        say(f"answer: {first}" if len(answers) == 1 else f"{name}: {first}")
        for line in rest:
            say(f"        {line}")  # which no line of ours begins with
    if len(answers) > ANSWERS_SHOWN:
        say(f"… and {len(answers) - ANSWERS_SHOWN} more answers")
    for line in [*lines, *(f"wrote {path.relative_to(here) if path.is_relative_to(here) else path}" for path in paths)]:
        say(line)
    if others := other_files(paths):
        say(f"note: {others[0].parent} holds files of another run too: {len(others)} such as {others[0].name}")


@contextmanager
def quietly(verbose: bool):
    """Inside, the libraries report nothing unless asked to; our own warnings take one line each."""
    with warnings.catch_warnings():
        if not verbose:
            transformers.logging.set_verbosity_error()
            transformers.logging.disable_progress_bar()
            for library in ("huggingface_hub", "matplotlib", "PIL"):
                logging.getLogger(library).setLevel(logging.ERROR)
            warnings.simplefilter("ignore")
        warnings.simplefilter("always", ExplanationWarning)
        usual = warnings.showwarning

        def show(message, category, *where, **options):
            if issubclass(category, ExplanationWarning):
                say(f"test_gradcam.py: warning: {message}", sys.stderr)
            else:
                usual(message, category, *where, **options)

        warnings.showwarning = show
        yield


def main(argv: list[str] | None = None, signals: Sequence[int] = ()) -> int:
    """The command line; returns the exit code. `signals` is what `stoppable` yields."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # an answer in a script that the terminal lacks is no error
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    args = parse_args(argv)
    for note in args.notes:
        say(f"note: {note}")
    try:
        with quietly(args.verbose):
            done = run(args)
    except KeyboardInterrupt:
        return 130
    except Exception as exc:
        if signals:  # a library has turned SystemExit into another exception
            return 128 + signals[0]
        if args.verbose:
            for line in traceback.format_exc().split("\n"):
                say(line, sys.stderr)
        say(f"test_gradcam.py: error: {one_line(exc)}", sys.stderr)
        return 2 if isinstance(exc, (ValueError, ExplanationError)) else 1
    try:
        report(*done[:3])
        if sys.stdout is not None:  # closed from the start
            sys.stdout.flush()
    except OSError as exc:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
        if not isinstance(exc, BrokenPipeError):  # else whoever reads the output has read enough
            say(f"test_gradcam.py: error: the files are written, but not this report: {exc}", sys.stderr)
            return 1
    return done.code


if __name__ == "__main__":
    with stoppable() as came:
        code = main(signals=came)
    sys.exit(code)
