"""A list of photos, words and masks from COCO's annotations: python studies/coco.py instances_val2017.json val2017/

Writes a .jsonl with a line for each category in a photo, {"image", "target", "segmentation"}, whose segmentation is the
union of the category's objects. `python test_gradcam.py --mode evaluate --image_path coco.jsonl` then measures the maps
of those words that the model says. A category is left out of a photo where one of its objects is a crowd or too small
to be pointed at, since its mask would be wrong.
"""

import argparse
import json
import os
import random
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common.flags import OneLineParser  # noqa: E402
from common.inputs import open_regular  # noqa: E402
from common.terminal import say  # noqa: E402
from smooth_gradcam import open_image  # noqa: E402

__all__ = ["main"]

KEYS = ("images", "annotations", "categories")


def _categories_of(data: dict, smallest: float) -> dict[int, dict[str, list]]:
    """{image id: {category: polygons}}, without categories that have a crowd, or an object below `smallest` there."""
    names = {category["id"]: category["name"] for category in data["categories"]}
    sizes = {image["id"]: image["width"] * image["height"] for image in data["images"]}
    polygons, spoilt = defaultdict(lambda: defaultdict(list)), set()
    for annotation in data["annotations"]:
        for kind, known in (("image", sizes), ("category", names)):
            if annotation[f"{kind}_id"] not in known:
                raise ValueError(f"an annotation is of the {kind} {annotation[f'{kind}_id']}, which does not exist")
        image, name = annotation["image_id"], names[annotation["category_id"]]
        crowd = annotation.get("iscrowd") or not isinstance(annotation["segmentation"], list)
        if crowd or not annotation["segmentation"] or annotation["area"] < smallest * sizes[image]:
            spoilt.add((image, name))
        else:
            polygons[image][name] += annotation["segmentation"]
    sound = {image: {n: p for n, p in words.items() if (image, n) not in spoilt} for image, words in polygons.items()}
    return {image: words for image, words in sound.items() if words}


def _make_lines(data: dict, photos: Path, output: Path, count: int | None, seed: int, smallest: float) -> list[dict]:
    """The lines of the list, of `count` photos drawn at random, or of all; paths are relative to the list.

    Raises ValueError if keys or photos are missing, or if no object is left.
    """
    if missing := [name for name in KEYS if not isinstance(data.get(name), list)]:
        raise ValueError(f"these are not annotations in COCO's format: {', '.join(missing)} is missing")
    files, categories = {image["id"]: image["file_name"] for image in data["images"]}, _categories_of(data, smallest)
    if not categories:
        raise ValueError(f"nothing is left: no object covers {smallest:g} of its photo and is no crowd (--smallest)")
    chosen = sorted(categories)
    if count is not None:
        chosen = sorted(random.Random(seed).sample(chosen, min(count, len(chosen))))
    paths = {image: photos / Path(files[image]).name for image in chosen}
    if lost := [path for path in paths.values() if not path.is_file()]:
        raise ValueError(f"{len(lost)} of {len(paths)} photos are not in {photos}, such as {lost[0].name}")
    sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
    for image, path in paths.items():
        if (size := open_image(path).size) != sizes[image]:
            raise ValueError(f"{path.name} has {size} pixels the right way up, its annotations {sizes[image]}")
    return [
        {"image": os.path.relpath(paths[image], output.parent), "target": name, "segmentation": polygons}
        for image in chosen
        for name, polygons in categories[image].items()
    ]


def main(arguments=None) -> None:
    """The command line; `arguments` None are those of the process."""
    parser = OneLineParser(
        prog="coco.py",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("annotations", type=Path, help="instances_....json of COCO")
    parser.add_argument("photos", type=Path, help="folder of the photos")
    parser.add_argument("--output", type=Path, default=Path("coco.jsonl"), help="the list")
    parser.add_argument("--count", type=int, help="photos, drawn at random (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smallest", type=float, default=0.01, help="object, as a share of the photo")
    args = parser.parse_args(arguments)
    if not 0 <= args.smallest <= 1:
        parser.error(f"--smallest {args.smallest}: give a share, 0 to 1")
    if args.count is not None and args.count < 1:
        parser.error(f"--count {args.count}: give 1 or more")
    try:
        with open_regular(args.annotations) as file:
            data = json.load(file)
        selection = (args.photos, args.output, args.count, args.seed, args.smallest)
        lines = _make_lines(data if isinstance(data, dict) else {}, *selection)
        for path in (args.annotations, *(args.photos / Path(image["file_name"]).name for image in data["images"])):
            if args.output.exists() and path.exists() and path.samefile(args.output):
                raise ValueError(f"--output {args.output} is {path}: it would be replaced, choose another")
    except (OSError, ValueError) as exc:
        parser.error(f"{args.annotations}: {exc}")
    except (KeyError, TypeError, AttributeError, RecursionError) as exc:
        parser.error(f"{args.annotations} is not in COCO's format: {type(exc).__name__}: {exc}")
    try:
        args.output.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    except OSError as exc:
        parser.error(f"--output {args.output} cannot be written: {exc.strerror}")
    say(f"{len(lines)} words in {len({line['image'] for line in lines})} photos: {args.output}")


if __name__ == "__main__":
    main()
