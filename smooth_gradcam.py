"""Smooth Grad-CAM for Qwen2.5-VL: where in the photo the answer comes from.

The method is that of "From Redundancy to Relevance" (NAACL 2025): Grad-CAM of the answer's score at a decoder layer,
averaged over noisy copies of the photo as in SmoothGrad, 1/n sum M(photo + noise). Gradients pass the decoder by
AttnLRP's rules (`attnlrp`): without them, the maps of a transformer are mostly noise.

The mathematics of a map stands first. Then the file reads in the order in which data flows: settings, photo, reading
(photo, prompt and answer), features and gradients with their rules, token maps, pictures, the documented class.

Shapes:  H, W  rows and columns of image tokens     N = H * W     C  channels of a layer     V  vocabulary
         P  prompt tokens (the N included)          A  answer tokens     T  answer tokens that are scored
         L  positions that are run: P, and the answer up to its last scored token
         B  noisy copies that go through the model at once
"""

import inspect
import math
import operator
import os
import re
import threading
import unicodedata
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import InitVar, dataclass, field, replace
from functools import cached_property, partial
from typing import NamedTuple

import cv2
import numpy as np
import regex
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (its usual name)

__all__ = [
    *("SmoothQwenGradCAM", "get_model_layers", "compute_token_maps", "render_cam"),
    *("Settings", "Look", "Reading", "read", "find_target", "explain", "TokenMaps"),
    *("ExplanationError", "ExplanationWarning"),
]


def standardised(features: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Features as the next norm sees them, centred, and the gradients with respect to them: (N, C), (N, C).

    Each token is divided by its root mean square r and its gradient multiplied by it, so that g_i . A_i stays the same;
    then the mean over the tokens is subtracted: what all places share says nothing about a place. A token that is long
    in a few channels, as attention sinks are, counts as much as any other.
    """
    size = features.square().mean(-1, keepdim=True).sqrt()  # (N, 1)
    features = features / size.clamp_min(torch.finfo(features.dtype).tiny)
    return features - features.mean(0), gradients * size


def paper(features: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM exactly as published, ReLU(sum_k alpha_k A_k), alpha_k the mean gradient: (N, C), (N, C) -> (N,).

    Selvaraju et al., ICCV 2017, eq. 1 and 2, image tokens being the pixels, as in "From Redundancy to Relevance".
    """
    return (features @ gradients.mean(0)).relu()


def gradcam(features: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM, ReLU(sum_k alpha_k A_k), alpha_k the gradient pooled over the tokens: (N, C), (N, C) -> (N,).

    Features are `standardised`. In the mean over the tokens, each gradient is weighted by its token's contribution to
    the score, ReLU(g_i . A_i): a plain mean is dominated by the background.
    """
    features, gradients = standardised(features, gradients)
    share = (features * gradients).sum(-1).relu()  # (N,)
    alpha = share @ gradients / share.sum().clamp_min(torch.finfo(share.dtype).tiny)  # (C,)
    return (features @ alpha).relu()


def hirescam(features: Tensor, gradients: Tensor) -> Tensor:
    """HiResCAM, ReLU(sum_k g_k A_k) with each token's own gradient (Draelos and Carin, 2020): (N, C), (N, C) -> (N,).

    Features are `standardised`.
    """
    features, gradients = standardised(features, gradients)
    return (features * gradients).sum(-1).relu()


def product(features: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM^(3/4) HiResCAM^(1/4), high only where both are: (N, C), (N, C) -> (N,)."""
    return gradcam(features, gradients) ** 0.75 * hirescam(features, gradients) ** 0.25


def logit_score(logits: Tensor, tokens: Tensor) -> Tensor:
    """Sum of the logits (T, V) at the tokens (T,) they predict: the paper's score."""
    return logits.gather(1, tokens[:, None]).sum()


def logprob_score(logits: Tensor, tokens: Tensor) -> Tensor:
    """Sum of the log-probabilities of the tokens, which also depend on the alternatives."""
    return logit_score(logits.log_softmax(-1), tokens)


class Method(NamedTuple):
    """A map's formula, its own tap and rules, and what `explain` does to the maps at the end."""

    formula: Callable[[Tensor, Tensor], Tensor]
    tap: str = "input"
    rules: str = "attnlrp"
    finish: Callable = lambda reading, maps: maps  # list[TokenMaps] of all parts of a reading, before and after
    run: Callable | None = None  # in the place of `features_and_gradients`
    scores_end: bool = False  # whether the score of a whole answer includes its end of turn
    inert: dict[str, str] = {"head": "its maps are not those of a head"}  # settings that cannot act, and why


METHODS = {  # `common/evidence.py`, `common/attention.py` and `common/parent.py` add theirs
    "gradcam": Method(gradcam),
    "hirescam": Method(hirescam),
    "product": Method(product),
    "paper": Method(paper, "post_attention_layernorm", "plain", scores_end=True),
}
SCORES = {"logit": logit_score, "logprob": logprob_score}
TAPS = ("input", "output", "post_attention_layernorm")


class ExplanationError(RuntimeError):
    """The model gave nothing that can be explained: no answer, no gradient, or values that are not finite."""


class ExplanationWarning(UserWarning):
    """There is a map, but it may not show what one expects."""


@dataclass(frozen=True)
class Settings:
    """How a map is made. ValueError names an invalid value, and what would be valid.

    num_samples  noisy copies whose maps are averaged
    noise_std    standard deviation of the noise, for pixel values in [0, 1]; 0 is no noise, and one copy
    use_smooth   False: one clean copy, without noise
    seed         of the noise: the same seed gives the same maps
    tap          where decoder layers are read: at the hidden states that enter them ("input"), at their "output", or at
                 the output of their "post_attention_layernorm"; at the last two, the last layer has no gradient
    score        what is summed over the explained tokens: "logit" (as in the paper) or "logprob"
    contrast     explain the target's score minus that of this text in its place, after the same words; needs the passes
                 of `common/passes.py`. Scores are sums over tokens, so both should have the same number of tokens
    method       "gradcam" (gradients pooled over the image tokens), "hirescam" (each token's own), "product" (of the
                 two), or "paper" (exactly as published; for a whole answer, its end of turn is scored as well)
    rules        how gradients pass the decoder: by AttnLRP's rules for norms, gates and attention ("attnlrp"), with
                 only the denominators of the norms held constant ("detached"), or unchanged ("plain"); None, as for
                 the tap, is the method's own, see `METHODS`
    head         of method "attention" (see `common/attention.py`): one head, in the place of their mean
    """

    num_samples: int = 10
    noise_std: float = 0.1
    use_smooth: InitVar[bool] = True
    seed: int = 0
    tap: str | None = None
    score: str = "logit"
    contrast: str | None = None
    method: str = "gradcam"
    rules: str | None = None
    head: int | None = None

    def __post_init__(self, use_smooth):
        check_whole("num_samples", self.num_samples, 1)
        check_whole("seed", self.seed, 0)
        if not (isinstance(self.noise_std, (int, float, np.number)) and 0 <= self.noise_std <= 1):
            raise ValueError(f"noise_std={self.noise_std!r} must be 0 to 1 (0.15 is 15 % of the pixel range)")
        if self.contrast is not None:
            check_text("contrast", self.contrast)
            object.__setattr__(self, "contrast", self.contrast.strip())  # as a target is
        check_choices(self, method=METHODS, tap=(None, *TAPS), score=SCORES, rules=(None, *RULES))
        for name, why in METHODS[self.method].inert.items():
            given, method = getattr(self, name), f"method={self.method!r}"
            if given not in (getattr(type(self), name), getattr(METHODS[self.method], name, None)):
                raise ValueError(f"{name}={given!r} cannot be combined with {method}: {why}")
        if not use_smooth or self.noise_std == 0:  # all copies would be equal
            object.__setattr__(self, "num_samples", 1)
            object.__setattr__(self, "noise_std", 0.0)

    def settled(self) -> "Settings":
        """The same with the method's own tap and rules where none is given."""
        own = METHODS[self.method]
        return replace(self, tap=self.tap or own.tap, rules=self.rules or own.rules)


def check_whole(name: str, value, least: int) -> None:
    """Raises ValueError unless `least` <= value < 2^63."""
    if not hasattr(value, "__index__") or not least <= value < 2**63:
        raise ValueError(f"{name}={value!r} must be a whole number, {least} or more, and below 2^63")


def check_text(name: str, value) -> None:
    """Raises ValueError unless the value is a string with more than white space in it that can be encoded."""
    if not isinstance(value, str) or not value.strip() or regex.search(r"\p{Cs}", value):
        raise ValueError(f"{name}={value!r} must be a non-empty string without lone surrogates")


def check_choices(record, **choices: Iterable) -> None:
    """Raises ValueError for an attribute of the record that is not one of its choices."""
    for name, valid in choices.items():
        value = getattr(record, name)
        if not (value is None or isinstance(value, str)) or value not in valid:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(filter(None, valid))}")


def check_type(name: str, value, kind: type) -> None:
    """Raises TypeError unless the value is an instance of the class."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}={value!r} must be a {kind.__name__}")


@dataclass(frozen=True)
class TokenMaps:
    """The raw maps of one part of an answer at all requested layers, and what they explain: plain values."""

    maps: dict[int | str, np.ndarray]  # layer -> (H, W) float32 >= 0, mean over the samples, not normalised
    grid: tuple[int, int]  # (H, W)
    prompt: str
    answer: str  # as decoded, without end-of-turn and other special tokens
    tokens: list[int]  # A token ids
    target: str  # the explained part of the answer, all of it by default
    target_span: tuple[int, int]  # where it stands in `answer`, in characters
    target_tokens: list[int]  # T indices into `tokens`: what was scored
    no_gradient: frozenset  # layers whose gradient is exactly zero
    settings: Settings
    image: int = 0  # which of the prompt's images, or of a video's temporal patches: 0 is the first
    thinking: int = 0  # characters of `answer` that only lead to it
    cut_off: bool = False  # whether generation ended before the answer did
    evidence: tuple | None = None  # the `Evidence` of `common/evidence.py`, where it was measured
    likeness: dict = field(default_factory=dict)  # layer -> rank correlation with the middle layer's map, if measured

    @property
    def whole(self) -> bool:
        """Whether all of the answer is explained, with or without the thinking before it."""
        return tuple(self.target_span) in ((0, len(self.answer)), (self.thinking, len(self.answer)))

    @cached_property
    def blank(self) -> dict[int | str, str]:
        """{layer: why it has no map}: say so in words, never paint its zeros as data."""
        zero = {layer: "zero everywhere" for layer, cam in self.maps.items() if not cam.any()}
        return zero | dict.fromkeys(sorted(self.no_gradient, key=str), "no gradient")


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # not EPS: Pillow would start Ghostscript
LARGE = 25_000_000  # pixels from which on a photo is made smaller before the processor gets it


def load_rgb(image) -> Image.Image:
    """A photo the right way up, as RGB.

    `image` is a path (JPEG, PNG, WebP, GIF, BMP, TIFF, MPO, PPM or AVIF, whatever the file is called), a PIL image of
    8 bits a channel or 16 bits of grey, or a uint8 array (height, width, 3). EXIF rotation is applied, transparency is
    laid on white, of an animated file the first frame is taken. The caller's image is left as it is. Raises ValueError
    for anything else; `common/photos.py` opens more.
    """
    image = open_image(image)
    if image.mode.startswith("I;16"):
        grey = np.asarray(image)
        image = Image.fromarray((grey // 257 + (grey % 257 > 128)).astype(np.uint8))  # white is 65535 = 257 * 255
    if image.mode in "IF":
        raise ValueError(f"the image has grey values of mode {image.mode}: scale them to 8 bits (see common/photos.py)")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(image) -> Image.Image:
    """What `load_rgb` opens, the right way up, in its own mode."""
    if isinstance(image, (str, os.PathLike)):
        if os.path.exists(image) and not os.path.isfile(image):  # noqa: PTH110, PTH113  (Path's raise for a long name)
            raise ValueError(f"{image} is a folder, a pipe or a device, not an image file")
        try:
            with open(image, "rb", opener=_without_waiting) as file, Image.open(file, formats=FORMATS) as picture:
                return ImageOps.exif_transpose(picture)
        except Exception as exc:  # Pillow raises anything for a damaged file
            reasons = {FileNotFoundError: "does not exist", Image.DecompressionBombError: f"is too large: {exc}"}
            reasons[UnidentifiedImageError] = f"cannot be read as an image of one of the formats {', '.join(FORMATS)}"
            why = reasons.get(type(exc), f"cannot be read as an image (damaged?): {exc}")
            raise ValueError(f"the image {image} {' '.join(why.split())}") from exc
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"an image array of {image.dtype} {image.shape} must be uint8 (height, width, 3), RGB")
        return Image.fromarray(image)
    if not isinstance(image, Image.Image) or not all(image.size):
        what = f"size {image.size}" if isinstance(image, Image.Image) else f"type {type(image).__name__}"
        raise ValueError(f"image of {what} must be a path, a PIL image with pixels, or a uint8 array")
    if getattr(image, "tile", None) and image.format not in (*FORMATS, "MPO"):  # not loaded yet
        raise ValueError(f"the image is of format {image.format}, not one of {', '.join(FORMATS)}: load it first")
    upright = not isinstance(image, ImageFile.ImageFile) and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    return image if upright else ImageOps.exif_transpose(image)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a file that has become a pipe does not block


def add_noise(pixel_values: Tensor, noise_std: float, image_processor, generator, still: bool = True) -> Tensor:
    """One SmoothGrad copy of the processor's pixels, (patches, channels * temporal copies * P * P) or (..., 3, P, P).

    `noise_std` is in units of pixel values in [0, 1] (Smilkov et al., 2017: sigma / (max - min)). A still image is
    stored twice along time: both copies of a pixel get the same draw; the frames of a video get one each. Drawn on the
    CPU, so that a seed means the same noise on every device.
    """
    std = torch.tensor(image_processor.image_std if image_processor.do_normalize else 1.0).expand(3)
    copies, whole = getattr(image_processor, "temporal_patch_size", 1), pixel_values.dim() > 2  # pictures, not patches
    rows = pixel_values.flatten(-3) if whole else pixel_values
    pixels = rows.unflatten(-1, (len(std), copies, -1))  # (patches, channels, copies, P * P)
    drawn = pixels[..., :1, :] if still else pixels
    noise = torch.randn(drawn.shape, generator=generator) * (noise_std / std[:, None, None])
    return (pixels + noise.to(pixels)).reshape(pixel_values.shape)


def supported() -> str:
    """The families there are, in words; `import common.families` adds those beside Qwen-VL."""
    return "supported are " + ", ".join(f"{family.name} ({kind})" for kind, family in FAMILIES.items())


def check_family(model) -> "Family":
    """The model's. Raises ValueError, with what is supported, for that of none of them, or one that is no model."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        raise ValueError(f"{type(model).__name__} is of type {kind}, which is not supported: {supported()}")
    if model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} cannot answer: load it with AutoModelForImageTextToText")
    return FAMILIES[kind]


