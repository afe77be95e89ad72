"""Smooth Grad-CAM for Qwen2.5-VL: where in the photo the answer comes from.

The method is that of "From Redundancy to Relevance" (NAACL 2025): Grad-CAM of the answer's score at a decoder layer,
averaged over noisy copies of the photo as in SmoothGrad, 1/n sum M(photo + noise). Gradients pass the decoder by
AttnLRP's rules (`attnlrp`): without them, the maps of a transformer rest on very little.

The mathematics stands first. Then the file reads in the order in which data flows: settings, photo, the reading of
photo, prompt and answer, features and gradients, token maps, pictures; the documented class is its end.

Shapes:  H, W  rows and columns of image tokens     N = H * W     C  channels of a layer     V  vocabulary
         P  prompt tokens (the N included)          A  answer tokens     L = P + A     T  answer tokens that are scored
         B  noisy copies that go through the model at once
"""

import functools
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
from copy import copy as shallow_copy
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import regex
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (its usual name)
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

__all__ = [
    *("SmoothQwenGradCAM", "get_model_layers", "compute_token_maps", "render_cam"),
    *("gradcam", "hirescam", "product", "paper"),
    *("Settings", "Look", "Reading", "Video", "read", "explain", "TokenMaps", "ExplanationError", "ExplanationWarning"),
]


# the mathematics


def standardised(features: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Features as the norm behind them sees them, centred, and the gradients with respect to them: (N, C), (N, C).

    Each token is divided by its root mean square r, its gradient multiplied by it, so that r_i g_i . A_i / r_i is what
    it was; then the mean over the tokens, which tells no two places apart, is taken away. A token that is long in a few
    channels, as attention sinks are, weighs no more than any other.
    """
    size = features.square().mean(-1, keepdim=True).sqrt()  # (N, 1)
    features = features / size.clamp_min(torch.finfo(features.dtype).tiny)
    return features - features.mean(0), gradients * size


def paper(features: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM to the letter, ReLU(sum_k alpha_k A_k), alpha_k the gradient's mean over the tokens: (N, C) x 2 -> (N,).

    Selvaraju et al., ICCV 2017, eq. 1 and 2, with image tokens in the place of pixels, as "From Redundancy to
    Relevance" has it.
    """
    return (features @ gradients.mean(0)).relu()


def gradcam(features: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM, ReLU(sum_k alpha_k A_k), alpha_k the gradient pooled over the tokens: (N, C), (N, C) -> (N,).

    Features are `standardised`, and in the mean over the tokens each gradient weighs as much as its token speaks for
    the score, ReLU(g_i . A_i): a plain mean is one over the background.
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
    """Grad-CAM^(3/4) HiResCAM^(1/4), their weighted geometric mean: high where both say so. (N, C), (N, C) -> (N,)."""
    return gradcam(features, gradients) ** 0.75 * hirescam(features, gradients) ** 0.25


def logit_score(logits: Tensor, tokens: Tensor) -> Tensor:
    """Sum of the logits (T, V) at the tokens (T,) they predict: the paper's score."""
    return logits.gather(1, tokens[:, None]).sum()


def logprob_score(logits: Tensor, tokens: Tensor) -> Tensor:
    """Sum of the tokens' log-probabilities, which also know what the alternatives were."""
    return logit_score(logits.log_softmax(-1), tokens)


METHODS = {"gradcam": gradcam, "hirescam": hirescam, "product": product, "paper": paper}
SCORES = {"logit": logit_score, "logprob": logprob_score}


# settings and results


class ExplanationError(RuntimeError):
    """The model gave nothing that can be explained: no answer, no gradient, or values that are not finite."""


class ExplanationWarning(UserWarning):
    """There is a map, but it may not say what one expects of it."""


def caution(message: str) -> None:
    """Warn of what the caller of this module's caller has asked for."""
    warnings.warn(message, ExplanationWarning, stacklevel=3)


TAPS = ("input", "output", "post_attention_layernorm")
USUAL = {"tap": "input", "score": "logit", "rules": "attnlrp"}  # of every method but the paper's
PAPER = {"tap": "post_attention_layernorm", "score": "logit", "rules": "plain"}


@dataclass(frozen=True)
class Settings:
    """How a map is made. ValueError names a value that cannot be, and what would be valid.

    num_samples  noisy copies whose maps are averaged
    noise_std    standard deviation of the noise, for pixel values in [0, 1]; 0 is no noise, and one copy
    use_smooth   False: one clean copy, without noise
    seed         of the noise: the same seed gives the same maps
    tap          read decoder layers at the hidden states that enter them ("input"), at their "output", or at the output
                 of their "post_attention_layernorm"; at the last two the last layer has no gradient. Qwen3-VL's first
                 layers lack what is added to the photo's tokens behind them (see `find_taps`)
    score        "logit" (the paper's) or "logprob": what is summed over the explained tokens
    contrast     explain the target's score minus that of this text in its place, after the same words; scores are sums
                 over tokens, so both should have the same number
    method       "gradcam" (gradients pooled over the image tokens), "hirescam" (each token's own), "product" (of the
                 two, the most exact), or "paper" (the paper's formula to the letter)
    rules        how gradients pass the decoder: by AttnLRP's rules for norms, gates and attention ("attnlrp"), with no
                 more than the norms' denominators held constant ("detached"), or as they are ("plain")

    A tap, score or rules of None is the method's own: "input", "logit" and "attnlrp", but for "paper", which is read at
    the "post_attention_layernorm" with "plain" rules. The score of a whole answer then counts its end of turn as well.
    It is settled when the Settings are made: `dataclasses.replace` with another method keeps it.
    """

    num_samples: int = 10
    noise_std: float = 0.1
    use_smooth: InitVar[bool] = True
    seed: int = 0
    tap: str | None = None
    score: str | None = None
    contrast: str | None = None
    method: str = "gradcam"
    rules: str | None = None

    def __post_init__(self, use_smooth):
        check_whole("num_samples", self.num_samples, 1)
        check_whole("seed", self.seed, 0)
        if not (isinstance(self.noise_std, (int, float, np.number)) and 0 <= self.noise_std <= 1):
            raise ValueError(f"noise_std={self.noise_std!r} must be 0 to 1 (0.15 is 15 % of the pixel range)")
        if self.contrast is not None:
            check_text("contrast", self.contrast)
            object.__setattr__(self, "contrast", self.contrast.strip())  # as a target is
        for name, valid in {"method": METHODS, "tap": TAPS, "score": SCORES, "rules": RULES}.items():
            value = getattr(self, name)
            if value is None and name in USUAL:
                value = (PAPER if self.method == "paper" else USUAL)[name]
                object.__setattr__(self, name, value)
            if not isinstance(value, str) or value not in valid:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(valid)}")
        if not use_smooth or self.noise_std == 0:  # all copies would be equal
            object.__setattr__(self, "num_samples", 1)
            object.__setattr__(self, "noise_std", 0.0)


def check_whole(name: str, value, least: int) -> None:
    """Raises ValueError unless `least` <= value < 2^63."""
    if not hasattr(value, "__index__") or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number, {least} or more")
    if value >= 2**63:
        raise ValueError(f"{name}={value!r} must be below 2^63")


def check_text(name: str, value) -> None:
    """Raises ValueError unless `value` is a text that says something and that can be written."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name}={value!r} must be a text that is not empty")
    if regex.search(r"\p{Cs}", value):
        raise ValueError(f"{name}={value!r} must be a text without lone surrogates, which are no characters")


def check_batch_size(value) -> None:
    """Raises ValueError unless `value` is "auto" or 1 <= value < 2^63."""
    if not (isinstance(value, str) and value == "auto"):
        if not hasattr(value, "__index__"):
            raise ValueError(f'batch_size={value!r} must be "auto" or a whole number, 1 or more')
        check_whole("batch_size", value, 1)


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

    @cached_property
    def blank(self) -> dict[int | str, str]:
        """{layer: why it has no map}: say so in words, never paint its zeros as data."""
        zero = {layer: "zero everywhere" for layer, cam in self.maps.items() if not cam.any()}
        return zero | dict.fromkeys(sorted(self.no_gradient, key=str), "no gradient")


# photo


def load_rgb(image) -> Image.Image:
    """Open a photo the right way up, as RGB.

    `image` is a path, a PIL image of any mode, which is left as it is, or a uint8 array (height, width, 3). EXIF
    rotation is applied, transparency is laid on white, 16-bit and float grey values are scaled to 8 bits, of an
    animated file the first frame is taken. Raises ValueError for what is no image, or has no pixels.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"an image array of {image.dtype} {image.shape} must be uint8 (height, width, 3), RGB")
        return Image.fromarray(image)
    if not isinstance(image, Image.Image):
        if not isinstance(image, (str, os.PathLike)):
            raise ValueError(f"image of type {type(image).__name__} must be a path, a PIL image or a uint8 array")
        image = _open_image(os.fspath(image))
    if not all(image.size):
        raise ValueError(f"the image has {image.width} x {image.height} pixels: there is nothing to explain")
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        return _scale_grey(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _open_image(path: str) -> Image.Image:
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path} is a folder, a pipe or a device, not an image file")
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as exc:
        missing = isinstance(exc, FileNotFoundError)
        why = "does not exist" if missing else f"cannot be read as an image (empty, truncated or not one?): {exc}"
        raise ValueError(f"the image {path} {why}") from exc


