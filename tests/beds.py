"""Beds: pictures whose objects are known, words of answers about them, and the models that read them.

A setting that was measured in one bed only is not proven: every benchmark takes its pictures, masks and words from
here. Only words count whose probability is a tenth or more, and falls by a quarter or more when their object is painted
over: a map cannot point at what is not used. How many do is a figure of the bed.

Beds in which settings are chosen:

    scenes   the demo model on scenes of its own kind that it has never seen
    flat     the same, one object anywhere on a plain, a gradient or a noisy background, small to large
    crowded  the same, portraits with five or six objects, two of them of one kind
    small    the same, one or two objects of 0.5 to 2 image tokens
    large    the same, one object of 40 to 60 % of the picture
    eyes     a published decoder with trained eyes (demo_model/graft.py) on scenes
    words    a published decoder whose image tokens are its own word embeddings, with noise of half their spread
    blurred  the same, with noise as large as their spread
    sinks    like words, with four background tokens turned into attention sinks in an early layer

Beds in which the choice is confirmed: none of them had a part in it.

    photos                     the demo model on scenes with a photograph (scikit-image's) as background
    doubted                    the same, true answers that are given: only words of a probability below a tenth count
    eyes-photos, -small, -large  the published decoder on those pictures
    twins                      the same on two objects of a kind; each mention has its own object
    coder, -photos, -small, -large  a larger published decoder, of 28 layers, with eyes of its own, likewise

The three of words put a test double in the vision tower's place: it reads a colour-coded grid and gives each image
token the decoder's embedding of what stands there. Published decoders need --decoder and --coder: what graft.py wrote.
"""

import itertools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import skimage.data
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo_model")]
import graft  # noqa: E402
import scenes  # noqa: E402
from evaluate import UNSEEN  # noqa: E402

import smooth_gradcam as core  # noqa: E402
from common.checkpoint import load_model, load_processor  # noqa: E402
from common.evidence import DOUBTED  # noqa: E402
from common.passes import token_probabilities  # noqa: E402
from studies.decoder import covered_tokens  # noqa: E402

DEMO, PUBLISHED = ("scenes", "flat", "crowded", "small", "large"), ("eyes", "words", "blurred", "sinks")
CONFIRMING = ("photos", "doubted", "eyes-photos", "eyes-small", "eyes-large", "twins")
CONFIRMING += ("coder", "coder-photos", "coder-small", "coder-large")
CELL = scenes.TOKEN  # pixels of one image token
FALL = 0.75  # what may be left of a word's probability without its object
PHOTOGRAPHS = ("astronaut", "coffee", "rocket", "hubble_deep_field", "retina", "gravel", "grass", "brick", "moon")


class Word(NamedTuple):
    """A word of an answer that names an object."""

    name: str
    span: tuple[int, int]  # characters of the answer
    mask: np.ndarray  # (height, width) bool, the photo's pixels of all objects of that name

    def covered(self, grid: tuple[int, int]) -> np.ndarray:
        """Share of each image token that the object covers, (H, W)."""
        return cv2.resize(self.mask.astype(np.float32), grid[::-1], interpolation=cv2.INTER_AREA)

    def on(self, grid: tuple[int, int]) -> np.ndarray:
        """The image tokens of the object, (H, W) bool; if it covers a quarter of none, the one that it covers most."""
        return covered_tokens(self.mask, grid).reshape(grid)


class Picture(NamedTuple):
    """One reading, its words that count, and how many words were tried."""

    reading: core.Reading
    words: list[Word]
    tried: int


class Drawn(NamedTuple):
    """A picture before it is read."""

    photo: Image.Image
    masks: dict[str, np.ndarray]  # name -> (height, width) bool; "dog (2)" is the second mention alone
    without: dict[str, Image.Image]  # name -> the photo with its objects painted over
    prompt: str
    answer: str | None  # None: the model's own


@dataclass(frozen=True)
class Bed:
    """A model, and pictures for it; `draw` makes the picture of a number."""

    name: str
    model: torch.nn.Module
    processor: object
    draw: Callable[[int], Drawn]
    baseline: str = "blur"  # what removed image tokens show in insertion and deletion

    @property
    def doubted(self) -> bool:
        """Whether the words count that the model hardly says, and not the others."""
        return self.name == "doubted"

    def picture(self, number: int) -> Picture:
        return read(self.model, self.processor, self.draw(number), self.doubted)


