"""Smooth Grad-CAM of a Qwen2.5-VL from the command line: which parts of a photo an answer comes from.

Exit code 0: everything that was asked for is written. 2: the request cannot be met as it stands (a wrong flag, photo,
model folder or layer, an answer that is empty or not finite), with one line that says why. 1: anything else, such as
memory that ran out, or a photo of a list that cannot be explained. Of a photo, nothing is written unless everything is.

The flags stand first: torch and transformers, which take seconds to load, are imported once they are known to be good.
"""

import argparse
import csv
import functools
import io
import json
import logging
import os
import re
import signal
import sys
import time
import traceback
import unicodedata
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the run without more ado, until `main` can tidy up

from common.flags import CHOICES, FOLDERS, MODES_OF_FLAG, RUNS_AT_ONCE, parse_args

if __name__ == "__main__":
    parse_args()  # --help and mistyped flags are answered here

# ruff: noqa: E402  (torch takes seconds to load)
import numpy as np
import torch
import transformers
from PIL import Image

from common.checkpoint import count_layers, load_model, load_processor, model_identity, resolve_device
from common.files import other_files, output_folder, to_csv, write_files
from common.page import PAGE, Paper
from common.photos import load_mask, load_photo, object_mask
from common.terminal import say
from smooth_gradcam import (
    ExplanationError,
    ExplanationWarning,
    Look,
    Reading,
    Settings,
    SmoothQwenGradCAM,  # noqa: F401  (users import it from here)
    TokenMaps,
    borrowed,
    compute_token_maps,
    explain,
    find_target,
    get_model_layers,
    memory_explained,
    read,
    resolve_layers,
    score_parts,
    token_probabilities,
)
from visualization_utils import (
    PLAIN,
    check_drawing,
    comparative_layers,
    create_comparative_analysis,  # noqa: F401  (users import it from here)
    create_layer_comparison_grid,  # noqa: F401
    draw_comparative,
    draw_grid,
    draw_multilayer,
    draw_single,
    select_layers,
    show_progress,
    visualize_multiple_layers,  # noqa: F401
)

LOOK = ("colormap", "opacity", "upsample", "scale")
SETTINGS = ("num_samples", "noise_std", "seed", "tap", "score", "contrast", "method", "rules")  # flags of the same name
NO_MATTER = ("output_dir", "quiet", "verbose", "overwrite", "image_path", "photos", "listed", "device", "batch_size")
NO_MATTER += ("recompute",)  # to what a list's results are, beyond rounding
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


def read_mask(path: str, size: tuple[int, int]) -> np.ndarray:
    """The object's pixels. Raises ValueError naming the flag."""
    try:
        return load_mask(path, size)
    except ValueError as exc:
        raise ValueError(f"--mask {path}: {exc}") from exc


def check_answer(args: argparse.Namespace) -> None:
    """Raises ValueError if the given answer does not hold what is to be explained."""
    answer = unicodedata.normalize("NFC", args.answer)  # as the tokenizer composes it
    if args.mode != "words":
        find_target(answer, args.target, args.target_occurrence)
    elif args.words not in ("content", "all"):
        from studies.words import choose_words

        choose_words(answer, [], args.words)


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


LONG = 4096  # tokens of photo, prompt and answer from which on it is told how long they take
BACKWARD = 2  # forward passes that a backward pass through all layers takes the time of