def check_processor(processor, pictures: str) -> None:
    """Raises ValueError for what is no processor with `pictures`, "image_processor" or "video_processor"."""
    for part in ("tokenizer", pictures, "apply_chat_template"):
        if not hasattr(processor, part):
            raise ValueError(f"a {type(processor).__name__} is no processor (it has no {part}): use AutoProcessor")


@dataclass(frozen=True, eq=False)
class Reading:
    """Photos, a prompt and an answer as a model reads them: made once by `read`, explained as often as you like."""

    model: nn.Module
    processor: object
    photos: tuple[Image.Image, ...]  # those that are explained, as the model sees them, in the prompt's order
    prompt: str  # of a conversation all its texts
    inputs: dict[str, Tensor]  # what the processor makes of pictures and prompt
    positions: Tensor  # (N,) of the image tokens in the sequence, those of all photos, each in raster order
    grids: tuple[tuple[int, int], ...]  # (H, W) of each photo
    tokens: list[int]  # A token ids of the answer
    spans: list[tuple[int, int]]  # A: the characters of `answer` that each token has a part in
    answer: str
    pixels: str = "pixel_values"  # which of the inputs gets the noise
    chat: tuple[dict, ...] = ()  # the messages, {"role", "content": parts}
    pictures: tuple[Image.Image, ...] = ()  # all those of the prompt
    numbers: tuple[int, ...] = ()  # which of them the photos are
    thinking: int = 0  # characters of the answer that only lead to it, up to the end of </think>
    cut_off: bool = False  # whether generation ended before the answer did

    def of(self, *numbers: int) -> "Reading":
        """The same with these pictures of the prompt explained, 0 is the first; the others are read like text.

        Raises ValueError for a picture that is not there.
        """
        kind = "image" if self.pixels == "pixel_values" else "video"
        positions, grids = check_family(self.model).grids(self.model, self.inputs, kind, self.pictures, self.processor)
        if not numbers or not set(numbers) <= set(range(len(grids))):
            raise ValueError(f"pictures {numbers} must be some of 0 to {len(grids) - 1}")
        parts = positions.split([math.prod(grid) for grid in grids])
        photos, grids, parts = (tuple(every[i] for i in numbers) for every in (self.pictures, grids, parts))
        return replace(self, photos=photos, grids=grids, positions=torch.cat(parts), numbers=numbers)

    @property
    def own(self) -> Tensor:
        """(M,) bool: which of the M image tokens in the sequence are those of `photos`."""
        ids = self.inputs["input_ids"][0]
        return torch.isin((ids == ids[self.positions[0]]).nonzero()[:, 0], self.positions)

    def part(self, name: str = "answer") -> tuple[int, int]:
        """(start, end) in characters of `answer`: of its part behind the "thinking", of that, or of "all".

        Raises ValueError for another name, and ExplanationError if that part is empty.
        """
        end = len(self.answer)
        parts = {"answer": (self.thinking, end), "thinking": (0, self.thinking), "all": (0, end)}
        if name not in parts:
            raise ValueError(f"part={name!r} must be one of {', '.join(parts)}")
        if not self.answer[slice(*parts[name])].strip():
            why = " (it was cut off: raise max_new_tokens)" if self.cut_off else ""
            raise ExplanationError(f"there is no {name} to explain in {self.answer!r}{why}: choose another part")
        return parts[name]

    def is_whole(self, span: tuple[int, int]) -> bool:
        """Whether these characters are all of the answer, with or without the thinking before it."""
        return tuple(span) in ((0, len(self.answer)), (self.thinking, len(self.answer)))

    @property
    def photo(self) -> Image.Image:
        """The only photo. Raises ValueError if there are several, or a video."""
        return self._only(self.photos)

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the only photo. Raises ValueError if there are several, or a video."""
        return self._only(self.grids)

    def _only(self, of_photos: tuple):
        if len(of_photos) > 1 or self.pixels != "pixel_values":
            what = f"{len(of_photos)} images" if self.pixels == "pixel_values" else "a video"
            raise ValueError(f"the prompt has {what}, and this takes one photo: use read and explain")
        return of_photos[0]

    def tokens_of(self, span: tuple[int, int]) -> list[int]:
        """T indices of the answer's tokens that have a part in these characters (start, end)."""
        start, end = span
        return [i for i, (first, last) in enumerate(self.spans) if first < end and last > start]