def read(model, processor, drawn: Drawn, doubted: bool = False) -> Picture:
    """The reading, and of the words that name an object, as often as they do, those that count."""
    reading = core.read(model, processor, drawn.photo, drawn.prompt, drawn.answer, max_new_tokens=64)
    words = []
    for name, mask in drawn.masks.items():
        kind, _, mention = name.removesuffix(")").partition(" (")
        spans = [match.span() for match in re.finditer(rf"\b{kind}\b", reading.answer, re.IGNORECASE)]
        words += [Word(name, span, mask) for span in (spans[int(mention) - 1 :][:1] if mention else spans)]
    used = [word for word in words if counts(reading, word, drawn.without[word.name], doubted)]
    return Picture(reading, used, len(words))


def probability(reading: core.Reading, span: tuple[int, int]) -> float:
    """Mean probability of the tokens of these characters of the answer."""
    with core.borrowed(reading.model):
        forced, (scored,) = core.score_parts(reading.inputs, reading.tokens, [reading.tokens_of(span)])
        return float(token_probabilities(reading, forced, forced["pixel_values"][None], scored).mean())


def counts(reading: core.Reading, word: Word, without: Image.Image, doubted: bool = False) -> bool:
    """Whether the word's probability falls by a quarter or more without its object, and is not, or is, doubted."""
    other = core.prepare_inputs(reading.model, reading.processor, [without], reading.prompt)
    said = probability(reading, word.span)
    return (said < DOUBTED) == doubted and probability(replace(reading, inputs=other), word.span) <= FALL * said


# scenes


def painted_over(image: np.ndarray, mask: np.ndarray) -> Image.Image:
    """The picture with what is around the object drawn into its place (Telea, 2004)."""
    grown = cv2.dilate(mask.astype(np.uint8), np.ones((9, 9), np.uint8))
    return Image.fromarray(cv2.inpaint(image, grown, 5, cv2.INPAINT_TELEA))


def drawn_scene(scene: scenes.Scene, prompt: str, grain: float = 0, seed: int = 0) -> Drawn:
    """A scene, to be described by the model; `grain` is a camera's noise, its deviation for pixel values in [0, 1]."""
    noise = np.random.default_rng(seed).normal(0, 255 * grain, scene.image.shape) if grain else 0
    image = np.round(np.clip(scene.image + noise, 0, 255)).astype(np.uint8)
    masks = {}
    for thing in scene.objects:
        masks[thing.kind] = masks.get(thing.kind, False) | thing.mask
    without = {kind: painted_over(image, mask) for kind, mask in masks.items()}
    return Drawn(Image.fromarray(image), masks, without, prompt, None)


def draw_scenes(number: int) -> Drawn:
    return drawn_scene(scenes.make_scene(UNSEEN + number), scenes.DESCRIBE[0])


def draw_flat(number: int) -> Drawn:
    """One object, of 0.25 to 0.7 of the shorter side, on a plain or gradient background, every third one with grain."""
    background, grain = (("plain", 0), ("gradient", 0), ("plain", 0.06))[number % 3]
    scale = 0.25 + 0.45 * ((number * 7) % 10) / 9
    for place in np.random.default_rng((UNSEEN, 1, number)).permutation(9).tolist():  # a large one fits few places
        try:
            scene = scenes.make_scene((UNSEEN, 2, number), places=[place], background=background, scale=scale)
        except ValueError:
            continue
        return drawn_scene(scene, scenes.DESCRIBE[0], grain=grain, seed=number)
    raise ValueError(f"the picture {number} cannot be laid out")


