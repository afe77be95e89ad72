"""Composed scenes whose objects are known to the pixel, and questions about them with their true answers.

A scene is one to four objects (Microsoft's Fluent 3D emoji, `objects/`) on a drawn background. Every object has its
exact visible mask and one of nine places, a 3 x 3 division of the picture. Scenes in which two place words would both
be fair, or in which an object is mostly hidden, are not made. Everything follows from one integer seed.

    python demo_model/scenes.py build/scene.png --seed 7      # a scene, and scene_<object>_mask.png for each object
    python demo_model/scenes.py demo.jpeg --demo --masks build/masks      # the picture that comes with the project
    python demo_model/scenes.py build/questions --questions 50      # 50 scenes, and questions.jsonl about them

Legend: H, W pixels of the scene; h, w image tokens (28 x 28 pixels each: 2 x 2 patches of 14 pixels).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

OBJECTS = Path(__file__).parent / "objects"
KINDS = (
    "dog", "cat", "cow", "pig", "frog", "penguin", "fish", "butterfly", "car", "bus", "bicycle", "plane", "boat",
    "apple", "banana", "watermelon", "grapes", "chair", "bed", "umbrella", "clock", "guitar", "house", "cactus",
)  # fmt: skip
PLACES = (
    "at the top left", "at the top", "at the top right",
    "on the left", "in the center", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
BACKGROUNDS = ("plain", "gradient", "texture", "stripes", "landscape")
NUMBERS = ("zero", "one", "two", "three", "four")
TOKEN = 28  # pixels of one image token
PLACE_MARGIN = 0.055  # share of the picture an object's centre keeps from the lines between two places
MIN_VISIBLE = 0.7  # share of an object's pixels that no other object hides


@dataclass(frozen=True)
class SceneObject:
    kind: str
    place: int  # index into PLACES, reading order
    mask: np.ndarray  # (H, W) bool, the pixels where this object is what one sees

    @property
    def column(self) -> int:
        return self.place % 3

    @property
    def row(self) -> int:
        return self.place // 3


@dataclass(frozen=True)
class Scene:
    image: np.ndarray  # (H, W, 3) uint8 RGB
    objects: tuple[SceneObject, ...]  # in reading order of their places

    def object(self, kind: str) -> SceneObject | None:
        return next((thing for thing in self.objects if thing.kind == kind), None)

    def covers(self) -> np.ndarray:
        """Share of each image token that each of the objects covers: (objects, h, w)."""
        h, w = self.image.shape[0] // TOKEN, self.image.shape[1] // TOKEN
        masks = np.stack([thing.mask[: h * TOKEN, : w * TOKEN] for thing in self.objects])
        return masks.reshape(-1, h, TOKEN, w, TOKEN).mean((2, 4))

    def cells(self) -> np.ndarray:
        """Which object covers each image token: (h, w) int, -1 background, -2 undecided, else index into `objects`."""
        covers = self.covers()
        label = np.full(covers.shape[1:], -1)
        label[np.max(covers, 0) > 0.12] = -2
        for index, cover in enumerate(covers):
            label[cover > 0.4] = index
        return label


@cache
def sprite(kind: str, level: int) -> np.ndarray:
    """Artwork of one kind as premultiplied float32 RGBA in [0, 1], cropped to what is drawn, halved `level` times."""
    art = Image.open(OBJECTS / f"{kind}.webp").convert("RGBA")
    art = np.asarray(art.crop(art.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox()), np.float32) / 255
    art[..., :3] *= art[..., 3:]
    for _ in range(level):
        art = cv2.resize(art, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    return art


def random_size(rng: np.random.Generator, max_tokens: int = 190) -> tuple[int, int]:
    """(height, width) in pixels: landscape, portrait or square, 49 to `max_tokens` image tokens, small ones oftener."""
    sizes = [(h, w) for h in range(7, 17) for w in range(7, 17) if h * w <= max_tokens and max(h, w) <= 2 * min(h, w)]
    weight = np.array([1.0 / (h * w) for h, w in sizes])
    h, w = sizes[rng.choice(len(sizes), p=weight / weight.sum())]
    return h * TOKEN, w * TOKEN


def _colour(rng, low=0.1, high=1.0) -> np.ndarray:
    return rng.uniform(low, high, 3).astype(np.float32)


def _ramp(height, width, angle) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    ramp = np.cos(angle) * x / width + np.sin(angle) * y / height
    return (ramp - ramp.min()) / (np.ptp(ramp) + 1e-6)


def _blend(mask, low, high) -> np.ndarray:
    return low + mask[..., None] * (high - low)


def draw_background(rng: np.random.Generator, height: int, width: int, style: str) -> np.ndarray:
    """(H, W, 3) float32 in [0, 1]."""
    if style == "plain":
        return np.broadcast_to(_colour(rng), (height, width, 3)).copy()
    if style == "gradient":
        return _blend(_ramp(height, width, rng.uniform(0, 2 * np.pi)), _colour(rng), _colour(rng))
    if style == "texture":
        coarse = int(rng.integers(4, 24))
        noise = rng.random((coarse, coarse), np.float32)
        return _blend(cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR), _colour(rng), _colour(rng))
    if style == "stripes":
        waves = np.sin(_ramp(height, width, rng.uniform(0, 2 * np.pi)) * rng.uniform(10, 60))
        low = _colour(rng)
        return _blend((waves > 0).astype(np.float32), low, np.clip(low + rng.uniform(-0.3, 0.3, 3), 0, 1))
    return draw_landscape(rng, height, width)


def draw_landscape(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Sky with soft clouds, one to three lines of hills, a meadow, sand or water; (H, W, 3) float32 in [0, 1]."""
    tint = rng.uniform(-0.08, 0.08, 3)
    sky = np.clip(np.array([0.45, 0.7, 0.95]) + tint, 0, 1), np.clip(np.array([0.85, 0.92, 1.0]) + tint, 0, 1)
    picture = _blend(_ramp(height, width, np.pi / 2), *sky).astype(np.float32)
    clouds = cv2.resize(rng.random((5, 7), np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    picture = picture + (np.clip(clouds - 0.6, 0, 1) * 0.8)[..., None] * (1 - picture)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    ground = np.array(((0.55, 0.78, 0.4), (0.85, 0.78, 0.55), (0.4, 0.65, 0.75), (0.7, 0.72, 0.7))[rng.integers(4)])
    lines = int(rng.integers(1, 4))
    for line in range(lines):
        level = 0.4 + 0.22 * line + rng.uniform(0, 0.12)
        wave = 0.05 * np.sin(x / width * rng.uniform(2, 9) + rng.uniform(0, 6)) + 0.02 * np.sin(x / width * 17 + line)
        edge = np.clip((y / height - level + wave) * height / 2, 0, 1)  # two pixels soft
        shade = np.clip(ground * (0.7 + 0.3 * (line + 1) / lines) + rng.uniform(-0.06, 0.06, 3), 0, 1)
        picture = picture + edge[..., None] * (shade - picture)
    return picture.astype(np.float32)


def _placed(rng, kind, side, centre, height, width):
    """The object scaled, turned, mirrored and brightened: (rows, columns) it may fill, premultiplied RGBA for them."""
    level = 0 if side > 180 else 1 if side > 90 else 2
    art = sprite(kind, level)
    scale = side / max(art.shape[:2])
    turn = cv2.getRotationMatrix2D((art.shape[1] / 2, art.shape[0] / 2), rng.uniform(-18, 18), scale)
    if rng.random() < 0.5:
        turn = turn @ np.array([[-1, 0, art.shape[1]], [0, 1, 0], [0, 0, 1]])
    (left, right), (top, bottom) = (
        (max(0, int(middle - 0.75 * side)), min(extent, int(middle + 0.75 * side) + 1))
        for middle, extent in zip(centre, (width, height), strict=True)
    )
    turn[:, 2] += np.asarray(centre) - (art.shape[1] / 2, art.shape[0] / 2) - (left, top)
    canvas = cv2.warpAffine(art, turn, (right - left, bottom - top), flags=cv2.INTER_LINEAR)
    canvas[..., :3] = np.minimum(canvas[..., :3] * rng.uniform(0.8, 1.2), canvas[..., 3:])
    return (slice(top, bottom), slice(left, right)), canvas


def _centre(rng, place, side, height, width) -> tuple[float, float]:
    """A centre well inside the place and, as far as that allows, with the object inside the picture."""
    centre = []
    for cell, extent in ((place % 3, width), (place // 3, height)):
        low, high = (cell / 3 + PLACE_MARGIN) * extent, ((cell + 1) / 3 - PLACE_MARGIN) * extent
        inside = np.clip(rng.uniform(low, high), 0.46 * side, extent - 0.46 * side)
        centre.append(float(np.clip(inside, low if cell else 0, high if cell < 2 else extent)))
    return tuple(centre)


def _is_fair(thing: SceneObject) -> bool:
    """Whether the middle of what is seen of the object lies in its place, clear of the lines to other places."""
    for axis, cell in ((0, thing.column), (1, thing.row)):
        seen = np.flatnonzero(thing.mask.any(axis))
        middle = (seen[0] + seen[-1]) / 2 / thing.mask.shape[1 - axis]
        low = cell / 3 + PLACE_MARGIN if cell else 0
        high = (cell + 1) / 3 - PLACE_MARGIN if cell < 2 else 1
        if not low <= middle <= high:
            return False
    return True


def make_scene(seed, *, size=None, kinds=None, places=None, count=None, background=None, scale=None) -> Scene:
    """The scene of a seed (an int or a sequence of ints); whatever is named is fixed, the rest is drawn.

    size: (height, width) in pixels. kinds: names from KINDS. places: indices into PLACES, one per object.
    count: 1 to 4 objects. background: one of BACKGROUNDS, or a picture, (H, W, 3) uint8.
    scale: object side as a share of the shorter picture side.
    Raises ValueError for a kind that is not in KINDS, and when the objects asked for cannot be laid out fairly.
    """
    if unknown := set(kinds or ()) - set(KINDS):
        raise ValueError(f"unknown kinds {sorted(unknown)}; there are {', '.join(KINDS)}")
    rng = np.random.default_rng(seed)
    height, width = size or random_size(rng)
    count = len(kinds or places or ()) or count or int(rng.choice([1, 2, 3, 4], p=[0.2, 0.3, 0.3, 0.2]))
    side_range = max(64, 0.24 * min(height, width)), max(70, (0.5 if count == 1 else 0.42) * min(height, width))
    for _ in range(200):
        names = kinds or [str(kind) for kind in rng.choice(KINDS, count, replace=False)]
        spots = places or [int(place) for place in rng.choice(9, count, replace=False)]
        layers, alphas = [], []
        for kind, place in zip(names, spots, strict=True):
            side = scale * min(height, width) if scale else rng.uniform(*side_range)
            region, canvas = _placed(rng, kind, side, _centre(rng, place, side, height, width), height, width)
            for alpha in alphas:
                alpha[region] *= 1 - canvas[..., 3]
            alphas.append(np.zeros((height, width), np.float32))
            alphas[-1][region] = canvas[..., 3]
            layers.append((region, canvas))
        things = [SceneObject(k, p, alpha > 0.5) for k, p, alpha in zip(names, spots, alphas, strict=True)]
        whole = [(canvas[..., 3] > 0.5).sum() for _, canvas in layers]
        seen = all(t.mask.sum() >= MIN_VISIBLE * drawn > 0 for t, drawn in zip(things, whole, strict=True))
        if seen and all(_is_fair(thing) for thing in things):
            if isinstance(background, np.ndarray):
                picture = cv2.resize(background, (width, height), interpolation=cv2.INTER_AREA) / np.float32(255)
            else:
                picture = draw_background(rng, height, width, background or str(rng.choice(BACKGROUNDS)))
            for region, canvas in layers:
                picture[region] = picture[region] * (1 - canvas[..., 3:]) + canvas[..., :3]
            image = np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)
            return Scene(image, tuple(sorted(things, key=lambda thing: thing.place)))
    raise ValueError(f"no fair layout found in 200 tries for kinds={kinds}, places={places}, size={(height, width)}")


def a(kind: str) -> str:
    return kind if kind == "grapes" else f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def listing(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def is_are(kinds: list[str]) -> str:
    return "are" if kinds == ["grapes"] else "is"


DESCRIBE = (
    "Describe the main content in this image in detail.", "Describe this image.", "Describe the image in detail.",
    "What do you see in this picture?", "Please describe the picture.", "What is shown here, and where?",
    "Describe what you see.", "Tell me about this image.",
)  # fmt: skip
LIST = (
    "What is in this image?", "What objects are in the image?", "Which objects can you see?", "List the objects.",
    "What is in the picture?", "Name all objects in this image.",
)  # fmt: skip
WHERE = ("Where is the {}?", "Where can I find the {}?", "In which part of the image is the {}?", "Locate the {}.")
THERE = ("Is there {} in the image?", "Is there {}?", "Can you see {}?", "Does the picture show {}?")
COUNT = ("How many objects are there?", "How many objects are in this image?", "Count the objects.")
PLACE = ("What is {}?", "What is {} of the image?", "Which object is {}?")
BESIDE = ("What is {} the {}?", "Which objects are {} the {}?", "What can you see {} the {}?")
SIDES = {  # phrase: is `one` there, seen from `other`?
    "to the left of": lambda one, other: one.column < other.column,
    "to the right of": lambda one, other: one.column > other.column,
    "above": lambda one, other: one.row < other.row,
    "below": lambda one, other: one.row > other.row,
}


def describe(scene: Scene) -> str:
    parts = [f"{a(thing.kind)} {PLACES[thing.place]}" for thing in scene.objects]
    return f"There {is_are([scene.objects[0].kind])} {listing(parts)}."


def list_objects(scene: Scene) -> str:
    names = listing([a(thing.kind) for thing in scene.objects])
    return names[0].upper() + names[1:] + "."


def where(scene: Scene, kind: str) -> str:
    thing = scene.object(kind)
    verb = is_are([kind])
    return f"The {kind} {verb} {PLACES[thing.place]}." if thing else f"There {verb} no {kind}."


def is_there(scene: Scene, kind: str) -> str:
    thing = scene.object(kind)
    verb = is_are([kind])
    return f"Yes, there {verb} {a(kind)} {PLACES[thing.place]}." if thing else f"No, there {verb} no {kind}."


def how_many(scene: Scene) -> str:
    count = len(scene.objects)
    return f"There {'is' if count == 1 else 'are'} {NUMBERS[count]} object{'s' * (count > 1)}."


def at_place(scene: Scene, place: int) -> str:
    found = [thing.kind for thing in scene.objects if thing.place == place]
    return f"There {is_are(found)} {listing([a(kind) for kind in found]) if found else 'nothing'} {PLACES[place]}."


def beside(scene: Scene, side: str, kind: str) -> str:
    other = scene.object(kind)
    if other is None:
        return f"There {is_are([kind])} no {kind}."
    found = [thing.kind for thing in scene.objects if SIDES[side](thing, other)]
    names = listing([a(name) for name in found]) if found else "nothing"
    return f"There {is_are(found[:1])} {names} {side} the {kind}."


def strange_prompt(rng: np.random.Generator) -> str:
    """Words of no meaning in some script: the model is to answer with a description all the same."""
    scripts = ((97, 122), (65, 90), (0x4E00, 0x4FFF), (0x430, 0x44F), (0x3B1, 0x3C9), (0x627, 0x64A))
    first, last = scripts[rng.integers(len(scripts))]
    words = ["".join(map(chr, rng.integers(first, last + 1, rng.integers(1, 7)))) for _ in range(rng.integers(1, 6))]
    return " ".join(words) + str(rng.choice(["", "?", ".", "!"]))


TOPICS = ("describe", "list", "where", "there", "count", "place", "beside", "strange")


def ask(scene: Scene, rng: np.random.Generator, topic: str) -> tuple[str, str]:
    """One (question, true answer) on one of TOPICS."""
    present = [thing.kind for thing in scene.objects]
    absent = [kind for kind in KINDS if kind not in present]
    any_kind = str(rng.choice(present if rng.random() < 0.6 else absent))
    if topic == "where":
        kind = any_kind if rng.random() < 0.25 else str(rng.choice(present))
        return str(rng.choice(WHERE)).format(kind), where(scene, kind)
    if topic == "there":
        return str(rng.choice(THERE)).format(a(any_kind)), is_there(scene, any_kind)
    if topic == "count":
        return str(rng.choice(COUNT)), how_many(scene)
    if topic == "place":
        taken = scene.objects[rng.integers(len(present))].place
        place = taken if rng.random() < 0.6 else int(rng.integers(9))
        return str(rng.choice(PLACE)).format(PLACES[place]), at_place(scene, place)
    if topic == "beside":
        side = str(rng.choice(list(SIDES)))
        kind = str(rng.choice(present)) if rng.random() < 0.9 else any_kind
        return str(rng.choice(BESIDE)).format(side, kind), beside(scene, side, kind)
    if topic == "list":
        return str(rng.choice(LIST)), list_objects(scene)
    return (strange_prompt(rng) if topic == "strange" else str(rng.choice(DESCRIBE))), describe(scene)


def demo_scene() -> Scene:
    """The scene of demo.jpeg, of a seed never drawn in training."""
    return make_scene(
        9_500_006,
        size=(900, 1200),
        kinds=["plane", "house", "dog", "bicycle"],
        places=[0, 5, 6, 7],
        background="landscape",
        scale=0.36,
    )


def write_questions(folder: Path, count: int, topic: str, seed: int) -> None:
    """Scenes, and questions.jsonl: of each its file, a question and the right answer, of "there" its yes or no.

    Of "describe" the objects that are there, in the place of an answer; names.txt then has the names of all objects.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(seed, seed + count):
        scene = make_scene(i)
        Image.fromarray(scene.image).save(folder / f"scene_{i}.png")
        prompt, answer = ask(scene, np.random.default_rng((i, len(topic))), topic)
        answer = answer.split(",")[0] if topic == "there" else answer
        truth = {"objects": [thing.kind for thing in scene.objects]} if topic == "describe" else {"answer": answer}
        lines.append(json.dumps({"image": f"scene_{i}.png", "prompt": prompt} | truth))
    if topic == "describe":
        (folder / "names.txt").write_text("\n".join(KINDS) + "\n")
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")


def write_list(folder: Path, count: int, seed: int) -> None:
    """Scenes, the mask of an object of each, and list.jsonl with a line for each: {"image", "target", "mask"}."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(seed, seed + count):
        scene, name = make_scene(number), f"scene_{number}"
        thing = scene.objects[number % len(scene.objects)]
        Image.fromarray(scene.image).save(folder / f"{name}.jpg", quality=90)
        Image.fromarray(thing.mask).convert("1").save(folder / f"{name}_mask.png")
        lines.append({"image": f"{name}.jpg", "target": thing.kind, "mask": f"{name}_mask.png"})
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def main():
    parser = argparse.ArgumentParser(description="Write a scene and its objects' masks, or a list.")
    parser.add_argument("path", type=Path, help="where the picture goes; with --questions, a folder")
    parser.add_argument("--masks", type=Path, help="folder of the masks (default: the picture's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--demo", action="store_true", help="the scene of demo.jpeg")
    parser.add_argument("--questions", type=int, help="write so many scenes, and a question about each")
    parser.add_argument("--list", type=int, help="write so many scenes, a mask of each, and a list of them")
    parser.add_argument("--topic", default="there", choices=TOPICS, help="of the questions")
    options = parser.parse_args()
    for name in ("questions", "list"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: give 1 or more")
    if options.list is not None:
        write_list(options.path, options.list, options.seed)
        return
    if options.questions is not None:
        write_questions(options.path, options.questions, options.topic, options.seed)
        return
    scene = demo_scene() if options.demo else make_scene(options.seed)
    masks = options.masks or options.path.parent
    for folder in (options.path.parent, masks):
        folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene.image).save(options.path, **({"quality": 90} if options.demo else {}))
    for thing in scene.objects:
        Image.fromarray(thing.mask).save(masks / f"{options.path.stem}_{thing.kind}_mask.png")
    print(describe(scene))


if __name__ == "__main__":
    main()