def read(model, processor, image, prompt, answer: str | None = None, max_new_tokens: int = 128) -> Reading:
    """Photo, prompt and answer, the model's own (greedy) if none is given, as `explain` needs them.

    `image` is what `load_rgb` opens, or a list of such: they stand before the prompt, in their order. `prompt` is a
    text, or a conversation: chat messages as transformers' templates take them, {"role", "content": a text, or a list
    of {"type": "text", "text": ...} and {"type": "image", "image": ...}}. There, images fill the places without one,
    {"type": "image"}, in their order, or stand before the last message's text if there are none; with None, all are
    in the messages. Of a conversation the given images are explained, or else its last picture: see `Reading.of`.

    Raises ValueError for bad arguments, ExplanationError if the model's answer is empty.
    """
    model = unwrapped(model)
    family = check_family(model)
    check_processor(processor, "image_processor")
    images = [] if image is None else list(image) if isinstance(image, (list, tuple)) else [image]
    chat, pictures, given = conversation(images, prompt)
    if not pictures:
        raise ValueError(f"image={image!r} has no photo: give one or more")
    photos = tuple(map(load_rgb, pictures))
    inputs = prepare_inputs(model, processor, photos, chat)
    photos = tuple(family.seen(photo, processor.image_processor) for photo in photos)
    reading = answered(model, processor, photos, chat, inputs, "image", answer, max_new_tokens)
    return reading.of(*given) if len(given) < len(photos) else reading


def conversation(images: list, prompt, kind: str = "image") -> tuple[list[dict], list, list[int]]:
    """(messages whose contents are lists of parts, their pictures, the numbers of those that are explained)."""
    text = {"type": "text", "text": prompt}
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": [*({"type": kind} for _ in images), text]}]
    chat, keys = [], {"text": {"type", "text"}, kind: {"type", "image", "path", "url"}}  # that a part may have
    for message in prompt if isinstance(prompt, (list, tuple)) and prompt else [None]:
        role, parts = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        parts = [text | {"text": parts}] if isinstance(parts, str) else parts
        known = isinstance(role, str) and re.fullmatch(r"\w+", role) and isinstance(parts, (list, tuple))
        known = known and not any(message[key] for key in message.keys() - {"role", "content"})  # as a tool's calls
        own = known and [(str(part.get("type")), {*part}) if isinstance(part, dict) else ("", 0) for part in parts]
        if not known or any(of not in keys or names - keys[of] or len(names) > 2 for of, names in own):
            form = '{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}'
            what = f"prompt={prompt!r}" if message is None else f"a prompt with the message {repr(message)[:200]}"
            raise ValueError(f"{what} must be a text, or a list of messages such as {form}")
        chat.append({"role": role, "content": [dict(part) for part in parts]})
    for part in (part for message in chat for part in message["content"] if part["type"] == "text"):
        check_text("prompt", part.get("text"))
    if chat[-1]["role"] == "assistant":
        raise ValueError("the last message is the assistant's: give its text as the answer, to be explained")
    places = [part for message in chat for part in message["content"] if part["type"] == kind]
    pictures = [next((place.pop(key) for key in ("image", "path", "url") if key in place), None) for place in places]
    if images and all(picture is not None for picture in pictures):
        before = sum(part["type"] == kind for message in chat[:-1] for part in message["content"])
        chat[-1]["content"][:0] = [{"type": kind} for _ in images]
        pictures[before:before] = [None] * len(images)
    empty = [i for i, picture in enumerate(pictures) if picture is None]
    if len(empty) != len(images):
        raise ValueError(f"the messages have {len(empty)} places for a picture, and {len(images)} are given")
    for i, image in zip(empty, images, strict=True):
        pictures[i] = image
    return chat, pictures, empty or [len(pictures) - 1]


def shown(chat: list[dict]) -> str:
    """The texts of a conversation; of several messages in a line each, with its role and "[image]" for a picture."""
    said = [[part.get("text", f"[{part['type']}]") for part in message["content"]] for message in chat]
    if len(chat) == 1:
        return "\n".join(part["text"] for part in chat[0]["content"] if part["type"] == "text")
    return "\n".join(f"{message['role']}: {' '.join(texts)}" for message, texts in zip(chat, said, strict=True))


def answered(
    model, processor, photos, chat: list[dict], inputs: dict[str, Tensor], kind: str, answer: str | None,
    max_new_tokens: int,
) -> Reading:  # fmt: skip
    """The reading of inputs whose `kind` ("image" or "video") is explained, with the given or the generated answer."""
    check_whole("max_new_tokens", max_new_tokens, 1)
    positions, grids = check_family(model).grids(model, inputs, kind, photos, processor)
    if kind == "image" and len(grids) != len(photos):
        raise ValueError(f"the processor makes {len(grids)} pictures of {len(photos)} photos: it must be one of each")
    if min(map(math.prod, grids)) < 9:
        sizes = " and ".join(f"{width} x {height}" for height, width in grids)
        warn(f"the photo is seen as {sizes} image tokens: too few to tell places apart")
    tokenizer, cut_off = processor.tokenizer, False
    if answer is None:
        with borrowed(model), memory_explained(len(positions)):
            tokens, cut_off = generate(model, tokenizer, inputs, max_new_tokens)
        if len(tokens) >= 8 and len(set(tokens)) == 1:
            warn(f"the model repeats one token, {decode(tokenizer, tokens[:1])!r}: its weights may be damaged")
    else:
        tokens = tokenise(tokenizer, answer)
    text, spans = decode(tokenizer, tokens), token_spans(tokenizer, tokens)
    if not text.strip():
        raise ExplanationError("the model's answer is empty: give a text to explain as the answer")
    pixels = "pixel_values" if kind == "image" else "pixel_values_videos"
    return Reading(model, processor, photos, shown(chat), inputs, positions, grids, tokens, spans, text, pixels, chat,
                   photos, tuple(range(len(grids))), thinking_end(tokenizer, tokens, spans, text), cut_off)  # fmt: skip


def thinking_end(tokenizer, tokens: list[int], spans: list[tuple[int, int]], text: str) -> int:
    """The characters of an answer up to the end of </think>, be it a special token; all if that never comes."""
    marks = {name: span[1] for name, span in zip(tokenizer.convert_ids_to_tokens(tokens), spans, strict=True)}
    end = marks.get("</think>", text.find("</think>") + len("</think>") if "</think>" in text else 0)
    if not end and ("<think>" in marks or "<think>" in text):
        return len(text)
    return end + len(text[end:]) - len(text[end:].lstrip()) if end else 0


def warn(message: str) -> None:
    """Issue an ExplanationWarning."""
    warnings.warn(message, ExplanationWarning, stacklevel=4)