def _scale_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float32)
    scales = {"F": [1.0, 255.0, 65535.0], "I": [255.0, 65535.0]}.get(image.mode, [65535.0])  # what is white
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= scales[-1]):  # nan is neither
        raise ValueError(f"the image has grey values {low:g} to {high:g}: they must be finite, 0 to {scales[-1]:g}")
    white = next(scale for scale in scales if high <= scale)
    for scale in scales[: scales.index(white)]:
        if np.mean(values <= scale) > 0.99:  # the rest would turn it all but black
            raise ValueError(f"the image has a few grey values up to {high:g}, nearly all up to {scale:g}: clip them")
    return Image.fromarray(np.round(values * (255 / white)).astype(np.uint8)).convert("RGB")


@dataclass(frozen=True)
class Video:
    """Frames in their order, each what `load_rgb` opens, all of one size; `fps` of them are a second."""

    frames: Iterable
    fps: float = 2.0

    def __post_init__(self):
        if not (isinstance(self.fps, (int, float)) and 0 < self.fps < math.inf):
            raise ValueError(f"fps={self.fps!r} must be frames per second, above 0")
        frames = tuple(map(load_rgb, self.frames))
        if len(frames) < 2 or len({frame.size for frame in frames}) > 1:
            sizes = ", ".join(f"{width} x {height}" for width, height in dict.fromkeys(frame.size for frame in frames))
            raise ValueError(f"a video of {len(frames)} frames ({sizes}): give two or more, all of one size")
        object.__setattr__(self, "frames", frames)


def add_noise(
    pixel_values: Tensor, noise_std: float, image_processor, generator: torch.Generator, still: bool = True
) -> Tensor:
    """One SmoothGrad copy of the processor's pixels, (patches, channels * temporal copies * P * P).

    `noise_std` is in units of pixel values in [0, 1] (Smilkov et al., 2017: sigma / (max - min)). A still image is
    stored twice along time: every distinct pixel gets one draw, the same in both copies; not `still`, they are frames
    of a video, with a draw each. Drawn on the CPU, so that a seed means the same noise on every device.
    """
    std = torch.tensor(image_processor.image_std if image_processor.do_normalize else 1.0).expand(3)
    copies = image_processor.temporal_patch_size
    pixels = pixel_values.unflatten(1, (len(std), copies, -1))  # (patches, channels, copies, P * P)
    drawn = pixels[:, :, :1] if still else pixels
    noise = torch.randn(drawn.shape, generator=generator) * (noise_std / std[:, None, None])
    return (pixels + noise.to(pixels)).flatten(1)


# reading: photo, prompt and answer as the model has them


FAMILIES = {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}  # by model_type
SUPPORTED = "supported are " + ", ".join(f"{name} ({kind})" for kind, name in FAMILIES.items())


def check_family(model) -> None:
    """Raises ValueError, with the list of what is supported, for a model of another family, or one that is no model."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        raise ValueError(f"{type(model).__name__} is of type {kind}, which is not supported: {SUPPORTED}")
    if model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} cannot answer: load it with AutoModelForImageTextToText")


@dataclass(frozen=True, eq=False)
class Reading:
    """A photo, a prompt and an answer as a model reads them: made once by `read`, explained as often as you like.

    There may be several photos; `photo` and `grid` are of the only one. A video is read as its temporal patches, of two
    frames each, with the first of them as photo.
    """

    model: nn.Module
    processor: object
    photos: tuple[Image.Image, ...]  # RGB, in the order of the prompt
    prompt: str
    inputs: dict[str, Tensor]  # what the processor makes of photos and prompt
    positions: Tensor  # (N,) of the image tokens in the sequence, those of all photos
    grids: tuple[tuple[int, int], ...]  # (H, W) of each photo
    tokens: list[int]  # A token ids of the answer
    spans: list[tuple[int, int]]  # A: the characters of `answer` that each token has a part in
    answer: str
    seen: dict = field(default_factory=dict, repr=False)  # what the vision tower gave for the photos, see `seeing`

    @property
    def photo(self) -> Image.Image:
        """The only photo. Raises ValueError if there are several, or a video."""
        return self._only(self.photos)

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the only photo. Raises ValueError if there are several, or a video."""
        return self._only(self.grids)

    def _only(self, of_photos: tuple):
        if len(of_photos) > 1 or "pixel_values_videos" in self.inputs:
            given = "a video" if "pixel_values_videos" in self.inputs else f"{len(of_photos)} images"
            raise ValueError(f"the prompt has {given}, and this is made for one photo: use read and explain")
        return of_photos[0]

    def tokens_of(self, span: tuple[int, int]) -> list[int]:
        """T indices of the answer's tokens that have a part in these characters (start, end)."""
        start, end = span
        return [i for i, (first, last) in enumerate(self.spans) if first < end and last > start]