def draw_crowded(number: int) -> Drawn:
    """A portrait of five or six objects, two of them of one kind."""
    rng = np.random.default_rng((UNSEEN, 3, number))
    for attempt in range(50):
        kinds = rng.choice(scenes.KINDS, 4 + number % 2, replace=False).tolist()
        try:
            scene = scenes.make_scene(
                (UNSEEN, 4, number, attempt), size=(16 * CELL, 11 * CELL), kinds=kinds + kinds[:1], scale=0.28
            )
        except ValueError:
            continue
        return drawn_scene(scene, scenes.DESCRIBE[0])
    raise ValueError(f"the picture {number} cannot be laid out")


def draw_small(number: int) -> Drawn:
    """One or two objects that cover about 0.5 to 2 image tokens each."""
    rng, size = np.random.default_rng((UNSEEN, 10, number)), ((9, 12), (12, 9), (10, 10))[number % 3]
    side = 1.25 * np.sqrt(rng.uniform(0.6, 2.2)) / min(size)  # an object fills about 0.64 of its square
    for attempt in range(50):
        try:
            scene = scenes.make_scene(
                (UNSEEN, 11, number, attempt), size=(size[0] * CELL, size[1] * CELL), count=1 + number % 2, scale=side
            )
        except ValueError:
            continue
        return drawn_scene(scene, scenes.DESCRIBE[0])
    raise ValueError(f"the picture {number} cannot be laid out")


def draw_large(number: int) -> Drawn:
    """One object in the middle that covers 40 to 60 % of the picture."""
    rng, size = np.random.default_rng((UNSEEN, 12, number)), ((9, 9), (9, 10), (10, 9))[number % 3]
    for attempt in range(500):
        scale = float(rng.uniform(0.95, 1.15))
        try:
            scene = scenes.make_scene(
                (UNSEEN, 13, number, attempt), size=(size[0] * CELL, size[1] * CELL), places=[4], scale=scale
            )
        except ValueError:
            continue
        if 0.4 <= scene.objects[0].mask.mean() <= 0.6:
            return drawn_scene(scene, scenes.DESCRIBE[0])
    raise ValueError(f"the picture {number} cannot be laid out")


def on_photograph(number: int) -> scenes.Scene:
    """A scene with one of scikit-image's photographs in the place of its background."""
    photograph = getattr(skimage.data, PHOTOGRAPHS[number % len(PHOTOGRAPHS)])()
    if photograph.ndim == 2:
        photograph = np.stack([photograph] * 3, -1)
    return scenes.make_scene((UNSEEN, 14, number), background=np.ascontiguousarray(photograph[..., :3]))


def draw_photos(number: int) -> Drawn:
    return drawn_scene(on_photograph(number), scenes.DESCRIBE[0])


def draw_doubted(number: int) -> Drawn:
    scene = on_photograph(number)
    return drawn_scene(scene, scenes.DESCRIBE[0])._replace(answer=scenes.describe(scene))


def draw_twins(number: int) -> Drawn:
    """Two objects of one kind and a third; the answer is given, and each mention has the mask of its own object."""
    rng = np.random.default_rng((UNSEEN, 15, number))
    one, other = (str(kind) for kind in rng.choice(scenes.KINDS, 2, replace=False))
    for attempt in range(50):
        try:
            scene = scenes.make_scene((UNSEEN, 16, number, attempt), kinds=[one, one, other], scale=0.34)
        except ValueError:
            continue
        named = enumerate((thing for thing in scene.objects if thing.kind == one), 1)
        masks = {f"{one} ({mention})": thing.mask for mention, thing in named}
        without = {name: painted_over(scene.image, mask) for name, mask in masks.items()}
        return Drawn(Image.fromarray(scene.image), masks, without, scenes.DESCRIBE[0], scenes.describe(scene))
    raise ValueError(f"the picture {number} cannot be laid out")


def draw_eyes(number: int) -> Drawn:
    """A scene, described, listed, or asked about by a choice between two objects."""
    rng, scene = np.random.default_rng((UNSEEN, 5, number)), scenes.make_scene(UNSEEN + number)
    return drawn_scene(scene, graft.ask(scene, rng, ("describe", "list", "choice")[number % 3])[0])