def prepare_inputs(model, processor, photos, prompt, **video) -> dict[str, Tensor]:
    """What the processor makes of photos and a prompt behind them, or of messages, on the device of the embeddings.

    `video`, the processor's arguments for one, takes the place of the photos.
    """
    kind = "video" if video else "image"
    chat = conversation([None] if video else list(photos), prompt, kind)[0] if isinstance(prompt, str) else prompt
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    texts = [(message["role"], part["text"]) for message in chat for part in message["content"] if "text" in part]
    for role, said in texts:
        for marker in processor.tokenizer.all_special_tokens:
            if marker in said and not re.search(GROUNDING, marker):
                raise ValueError(f"prompt={said[:80]!r} contains {marker}, which marks a picture or a turn of the chat")
        if said.strip() not in text and role != "assistant":  # of whose earlier thoughts some templates drop
            raise ValueError(f"the chat template drops the prompt {said!r}: the question was never asked")
    marks = {getattr(processor, mark, None) for mark in ("image_token", "video_token", "boi_token")} - {None}
    count, expected = sum(map(text.count, marks)), 1 if video else len(photos)
    if count != expected:
        raise ValueError(f"the chat template shows {count} pictures where {expected} are given")
    plain = {"add_special_tokens": False} if text.startswith(processor.tokenizer.bos_token or "\0") else {}  # has it
    given = video or {"images": [check_family(model).reduced(photo, processor.image_processor) for photo in photos]}
    inputs = dict(processor(text=[text], **given, **plain, return_tensors="pt"))
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        ids = inputs["input_ids"]  # without their types transformers >= 5.3 uses 1-D positions, with no error
        types = (ids == model.config.image_token_id).long() + 2 * (ids == model.config.video_token_id).long()
        inputs.setdefault("mm_token_type_ids", types)
    device = model.get_input_embeddings().weight.device
    device = "cpu" if device.type == "meta" else device  # weights that accelerate offloads
    return {name: value.to(device) for name, value in inputs.items() if torch.is_tensor(value)}