def read(model, processor, image, prompt: str, answer: str | None = None, max_new_tokens: int = 128) -> Reading:
    """Photo, prompt and answer, the model's own (greedy) if none is given, as `explain` needs them.

    `image` is what `load_rgb` opens, a list of such, or a `Video`: they stand before the prompt, in their order.
    Raises ValueError for bad arguments, ExplanationError if the model answers with nothing.
    """
    check_family(model)
    check_whole("max_new_tokens", max_new_tokens, 1)
    texts = {"prompt": prompt} if answer is None else {"prompt": prompt, "answer": answer}
    for name, text in texts.items():
        check_text(name, text)
    for part in ("tokenizer", "image_processor", "apply_chat_template"):
        if not hasattr(processor, part):
            raise ValueError(f"a {type(processor).__name__} is no processor (it has no {part}): use AutoProcessor")
    image = image if isinstance(image, Video) else tuple(map(load_rgb, _each(image)))
    photos, tokenizer = image, processor.tokenizer
    if isinstance(image, Video):
        photos = image.frames[:: processor.video_processor.temporal_patch_size]
    seen = {}
    with borrowed(model):
        inputs = prepare_inputs(model, processor, image, prompt)
        positions, grids = image_grids(model, inputs)
        with memory_explained(len(positions)), seeing(model, seen):
            if answer is None:
                tokens = generate(model, tokenizer, inputs, max_new_tokens)
            else:
                tokens = tokenise(tokenizer, answer)
    text = decode(tokenizer, tokens)
    if not text.strip():
        raise ExplanationError("the model answers with nothing: give a text to explain with answer= (--answer)")
    for height, width in grids:
        if height * width < 9:
            caution(f"the photo is seen as {width} x {height} image tokens: so few cells tell hardly any places apart")
    spans = token_spans(tokenizer, tokens)
    return Reading(model, processor, photos, prompt, inputs, positions, grids, tokens, spans, text, seen)


def _each(image) -> Iterable:
    """The photos that are given, one or a list."""
    if not isinstance(image, (list, tuple)):
        return (image,)
    if not image:
        raise ValueError(f"image={image!r} has no photo: give one or more")
    return image


def prepare_inputs(model, processor, image, prompt: str) -> dict[str, Tensor]:
    """What the processor makes of a photo, a list of them or a video, and a prompt behind it, with its chat template.

    The tensors are where the model's embeddings are.
    """
    if isinstance(image, Video):
        kind, count, given = "video", 1, video_arguments(image)
    else:
        images = list(_each(image))
        kind, count, given = "image", len(images), {"images": images}
    for marker in processor.tokenizer.all_special_tokens:
        if marker in prompt and not re.search("object|box|quad", marker):  # but for those of grounding
            raise ValueError(f"prompt={prompt!r} contains {marker}, which stands for a picture or a turn of the chat")
    message = {"role": "user", "content": [*[{"type": kind}] * count, {"type": "text", "text": prompt}]}
    text = processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    inputs = dict(processor(text=[text], **given, return_tensors="pt"))
    if "mm_token_type_ids" in accepted(model):  # without them transformers >= 5.3 uses 1-D positions, with no error
        ids = inputs["input_ids"]
        kinds = (ids == model.config.image_token_id).long() + 2 * (ids == model.config.video_token_id).long()
        inputs.setdefault("mm_token_type_ids", kinds)
    device = model.get_input_embeddings().weight.device
    device = "cpu" if device.type == "meta" else device  # weights that accelerate offloads
    return {name: value.to(device) for name, value in inputs.items() if torch.is_tensor(value)}


def video_arguments(video: Video) -> dict:
    """The processor's arguments for all frames of a video, none left out."""
    from transformers.video_utils import VideoMetadata

    count = len(video.frames)
    about = VideoMetadata(total_num_frames=count, fps=video.fps, frames_indices=list(range(count)))
    frames = np.stack([np.asarray(frame) for frame in video.frames])
    return {"videos": [frames], "video_metadata": [about], "fps": video.fps, "do_sample_frames": False}


def accepted(model) -> Iterable[str]:
    """Names of the arguments that the model's forward takes: they differ between versions of transformers."""
    return inspect.signature(model.forward).parameters


def grid_from_count(count: int) -> tuple[int, int]:
    """(H, W), H <= W: the factors of a bare count of image tokens nearest to a square; 3577 gives (49, 73).

    Only for inputs that know no grid: a portrait photo has H > W, and many counts have several factor pairs.
    """
    height = next(h for h in range(math.isqrt(count), 0, -1) if count % h == 0)
    return height, count // height