def draw_corner(number: int) -> tuple[Image.Image, tuple[int, int]]:
    """One object in a corner of a flat background and that corner (row, column), 0 or 1 each: sixteen pictures."""
    corner, size = number % 4, ((9, 12), (12, 9))[number // 4 % 2]
    scene = scenes.make_scene((UNSEEN, 6, number), size=(size[0] * CELL, size[1] * CELL), places=[(0, 2, 6, 8)[corner]],
                              background=("plain", "gradient")[number // 8], scale=0.4)  # fmt: skip
    return Image.fromarray(scene.image), divmod(corner, 2)


def lit_corner(cam: np.ndarray) -> tuple[int, int]:
    """The quadrant (row, column), 0 or 1 each, that the maximum of an (H, W) map lies in."""
    row, column = np.unravel_index(cam.argmax(), cam.shape)
    return int(2 * row >= cam.shape[0]), int(2 * column >= cam.shape[1])


# words as image

THINGS = ("dog", "cat", "bus", "car", "horse", "boat", "bird", "train", "clock", "cow", "pizza", "bicycle")
AROUND = (("sky", "grass"), ("sky", "sea"), ("wall", "floor"), ("sky", "sand"))
EMPTY = "empty"
CODE = dict(
    zip(
        (EMPTY, *THINGS, *dict.fromkeys(itertools.chain(*AROUND))),
        itertools.product((0, 85, 170, 255), repeat=3),
        strict=False,
    )
)  # word -> RGB
SIZE = 6, 9  # image tokens
SINK_LAYER = 4  # the published decoder of 0.5B has its massive activations from layer 4 on
SINKS = [0, 8, 22, 47]  # cells, always background


def word_grid(number: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(what stands in each cell, what stands there without the objects, the objects): arrays (H, W) of words.

    One or two objects of 2 x 2 or 2 x 3 cells before a background of two words.
    """
    rng = np.random.default_rng((UNSEEN, 7, number))
    above, below = AROUND[rng.integers(len(AROUND))]
    empty = np.full(SIZE, above, dtype=object)
    empty[3:] = below
    things = [str(name) for name in rng.choice(THINGS, 1 + number % 2, replace=False)]
    halves = [(0, 5), (5, 9)] if len(things) == 2 else [(0, 9)]
    while True:
        grid = empty.copy()
        for name, (left, right) in zip(things, halves, strict=True):
            width = int(rng.integers(2, 4))
            row, column = int(rng.integers(0, SIZE[0] - 1)), int(rng.integers(left, right - width + 1))
            grid[row : row + 2, column : column + width] = name
        if (grid == empty).ravel()[SINKS].all():
            return grid, empty, things


def coded(grid: np.ndarray) -> Image.Image:
    """Words (H, W) as a picture, a cell of one colour for each."""
    colours = np.array([[CODE[word] for word in row] for row in grid], np.uint8)
    return Image.fromarray(colours.repeat(CELL, 0).repeat(CELL, 1))


def draw_words(number: int) -> Drawn:
    """A grid of words: a question with a choice, one for a list, or a free description."""
    grid, empty, things = word_grid(number)
    rng = np.random.default_rng((UNSEEN, 8, number))
    absent = str(rng.choice([name for name in THINGS if name not in things]))
    pair = [things[0], absent]
    rng.shuffle(pair)
    names = scenes.listing([f"a {name}" for name in things])
    above, below = empty[0, 0], empty[-1, 0]
    prompt, answer = (
        (f"Is there a {pair[0]} or a {pair[1]} in this image?", f"There is a {things[0]}."),
        ("What is in this image? Answer with a list.", f"{names[0].upper()}{names[1:]}."),
        ("Describe this image in one sentence.", f"The image shows {names} and {above} and {below}."),
    )[number // 2 % 3]
    masks = {name: (grid == name).repeat(CELL, 0).repeat(CELL, 1) for name in things}
    without = {name: coded(np.where(grid == name, empty, grid)) for name in things}
    return Drawn(coded(grid), masks, without, prompt, answer)


class WordEyes:
    """A test double of the vision tower, as a hook on it: each image token becomes an embedding of the decoder.

    The colour of its pixels says of which word; noise is `spread` of the deviation of these embeddings, always the
    same at the same place of a picture.
    """

    def __init__(self, model, processor, spread: float):
        table, tokenizer = model.get_input_embeddings().weight.detach(), processor.tokenizer
        self.words = torch.stack([table[tokenizer(f" {word}")["input_ids"]].mean(0) for word in CODE])  # (words, C)
        self.noise = spread * float(self.words.std(0).square().mean().sqrt())
        images = processor.image_processor
        codes = torch.tensor(list(CODE.values())) / 255
        self.codes = (codes - torch.tensor(images.image_mean)) / torch.tensor(images.image_std)  # (words, 3)

    def embeddings(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(patches, 3 * 2 * 14 * 14), four to an image token -> (N, C)."""
        colours = pixel_values.float().reshape(len(pixel_values) // 4, 4, 3, -1).mean((1, 3))  # (N, 3)
        word = torch.cdist(colours, self.codes.to(colours)).argmin(1)
        noise = torch.randn(len(word), self.words.shape[1], generator=torch.Generator().manual_seed(1))
        return self.words[word] + self.noise * noise.to(self.words)

    def __call__(self, module, args, kwargs, output):
        pixels = args[0] if args else kwargs["hidden_states"]
        pictures = pixels.chunk(len(kwargs["grid_thw"]))  # noise is per place of each picture
        tokens = torch.cat([self.embeddings(part) for part in pictures])
        if torch.is_tensor(output):
            return tokens
        output.pooler_output = tokens
        return output


class Sinks:
    """A hook on a decoder layer that turns image tokens into attention sinks, as published models have them.

    In the channels in which the first token of the sequence is an outlier, five times its root mean square or more, the
    chosen image tokens get its values (Sun et al., "Massive Activations", COLM 2024): they draw attention as it does,
    and what they say of the picture is lost in the norm.
    """

    def __init__(self, places: list[int]):
        self.places = places  # in the sequence

    def __call__(self, module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]  # (B, L, C)
        if hidden.shape[1] <= max(self.places):  # what follows a picture that is kept in a cache
            return args, kwargs
        first = hidden[:, :1]
        outlier = first.abs() >= 5 * first.square().mean(-1, keepdim=True).sqrt()  # (B, 1, C)
        planted = hidden.clone()
        planted[:, self.places] = torch.where(outlier, first, hidden[:, self.places])
        return ((planted, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": planted})


# all beds


DRAWS = {"scenes": draw_scenes, "flat": draw_flat, "crowded": draw_crowded, "small": draw_small, "large": draw_large}
DRAWS |= {"eyes": draw_eyes, "photos": draw_photos, "doubted": draw_doubted, "twins": draw_twins, "coder": draw_eyes}


def source(name: str) -> str:
    """Whose bed it is: "demo", "eyes", the published decoder with its eyes or words, or "coder", the larger one."""
    if name.startswith("coder"):
        return "coder"
    return "eyes" if name.startswith("eyes") or name in (*PUBLISHED, "twins") else "demo"


def load(name: str, decoder: str | None = None, coder: str | None = None) -> Bed:
    """The bed of a name; those of published decoders need the folders that graft.py wrote."""
    drawn, whose = name.split("-")[-1], source(name)
    folder = {"demo": str(ROOT / "demo_model"), "eyes": decoder, "coder": coder}[whose]
    if not (folder and Path(folder).is_dir()):
        flag = "--coder" if whose == "coder" else "--decoder"
        raise SystemExit(f"the bed {name} needs {flag}: a folder that demo_model/graft.py wrote, not {folder}")
    dtype = "float32" if whose == "demo" else "bfloat16"  # as they are published and run
    model, processor = load_model(folder, "cpu", dtype), load_processor(folder, 10**6)
    if drawn in DRAWS:
        return Bed(name, model, processor, DRAWS[drawn])
    eyes = WordEyes(model, processor, 1.0 if name == "blurred" else 0.5)
    model.model.visual.register_forward_hook(eyes, with_kwargs=True)
    if name == "sinks":
        positions = read(model, processor, draw_words(0)).reading.positions[SINKS].tolist()
        layers, _ = core.get_model_layers(model)
        layers[SINK_LAYER].register_forward_pre_hook(Sinks(positions), with_kwargs=True)
    return Bed(name, model, processor, draw_words, "black")