def reduced(photo: Image.Image, image_processor) -> Image.Image:
    """A photo of up to LARGE pixels as it is; a larger one at four times the processor's cap or more.

    The processor makes several copies of what it gets before it makes it smaller itself.
    """
    count = photo.width * photo.height
    factor = math.isqrt(count // (4 * image_processor.size["longest_edge"])) if count > LARGE else 1
    return photo.reduce(factor) if factor > 1 else photo


def image_grids(model, inputs: dict[str, Tensor], kind="image", *_) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    """Positions (N,) of the image tokens in the sequence and the grid (H, W) of each image, in raster order.

    With `kind` "video", of each temporal patch.
    """
    positions = (inputs["input_ids"][0] == getattr(model.config, f"{kind}_token_id")).nonzero()[:, 0]  # (N,)
    merge = model.config.vision_config.spatial_merge_size
    sizes = inputs[f"{kind}_grid_thw"].tolist()  # in patches
    grids = tuple((height // merge, width // merge) for patches, height, width in sizes for _ in range(patches))
    if len(positions) != sum(map(math.prod, grids)):
        known = " and ".join(f"{height} x {width}" for height, width in grids)
        raise ValueError(f"{len(positions)} image tokens do not fill the processor's grid of {known}")
    return positions, grids


def generate(model, tokenizer, inputs: dict[str, Tensor], max_new_tokens: int) -> tuple[list[int], bool]:
    """The greedy answer without its end-of-turn token, and whether it was cut off before that came.

    Greedy whatever the model's generation config says: of that, only the end and padding tokens are used.
    """
    usual, config = model.generation_config, model.config
    ends = {*np.atleast_1d(usual.eos_token_id).tolist(), tokenizer.eos_token_id} - {None}
    ids = {"eos_token_id": sorted(ends) or None, "pad_token_id": usual.pad_token_id}
    names = ("image_token_id", "video_token_id", "vision_start_token_id")  # what would be counted as a picture
    ids["suppress_tokens"] = [getattr(config, name) for name in names if hasattr(config, name)]
    greedy = type(usual)(max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, **ids)
    model.generation_config = greedy  # what one leaves open is filled in from here
    try:
        output = model.generate(**inputs, generation_config=greedy)
    finally:
        model.generation_config = usual
    tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
    end = next((i for i, token in enumerate(tokens) if token in ends), None)
    return tokens[:end], end is None


def tokenise(tokenizer, text: str, name: str = "answer") -> list[int]:
    """The text's token ids. Raises ValueError for special tokens in it, other than those of grounding and thinking."""
    check_text(name, text)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    special = {token for token in tokenizer.all_special_tokens if not re.search(GROUNDING, token)}
    if special & set(tokenizer.convert_ids_to_tokens(tokens)):
        raise ValueError(f"{name}={text!r} must be text without special tokens")
    return tokens


def decode(tokenizer, tokens: list[int]) -> str:
    """The text of the tokens, without special ones."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def token_spans(tokenizer, tokens: list[int]) -> list[tuple[int, int]]:
    """The characters (start, end) of the decoded answer that each token has a part in.

    A byte-level token may carry only some bytes of a character: then all tokens of that character span it. Special
    tokens are left out of the decoded answer and span nothing.
    """
    said = [token for token in tokens if decode(tokenizer, [token] * 2)]
    lead = tokenizer("a", add_special_tokens=False)["input_ids"]

    def text_of(start, end):  # LLaMA's tokenizer drops a blank at the beginning of all that it decodes
        return decode(tokenizer, lead + said[start:end])[1:] if start else decode(tokenizer, said[:end])

    spans, start, i = [], 0, 0
    first, before = 0, 0  # the token that begins with a character of its own, and the characters before it
    for token in tokens:
        if not decode(tokenizer, [token] * 2):
            spans.append((start, start))
            continue
        i += 1
        text = text_of(first, i)
        # A cut inside a character shows where both sides are decoded alone; three more tokens hold its last byte.
        inside = text.endswith("\ufffd") and any(text + text_of(i, i + n) != text_of(first, i + n) for n in (1, 2, 3))
        end = before + (1 if inside and not text.strip("\ufffd") else len(text))
        spans.append((start, end))
        start = end - inside
        if not inside:
            first, before = i, end
    return spans


GROUNDING = r"object|box|quad|think"  # in the names of special tokens that texts may have
OF_A_WORD = r"[\p{L}\p{N}\p{M}_]"  # letters, digits, and the marks above and below them, such as Hindi vowel signs


def occurrences(answer: str, target: str, name: str = "target") -> list[tuple[int, int]]:
    """Where the target stands in the answer, as a whole word if it does so anywhere. ValueError if nowhere."""
    if not isinstance(target, str):
        raise ValueError(f"{name}={target!r} must be a text")
    wanted = target.strip()  # the token of a blank says the next word
    if wanted not in answer:
        wanted = unicodedata.normalize("NFC", wanted)  # as the tokenizer composes what it is given
    literal = re.escape(wanted)
    found = list(regex.finditer(f"(?<!{OF_A_WORD}){literal}(?!{OF_A_WORD})", answer))
    found = found or list(re.finditer(literal, answer))
    if not found or not wanted:
        other = re.search(literal, answer, re.IGNORECASE) if wanted else None
        hint = f": there is {other[0]!r}" if other else ""
        words = ", ".join(list(dict.fromkeys(re.findall(r"\w+", answer)))[:40])
        said = f"{name}={target!r} is not in the answer {answer!r} (letter case counts{hint}; its words: {words})"
        raise ValueError(said)
    return [match.span() for match in found]


def find_target(answer, target: str | None, occurrence: int = 1, part: str = "answer") -> tuple[int, int]:
    """(start, end) in characters of `target` in the answer, the first or the given occurrence; None is all of it.

    `answer` is a text, or a `Reading`, in whose `part` the target is sought. Where the target stands as a whole word,
    only whole words count: not "cat" in "cattle". Raises ValueError, with the answer, if it is not there as often.
    """
    check_whole("target_occurrence", occurrence, 1)
    start, end = answer.part(part) if isinstance(answer, Reading) else (0, len(answer))
    answer = (answer.answer if isinstance(answer, Reading) else answer)[start:end]
    found = [(0, len(answer))] if target is None else occurrences(answer, target)
    if occurrence > len(found):
        what = "needs a target" if target is None else f"is more than the {len(found)} of {target!r} in {answer!r}"
        raise ValueError(f"target_occurrence={occurrence} {what}")
    first, last = found[occurrence - 1]
    return start + first, start + last


class Scored(NamedTuple):
    """Tokens (T,) whose scores are summed, and the positions (T,) of the sequence that predict them."""

    expected: list[int]
    predicting: list[int]


def score_parts(inputs, tokens: list[int], parts: list[Iterable[int]]) -> tuple[dict[str, Tensor], list[Scored]]:
    """The inputs, extended by the answer as far as its parts need it, and what of each part is scored there.

    `parts` are indices into the answer's `tokens`. What is per token is extended, or mask and positions would be wrong.
    """
    ids = inputs["input_ids"]
    before = ids.shape[1] - 1  # the position that predicts the answer's first token
    scored = [Scored([tokens[i] for i in part], [before + i for i in part]) for part in parts]
    answer = ids.new_tensor([tokens[: max(i for part in parts for i in part)]])
    fills = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
    forced = {
        name: torch.cat([value, fills.get(name, torch.zeros_like(answer)).to(value)], dim=1)
        for name, value in inputs.items()
        if value.shape == ids.shape
    }  # (1, P) -> (1, L)
    return inputs | forced, scored


def unwrapped(model):
    """The model in wrappers of PEFT, torch.compile and data parallelism. ValueError for an adapter of the prompt."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrapped(model.module)
    if hasattr(model, "get_base_model"):  # PEFT's
        config = model.active_peft_config
        if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
            raise ValueError(f"an adapter of type {config.peft_type} acts on the prompt: only those of layers are run")
        return unwrapped(model.get_base_model())
    return unwrapped(model._orig_mod) if hasattr(model, "_orig_mod") else model  # torch.compile's


def get_model_layers(model) -> tuple[nn.ModuleList, int]:
    """The decoder layers of a Qwen2.5-VL (or a model with the same layout, of any family) and their number.

    Raises ValueError if the model has them in none of the known places.
    """
    model = unwrapped(model)
    paths = ("model.language_model.layers", "language_model.layers", "model.layers")
    for path in paths:
        with suppress(AttributeError):
            layers = operator.attrgetter(path)(model)
            return layers, len(layers)
    raise ValueError(f"{type(model).__name__} has its decoder layers at none of {', '.join(paths)}")


def resolve_layers(layers: Iterable[int], total: int) -> list[int]:
    """Layer indices in 0 ... total - 1, in the order given and each once; negative ones count from the end.

    Raises ValueError naming the value and the valid range.
    """
    resolved = []
    for layer in _listed(layers):
        if not hasattr(layer, "__index__") or not -total <= layer < total:
            raise ValueError(f"layer {layer!r} does not exist: the model has 0 to {total - 1}, or {-total} to -1")
        resolved.append(operator.index(layer) % total)
    if not resolved:
        raise ValueError(f"no layer is given: the model has 0 to {total - 1}, or {-total} to -1")
    return list(dict.fromkeys(resolved))


def _listed(layers) -> Iterable:
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise ValueError(f"layers={layers!r} must be a list of layers, such as [0, -1]")
    return layers


class Tap(NamedTuple):
    """Where features are read: the key of their map, and the module whose input or output they are."""

    key: int | str
    module: nn.Module
    at_input: bool


def find_taps(model, layers, tap: str) -> list[Tap]:
    """Decoder layers are tapped as `tap` says, all other modules at their output.

    What Qwen3-VL adds of the photo behind its first layers (deepstack) is held constant there, and left out. Keys are
    the index of a decoder layer, whichever the tap, and the name in the model of any other module.
    """
    decoder, total = get_model_layers(model)
    names = {module: name.replace("_orig_mod.", "") for name, module in model.named_modules()}  # of torch.compile
    index = {module: i for i, module in enumerate(decoder)}
    taps = {}
    for layer in _listed(layers):
        module = layer if isinstance(layer, nn.Module) else decoder[resolve_layers([layer], total)[0]]
        if module not in names:
            raise ValueError(f"the layer {type(module).__name__} does not belong to the model")
        key = index.get(module, names[module])
        before_mlp = module in index and tap == "post_attention_layernorm"
        place = getattr(module, check_family(model).mlp_norm) if before_mlp else module
        taps[key] = Tap(key, place, at_input=module in index and tap == "input")
    return list(taps.values()) or resolve_layers([], total)


@contextmanager
def hooked(handles: Iterable):
    """Inside, these hooks are registered; afterwards none is, even if registering one of them failed."""
    held = []
    try:
        held.extend(handles)
        yield
    finally:
        for handle in held:
            handle.remove()


@contextmanager
def captured(taps: list[Tap]):
    """Inside, a forward pass leaves the tapped tensor of each layer in the yielded dictionary; no hook outlives it."""
    features = {}

    def keep(key, tensor):
        if not (torch.is_tensor(tensor) and tensor.is_floating_point()):
            raise ValueError(f"layer {key} gives a {type(tensor).__name__}: choose one whose output is a tensor")
        # The graph starts here: parameters are frozen, so what lies below the first tap needs none.
        features[key] = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        return features[key]

    def at_input(key):
        def hook(module, args, kwargs):
            if args:
                return (keep(key, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": keep(key, kwargs["hidden_states"])}

        return hook

    def at_output(key):  # a tensor, or a tuple that begins with it (decoder layers before transformers 5.6)
        def hook(module, args, out):  # copied, because Qwen3-VL adds to its first layers' outputs in place before 5
            return (keep(key, out[0]).clone(), *out[1:]) if isinstance(out, tuple) else keep(key, out).clone()

        return hook

    with hooked(
        module.register_forward_pre_hook(at_input(key), with_kwargs=True)
        if inside
        else module.register_forward_hook(at_output(key))
        for key, module, inside in taps
    ):
        yield features


def identity_rule(module, args, output):
    """Hook: y = f(x) taken as x [f(x) / x] with the ratio held constant. For an RMSNorm, w x / rms(x), that is rms(x).

    Such a norm does not change with the length of x, so the gradient that comes back through it is orthogonal to x, and
    what a token contributes, sum_k g_k x_k, is zero but for eps. With the ratio held it is what y contributes, and adds
    up over the tokens: the rule of Ali et al. (ICML 2022), and the identity rule of AttnLRP.
    """
    if not output.requires_grad:  # below the first tap
        return output
    linear = args[0] * (output.detach() / args[0].detach()).nan_to_num(0, 0, 0)
    return output.detach() + (linear - linear.detach())


def layer_norm_rule(module, args, output):
    """Hook: the same for w (x - mean(x)) / std(x) + b with std(x) held constant; the mean is linear in x and stays."""
    if not output.requires_grad:
        return output
    with torch.no_grad():
        centred = args[0] - args[0].mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True) + module.eps
        shown = output - module.forward(torch.zeros_like(args[0][:1]))  # w (x - mean(x)) / std(x), without b
    growth = (centred * args[0]).mean(-1, keepdim=True) / variance  # of std(x), relative: what the gradient lacks
    return output + shown * (growth - growth.detach())


def uniform_rule(share: float):
    """Hook: only this share of the gradient passes, as each factor of a product gets half of its relevance."""
    return lambda module, args, output: share * output + (1 - share) * output.detach()


def activation_rule(module, args, output):
    """Hook of an activation whose output is a factor of a product: the identity rule, and half of the gradient."""
    return half(module, args, identity_rule(module, args, output))


half, quarter = uniform_rule(0.5), uniform_rule(0.25)
NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")  # the latter if any
PRODUCTS = {"self_attn.q_proj": quarter, "self_attn.k_proj": quarter, "self_attn.v_proj": half}
PRODUCTS |= {"mlp.up_proj": half, "mlp.act_fn": activation_rule}


@contextmanager
def ruled(model, products: bool):
    """Inside, gradients pass every norm as if its denominator were a constant; values stay the same.

    That includes the vision tower's. With `products` they follow AttnLRP's rules (Achtibat et al., ICML 2024), where
    gradient x input is relevance: the identity rule for activations too; the uniform rule (eq. 14) for products, so
    gradients are halved towards both sides of the gated MLP, towards attention weights and values, and once more, since
    the weights come from a product, towards queries and keys. Raises ExplanationError if the decoder runs without one
    of the modules that have a rule, as with fused kernels.
    """
    layers, family = get_model_layers(model)[0], check_family(model)
    decoder = next(module for module in model.modules() if getattr(module, "layers", None) is layers)
    places = {"norm": (decoder, "norm")} | {
        f"layers.{i}.{place}": (layer, place)
        for i, layer in enumerate(layers)
        for place in (*family.norms, *(family.products if products else ()))
        if not re.search("[qk]_norm", place) or hasattr(layer.self_attn, "q_norm")
    }
    rules, called = norm_rules(model), set()
    for name, (parent, place) in places.items():
        with suppress(AttributeError):
            module = places[name] = operator.attrgetter(place)(parent)
            rule = family.products.get(place, None if getattr(module, "bias", None) is not None else identity_rule)
            rules |= {module: rule} if rule and module not in rules else {}
    names = {module: name for name, module in places.items()}  # layers may have an activation in common
    missing = {name for name, module in places.items() if module not in rules}

    def hook(module, rule):
        if module not in names:
            return module.register_forward_hook(rule)
        return module.register_forward_hook(lambda *given: called.add(module) or rule(*given))

    with hooked(hook(module, rule) for module, rule in rules.items()):
        yield
    missing |= {names[module] for module in names.keys() - called if decoder.norm in called}  # else no whole pass
    if missing:
        first = next(name for name in places if name in missing)
        advice = 'load the model without fused kernels, or use rules="plain"'
        raise ExplanationError(f"{first} has no gradient rule, as it is not run, or no known norm: {advice}")


def norm_rules(model) -> dict[nn.Module, Callable]:
    """The hooks of all that is a norm by its class, in the vision tower too."""
    rms = {module: identity_rule for module in model.modules() if type(module).__name__.endswith("RMSNorm")}
    return {module: layer_norm_rule for module in model.modules() if isinstance(module, nn.LayerNorm)} | rms


detached_norms, attnlrp = partial(ruled, products=False), partial(ruled, products=True)
RULES = {"attnlrp": attnlrp, "detached": detached_norms, "plain": nullcontext}


def check_linear(model) -> None:
    """Raises ExplanationError if a kind of linear layer of the decoder passes no gradient, as some quantised ones."""
    linear = [layer for layer in get_model_layers(model)[0].modules() if hasattr(layer, "in_features")]
    for layer in {(type(layer), type(getattr(layer, "weight", None))): layer for layer in linear}.values():
        if type(layer) is nn.Linear and type(layer.weight) is nn.Parameter:
            continue
        x = torch.ones(1, layer.in_features, dtype=model.dtype, device=model.device, requires_grad=True)
        y = layer(x)
        if not y.requires_grad or torch.autograd.grad(y.sum(), x, allow_unused=True)[0] is None:
            raise ExplanationError(f"its linear layers pass no gradient: {type(layer)} (load the model unquantised)")


_LOCKS = weakref.WeakKeyDictionary()  # one for each decoder: hooks, modes and gradients of two passes would mix


@contextmanager
def borrowed(model):
    """Evaluation mode and frozen parameters inside; afterwards the model is as the caller left it, even on errors.

    Other threads that want to explain with the same model wait until then.
    """
    # hooks do not act in what is compiled; how it is run is set for all threads
    compiled = any(m._compiled_call_impl or hasattr(m.forward, "_torchdynamo_orig_callable") for m in model.modules())
    eager = (lambda: torch.compiler.set_stance("force_eager")) if compiled else nullcontext
    with _LOCKS.setdefault(torch.compile if compiled else get_model_layers(model)[0], threading.RLock()), eager():
        training = [module for module in model.modules() if module.training]
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        positions = getattr(model.model, "rope_deltas", None)  # a caller's unfinished generation lives on this

        def switch(on: bool):
            for module in training:
                module.training = on
            for parameter in trainable:
                parameter.requires_grad_(on)  # else autograd would keep what the parameters' gradients need

        try:
            switch(False)
            with torch.inference_mode(False), torch.enable_grad():
                yield
        finally:
            switch(True)
            if hasattr(model.model, "rope_deltas"):
                model.model.rope_deltas = positions


@contextmanager
def memory_explained(count: int):
    """Inside, running out of memory is reported with what to do about it; `count` are the image tokens."""
    try:
        yield
    except RuntimeError as exc:
        if not is_out_of_memory(exc):
            raise
        advice = "lower batch_size, give the model fewer pixels, explain only later layers, or recompute activations"
        raise RuntimeError(f"out of memory with {count} image tokens: {advice}") from exc


def is_out_of_memory(exc: Exception) -> bool:
    """Whether a device, or the processor, had no memory left to give."""
    return isinstance(exc, torch.cuda.OutOfMemoryError) or "DefaultCPUAllocator" in str(exc)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Upcast, because sums over tokens and channels lose digits in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def not_finite(what: str, model) -> ExplanationError:
    """The error for values that are not finite, with what to do about them."""
    advice = "load it as float32" if model.dtype.itemsize < 4 else "its weights may be damaged, or hold such values"
    return ExplanationError(f"{what} in {model.dtype}: {advice}")


def compute_logits(model, inputs: dict[str, Tensor], first: int) -> Tensor:
    """(B, L, V), or where the model can leave out the rest, only those from position `first` to the end."""
    length = inputs["input_ids"].shape[1]
    known = inspect.signature(model.forward).parameters
    keep = {"logits_to_keep": length - first} if "logits_to_keep" in known else {}
    return model(**inputs, **keep, use_cache=False).logits


def batch_of(forced: dict[str, Tensor], pixels: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The inputs with the pixels of B copies in the place of one's: patches one below the other, all else B times."""
    batch = {name: value.repeat(len(pixels), *[1] * (value.dim() - 1)) for name, value in forced.items()}
    return batch | {name: torch.cat([copy[name] for copy in pixels]) for name in pixels[0]}


def features_and_gradients(
    model, forced: dict[str, Tensor], taps: list[Tap], targets: list[Scored], settings: Settings
) -> Iterator[dict]:
    """One forward of B copies, and one backward of each target: yields {key: (features, gradient or None)} of all taps.

    Features and gradients have the shape that the layer gives them, whose first dimension is that of a copy B times.
    """
    check_linear(model)
    length = forced["input_ids"].shape[1]
    first = min(position for target in targets for position in target.predicting)
    with RULES[settings.rules](model), captured(taps) as found:
        logits = compute_logits(model, forced, first)  # (B, L, V), or the last of it
    if len(found) < len(taps):
        missing = next(tap.key for tap in taps if tap.key not in found)
        raise ValueError(f"layer {missing} takes no part in the forward pass")
    features = list(found.values())
    for i, target in enumerate(targets, 1):
        rows = at_least_float32(logits[:, [position - length for position in target.predicting]])  # (B, T, V)
        expected = torch.tensor(target.expected, device=rows.device)
        scores = [SCORES[settings.score](row, expected) for row in rows]  # no copy has a part in another's
        if wrong := [score.item() for score in scores if not score.isfinite()]:
            raise not_finite(f"the score is {wrong[0]}", model)
        gradients = [None] * len(features)
        if rows.requires_grad:
            with RULES[settings.rules](model), captured(taps):  # as layers may be recomputed; hooks stand no longer
                gradients = torch.autograd.grad(scores, features, allow_unused=True, retain_graph=i < len(targets))
        yield {key: (a.detach(), g) for key, a, g in zip(found, features, gradients, strict=True)}


def copy_by_copy(pairs: dict, count: int) -> Iterator[dict]:
    """Of the features and gradients of B = `count` copies those of each, in the shapes that it has alone."""

    def own(key, tensor, i):  # (B, L, ...) -> (1, L, ...), and of the vision tower (B * k * N, C) -> (k * N, C)
        if tensor is None or count == 1:
            return tensor
        if not tensor.dim() or len(tensor) % count:
            raise ValueError(f"layer {key} gives the shape {tuple(tensor.shape)}: no row for each image token")
        return tensor.chunk(count)[i]

    for i in range(count):
        yield {key: tuple(own(key, tensor, i) for tensor in pair) for key, pair in pairs.items()}


def noisy_passes(
    reading: Reading, spans, taps: list[Tap], settings: Settings, progress=None, batch_size: int = 1
) -> Iterator[tuple[int, dict]]:
    """Yields (part, {key: (features, gradient or None)}) of each noisy copy and each part of the answer.

    One forward of each batch of copies, one backward of each part: of a batch come the parts in their order, of each
    the copies in theirs. `settings` are settled; to be used inside `borrowed`.
    """
    tokens, parts = reading.tokens, [reading.tokens_of(span) for span in spans]
    if METHODS[settings.method].scores_end and settings.contrast is None:
        parts = [[*part, len(tokens)] * reading.is_whole(span) or part for span, part in zip(spans, parts, strict=True)]
        tokens = [*tokens, reading.processor.tokenizer.eos_token_id]
    forced, targets = score_parts(reading.inputs, tokens, parts)
    clean, still = reading.inputs[reading.pixels], reading.pixels == "pixel_values"
    images = reading.processor.image_processor if still else reading.processor.video_processor
    generator = torch.Generator().manual_seed(operator.index(settings.seed))
    batch, count = [], 0
    for _ in (progress or iter)(range(settings.num_samples)):
        batch.append(add_noise(clean, settings.noise_std, images, generator, still))
        count += 1
        if len(batch) == batch_size or count == settings.num_samples:
            copies = batch_of(forced, [{reading.pixels: pixels} for pixels in batch])
            run = METHODS[settings.method].run or features_and_gradients
            for part, pairs in enumerate(run(reading.model, copies, taps, targets, settings)):
                for own in copy_by_copy(pairs, len(batch)):
                    yield part, own
            batch, pairs, own = [], None, None  # nothing of a batch outlives it
    if count != settings.num_samples:
        what = f"yields {count} copies in place of {settings.num_samples}: it must yield each of them once"
        raise ValueError(f"progress={progress!r} {what}")


def image_rows(key, tensor: Tensor, positions: Tensor, own: Tensor) -> Tensor:
    """The rows of the image tokens: (N, C) of a sequence (1, L, ...), (k * N, C) of the vision tower (k * M, C).

    `own` (M,) are the explained ones of all that the vision tower has.
    """
    if tensor.dim() == 2 and len(tensor) % len(own) == 0:
        return at_least_float32(tensor[own.repeat_interleave(len(tensor) // len(own)).to(tensor.device)])
    if tensor.dim() >= 3 and tensor.shape[0] == 1 and tensor.shape[1] > positions[-1]:
        return at_least_float32(tensor[0].flatten(1)[positions.to(tensor.device)])
    raise ValueError(f"layer {key} gives the shape {tuple(tensor.shape)}: no row for each image token")


def window_order(grid: tuple[int, int], side: int) -> np.ndarray:
    """Raster index (N,) of the image tokens in the order of the vision tower's windows of `side` x `side` tokens."""
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return np.lexsort((column, row, column // side, row // side))


def to_grid(key, heat: np.ndarray, grid: tuple[int, int], vision_config) -> np.ndarray:
    """(k * N,) -> (H, W): the mean of a token's k patches, and out of window order what the vision tower has so."""
    heat = heat.reshape(grid[0] * grid[1], -1).mean(1)  # (N,)
    if re.search(r"\bvisual\.(blocks|merger)\b", str(key)) and hasattr(vision_config, "window_size"):
        side = vision_config.window_size // vision_config.spatial_merge_size // vision_config.patch_size
        heat = heat[np.argsort(window_order(grid, side))]
    return heat.reshape(grid)


def token_map(key, features: Tensor, gradient: Tensor | None, reading: Reading, method: str) -> np.ndarray | None:
    """(N,) of one copy, image after image, None if no path leads from the image tokens at this layer to the answer."""
    if gradient is None:
        return None
    places, family = (reading.positions, reading.own), FAMILIES[reading.model.config.model_type]
    features, gradient = (family.rows(key, tensor, *places) for tensor in (features, gradient))  # (k * N, C)
    if not gradient.isfinite().all():
        raise not_finite(f"the gradient at layer {key} is not finite", reading.model)
    if not gradient.any():
        return None
    heat = METHODS[method].formula(features, gradient).float().cpu().numpy()
    counts = np.multiply([math.prod(grid) for grid in reading.grids], len(heat) // len(reading.positions))
    parts = zip(np.split(heat, np.cumsum(counts)[:-1]), reading.grids, strict=True)  # the vision tower's, too
    config = reading.model.config.vision_config
    return np.concatenate([family.grid(key, part, grid, config).ravel() for part, grid in parts])


@dataclass(frozen=True)
class Family:
    """What differs between families of models: the defaults are Qwen-VL's, `common/families.py` has others."""

    name: str
    grids: Callable = image_grids  # (model, inputs, kind, photos, processor) -> positions (N,), (H, W) of each picture
    seen: Callable = lambda photo, image_processor: photo  # what the processor shows the model of a photo
    reduced: Callable = reduced  # (photo, image processor) -> a photo not much larger than what that makes of it
    rows: Callable = image_rows  # (key, tensor, positions, own) -> (k * N, C)
    grid: Callable = to_grid  # (key, heat (k * N,), (H, W), vision config) -> (H, W)
    norms: tuple[str, ...] = NORMS  # of a decoder layer
    mlp_norm: str = "post_attention_layernorm"  # the one before the MLP
    products: dict[str, Callable] = field(default_factory=lambda: PRODUCTS)  # {module of a decoder layer: rule}


FAMILIES = {"qwen2_vl": Family("Qwen2-VL"), "qwen2_5_vl": Family("Qwen2.5-VL"), "qwen3_vl": Family("Qwen3-VL")}


def explain(
    reading: Reading, spans: list[tuple[int, int]], layers: Iterable[int | nn.Module], settings: Settings | None = None,
    progress: Callable[[Iterable], Iterable] | None = None, *, batch_size: int = 1, passes: Callable = noisy_passes,
) -> list[TokenMaps]:  # fmt: skip
    """The raw maps of parts of the answer at any set of layers: one forward per noisy copy serves all of them.

    One TokenMaps for each part; of several photos, or of a video's temporal patches, one for each of them in turn, with
    their tokens pooled and centred together: the maps of one part compare, and a photo that contributes less is darker.

    `spans` are the parts, (start, end) in characters of `reading.answer`, one or more; see `find_target`. `passes`
    takes the place of `noisy_passes`: see `common/passes.py`. `layers`, `progress`, `batch_size` and errors are
    described in `compute_token_maps`.
    """
    settings = Settings() if settings is None else settings
    check_type("reading", reading, Reading)
    check_type("settings", settings, Settings)
    check_whole("batch_size", batch_size, 1)
    if not isinstance(spans, (list, tuple)) or not spans:
        raise ValueError(f"spans={spans!r} has no part of the answer: give one or more, (start, end) in characters")
    for span in spans:
        pair = isinstance(span, (list, tuple)) and len(span) == 2 and all(hasattr(edge, "__index__") for edge in span)
        if not pair or not 0 <= span[0] < span[1] <= len(reading.answer) or not reading.tokens_of(span):
            valid = f"(start, end) in the {len(reading.answer)} characters of the answer, with a token in it"
            raise ValueError(f"spans={spans!r}: {span!r} must be {valid}")
    if settings.contrast is not None and passes is noisy_passes:
        raise ValueError(f"contrast={settings.contrast!r} needs passes=contrasted_passes of common/passes.py")
    settings = settings.settled()
    taps = find_taps(reading.model, layers, settings.tap)
    maps = [{tap.key: np.zeros(len(reading.positions), np.float32) for tap in taps} for _ in spans]
    alive = [set() for _ in spans]
    with borrowed(reading.model), memory_explained(len(reading.positions)):
        for part, pairs in passes(reading, spans, taps, settings, progress, batch_size):
            for key, (features, gradient) in pairs.items():
                heat = token_map(key, features, gradient, reading, settings.method)
                if heat is not None:
                    maps[part][key] += heat / settings.num_samples
                    alive[part].add(key)
            del pairs, features, gradient  # before the next copy
    ends = np.cumsum([math.prod(grid) for grid in reading.grids])
    results = []
    for span, cams, live in zip(spans, maps, alive, strict=True):
        about = reading.prompt, reading.answer, list(reading.tokens), reading.answer[slice(*span)], span
        about += reading.tokens_of(span), frozenset(cams) - live, settings
        for image, (grid, end) in enumerate(zip(reading.grids, ends, strict=True)):
            own = {key: cam[end - math.prod(grid) : end].reshape(grid) for key, cam in cams.items()}
            results.append(TokenMaps(own, grid, *about, reading.numbers[image], reading.thinking, reading.cut_off))
    return METHODS[settings.method].finish(reading, results)


def compute_token_maps(
    model, processor, image, prompt, layers: Iterable[int | nn.Module], *, answer: str | None = None,
    max_new_tokens: int = 128, target: str | None = None, target_occurrence: int = 1, part: str = "answer",
    progress: Callable[[Iterable], Iterable] | None = None, batch_size: int = 1, passes: Callable = noisy_passes,
    by: Callable = explain, **settings,
) -> TokenMaps:  # fmt: skip
    """The raw maps of any set of layers in one pass: one answer, then one forward and backward per noisy copy.

    image           path, PIL image, or uint8 RGB array (height, width, 3): see `load_rgb`; None if the messages have it
    prompt          a text, or chat messages, whose last picture is explained unless `image` is one: see `read`
    layers          decoder layer indices (negative ones from the end), or modules of the model; the maps' keys are
                    the index of a decoder layer, the name in the model of any other module (read at its output)
    answer          explain this text in place of the generated answer
    max_new_tokens  where the generated answer is cut off
    target          score only the tokens of this part of the answer; None is the whole answer
    target_occurrence  which one, where the answer has the target several times: 1 is the first
    part            where the target is sought, and what is the whole answer: see `Reading.part`
    progress        wraps the iterable over the copies, e.g. tqdm; None is silent
    batch_size      noisy copies that go through the model at once; the maps do not depend on it beyond rounding
    passes, by      how the copies pass the model, see `explain`; and what is called in the place of `explain`
    settings        num_samples, noise_std, use_smooth, seed, tap, score, contrast, method, rules, head: see `Settings`

    Raises ValueError or TypeError for bad arguments, ExplanationError if the model's answer is empty or a score or
    gradient is not finite, and RuntimeError if memory runs out. The model and the random state of the caller stay as
    they are. Threads may explain with one model: one pass waits for the other.
    """
    settings, layers = Settings(**settings), list(_listed(layers))
    check_whole("batch_size", batch_size, 1)
    if settings.contrast is not None and target is None:
        raise ValueError(f"contrast={settings.contrast!r} needs a target, whose place it takes")
    if isinstance(image, (list, tuple)):
        raise ValueError(f"image has {len(image)} photos, and this takes one: use read and explain, with a map each")
    model = unwrapped(model)
    check_family(model)
    find_taps(model, layers, settings.settled().tap)  # before an answer is generated
    reading = read(model, processor, image, prompt, answer, max_new_tokens)
    span = find_target(reading, target, target_occurrence, part)
    return by(reading, [span], layers, settings, progress, batch_size=batch_size, passes=passes)[0]


COLORMAPS = ("plasma", "inferno", "magma", "viridis", "cividis", "turbo", "jet")  # the first five: perceptually uniform
UPSAMPLING = {"smooth": "bilinear", "cells": "nearest-exact"}
SCALES = ("map", "word", "all")
OPAQUE, HALF = 0.7, 0.5  # opacity that follows the value: the most there is, and the value from which on it is that


@dataclass(frozen=True)
class Look:
    """How maps are drawn. ValueError names an invalid value, and what would be valid.

    colormap  of COLORMAPS: "plasma" is bright where the map is high on any photo, "jet" is what papers often show
    opacity   of the colours over the photo, 0 to 1; None follows the value, so that cold areas stay photo: 0.7 from
              half of the scale on, less in proportion below
    upsample  "smooth" is linear between the centres of the image tokens, "cells" shows the image tokens
    scale     what has full colour: the maximum of each "map", of all maps of a "word", or of "all" maps of a figure
    """

    colormap: str = "plasma"
    opacity: float | None = None
    upsample: str = "smooth"
    scale: str = "map"

    def __post_init__(self):
        check_choices(self, colormap=COLORMAPS, upsample=UPSAMPLING, scale=SCALES)
        if self.opacity is not None and not (isinstance(self.opacity, (int, float)) and 0 <= self.opacity <= 1):
            raise ValueError(f"opacity={self.opacity!r} must be 0 to 1, or None to follow the value")


PLAIN = Look()


def normalize_cam(cam: np.ndarray, peak: float | None = None) -> np.ndarray:
    """The map divided by `peak`, its own maximum for None: float32 in [0, 1]. A map of zeros stays zero."""
    cam = np.asarray(cam, dtype=np.float32)
    peak = cam.max() if peak is None else peak
    return (cam / peak).clip(0, 1) if peak > 0 else np.zeros_like(cam)


def upsample_cam(cam: np.ndarray, size: tuple[int, int], how: str = "smooth") -> np.ndarray:
    """The (H, W) map at `size` = (height, width) pixels, float32; each cell keeps its area of the photo.

    Neither way goes beyond the map's own values: the highest pixel lies in the cell of the map's maximum.
    """
    cam = torch.as_tensor(cam, dtype=torch.float32)[None, None]  # (1, 1, H, W)
    style = {"align_corners": False} if how == "smooth" else {}
    return F.interpolate(cam, size=size, mode=UPSAMPLING[how], **style)[0, 0].numpy()


def colorize_cam(cam01: np.ndarray, colormap: str = "plasma") -> np.ndarray:
    """A map in [0, 1] in 256 colours, (...) -> (..., 3) uint8 RGB."""
    return colour_table(colormap)[np.rint(np.multiply(cam01, 255, dtype=np.float32)).astype(np.uint8)]


def colour_table(colormap: str) -> np.ndarray:
    """(256, 3) uint8 RGB of one of OpenCV's colour maps, the hot end last."""
    steps = np.arange(256, dtype=np.uint8)[:, None]
    return cv2.applyColorMap(steps, getattr(cv2, f"COLORMAP_{colormap.upper()}"))[:, 0, ::-1]


def opacity_of(cam01: np.ndarray, look: Look) -> np.ndarray:
    """Opacity of the colours of a map in [0, 1], of its shape."""
    if look.opacity is not None:
        return np.full(np.shape(cam01), look.opacity, np.float32)
    return np.minimum(np.asarray(cam01, np.float32) * (OPAQUE / HALF), OPAQUE)


def overlay_cam(image_rgb: np.ndarray, heatmap: np.ndarray, alpha: float | np.ndarray = 0.5) -> np.ndarray:
    """`alpha` parts, a number or (height, width), of the heatmap over 1 - `alpha` of the photo, both uint8 RGB."""
    photo, heatmap = np.ascontiguousarray(image_rgb), np.ascontiguousarray(heatmap)
    alpha = np.ascontiguousarray(np.broadcast_to(np.float32(alpha), photo.shape[:2]))
    return cv2.blendLinear(photo, heatmap, 1 - alpha, alpha)


def render_cam(image, cam: np.ndarray, look: Look = PLAIN, peak: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(superimposed, heatmap) of a raw (H, W) map, uint8 RGB arrays (height, width, 3) of the photo's own size."""
    check_type("look", look, Look)
    photo = np.asarray(load_rgb(image))
    share = upsample_cam(normalize_cam(cam, peak), photo.shape[:2], look.upsample)
    heatmap = colorize_cam(share, look.colormap)
    return overlay_cam(photo, heatmap, opacity_of(share, look)), heatmap


class SmoothQwenGradCAM:
    """Smooth Grad-CAM of one layer, as pictures.

    target_layer            a module of the model, e.g. `get_model_layers(model)[0][-1]`, or a decoder layer's index
    num_samples, noise_std  noisy copies, and their noise for pixel values in [0, 1]; may be set later as attributes
    look                    how the map is drawn, a `Look`
    options                 further keywords of `compute_token_maps`, which has their defaults and says what is raised

        cam = SmoothQwenGradCAM(model, processor, target_layer=layers[-1])
        superimposed, heatmap = cam.generate_cam(image, "What is in this image?")
        print(cam.result.answer)
    """

    def __init__(self, model, processor, target_layer, num_samples=10, noise_std=0.1, *, look=None, **options):
        if "use_smooth" in options:
            raise TypeError("use_smooth is an argument of generate_cam")
        check_type("look", look or Look(), Look)
        check_whole("batch_size", options.get("batch_size", 1), 1)
        others = inspect.signature(compute_token_maps).parameters
        Settings(num_samples, noise_std, **{name: value for name, value in options.items() if name not in others})
        self.model, self.processor, self.target_layer, self.options = model, processor, target_layer, options
        self.num_samples, self.noise_std, self.look = num_samples, noise_std, look or Look()
        self.result: TokenMaps | None = None  # of the last generate_cam
        self.feature_maps, self.gradients, self.hooks = None, None, []  # nothing of a pass outlives it: see `result`
        self.remove_hooks = self._remove_hooks = self.hooks.clear

    @property
    def device(self) -> torch.device:
        """Where the model's embeddings are, and so inputs; another one is a ValueError, as the model stays there."""
        return unwrapped(self.model).get_input_embeddings().weight.device

    @device.setter
    def device(self, device):
        if torch.device(device) != self.device and str(device) != self.device.type:
            raise ValueError(f"device={device!r} must be the model's, {self.device}: move the model, and inputs follow")

    def generate_cam(self, image, prompt, use_smooth=True):
        """(superimposed, heatmap): uint8 RGB arrays (height, width, 3) of the photo's own size, or what the model sees.

        `use_smooth=False` is plain Grad-CAM, without noise. Afterwards `self.result` has the raw map and the answer.
        Raises what `compute_token_maps` does, and ExplanationError if the layer has no map (no gradient, or all zero).
        """
        settings = {"num_samples": self.num_samples, "noise_std": self.noise_std, "use_smooth": use_smooth}
        given = self.model, self.processor, image, prompt, [self.target_layer]
        self.result = compute_token_maps(*given, **settings, **self.options)
        ((layer, cam),) = self.result.maps.items()
        if layer in self.result.blank:
            advice = 'choose an earlier layer, or tap="input" with a decoder layer'
            raise ExplanationError(f"layer {layer} has no map ({self.result.blank[layer]}): {advice}")
        photo = check_family(unwrapped(self.model)).seen(load_rgb(image), self.processor.image_processor)
        return render_cam(photo, cam, self.look)