def image_grids(model, inputs: dict[str, Tensor]) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    """Positions (N,) of the image tokens in the sequence and the grid (H, W) of each image, raster order.

    Of a video the grid of each temporal patch.
    """
    kind = "video" if "video_grid_thw" in inputs else "image"
    token = getattr(model.config, f"{kind}_token_id")
    positions = (inputs["input_ids"][0] == token).nonzero()[:, 0]  # (N,)
    if f"{kind}_grid_thw" not in inputs:
        return positions, (grid_from_count(len(positions)),)
    merge = model.config.vision_config.spatial_merge_size
    sizes = inputs[f"{kind}_grid_thw"].tolist()  # in patches
    grids = tuple((height // merge, width // merge) for patches, height, width in sizes for _ in range(patches))
    if len(positions) != sum(map(math.prod, grids)):
        known = " and ".join(f"{height} x {width}" for height, width in grids)
        raise ValueError(f"{len(positions)} image tokens do not fill the processor's grid of {known}")
    return positions, grids


def generate(model, tokenizer, inputs: dict[str, Tensor], max_new_tokens: int) -> list[int]:
    """The greedy answer, cut before its end-of-turn token."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id")
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,  # sampling settings of the checkpoint, which greedy decoding would warn about
        top_p=None,
        top_k=None,
        suppress_tokens=[getattr(model.config, name) for name in names if hasattr(model.config, name)],
    )  # suppressed is what would be counted as a picture
    ends = np.atleast_1d(model.generation_config.eos_token_id).tolist() + [tokenizer.eos_token_id]
    tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), None)]


def tokenise(tokenizer, text: str, name: str = "answer") -> list[int]:
    """The text's token ids. Raises ValueError for special tokens in it."""
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not text.strip() or set(tokens) & set(tokenizer.all_special_ids):
        raise ValueError(f"{name}={text!r} must be text that is not empty, without special tokens")
    return tokens


def decode(tokenizer, tokens: list[int]) -> str:
    """The text of the tokens, without special ones."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def token_spans(tokenizer, tokens: list[int]) -> list[tuple[int, int]]:
    """The characters (start, end) of the decoded answer that each token has a part in.

    A byte-level token may carry only some bytes of a character: then all tokens of that character span it. Special
    tokens are left out of the decoded answer and span nothing.
    """
    said = [token for token in tokens if decode(tokenizer, [token])]
    spans, start, i = [], 0, 0
    first, before = 0, 0  # the token that begins with a character of its own, and the characters before it
    for token in tokens:
        if not decode(tokenizer, [token]):
            spans.append((start, start))
            continue
        i += 1
        text = decode(tokenizer, said[first:i])
        end = before + len(text)
        spans.append((start, end))
        # A cut inside a character shows where both sides are decoded alone; three more tokens hold its last byte.
        both = decode(tokenizer, said[first : i + 3])
        inside = text.endswith("\ufffd") and text + decode(tokenizer, said[i : i + 3]) != both
        start = end - inside
        if not inside:
            first, before = i, end
    return spans


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
        raise ValueError(
            f"{name}={target!r} is not in the answer {answer!r} (letter case counts{hint}; its words: {words})"
        )
    return [match.span() for match in found]


def find_target(answer: str, target: str | None, occurrence: int = 1) -> tuple[int, int]:
    """(start, end) in characters of `target` in `answer`, the first or the given occurrence; None is all of it.

    Where the target stands as a whole word, only whole words count: "cat" is not sought in "cattle".
    Raises ValueError, with the answer, if it is not there, or not as often.
    """
    check_whole("target_occurrence", occurrence, 1)
    if target is None:
        if occurrence > 1:
            raise ValueError(f"target_occurrence={occurrence} needs a target")
        return 0, len(answer)
    found = occurrences(answer, target)
    if occurrence > len(found):
        times = "once" if len(found) == 1 else f"{len(found)} times"
        raise ValueError(f"target_occurrence={occurrence}: {target!r} is {times} in the answer {answer!r}")
    return found[occurrence - 1]


class Scored(NamedTuple):
    """Tokens (T,) whose scores are summed, and the positions (T,) of the sequence that predict them."""

    expected: list[int]
    predicting: list[int]


def score_parts(inputs, tokens: list[int], parts: list[Iterable[int]]) -> tuple[dict[str, Tensor], list[Scored]]:
    """The inputs with the answer behind them as far as its parts need it, and what of each part is scored there.

    `parts` are indices into the answer's `tokens`. What is per token grows along, else mask and positions would be
    others.
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


def put_in_place(reading: Reading, span: tuple[int, int], contrast: str) -> tuple[list[int], range]:
    """The answer's tokens with `contrast` in the place of these characters, and which of them it is."""
    part = reading.tokens_of(span)
    first, last = reading.spans[part[0]][0], reading.spans[part[-1]][1]  # what their tokens say besides is kept
    text = reading.answer[first : span[0]] + contrast + reading.answer[span[1] : last]
    other = tokenise(reading.processor.tokenizer, text, "contrast")
    if max(len(other), len(part)) > 2 * min(len(other), len(part)):
        caution(
            f"contrast={contrast!r} has {len(other)} tokens, the target {len(part)}: scores are sums over tokens, so "
            "the map mostly shows the difference in length"
        )
    return reading.tokens[: part[0]] + other, range(part[0], part[0] + len(other))


# features and gradients


def get_model_layers(model) -> tuple[nn.ModuleList, int]:
    """The decoder layers of a Qwen2.5-VL (or a model laid out like it, of whatever family) and their number.

    Raises ValueError if the model has them in none of the known places.
    """
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

    Qwen3-VL adds features of the photo to the hidden states behind its first layers (deepstack). Read at the input of
    one of those or at its output, they are as they are there: what is added behind is held constant, and left out.
    Keys are the index of a decoder layer, whichever the tap, and the name in the model of any other module.
    """
    decoder, total = get_model_layers(model)
    names = {module: name for name, module in model.named_modules()}
    index = {module: i for i, module in enumerate(decoder)}
    taps = {}
    for layer in _listed(layers):
        module = layer if isinstance(layer, nn.Module) else decoder[resolve_layers([layer], total)[0]]
        if module not in names:
            raise ValueError(f"the layer {type(module).__name__} does not belong to the model")
        key = index.get(module, names[module])
        place = module.post_attention_layernorm if module in index and tap == "post_attention_layernorm" else module
        taps[key] = Tap(key, place, at_input=module in index and tap == "input")
    return list(taps.values()) or resolve_layers([], total)


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

    def at_output(key):  # a tensor, or a tuple that begins with it (decoder layers before 5.6)
        def hook(module, args, out):  # copied, because Qwen3-VL adds to its first layers' outputs in place (before 5)
            return (keep(key, out[0]).clone(), *out[1:]) if isinstance(out, tuple) else keep(key, out).clone()

        return hook

    handles = [
        module.register_forward_pre_hook(at_input(key), with_kwargs=True)
        if inside
        else module.register_forward_hook(at_output(key))
        for key, module, inside in taps
    ]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def detached_norms(model):
    """Inside, gradients pass every RMSNorm and LayerNorm as if its denominator were a constant; values stay the same.

    y = w x / rms(x) does not change with the length of x, so the gradient that comes back through it is orthogonal to
    x: what a token contributes through a norm, sum_k g_k x_k, is zero but for eps. With a stop-gradient on rms(x) it is
    what y contributes, and contributions add up over the tokens: the rule of Ali et al. ("XAI for Transformers: Better
    Explanations through Conservative Propagation", ICML 2022) and of AttnLRP (Achtibat et al., ICML 2024) for norms.

    Qwen3-VL has such norms on the queries and keys of each head as well: without the rule, which passes on all that
    reaches them, nothing would be left of what queries and keys contribute. A LayerNorm, as the vision towers of
    Qwen2-VL and Qwen3-VL have them, is w (x - mean(x)) / std(x) + b: the mean is linear in x and stays.
    """

    def rms_norm(module, args, output):
        if not output.requires_grad:  # below the first tap
            return output
        scale = (output / args[0]).detach().nan_to_num(0, 0, 0)  # w / rms(x)
        linear = args[0] * scale
        return output.detach() + (linear - linear.detach())

    def layer_norm(module, args, output):
        if not output.requires_grad:
            return output
        with torch.no_grad():
            centred = args[0] - args[0].mean(-1, keepdim=True)
            variance = centred.square().mean(-1, keepdim=True) + module.eps
            shown = output - module.forward(torch.zeros_like(args[0][:1]))  # w (x - mean(x)) / std(x), without b
        growth = (centred * args[0]).mean(-1, keepdim=True) / variance  # of std(x), relative: what the gradient lacks
        return output + shown * (growth - growth.detach())

    handles = []
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            handles.append(module.register_forward_hook(rms_norm))
        elif isinstance(module, nn.LayerNorm):
            handles.append(module.register_forward_hook(layer_norm))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def attnlrp(model):
    """Inside, gradients follow AttnLRP's rules (Achtibat et al., ICML 2024): gradient x input is relevance then.

    Beside `detached_norms`: an activation f(x) is taken as x * [f(x) / x] with the ratio held constant (the identity
    rule); each factor of a product gets half of its relevance (the uniform rule, eq. 14), so gradients are halved
    towards the two sides of the gated MLP, towards attention weights and values, and once more, since the weights come
    from a product, towards queries and keys.
    """

    def share(part):
        return lambda module, args, output: part * output + (1 - part) * output.detach()

    def activation(module, args, output):
        linear = args[0] * (output / args[0]).detach().nan_to_num(0, 0, 0) / 2
        return output.detach() + (linear - linear.detach())

    hooks = {}  # by module: layers may have an activation in common
    for layer in get_model_layers(model)[0]:
        attention, mlp = layer.self_attn, layer.mlp
        hooks |= {attention.q_proj: share(0.25), attention.k_proj: share(0.25), attention.v_proj: share(0.5)}
        hooks |= {mlp.up_proj: share(0.5), mlp.act_fn: activation}
    handles = []
    try:
        handles += [module.register_forward_hook(hook) for module, hook in hooks.items()]
        with detached_norms(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def forwards_restored(modules: Iterable[nn.Module]):
    """Inside, modules may be given a forward of another kind; afterwards they have theirs, or accelerate's."""
    before = [(module, vars(module).get("forward")) for module in modules]
    try:
        yield
    finally:
        for module, forward in before:
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


@contextmanager
def recomputed(model):
    """Inside, a forward keeps of each decoder layer no more than its input: the backward runs the layer once more.

    What hooks the forward has inside a layer, the backward must have as well. The vision tower keeps what it keeps.
    """
    layers = get_model_layers(model)[0]
    away = any(
        parameter.is_meta for parameter in layers.parameters()
    )  # accelerate takes them away behind a whole layer
    with forwards_restored(layers):
        for layer in layers:  # there is no dropout, so the random state need not be kept
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        with set_checkpoint_early_stop(not away):
            yield


RULES = {"attnlrp": attnlrp, "detached": detached_norms, "plain": nullcontext}
_LOCKS = weakref.WeakKeyDictionary()  # one for each decoder: hooks, modes and gradients of two passes would mix


@contextmanager
def borrowed(model):
    """Evaluation mode and frozen parameters inside; afterwards the model is as the caller left it, even on errors.

    Other threads that want to explain with the same model wait until then.
    """
    with _LOCKS.setdefault(get_model_layers(model)[0], threading.RLock()):
        training = [module for module in model.modules() if module.training]
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        positions = getattr(model.model, "rope_deltas", None)  # a caller's unfinished generation lives on this
        try:
            for module in training:
                module.training = False
            for parameter in trainable:
                parameter.requires_grad_(False)  # else autograd would keep what the parameters' gradients need
            with torch.inference_mode(False), torch.enable_grad():
                yield
        finally:
            for module in training:
                module.training = True
            for parameter in trainable:
                parameter.requires_grad_(True)
            if hasattr(model.model, "rope_deltas"):
                model.model.rope_deltas = positions


@contextmanager
def seeing(model, seen: dict):
    """Inside, the vision tower does not run for pictures it has seen: what it gave is kept in `seen`, and given again.

    It runs where its weights are others since then, or where hooks watch or change what happens in it.
    """
    tower = model.model.visual
    if any(module._forward_hooks or module._forward_pre_hooks for module in tower.modules()):
        yield
        return
    run = tower.forward
    state = tower, [parameter._version for parameter in tower.parameters()]

    def once(pixels, *args, **kwargs):
        if seen and seen["state"] == state and torch.equal(seen["pixels"], pixels):
            return shallow_copy(seen["given"])  # as the model may write into it
        given = run(pixels, *args, **kwargs)
        if not seen:
            seen.update(state=state, pixels=pixels, given=shallow_copy(given))
        return given

    with forwards_restored([tower]):
        tower.forward = once
        yield


@contextmanager
def memory_explained(count: int):
    """Inside, running out of memory is told with what to do about it; `count` are the image tokens."""
    try:
        yield
    except RuntimeError as exc:
        if not is_out_of_memory(exc):
            raise
        raise RuntimeError(
            f"out of memory with {count} image tokens: give the model fewer pixels (--max_pixels), explain only later "
            "layers, or recompute activations (--recompute); --num_samples does not lower it, nor does --batch_size: "
            "copies run one by one where they must"
        ) from exc


def is_out_of_memory(exc: RuntimeError) -> bool:
    """Whether a device, or the processor, had no memory left to give."""
    return isinstance(exc, torch.cuda.OutOfMemoryError) or "DefaultCPUAllocator" in str(exc)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Upcast, because sums over tokens and channels lose digits in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def steadier(dtype: torch.dtype) -> str:
    """What to do about values that are not finite."""
    advice = {torch.float16: "load it as bfloat16 or float32", torch.bfloat16: "load it as float32"}
    return advice.get(dtype, "its weights may be damaged, or hold values that are not finite")


def compute_logits(model, inputs: dict[str, Tensor], first: int) -> Tensor:
    """(B, L, V), or where the model can leave out the rest, only those from position `first` to the end."""
    length = inputs["input_ids"].shape[1]
    keep = {"logits_to_keep": length - first} if "logits_to_keep" in accepted(model) else {}
    return model(**inputs, **keep, use_cache=False).logits


def token_probabilities(model, forced: dict[str, Tensor], pixels: Tensor, scored: Scored) -> np.ndarray:
    """Probability of each scored token for each of B pictures: pixels (B, patches, ...) -> (B, T)."""
    length = forced["input_ids"].shape[1]
    with torch.no_grad():
        batch = batch_of(forced, [{"pixel_values": picture} for picture in pixels])
        logits = compute_logits(model, batch, min(scored.predicting))  # (B, L or less, V)
    logits = at_least_float32(logits[:, [position - length for position in scored.predicting]])  # (B, T, V)
    expected = torch.tensor(scored.expected, device=logits.device).expand(len(pixels), -1)[..., None]
    return logits.softmax(-1).gather(2, expected)[..., 0].cpu().numpy()


def batch_of(forced: dict[str, Tensor], pixels: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The inputs with the pixels of B copies in the place of one's: patches one below the other, all else B times."""
    batch = {name: value.repeat(len(pixels), *[1] * (value.dim() - 1)) for name, value in forced.items()}
    return batch | {name: torch.cat([copy[name] for copy in pixels]) for name in pixels[0]}


def features_and_gradients(
    model, forced, taps: list[Tap], targets: list[Scored], settings: Settings, recompute: bool = False
) -> Iterator[dict]:
    """One forward of B copies, and of each target one backward: yields {key: (features, gradient or None)} of all taps.

    Features and gradients have the shape that the layer gives them, whose first dimension is that of a copy B times.
    """

    @contextmanager
    def hooked():
        with RULES[settings.rules](model), captured(taps) as found:
            yield found

    length = forced["input_ids"].shape[1]
    first = min(position for target in targets for position in target.predicting)
    with recomputed(model) if recompute else nullcontext(), hooked() as found:
        logits = compute_logits(model, forced, first)  # (B, L, V), or the last of it
    if len(found) < len(taps):
        missing = next(tap.key for tap in taps if tap.key not in found)
        raise ValueError(f"layer {missing} takes no part in the forward pass")
    features = list(found.values())
    for i, target in enumerate(targets, 1):
        rows = at_least_float32(logits[:, [position - length for position in target.predicting]])  # (B, T, V)
        expected = torch.tensor(target.expected, device=rows.device)
        values = [SCORES[settings.score](row, expected) for row in rows]  # no copy has a part in another's
        if wrong := [value.item() for value in values if not value.isfinite()]:
            raise ExplanationError(f"the score is {wrong[0]} in {model.dtype}: {steadier(model.dtype)}")
        gradients = [None] * len(features)
        if rows.requires_grad:
            with hooked() if recompute else nullcontext():  # a layer that runs again must run as before
                gradients = torch.autograd.grad(values, features, allow_unused=True, retain_graph=i < len(targets))
        yield {key: (a.detach(), g) for key, a, g in zip(found, features, gradients, strict=True)}


def contrasted(pairs: dict, others: dict) -> dict:
    """The first features with the difference of the gradients. What stands before the answer is the same in both."""
    result = {}
    for key, (features, gradient) in pairs.items():
        other = others[key][1]
        if gradient is not None and gradient.dim() > 2:  # sequences that may end differently
            length = min(gradient.shape[1], other.shape[1])
            features, gradient, other = (tensor[:, :length] for tensor in (features, gradient, other))
        result[key] = features, None if gradient is None else gradient - other
    return result


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


def scored_readings(reading: Reading, spans, settings: Settings) -> list[tuple[dict, list[Scored]]]:
    """The inputs and what of each part is scored there: of the answer and, if there is one, of the contrast."""
    tokens, parts = reading.tokens, [reading.tokens_of(span) for span in spans]
    if not all(parts):
        raise ValueError(f"the span {spans[parts.index([])]} has no token in the answer {reading.answer!r}")
    if settings.method == "paper" and settings.contrast is None:
        whole = list(range(len(tokens)))
        tokens = [*tokens, reading.processor.tokenizer.eos_token_id]
        parts = [[*part, len(whole)] if part == whole else part for part in parts]
    readings = [score_parts(reading.inputs, tokens, parts)]
    if settings.contrast is not None:
        tokens, part = put_in_place(reading, spans[0], settings.contrast)
        readings.append(score_parts(reading.inputs, tokens, [part]))
    return readings


MOST = {"cuda": 8, "cpu": 4}  # copies at once for "auto": more were no faster on a processor
KEPT = 6  # numbers kept for each one that a linear map gives: 3.1 to 3.4 were measured, and memory is to be left


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had there; of the processor's memory half of them, and 0 where it does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    with suppress(OSError, TypeError):
        free = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
        with suppress(OSError, ValueError):  # a container may have less
            group = Path("/sys/fs/cgroup")
            limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
            free = min(free, limit - used)
        return free // 2
    return 0


def kept_bytes(model, taps: list[Tap], length: int) -> int:
    """About what the forward of one copy keeps for the backward, by the rule above: in the decoder from the first tap.

    A tap of the vision tower starts the graph there, and an image token has several patches: then all counts thrice.
    """
    first = min(tap.key if isinstance(tap.key, int) else 0 for tap in taps)
    layers = get_model_layers(model)[0][first:]
    outputs = sum(module.out_features for module in layers.modules() if isinstance(module, nn.Linear))
    vision = 3 if any("visual" in str(tap.key) for tap in taps) else 1
    return KEPT * vision * outputs * length * model.dtype.itemsize


class Room:
    """How many copies go through the model at once, `size`: a number, or for "auto" as many as memory has room for.

    On a CUDA device the first copy runs alone, and its peak is what each of the others needs. Elsewhere `need`, the
    bytes of one copy, is estimated.
    """

    def __init__(self, model, asked: int | str, need: int):
        self.size, self.peaks = asked, {}
        if asked == "auto":
            devices = {parameter.device for parameter in model.parameters()}
            self.peaks = {device: 0 for device in devices if device.type == "cuda"}
            self.size = 1 if self.peaks else self.fitting(torch.device("cpu"), need)

    @staticmethod
    def fitting(device: torch.device, need: int) -> int:
        """Copies that fit, with a tenth to spare."""
        return int(max(1, min(MOST[device.type], 0.9 * free_memory(device) // max(need, 1))))

    @contextmanager
    def measured(self):
        """Around a batch: the first one, of one copy, is measured."""
        before = {device: torch.cuda.memory_allocated(device) for device in self.peaks}
        for device in self.peaks:
            torch.cuda.reset_peak_memory_stats(device)
        yield
        needs = {device: torch.cuda.max_memory_allocated(device) - start for device, start in before.items()}
        if needs:
            self.size, self.peaks = min(self.fitting(*need) for need in needs.items()), {}


def noisy_passes(
    reading: Reading, spans, taps: list[Tap], settings: Settings, progress=None, *, batch_size=1, recompute=False
) -> Iterator[tuple]:
    """Yields (copy, part, {key: (features, gradient or None)}) of each noisy copy and each of the parts at `spans`.

    One forward a batch (a second one for a contrast), one backward a part: of a batch come the parts in their order,
    of each the copies in theirs. A batch that memory does not suffice for is halved, as all behind it, and goes on with
    the part that is missing; RuntimeError for one copy. To be used inside `borrowed`.
    """
    readings = scored_readings(reading, spans, settings)
    name, still, images = "pixel_values", True, reading.processor.image_processor
    if "pixel_values_videos" in reading.inputs:
        name, still, images = "pixel_values_videos", False, reading.processor.video_processor
    clean = reading.inputs[name]
    generator = torch.Generator().manual_seed(operator.index(settings.seed))
    length = readings[0][0]["input_ids"].shape[1]
    room = Room(reading.model, batch_size, kept_bytes(reading.model, taps, length))
    todo, drawn = [(0, settings.num_samples, 0)], {}  # stretches of copies, and the part from which on they are missing
    for copy in (progress or iter)(range(settings.num_samples)):
        while todo and todo[-1][0] <= copy:  # the copy, or a part of it, is still missing
            first, last, part = todo.pop()
            batches = -(-(last - first) // room.size)
            if batches > 1:
                middle = first - (first - last) // batches  # batches are as even as can be
                todo.append((middle, last, part))
                last = middle
            for i in range(first, last):
                if i not in drawn:  # after a failure they are there already
                    drawn[i] = add_noise(clean, settings.noise_std, images, generator, still)
            batch = [{name: drawn[i]} for i in range(first, last)]
            try:
                with room.measured():
                    for copies in part_by_part(reading.model, readings, batch, part, taps, settings, recompute):
                        for i, pairs in enumerate(copies, first):
                            yield i, part, pairs
                            del pairs  # nothing of a batch outlives it
                        part += 1
            except RuntimeError as exc:
                if len(batch) == 1 or not is_out_of_memory(exc):
                    raise
                todo.append((first, last, part))
                room.size = len(batch) // 2
            else:
                drawn = {i: pixels for i, pixels in drawn.items() if i >= last}


def part_by_part(
    model, readings, pixels: list[dict[str, Tensor]], part: int, taps, settings, recompute
) -> Iterator[Iterator[dict]]:
    """Of each part from `part` on {key: (features, gradient or None)} of each copy of a batch."""
    runs = [
        features_and_gradients(model, batch_of(forced, pixels), taps, targets[part:], settings, recompute)
        for forced, targets in readings
    ]
    for pairs in zip(*runs, strict=True):
        yield copy_by_copy(pairs[0] if len(pairs) == 1 else contrasted(*pairs), len(pixels))


# token maps


def image_rows(key, tensor: Tensor, positions: Tensor) -> Tensor:
    """Of a sequence (1, L, ...) the rows (N, C) at the image tokens; of the vision tower all its rows (k * N, C)."""
    if tensor.dim() == 2 and len(tensor) % len(positions) == 0:
        return at_least_float32(tensor)
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
        raster = np.empty_like(heat)
        raster[window_order(grid, side)] = heat
        heat = raster
    return heat.reshape(grid)


def token_map(key, features: Tensor, gradient: Tensor | None, reading: Reading, method: str) -> np.ndarray | None:
    """(N,) of one copy, image after image, None if no path leads from the image tokens at this layer to the answer."""
    if gradient is None:
        return None
    features, gradient = (image_rows(key, tensor, reading.positions) for tensor in (features, gradient))  # (k * N, C)
    if not gradient.isfinite().all():
        dtype = reading.model.dtype
        raise ExplanationError(f"the gradient at layer {key} is not finite in {dtype}: {steadier(dtype)}")
    if not gradient.any():
        return None
    heat = METHODS[method](features, gradient).float().cpu().numpy()
    counts = np.multiply([math.prod(grid) for grid in reading.grids], len(heat) // len(reading.positions))
    parts = zip(np.split(heat, np.cumsum(counts)[:-1]), reading.grids, strict=True)  # the vision tower's, too
    config = reading.model.config.vision_config
    return np.concatenate([to_grid(key, part, grid, config).ravel() for part, grid in parts])


def explain(
    reading: Reading,
    spans: list[tuple[int, int]],
    layers: Iterable[int | nn.Module],
    settings: Settings = Settings(),  # noqa: B008  (it is frozen)
    progress: Callable[[Iterable], Iterable] | None = None,
    *,
    watch: Callable[[dict], None] | None = None,
    batch_size: int | str = 1,
    recompute: bool = False,
) -> list[TokenMaps]:
    """The raw maps of parts of the answer at any set of layers: one forward per noisy copy serves all of them.

    One TokenMaps for each part; of several photos, or of a video's temporal patches, for each part one for each of them
    in turn. Their tokens are pooled and centred together, as the image tokens they all are, so that maps of one part
    compare: a photo that the part is not taken from is darker.

    `spans` are the parts, (start, end) in characters of `reading.answer`, one or more (one for a contrast); see
    `find_target`. `watch` is called with {key: (features, gradient or None)} of every copy and part, in the shapes that
    the layers give a copy alone; copies of a batch come part by part. `layers`, `progress`, `batch_size`, `recompute`
    and errors are described in `compute_token_maps`.
    """
    check_batch_size(batch_size)
    if settings.contrast is not None and len(spans) != 1:
        raise ValueError(f"contrast={settings.contrast!r} needs one part to take the place of, not {len(spans)}")
    if not spans:
        raise ValueError("spans=[] names no part of the answer: give one or more, (start, end) in characters")
    taps = find_taps(reading.model, layers, settings.tap)
    maps = [{tap.key: np.zeros(len(reading.positions), np.float32) for tap in taps} for _ in spans]
    alive = [set() for _ in spans]
    clean = not settings.noise_std and all(isinstance(tap.key, int) for tap in taps)  # a tap in the tower has to run
    sight = seeing(reading.model, reading.seen) if clean else nullcontext()
    with borrowed(reading.model), memory_explained(len(reading.positions)), sight:
        how = {"batch_size": batch_size, "recompute": recompute}
        for _, part, pairs in noisy_passes(reading, spans, taps, settings, progress, **how):
            if watch is not None:
                watch(pairs)
            heats = {key: token_map(key, *pair, reading, settings.method) for key, pair in pairs.items()}
            del pairs  # before the next batch
            for key, heat in heats.items():
                if heat is not None:
                    maps[part][key] += heat / settings.num_samples
                    alive[part].add(key)
    about = reading.prompt, reading.answer, list(reading.tokens)
    ends = np.cumsum([math.prod(grid) for grid in reading.grids])
    results = []
    for span, cams, live in zip(spans, maps, alive, strict=True):
        told = reading.answer[slice(*span)], span, reading.tokens_of(span), frozenset(cams) - live, settings
        for image, (grid, end) in enumerate(zip(reading.grids, ends, strict=True)):
            own = {key: cam[end - math.prod(grid) : end].reshape(grid) for key, cam in cams.items()}
            results.append(TokenMaps(own, grid, *about, *told, image))
    return results


def compute_token_maps(
    model,
    processor,
    image,
    prompt: str,
    layers: Iterable[int | nn.Module],
    *,
    answer: str | None = None,
    max_new_tokens: int = 128,
    target: str | None = None,
    target_occurrence: int = 1,
    progress: Callable[[Iterable], Iterable] | None = None,
    batch_size: int | str = 1,
    recompute: bool = False,
    **settings,
) -> TokenMaps:
    """The raw maps of any set of layers in one pass: one answer, then one forward and backward per noisy copy.

    image           path, PIL image of any mode, or uint8 RGB array (height, width, 3)
    layers          decoder layer indices (negative ones from the end), or modules of the model; the maps' keys are
                    the index of a decoder layer, the name in the model of any other module (read at its output)
    answer          explain this text in place of the generated answer
    max_new_tokens  where the generated answer is cut off
    target          score only the tokens of this part of the answer; None is the whole answer
    target_occurrence  which one, where the answer has the target several times: 1 is the first
    progress        wraps the iterable over the copies, e.g. tqdm; None is silent
    batch_size      noisy copies that go through the model at once, or "auto": as many as memory has room for, up to 8
                    (4 without a GPU, where more are no faster). The maps do not depend on it beyond rounding. Where
                    memory runs out it is halved, and no copy is lost
    recompute       keep of each decoder layer its input alone and run it once more in the backward: slower, for a
                    fraction of the memory where many layers are explained
    settings        num_samples, noise_std, use_smooth, seed, tap, score, contrast, method, rules: see `Settings`

    Raises ValueError for bad arguments, ExplanationError if the model answers with nothing or gives a score or gradient
    that is not finite, and RuntimeError if memory runs out. The model and the random state of the caller stay as they
    are. Threads may explain with one model: one pass waits for the other.
    """
    settings, layers = Settings(**settings), list(_listed(layers))
    check_batch_size(batch_size)
    if settings.contrast is not None and target is None:
        raise ValueError(f"contrast={settings.contrast!r} needs a target, whose place it takes")
    if isinstance(image, (list, tuple, Video)):
        given = "a video" if isinstance(image, Video) else f"{len(image)} images"
        raise ValueError(f"{given}, and this is made for one photo: use read and explain, with a map each")
    check_family(model)
    find_taps(model, layers, settings.tap)  # before an answer is generated
    reading = read(model, processor, image, prompt, answer, max_new_tokens)
    span, how = find_target(reading.answer, target, target_occurrence), {"batch_size": batch_size}
    return explain(reading, [span], layers, settings, progress, **how, recompute=recompute)[0]


# pictures


JET = np.abs(4 * np.linspace(0, 1, 256)[:, None] - np.array([3, 2, 1]))  # distance from red, green and blue
JET = np.round(255 * (1.5 - JET).clip(0, 1)).astype(np.uint8)  # (256, 3) RGB, from blue to red


def colour_table(number: int) -> np.ndarray:
    """(256, 3) uint8 RGB of one of OpenCV's colour maps."""
    return cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], number)[:, 0, ::-1]


COLORMAPS = {  # the first five: perceptually uniform
    "plasma": colour_table(cv2.COLORMAP_PLASMA),
    "inferno": colour_table(cv2.COLORMAP_INFERNO),
    "magma": colour_table(cv2.COLORMAP_MAGMA),
    "viridis": colour_table(cv2.COLORMAP_VIRIDIS),
    "cividis": colour_table(cv2.COLORMAP_CIVIDIS),
    "turbo": colour_table(cv2.COLORMAP_TURBO),
    "jet": JET,
}
UPSAMPLING = {"smooth": "bilinear", "cells": "nearest-exact"}
SCALES = ("map", "word", "all")
OPAQUE, HALF = 0.7, 0.5  # opacity that follows the value: the most there is, and the value from which on it is that


@dataclass(frozen=True)
class Look:
    """How maps are drawn. ValueError names a value that cannot be, and what would be valid.

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
        for name, valid in (("colormap", COLORMAPS), ("upsample", UPSAMPLING), ("scale", SCALES)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in valid:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(valid)}")
        if self.opacity is not None and not (isinstance(self.opacity, (int, float)) and 0 <= self.opacity <= 1):
            raise ValueError(f"opacity={self.opacity!r} must be 0 to 1, or None to follow the value")


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
    return COLORMAPS[colormap][np.rint(np.multiply(cam01, 255, dtype=np.float32)).astype(np.uint8)]


def opacity_of(cam01: np.ndarray, look: Look) -> np.ndarray:
    """Opacity of the colours of a map in [0, 1], of its shape."""
    if look.opacity is not None:
        return np.full(np.shape(cam01), look.opacity, np.float32)
    return np.minimum(np.asarray(cam01, np.float32) * (OPAQUE / HALF), OPAQUE)


def overlay_cam(image_rgb: np.ndarray, heatmap: np.ndarray, alpha: float | np.ndarray = 0.5) -> np.ndarray:
    """`alpha` parts of the heatmap over 1 - `alpha` parts of the photo, both (height, width, 3) uint8 RGB.

    `alpha` is a number, or one for each pixel, (height, width).
    """
    photo, heatmap = np.ascontiguousarray(image_rgb), np.ascontiguousarray(heatmap)
    alpha = np.ascontiguousarray(np.broadcast_to(np.float32(alpha), photo.shape[:2]))
    return cv2.blendLinear(photo, heatmap, 1 - alpha, alpha)


def render_heatmap(
    cam: np.ndarray,
    size: tuple[int, int],
    look: Look = Look(),
    peak: float | None = None,  # noqa: B008  (it is frozen)
) -> np.ndarray:
    """The colours of a raw (H, W) map at `size` = (height, width) pixels, full at `peak` or its maximum: uint8 RGB."""
    return colorize_cam(upsample_cam(normalize_cam(cam, peak), size, look.upsample), look.colormap)


def render_cam(
    image,
    cam: np.ndarray,
    look: Look = Look(),
    peak: float | None = None,  # noqa: B008
) -> tuple[np.ndarray, np.ndarray]:
    """(superimposed, heatmap) of a raw (H, W) map, uint8 RGB arrays (height, width, 3) of the photo's own size."""
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
        others = ("answer", "max_new_tokens", "target", "target_occurrence", "progress", "batch_size", "recompute")
        check_batch_size(options.get("batch_size", 1))
        Settings(num_samples, noise_std, **{name: value for name, value in options.items() if name not in others})
        self.model, self.processor, self.target_layer, self.options = model, processor, target_layer, options
        self.num_samples, self.noise_std, self.look = num_samples, noise_std, look or Look()
        self.result: TokenMaps | None = None  # of the last generate_cam

    @property
    def device(self) -> torch.device:
        """Where the model's embeddings are."""
        return self.model.get_input_embeddings().weight.device

    def generate_cam(self, image, prompt, use_smooth=True):
        """(superimposed, heatmap): uint8 RGB arrays (height, width, 3) of the photo's own size.

        `use_smooth=False` is plain Grad-CAM, without noise. Afterwards `self.result` has the raw map and the answer.
        Raises ExplanationError if the layer has no map (no gradient reaches it, or the map is zero everywhere), beside
        what `compute_token_maps` raises.
        """
        settings = {"num_samples": self.num_samples, "noise_std": self.noise_std, "use_smooth": use_smooth}
        layers = [self.target_layer]
        self.result = compute_token_maps(self.model, self.processor, image, prompt, layers, **settings, **self.options)
        ((layer, cam),) = self.result.maps.items()
        if layer in self.result.no_gradient:
            raise ExplanationError(
                f"layer {layer} has no gradient: behind it no path leads from the image tokens to the answer. "
                'Choose an earlier one, or tap="input" with a decoder layer'
            )
        if layer in self.result.blank:
            raise ExplanationError(f"the map of layer {layer} is zero everywhere: try another layer or method")
        return render_cam(image, cam, self.look)
