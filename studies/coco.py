"""A list of photos, words and masks from COCO's annotations: python studies/coco.py instances_val2017.json val2017/

Writes a .jsonl with a line for each category of a photo, {"image", "target", "segmentation"}, whose segmentation is
the union of the category's objects; `python test_gradcam.py --mode evaluate --image_path coco.jsonl` measures the maps
of those words that the model says. Crowds and objects too small to be pointed at are left out, a category with them
altogether, since its mask would be wrong.
"""

import argparse
import json
import os
import random
from collections import defaultdict
from pathlib import Path

__all__ = ["main"]

NEEDED = ("images", "annotations", "categories")


def categories_of(data: dict, smallest: float) -> dict[int, dict[str, list]]:
    """{image id: {category: its polygons}} of what is whole: no crowd, nothing below that share of the photo."""
    names = {category["id"]: category["name"] for category in data["categories"]}
    sizes = {image["id"]: image["width"] * image["height"] for image in data["images"]}
    found, spoilt = defaultdict(lambda: defaultdict(list)), set()
    for part in data["annotations"]:
        for kind, known in (("image", sizes), ("category", names)):
            if part[f"{kind}_id"] not in known:
                raise ValueError(f"an annotation is of the {kind} {part[f'{kind}_id']}, which is not there")
        image, name = part["image_id"], names[part["category_id"]]
        crowd = part.get("iscrowd") or not isinstance(part["segmentation"], list)
        if crowd or not part["segmentation"] or part["area"] < smallest * sizes[image]:
            spoilt.add((image, name))
        else:
            found[image][name] += part["segmentation"]
    kept = {image: {n: p for n, p in words.items() if (image, n) not in spoilt} for image, words in found.items()}
    return {image: words for image, words in kept.items() if words}


def make_lines(data: dict, photos: Path, output: Path, count: int | None, seed: int, smallest: float) -> list[dict]:
    """The lines of the list, of `count` photos drawn at random; paths are relative to the list."""
    if missing := [name for name in NEEDED if not isinstance(data.get(name), list)]:
        raise ValueError(f"no annotations of COCO's form: {', '.join(missing)} is lacking")
    files, found = {image["id"]: image["file_name"] for image in data["images"]}, categories_of(data, smallest)
    if not found:
        raise ValueError(f"nothing is left: no object is {smallest:g} of its photo or more and no crowd (--smallest)")
    chosen = sorted(found)
    if count is not None:
        chosen = sorted(random.Random(seed).sample(chosen, min(count, len(chosen))))
    paths = {image: photos / Path(files[image]).name for image in chosen}
    if lost := [path for path in paths.values() if not path.is_file()]:
        raise ValueError(f"{len(lost)} of {len(paths)} photos are not in {photos}, such as {lost[0].name}")
    return [
        {"image": os.path.relpath(paths[image], output.parent), "target": name, "segmentation": polygons}
        for image in chosen
        for name, polygons in found[image].items()
    ]


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("annotations", type=Path, help="instances_....json of COCO")
    parser.add_argument("photos", type=Path, help="folder of the photos")
    parser.add_argument("--output", type=Path, default=Path("coco.jsonl"), help="the list")
    parser.add_argument("--count", type=int, help="photos, drawn at random (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smallest", type=float, default=0.01, help="object, as a share of the photo")
    options = parser.parse_args(arguments)
    if options.count is not None and options.count < 1:
        parser.error(f"--count {options.count}: give 1 or more")
    try:
        data = json.loads(options.annotations.read_text(encoding="utf-8"))
        where = (options.photos, options.output, options.count, options.seed, options.smallest)
        lines = make_lines(data if isinstance(data, dict) else {}, *where)
        for path in (
            options.annotations,
            *(options.photos / Path(image["file_name"]).name for image in data["images"]),
        ):
            if options.output.exists() and path.exists() and path.samefile(options.output):
                raise ValueError(f"--output {options.output} is {path}: it would be replaced, choose another")
    except (OSError, ValueError, KeyError, TypeError) as exc:
        parser.error(f"{options.annotations}: {f'{exc} is lacking' if isinstance(exc, KeyError) else exc}")
    try:
        options.output.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    except OSError as exc:
        parser.error(f"--output {options.output} cannot be written: {exc.strerror}")
    print(f"{len(lines)} words in {len({line['image'] for line in lines})} photos: {options.output}")


if __name__ == "__main__":
    main()