@contextmanager
def answering(model, args: argparse.Namespace):
    """Inside, a bar shows the tokens that the model answers with; a long prompt is told before it is read."""
    with show_progress(args.quiet, "answer", "token")(total=args.max_new_tokens) as bar:

        def told(module, given, kwargs):
            if not args.quiet and (length := kwargs["input_ids"].shape[1]) > LONG:
                say(f"reading {length:,} tokens of photo and prompt before the answer's first: this takes a while")

        def count(*_):  # what a hook returns would take the output's place
            bar.update()

        handles = [model.register_forward_pre_hook(told, with_kwargs=True), model.register_forward_hook(count)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def foretell(args: argparse.Namespace, reading: Reading, parts: int = 1, methods: int = 1) -> None:
    """How long the copies of a long sequence will take, each a forward and, of each part, a backward pass."""
    length = reading.inputs["input_ids"].shape[1] + len(reading.tokens)
    if args.quiet or length <= LONG:
        return
    forced, (scored,) = score_parts(reading.inputs, reading.tokens, [[len(reading.tokens) - 1]])
    with borrowed(reading.model), memory_explained(len(reading.positions)):
        start = time.monotonic()
        token_probabilities(reading.model, forced, reading.inputs["pixel_values"][None], scored)
    each = (time.monotonic() - start) * (1 + BACKWARD * parts) * (1 if args.contrast is None else 2)
    copies = methods * (args.num_samples if args.noise_std else 1)
    say(f"expected: {copies} noisy copies of {length:,} tokens, {each:.0f} s each: about {copies * each:.0f} seconds")


def read_all(args: argparse.Namespace, model, processor, asked: list[Asked]) -> list[Reading]:
    """A reading of each. Raises ValueError, for a list with the line."""
    readings = []
    for one in asked:
        try:
            with answering(model, args):
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
        tell=lambda line: say(f"test_gradcam.py: {line}", sys.stderr),
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
    from studies.benchmark import benchmark_rows

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
    foretell(args, reading)
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
        from studies.faithfulness_figures import evaluate

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
    from studies.faithfulness_figures import compare

    asked, maps = {name: getattr(args, name) for name in SETTINGS}, {}
    foretell(args, reading, methods=len(CHOICES["method"]))
    for method in CHOICES["method"]:
        settings = Settings(**asked | {"method": method})
        (maps[method],) = explain(reading, [span], layers, settings, show_progress(args.quiet), **passing(args))
    options = {name: getattr(args, name) for name in ("steps", "baseline", "seed", "quiet")}
    options["batch_size"] = runs_at_once(args)
    files, lines = compare(reading, maps, mask, **drawing(args), **options)
    return files, [f"explained: {reading.answer[slice(*span)]!r} at layer {', '.join(map(str, layers))}", *lines]


def explain_words(args, reading, layers, settings) -> tuple[dict, list[str]]:
    """The same of words mode."""
    from studies.words import choose_words, draw_words, map_words, name_words, word_tokens

    foretell(args, reading, len(choose_words(reading.answer, reading.spans, args.words)))
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
    from studies.flow_figures import trace

    spans = find_targets(args, readings, names)
    options = {"attention_map": args.attention_maps, "taps": args.taps, "quiet": args.quiet} | passing(args)
    return trace(readings, names, spans, layers, settings, **options, **drawing(args))


def sever_photos(args, readings, names, mask) -> tuple[dict, list[str]]:
    """The same of knockout mode."""
    from studies.flow_figures import sever

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
        first, *rest = answer.split("\n")
        say(f"answer: {first}" if len(answers) == 1 else f"{name}: {first}")
        for line in rest:
            say(f"        {line}")  # which no line of ours begins with
    if len(answers) > ANSWERS_SHOWN:
        say(f"… and {len(answers) - ANSWERS_SHOWN} more answers")
    for line in [*lines, *(f"wrote {path.relative_to(here) if path.is_relative_to(here) else path}" for path in paths)]:
        say(line)
    if others := other_files(paths):
        say(f"beware: {others[0].parent} holds files of another run too: {len(others)} such as {others[0].name}")


@contextmanager
def quietly(verbose: bool):
    """Inside, the libraries report nothing unless asked to; our own warnings take one line each."""
    with warnings.catch_warnings():
        if not verbose:
            transformers.logging.set_verbosity_error()
            transformers.logging.disable_progress_bar()
            for library in ("huggingface_hub", "matplotlib"):
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
            for line in traceback.format_exc().split("\n"):
                say(line, sys.stderr)
        say(f"test_gradcam.py: error: {as_flags(exc)}", sys.stderr)
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
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves nothing half done, as Ctrl-C
    sys.exit(main())
