"""Smooth Grad-CAM for Qwen2.5-VL: where in the photo the answer comes from.

The method is that of "From Redundancy to Relevance" (NAACL 2025): Grad-CAM of the answer's score at a decoder layer,

    alpha_k = mean over image tokens of d score / d A_k          M = ReLU(sum_k alpha_k A_k)

averaged over noisy copies of the photo as in SmoothGrad, 1/n sum M(photo + noise). Gradients pass the model's norms
as if their denominators were constants (`frozen_norms`): without that, the maps of a transformer rest on very little.

The file reads in the order in which data flows: photo and prompt, answer, features and gradients, token map, colours.

Shapes:  H, W  rows and columns of image tokens     N = H * W     C  channels of a layer
         P  prompt tokens (the N included)          A  answer tokens     L = P + A     T  answer tokens that are scored
"""

import copy
import inspect
import math
import operator
import os
import re
import threading
import unicodedata
import weakref
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (its usual name)


class ExplanationError(RuntimeError):
    """The model gave nothing that can be explained: no answer, no gradient, or values that are not finite."""


@dataclass(frozen=True)
class TokenMaps:
    """What one run of the pass knows: the raw maps of all requested layers, and the answer they explain."""

    maps: dict[int | str, np.ndarray]  # layer -> (H, W) float32 >= 0, mean over the samples, not normalised
    grid: tuple[int, int]  # (H, W)
    prompt: str
    answer: str  # as decoded, without end-of-turn and other special tokens
    tokens: list[int]  # A token ids
    target: str  # the explained part of the answer, all of it by default
    target_span: tuple[int, int]  # where it stands in `answer`, in characters
    target_tokens: list[int]  # T indices into `tokens`: what was scored
    no_gradient: frozenset  # layers whose gradient is exactly zero: say so in words, never paint their (zero) map
    settings: dict  # num_samples, noise_std, seed, score, method, tap, norms, contrast, ... as they were used


# photo and prompt


def load_rgb(image) -> Image.Image:
    """Open a photo the right way up, as RGB.

    `image` is a path or a PIL image of any mode, which is left as it is. EXIF rotation is applied, transparency is
    laid on white, 16-bit and float grey values are scaled to 8 bits, of an animated file the first frame is taken.
    Raises ValueError for a path that is missing, a folder, empty, truncated or no image.
    """
    if not isinstance(image, Image.Image):
        if not isinstance(image, (str, os.PathLike)):
            raise ValueError(f"image of type {type(image).__name__} must be a path or a PIL image")
        image = _open_image(Path(image))
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        return _scale_grey(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _open_image(path: Path) -> Image.Image:
    if not path.is_file():
        raise ValueError(f"{path} is a folder, not an image" if path.is_dir() else f"the image {path} does not exist")
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as exc:
        raise ValueError(f"{path} cannot be read as an image (empty, truncated, too large or not one): {exc}") from exc


def _scale_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float32)
    fits = [1.0] * (image.mode == "F") + [255.0] * (";" not in image.mode)  # full scales possible below 16 bits
    top = next((scale for scale in fits if values.max() <= scale), 65535.0)
    grey = np.round(values.clip(0, top) * (255 / top)).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def grid_from_count(count: int) -> tuple[int, int]:
    """(H, W), H <= W: the factors of a bare count of image tokens nearest to a square; 3577 gives (49, 73).

    Only for inputs that know no grid: a portrait photo has H > W, and many counts have several factor pairs.
    """
    height = next(h for h in range(math.isqrt(count), 0, -1) if count % h == 0)
    return height, count // height


def _prepare_inputs(model, processor, image: Image.Image, prompt: str) -> dict[str, Tensor]:
    for placeholder in processor.tokenizer.convert_ids_to_tokens(_placeholders(model)):
        if placeholder in prompt:
            raise ValueError(f"prompt={prompt!r} contains {placeholder}, which stands for a picture")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    text = processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    inputs = dict(processor(text=[text], images=[image], return_tensors="pt"))
    if "mm_token_type_ids" in _accepted(model):  # without them transformers >= 5.3 uses 1-D positions, with no error
        inputs.setdefault("mm_token_type_ids", (inputs["input_ids"] == model.config.image_token_id).long())
    device = model.get_input_embeddings().weight.device
    device = "cpu" if device.type == "meta" else device  # weights that accelerate offloads
    return {name: value.to(device) for name, value in inputs.items() if torch.is_tensor(value)}


def _placeholders(model) -> list[int]:
    names = ("image_token_id", "video_token_id", "vision_start_token_id")
    return [getattr(model.config, name) for name in names if hasattr(model.config, name)]


def _accepted(model) -> Iterable[str]:
    return inspect.signature(model.forward).parameters


def _image_grid(model, inputs: dict[str, Tensor]) -> tuple[Tensor, tuple[int, int]]:
    """Positions (N,) of the image tokens in the sequence and their grid (H, W), raster order."""
    positions = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]  # (N,)
    if "image_grid_thw" not in inputs:
        return positions, grid_from_count(len(positions))
    _, height, width = inputs["image_grid_thw"][0].tolist()  # in patches
    merge = model.config.vision_config.spatial_merge_size
    grid = height // merge, width // merge
    if len(positions) != grid[0] * grid[1]:
        raise ValueError(f"{len(positions)} image tokens do not fill the processor's grid of {grid[0]} x {grid[1]}")
    return positions, grid


def add_noise(pixel_values: Tensor, noise_std: float, image_processor, generator: torch.Generator) -> Tensor:
    """One SmoothGrad copy of the processor's pixels, (patches, channels * temporal copies * P * P).

    `noise_std` is in units of pixel values in [0, 1]. A still image is stored twice along time: every distinct pixel
    gets one draw, the same in both copies. Drawn on the CPU, so that a seed means the same noise on every device.
    """
    std = torch.tensor(image_processor.image_std if image_processor.do_normalize else [1.0, 1.0, 1.0])
    copies = image_processor.temporal_patch_size
    pixels = pixel_values.unflatten(1, (len(std), copies, -1))  # (patches, channels, copies, P * P)
    noise = torch.randn(pixels[:, :, :1].shape, generator=generator) * (noise_std / std[:, None, None])
    return (pixels + noise.to(pixels)).flatten(1)


# answer


def _generate(model, tokenizer, inputs: dict[str, Tensor], max_new_tokens: int) -> list[int]:
    """The greedy answer, cut before its end-of-turn token."""
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,  # sampling settings of the checkpoint, which greedy decoding would warn about
        top_p=None,
        top_k=None,
        suppress_tokens=_placeholders(model),  # in an answer they would be counted as a picture
    )
    ends = np.atleast_1d(model.generation_config.eos_token_id).tolist() + [tokenizer.eos_token_id]
    tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), None)]


def _tokenise(tokenizer, text: str, name: str = "answer") -> list[int]:
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not text.strip() or set(tokens) & set(tokenizer.all_special_ids):
        raise ValueError(f"{name}={text!r} must be text that is not empty, without special tokens")
    return tokens


def _decode(tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def token_spans(tokenizer, tokens: list[int]) -> list[tuple[int, int]]:
    """The characters (start, end) of the decoded answer that each token has a part in.

    A byte-level token may carry only some bytes of a character: then all tokens of that character span it. Special
    tokens are left out of the decoded answer and span nothing.
    """
    spans, start = [], 0
    for i in range(len(tokens)):
        text = _decode(tokenizer, tokens[: i + 1])
        whole = len(text.rstrip("\ufffd"))  # characters whose last byte has been seen
        spans.append((start, whole + (whole < len(text))))
        start = whole
    return spans


def _occurrences(answer: str, target: str, name: str) -> list[tuple[int, int]]:
    """Where the target stands in the answer, as a whole word if it does so anywhere. ValueError if nowhere."""
    if not isinstance(target, str):
        raise ValueError(f"{name}={target!r} must be a text")
    literal = re.escape(target)
    found = list(re.finditer(rf"(?<!\w){literal}(?!\w)", answer))  # \w knows no marks, such as Hindi vowel signs
    found = [m for m in found if not any(map(_is_word_character, answer[: m.start()][-1:] + answer[m.end() :][:1]))]
    found = found or list(re.finditer(literal, answer))
    if not found or not target.strip():
        other = re.search(literal, answer, re.IGNORECASE) if target.strip() else None
        hint = f"letter case counts: there is {other[0]!r}" if other else "letter case counts"
        raise ValueError(f"{name}={target!r} is not in the answer {answer!r} ({hint})")
    return [match.span() for match in found]


def find_target(answer: str, target: str | None, occurrence: int = 1) -> tuple[int, int]:
    """(start, end) in characters of `target` in `answer`, the first or the given occurrence; None is all of it.

    Where the target stands as a whole word, only whole words count: "cat" is not sought in "cattle".
    Raises ValueError, with the answer, if it is not there, or not as often.
    """
    _check_whole("target_occurrence", occurrence, 1)
    if target is None:
        if occurrence > 1:
            raise ValueError(f"target_occurrence={occurrence} needs a target")
        return 0, len(answer)
    found = _occurrences(answer, target, "target")
    if occurrence > len(found):
        times = "once" if len(found) == 1 else f"{len(found)} times"
        raise ValueError(f"target_occurrence={occurrence}: {target!r} is {times} in the answer {answer!r}")
    return found[occurrence - 1]


UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
FUNCTION_WORDS = """
a an the this that these those some any each every all both no not nor and or but so than then as if while because of
in on at by for from to into onto with without within over under above below between among through across along around
near behind beside beyond against toward towards about up down out off upon is are was were be been being am do does
did done has have had having can could will would shall should may might must i you he she it we they me him her us
them my your his its our their there here who whom whose which what when where why how it's that's there's isn't aren't
also just very too such other another more most much many only own same
的 了 着 在 是 和 与 及 或 有 也 都 就 而 但 把 被 这 那 其 之 一个 这个 那个 个
"""  # of English and Chinese


def _is_word_character(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character)[0] == "M"  # letters, digits, marks above and below


def split_words(answer: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, end) in characters of each word of the answer, whose tokens have these spans; see `token_spans`.

    A word is a run of letters, digits and their marks, across an apostrophe or hyphen inside it and a decimal point.
    In scripts that set no blanks (Chinese, Japanese, Thai, Lao, Khmer, Burmese) it is what the model has as a token.
    """
    cuts = {start for start, _ in spans if not any(first < start < last for first, last in spans)}
    unspaced = [bool(UNSPACED.match(character)) for character in answer]
    words = []
    for i, character in enumerate(answer):
        inside = bool(words) and words[-1][1] == i
        if character.isalnum():
            if inside and unspaced[i] == unspaced[i - 1] and not (unspaced[i] and i in cuts):
                words[-1] = words[-1][0], i + 1
            else:
                words.append((i, i + 1))
        elif inside and (_is_word_character(character) or character in "\u200c\u200d"):  # marks, (non-)joiners
            words[-1] = words[-1][0], i + 1
        elif inside and answer[i + 1 : i + 2].isalnum() and not (unspaced[i - 1] or unspaced[i + 1]):
            number = answer[i - 1].isdigit() and answer[i + 1].isdigit()
            if character in "-'\u2019" or (character in ".," and number):
                words[-1] = words[-1][0], i + 1
    return words


def choose_words(answer: str, spans: list[tuple[int, int]], words) -> list[tuple[int, int]]:
    """The spans in characters of the chosen words, in the answer's order: see `compute_word_maps`.

    "content" leaves out the words of `FUNCTION_WORDS`, English and Chinese, whatever their letter case. Raises
    ValueError if nothing is left, or for a word that is not in the answer.
    """
    if isinstance(words, str) and words in ("content", "all"):
        found = split_words(answer, spans)
        if words == "content":
            function_words = FUNCTION_WORDS.split()
            found = [span for span in found if answer[slice(*span)].lower() not in function_words]
        if not found:
            raise ValueError(f"words={words!r}: there is none in the answer {answer!r}; name the parts to explain")
        return found
    found = set()
    if not isinstance(words, Iterable):
        raise ValueError(f'words={words!r} must be "content", "all", or words of the answer')
    for word in words.split(",") if isinstance(words, str) else words:
        found.update(_occurrences(answer, word.strip() if isinstance(word, str) else word, "words"))
    if not found:
        raise ValueError(f'words={words!r} must be "content", "all", or words of the answer {answer!r}')
    return sorted(found)


class _Part(NamedTuple):
    """A part of the answer that is explained."""

    span: tuple[int, int]  # in characters
    tokens: list[int]  # T indices into the answer's tokens: those that have a part in it


def _covering(spans: list[tuple[int, int]], part: tuple[int, int]) -> _Part:
    start, end = part
    return _Part(part, [i for i, (first, last) in enumerate(spans) if first < end and last > start])


def _contrast_tokens(tokenizer, answer: str, spans, part: _Part, contrast: str) -> list[int]:
    """The tokens that put `contrast` in the place of the part; what the part's tokens say besides is kept."""
    first, last = spans[part.tokens[0]][0], spans[part.tokens[-1]][1]
    if not isinstance(contrast, str) or not contrast.strip():
        raise ValueError(f"contrast={contrast!r} must be a text that is not empty")
    return _tokenise(tokenizer, answer[first : part.span[0]] + contrast + answer[part.span[1] : last], "contrast")


def _teacher_force(inputs: dict[str, Tensor], tokens: list[int]) -> dict[str, Tensor]:
    """The inputs with the answer appended: what is per token grows along, else mask and positions would be others."""
    ids = inputs["input_ids"]
    fills = {"input_ids": ids.new_tensor([tokens]), "attention_mask": ids.new_ones(1, len(tokens))}
    zeros = ids.new_zeros(1, len(tokens))
    return {
        name: torch.cat([value, fills.get(name, zeros).to(value)], dim=1) if value.shape == ids.shape else value
        for name, value in inputs.items()  # (1, P) -> (1, L)
    }


class _Scored(NamedTuple):
    """Tokens (T,) whose scores are summed, and the positions (T,) of the sequence that predict them."""

    expected: list[int]
    predicting: list[int]


def _read(inputs, tokens: list[int], parts: list[Iterable[int]]) -> tuple[dict[str, Tensor], list[_Scored]]:
    """The inputs with the answer as far as the parts need it, and what of each part is scored there."""
    before = inputs["input_ids"].shape[1] - 1  # the position that predicts the answer's first token
    scored = [_Scored([tokens[i] for i in part], [before + i for i in part]) for part in parts]
    return _teacher_force(inputs, tokens[: max(i for part in parts for i in part)]), scored


# features and gradients


def get_model_layers(model) -> tuple[nn.ModuleList, int]:
    """The decoder layers of a Qwen2.5-VL (or a model laid out like it) and their number.

    Raises ValueError if the model has them in none of the known places.
    """
    for path in ("model.language_model.layers", "model.layers"):
        try:
            layers = operator.attrgetter(path)(model)
        except AttributeError:
            continue
        return layers, len(layers)
    raise ValueError(
        f"{type(model).__name__} has its decoder layers neither at model.language_model.layers nor at model.layers"
    )


def resolve_layers(layers: Iterable[int], total: int) -> list[int]:
    """Layer indices in 0 ... total - 1, in the order given and each once; negative ones count from the end.

    Raises ValueError naming the value and the valid range.
    """
    resolved = []
    for layer in layers:
        if not hasattr(layer, "__index__") or not -total <= layer < total:
            raise ValueError(f"layer {layer!r} does not exist: the model has 0 to {total - 1}, or {-total} to -1")
        resolved.append(operator.index(layer) % total)
    if not resolved:
        raise ValueError(f"no layer is given: the model has 0 to {total - 1}, or {-total} to -1")
    return list(dict.fromkeys(resolved))


TAPS = ("input", "output")


class _Tap(NamedTuple):
    key: int | str
    module: nn.Module
    at_input: bool


def _find_taps(model, layers, tap: str) -> list[_Tap]:
    """Decoder layers are tapped as `tap` says, all other modules at their output."""
    decoder, total = get_model_layers(model)
    names = {module: name for name, module in model.named_modules()}
    index = {module: i for i, module in enumerate(decoder)}
    taps = {}
    for layer in layers:
        module = layer if isinstance(layer, nn.Module) else decoder[resolve_layers([layer], total)[0]]
        if module not in names:
            raise ValueError(f"the layer {type(module).__name__} is no part of the model")
        key = index.get(module, names[module])
        taps[key] = _Tap(key, module, at_input=module in index and tap == "input")
    return list(taps.values()) or resolve_layers([], total)


@contextmanager
def _captured(taps: list[_Tap]):
    """Inside, a forward pass leaves the tapped tensor of each layer in the yielded dictionary; no hook outlives it."""
    captured, handles = {}, []

    def keep(key, tensor):
        if not (torch.is_tensor(tensor) and tensor.is_floating_point()):
            raise ValueError(f"layer {key} gives a {type(tensor).__name__}: choose one whose output is a tensor")
        # The graph starts here: parameters are frozen, so what lies below the first tap needs none.
        captured[key] = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        return captured[key]

    def input_hook(key):
        def hook(module, args, kwargs):
            if args:
                return (keep(key, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": keep(key, kwargs["hidden_states"])}

        return hook

    def output_hook(key):
        def hook(module, args, output):  # a tensor, or a tuple that begins with it (decoder layers before 5.6)
            return (keep(key, output[0]), *output[1:]) if isinstance(output, tuple) else keep(key, output)

        return hook

    try:
        for key, module, at_input in taps:
            if at_input:
                handles.append(module.register_forward_pre_hook(input_hook(key), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(output_hook(key)))
        yield captured
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen_norms(model):
    """Inside, gradients pass every RMSNorm as if its denominator were a constant; values stay as they are.

    y = w x / rms(x) does not change with the length of x, so the gradient that comes back through it is orthogonal to
    x: what a token contributes through a norm, sum_k g_k x_k, is zero but for eps. With rms(x) held constant it is what
    y contributes, and contributions add up over the tokens (Ali et al., "XAI for Transformers: Better Explanations
    through Conservative Propagation", ICML 2022, do so for the LayerNorms of language models).
    """

    def hook(module, args, output):
        if not output.requires_grad:  # below the first tap
            return output
        scale = (output / args[0]).detach().nan_to_num(0, 0, 0)  # w / rms(x)
        frozen = args[0] * scale
        return output.detach() + (frozen - frozen.detach())

    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    handles = [module.register_forward_hook(hook) for module in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


NORMS = {"frozen": frozen_norms, "live": nullcontext}


_LOCKS = weakref.WeakKeyDictionary()  # one for each model: hooks, modes and gradients of two passes would mix


@contextmanager
def _borrowed(model):
    """Evaluation mode and frozen parameters inside; afterwards the model is as the caller left it, even on errors.

    Other threads that want to explain with the same model wait until then.
    """
    with _LOCKS.setdefault(model, threading.RLock()), _lent(model):
        yield


@contextmanager
def _lent(model):
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


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def logit_score(logits: Tensor, tokens: Tensor) -> Tensor:
    """Sum of the logits (T, vocabulary) at the tokens (T,) they predict: the paper's score."""
    return logits.gather(1, tokens[:, None]).sum()


def logprob_score(logits: Tensor, tokens: Tensor) -> Tensor:
    """Sum of the tokens' log-probabilities, which also know what the alternatives were."""
    return logit_score(logits.log_softmax(-1), tokens)


SCORES = {"logit": logit_score, "logprob": logprob_score}


def _logits(model, inputs: dict[str, Tensor], first: int) -> Tensor:
    """(B, L, vocabulary), or where the model can leave out the rest, only those from position `first` to the end."""
    length = inputs["input_ids"].shape[1]
    keep = {"logits_to_keep": length - first} if "logits_to_keep" in _accepted(model) else {}
    return model(**inputs, **keep, use_cache=False).logits


def _features_and_gradients(model, forced, taps, targets: list[_Scored], score: str, norms: str):
    """One forward, and of each target one backward: yields {key: (features, gradient or None)} for all taps.

    Features and gradients have the shape that the layer gives them.
    """
    length = forced["input_ids"].shape[1]
    first = min(position for target in targets for position in target.predicting)
    with NORMS[norms](model), _captured(taps) as captured:
        logits = _logits(model, forced, first)[0]  # (L, vocabulary), or the last of it
    if len(captured) < len(taps):
        missing = next(tap.key for tap in taps if tap.key not in captured)
        raise ValueError(f"layer {missing} takes no part in the forward pass")
    features = list(captured.values())
    for i, target in enumerate(targets, 1):
        rows = logits[[position - length for position in target.predicting]]  # (T, vocabulary)
        value = SCORES[score](_at_least_float32(rows), torch.tensor(target.expected, device=rows.device))
        if not value.isfinite():
            raise ExplanationError(f"the score is {value.item()} in {model.dtype}: load it as bfloat16 or float32")
        gradients = [None] * len(features)
        if value.requires_grad:
            gradients = torch.autograd.grad(value, features, allow_unused=True, retain_graph=i < len(targets))
        yield {key: (a.detach(), g) for key, a, g in zip(captured, features, gradients, strict=True)}


def _contrasted(pairs: dict, others: dict) -> dict:
    """The first features with the difference of the gradients. What stands before the answer is the same in both."""
    result = {}
    for key, (features, gradient) in pairs.items():
        other = others[key][1]
        if gradient is not None and gradient.dim() > 2:  # sequences that may end differently
            length = min(gradient.shape[1], other.shape[1])
            features, gradient, other = (tensor[:, :length] for tensor in (features, gradient, other))
        result[key] = features, None if gradient is None else gradient - other
    return result


# token map


def gradcam(features: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM, ReLU(sum_k alpha_k A_k) with alpha_k the gradient's mean over the tokens: (N, C), (N, C) -> (N,)."""
    return (features @ gradients.mean(0)).relu()


def hirescam(features: Tensor, gradients: Tensor) -> Tensor:
    """HiResCAM, ReLU(sum_k g_k A_k) with each token's own gradient: (N, C), (N, C) -> (N,).

    With live norms all but zero at what enters the last decoder layer: there a token acts through a norm alone, which
    takes away its length, and the sum is the effect of its length.
    """
    return (features * gradients).sum(-1).relu()


def best(features: Tensor, gradients: Tensor) -> Tensor:
    """The geometric mean of Grad-CAM and HiResCAM: high where both say so. (N, C), (N, C) -> (N,)."""
    return gradcam(features, gradients).sqrt() * hirescam(features, gradients).sqrt()  # small values stay above zero


METHODS = {"gradcam": gradcam, "hirescam": hirescam, "best": best}


def _image_rows(key, tensor: Tensor, positions: Tensor) -> Tensor:
    """Of a sequence (1, L, ...) the rows (N, C) at the image tokens; of the vision tower all its rows (k * N, C)."""
    if tensor.dim() == 2 and len(tensor) % len(positions) == 0:
        return _at_least_float32(tensor)
    if tensor.dim() >= 3 and tensor.shape[0] == 1 and tensor.shape[1] > positions[-1]:
        return _at_least_float32(tensor[0].flatten(1)[positions.to(tensor.device)])
    raise ValueError(f"layer {key} gives the shape {tuple(tensor.shape)}: no row for each image token")


def window_order(grid: tuple[int, int], side: int) -> np.ndarray:
    """Raster index (N,) of the image tokens in the order of the vision tower's windows of `side` x `side` tokens."""
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return np.lexsort((column, row, column // side, row // side))


def _to_grid(key, heat: np.ndarray, grid: tuple[int, int], vision_config) -> np.ndarray:
    """(k * N,) -> (H, W): k patches to a token, and out of window order what the vision tower keeps in it."""
    heat = heat.reshape(grid[0] * grid[1], -1).mean(1)  # (N,)
    if re.search(r"\bvisual\.(blocks|merger)\b", str(key)) and hasattr(vision_config, "window_size"):
        side = vision_config.window_size // vision_config.spatial_merge_size // vision_config.patch_size
        raster = np.empty_like(heat)
        raster[window_order(grid, side)] = heat
        heat = raster
    return heat.reshape(grid)


def _layer_map(key, features, gradient, positions, grid, vision_config, method) -> np.ndarray | None:
    """(H, W) of one sample, None if no path leads from the image tokens at this layer to the answer."""
    if gradient is None:
        return None
    features, gradient = (_image_rows(key, tensor, positions) for tensor in (features, gradient))  # (k * N, C)
    if not gradient.isfinite().all():
        raise ExplanationError(f"the gradient at layer {key} is not finite: load the model as bfloat16 or float32")
    if not gradient.any():
        return None
    return _to_grid(key, METHODS[method](features, gradient).float().cpu().numpy(), grid, vision_config)


def _check_settings(num_samples, noise_std, seed, max_new_tokens, answer, **choices):
    for name, value in (("num_samples", num_samples), ("max_new_tokens", max_new_tokens)):
        _check_whole(name, value, 1)
    _check_whole("seed", seed, 0)
    if not (isinstance(noise_std, (int, float, np.number)) and math.isfinite(noise_std) and noise_std >= 0):
        raise ValueError(f"noise_std={noise_std!r} must be finite and 0 or more (0.1 is 10 % of the pixel range)")
    if not isinstance(answer, (str, list, type(None))):
        raise ValueError(f"answer={answer!r} must be a text, or None for the model's own")
    valid = {"tap": TAPS, "score": SCORES, "method": METHODS, "norms": NORMS}
    for name, value in choices.items():
        if not isinstance(value, str) or value not in valid[name]:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(valid[name])}")


def _check_whole(name: str, value, least: int):
    if not hasattr(value, "__index__") or not least <= value < 2**63:
        raise ValueError(f"{name}={value!r} must be a whole number, {least} or more")


@contextmanager
def _memory_explained(count: int):
    try:
        yield
    except RuntimeError as exc:
        if not isinstance(exc, torch.cuda.OutOfMemoryError) and "DefaultCPUAllocator" not in str(exc):
            raise
        raise RuntimeError(
            f"out of memory with {count} image tokens: give the model fewer pixels (--max_pixels), or explain only "
            "later layers; --num_samples does not lower it, the noisy copies run one after another"
        ) from exc


def compute_token_maps(
    model,
    processor,
    image,
    prompt: str,
    layers: Iterable[int | nn.Module],
    *,
    num_samples: int = 10,
    noise_std: float = 0.1,
    use_smooth: bool = True,
    seed: int = 0,
    max_new_tokens: int = 128,
    answer: str | None = None,
    target: str | None = None,
    target_occurrence: int = 1,
    contrast: str | None = None,
    tap: str = "input",
    score: str = "logit",
    method: str = "gradcam",
    norms: str = "frozen",
    progress: Callable[[Iterable], Iterable] | None = None,
) -> TokenMaps:
    """The raw maps of any set of layers in one pass: one answer, then one forward and backward per noisy copy.

    image           path or PIL image of any mode
    layers          decoder layer indices (negative ones from the end), or modules of the model; the maps' keys are
                    the index of a decoder layer, the name in the model of any other module (read at its output)
    num_samples     noisy copies whose maps are averaged
    noise_std       standard deviation of the noise, for pixel values in [0, 1]; 0 is no noise
    use_smooth      False: one clean copy, without noise
    seed            of the noise: the same seed gives the same maps
    max_new_tokens  where the generated answer is cut off
    answer          explain this text in place of the generated answer
    target          score only the tokens of this part of the answer; None is the whole answer
    target_occurrence  which one, where the answer has the target several times: 1 is the first
    contrast        explain the target's score minus that of this text in its place, after the same words; scores are
                    sums over tokens, so that both should have as many
    tap             read decoder layers at the hidden states that enter them ("input"), or at their "output", where
                    the last layer has no gradient
    score           "logit" (the paper's) or "logprob": what is summed over the explained tokens
    method          "gradcam" (the paper's, gradients pooled over the image tokens), "hirescam" (each token's own), or
                    "best" (the geometric mean of the two)
    norms           "frozen": gradients pass the norms as if their denominators were constants (`frozen_norms`);
                    "live": plain gradients, as the paper's code and other tools have them
    progress        wraps the iterable over the copies, e.g. tqdm; None is silent

    Raises ValueError for bad arguments, ExplanationError if the model answers with nothing or gives a score or gradient
    that is not finite, and RuntimeError if memory runs out. The model and the random state of the caller stay as they
    are. Threads may explain with one model: one pass waits for the other.
    """
    if contrast is not None and target is None:
        raise ValueError(f"contrast={contrast!r} needs a target, whose place it takes")
    return _compute_maps(
        model,
        processor,
        image,
        prompt,
        layers,
        lambda text, spans: [find_target(text, target, target_occurrence)],
        contrast=contrast,
        num_samples=num_samples,
        noise_std=noise_std,
        use_smooth=use_smooth,
        seed=seed,
        max_new_tokens=max_new_tokens,
        answer=answer,
        tap=tap,
        score=score,
        method=method,
        norms=norms,
        progress=progress,
    )[0]


def compute_word_maps(
    model, processor, image, prompt: str, layers: Iterable[int | nn.Module], *, words="content", **settings
) -> list[TokenMaps]:
    """The raw maps of each word of the answer, in its order: one forward per noisy copy serves all words and layers.

    words     "content" (all but function words), "all", or the words themselves, each at all its occurrences, as a list
              or as "dog,apple"; `split_words` says what a word is, `choose_words` what a function word
    settings  keywords of `compute_token_maps` but target, target_occurrence and contrast

    Raises what `compute_token_maps` raises, ValueError too for words that are not in the answer.
    """
    defaults = inspect.getfullargspec(compute_token_maps).kwonlydefaults
    for name in ("target", "target_occurrence", "contrast"):
        del defaults[name]
    for name in settings.keys() - defaults.keys():
        raise TypeError(f"a map of each word takes no {name}; it takes {', '.join(defaults)}")

    def choose(answer, spans):
        return choose_words(answer, spans, words)

    return _compute_maps(model, processor, image, prompt, layers, choose, contrast=None, **(defaults | settings))


def _token_probabilities(model, forced, pixels: Tensor, scored: _Scored) -> np.ndarray:
    """Probability of each scored token for each of B pictures: pixels (B, patches, ...) -> (B, T)."""
    batch = {name: value.repeat(len(pixels), *[1] * (value.dim() - 1)) for name, value in forced.items()}
    batch["pixel_values"] = pixels.flatten(0, 1)
    length = batch["input_ids"].shape[1]
    with torch.no_grad():
        logits = _logits(model, batch, min(scored.predicting))  # (B, L or less, vocabulary)
    logits = _at_least_float32(logits[:, [position - length for position in scored.predicting]])  # (B, T, vocabulary)
    expected = torch.tensor(scored.expected, device=logits.device).expand(len(pixels), -1)[..., None]
    return logits.softmax(-1).gather(2, expected)[..., 0].cpu().numpy()


def word_tokens(model, processor, image, word_maps: list[TokenMaps]) -> tuple[list[list[float]], list[list[str]]]:
    """Of each word its tokens' probabilities and texts, from one forward pass of the photo without noise.

    A probability is that of the token after the photo, the prompt and the answer before it. The text of a token that
    carries only some bytes of a character is that character.
    """
    given = word_maps[0]
    with _borrowed(model):
        inputs = _prepare_inputs(model, processor, load_rgb(image), given.prompt)
        forced, (scored,) = _read(inputs, given.tokens, [range(len(given.tokens))])
        found = _token_probabilities(model, forced, inputs["pixel_values"][None], scored)[0].tolist()  # (A,)
    spans = token_spans(processor.tokenizer, given.tokens)
    probabilities = [[found[i] for i in word.target_tokens] for word in word_maps]
    return probabilities, [[given.answer[slice(*spans[i])] for i in word.target_tokens] for word in word_maps]


def _read_parts(tokenizer, inputs, tokens: list[int], choose, contrast: str | None):
    """The decoded answer, the parts of it that `choose` picks, and what is to be read: with a contrast, two answers."""
    text, spans = _decode(tokenizer, tokens), token_spans(tokenizer, tokens)
    if not text.strip():
        raise ExplanationError("the model answers with nothing: give a text to explain with answer= (--answer)")
    parts = [_covering(spans, span) for span in choose(text, spans)]
    readings = [_read(inputs, tokens, [part.tokens for part in parts])]
    if contrast is not None:
        begin = parts[0].tokens[0]
        other = _contrast_tokens(tokenizer, text, spans, parts[0], contrast)
        readings.append(_read(inputs, tokens[:begin] + other, [range(begin, begin + len(other))]))
    return text, parts, readings


def _pairs_of_parts(model, readings, pixels: Tensor, taps, score: str, norms: str):
    """Of each part {key: (features, gradient)} on one noisy copy: one forward per reading, one backward per part."""
    runs = [
        _features_and_gradients(model, forced | {"pixel_values": pixels}, taps, scored, score, norms)
        for forced, scored in readings
    ]
    for pairs in zip(*runs, strict=True):
        yield pairs[0] if len(pairs) == 1 else _contrasted(*pairs)


def _compute_maps(
    model,
    processor,
    image,
    prompt,
    layers,
    choose,  # (answer, its tokens' spans) -> the spans of the parts to be explained
    *,
    num_samples,
    noise_std,
    use_smooth,
    seed,
    max_new_tokens,
    answer,
    contrast,
    tap,
    score,
    method,
    norms,
    progress,
) -> list[TokenMaps]:
    _check_settings(
        num_samples, noise_std, seed, max_new_tokens, answer, tap=tap, score=score, method=method, norms=norms
    )
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt={prompt!r} must be a text that is not empty")
    if not use_smooth or noise_std == 0:
        num_samples, noise_std = 1, 0.0
    taps = _find_taps(model, layers, tap)
    tokenizer, generator = processor.tokenizer, torch.Generator().manual_seed(operator.index(seed))
    with _borrowed(model):
        inputs = _prepare_inputs(model, processor, load_rgb(image), prompt)
        positions, grid = _image_grid(model, inputs)
        with _memory_explained(len(positions)):
            if answer is None:
                tokens = _generate(model, tokenizer, inputs, max_new_tokens)
            else:
                tokens = _tokenise(tokenizer, answer) if isinstance(answer, str) else answer
            text, parts, readings = _read_parts(tokenizer, inputs, tokens, choose, contrast)
            maps = [{layer.key: np.zeros(grid, np.float32) for layer in taps} for _ in parts]
            alive = [set() for _ in parts]
            for _ in (progress or iter)(range(num_samples)):
                pixels = add_noise(inputs["pixel_values"], noise_std, processor.image_processor, generator)
                for i, pairs in enumerate(_pairs_of_parts(model, readings, pixels, taps, score, norms)):
                    for key, pair in pairs.items():
                        heat = _layer_map(key, *pair, positions, grid, model.config.vision_config, method)
                        if heat is not None:
                            maps[i][key] += heat / num_samples
                            alive[i].add(key)
    settings = {"num_samples": num_samples, "noise_std": noise_std, "seed": seed, "score": score, "method": method}
    settings |= {"tap": tap, "norms": norms, "contrast": contrast, "max_new_tokens": max_new_tokens}
    return [
        TokenMaps(m, grid, prompt, text, tokens, text[slice(*span)], span, list(scored), frozenset(m) - live, settings)
        for (span, scored), m, live in zip(parts, maps, alive, strict=True)
    ]


# colours


def normalize_cam(cam: np.ndarray) -> np.ndarray:
    """The map divided by its own maximum: float32 in [0, 1]. A map of zeros stays zero."""
    cam = np.asarray(cam, dtype=np.float32)
    return cam / cam.max() if cam.max() > 0 else np.zeros_like(cam)


def upsample_cam(cam: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The (H, W) map at `size` = (height, width) pixels, cubic, float32 >= 0; each cell keeps its area of the photo."""
    cam = torch.as_tensor(cam, dtype=torch.float32)[None, None]  # (1, 1, H, W)
    return F.interpolate(cam, size=size, mode="bicubic", align_corners=False)[0, 0].clamp_min(0).numpy()


def _jet() -> np.ndarray:
    distance = np.abs(4 * np.linspace(0, 1, 256)[:, None] - np.array([3, 2, 1]))  # from red, green and blue
    return np.round(255 * (1.5 - distance).clip(0, 1)).astype(np.uint8)


JET = _jet()  # (256, 3) RGB, from blue to red


def colorize_cam(cam01: np.ndarray) -> np.ndarray:
    """Jet in 256 colours of a map in [0, 1], (...) -> (..., 3) uint8 RGB: red is high, blue is low."""
    return JET[np.round(255 * np.asarray(cam01, dtype=np.float32)).astype(np.uint8)]


def overlay_cam(image_rgb: np.ndarray, heatmap: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """`alpha` parts of the heatmap over 1 - `alpha` parts of the photo, both (height, width, 3) uint8 RGB."""
    mixed = (1 - alpha) * np.asarray(image_rgb, dtype=np.float32) + alpha * np.asarray(heatmap, dtype=np.float32)
    return np.round(mixed).astype(np.uint8)


def render_cam(image, cam: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(superimposed, heatmap) of a raw (H, W) map, uint8 RGB arrays (height, width, 3) of the photo's own size."""
    photo = np.asarray(load_rgb(image))
    heatmap = colorize_cam(normalize_cam(upsample_cam(cam, photo.shape[:2])))
    return overlay_cam(photo, heatmap), heatmap


class SmoothQwenGradCAM:
    """Smooth Grad-CAM of one layer, as pictures.

    target_layer            a module of the model, e.g. `get_model_layers(model)[0][-1]`, or a decoder layer's index
    num_samples, noise_std  noisy copies, and their noise for pixel values in [0, 1]
    options                 further keywords of `compute_token_maps`, which has their defaults and says what is raised

        cam = SmoothQwenGradCAM(model, processor, target_layer=layers[-1])
        superimposed, heatmap = cam.generate_cam(image, "What is in this image?")
        print(cam.result.answer)
    """

    def __init__(self, model, processor, target_layer, num_samples=10, noise_std=0.1, **options):
        self.options = {"num_samples": num_samples, "noise_std": noise_std, **options}
        inspect.signature(compute_token_maps).bind(model, processor, None, "", [target_layer], **self.options)
        self.model, self.processor, self.target_layer = model, processor, target_layer
        self.result: TokenMaps | None = None  # of the last generate_cam

    def generate_cam(self, image, prompt, use_smooth=True):
        """(superimposed, heatmap): uint8 RGB arrays (height, width, 3) of the photo's own size.

        `use_smooth=False` is plain Grad-CAM, without noise. Afterwards `self.result` has the raw map and the answer.
        Raises ExplanationError if no gradient reaches the layer, beside what `compute_token_maps` raises.
        """
        layers = [self.target_layer]
        self.result = compute_token_maps(
            self.model, self.processor, image, prompt, layers, use_smooth=use_smooth, **self.options
        )
        ((layer, cam),) = self.result.maps.items()
        if layer in self.result.no_gradient:
            raise ExplanationError(
                f"layer {layer} has no gradient: behind it no path leads from the image tokens to the answer. "
                'Choose an earlier one, or tap="input" with a decoder layer'
            )
        return render_cam(image, cam)


# how right a map is

BASELINES = ("blur", "mean", "black")
NEAR = 15  # pixels off the object that the pointing game lets pass (Zhang et al., "Top-down Neural Attention", 2018)


def load_mask(mask, size: tuple[int, int]) -> np.ndarray:
    """The object's pixels, bool (height, width): where a path or PIL image is lighter than mid grey.

    Raises ValueError if its size is not the photo's (width, height), or if nothing or everything is the object.
    """
    image = load_rgb(mask)
    if image.size != size:
        raise ValueError(
            f"the mask has {image.width} x {image.height} pixels, the photo {size[0]} x {size[1]}: they must be equal"
        )
    pixels = np.asarray(image.convert("L")) > 127
    if pixels.all() or not pixels.any():
        raise ValueError("the mask is all object or has none: white is the object, black is the rest")
    return pixels


def localization(cam: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """How well a raw (H, W) map fits an object's mask, bool (height, width); shares in [0, 1], all 0 for a zero map.

    pointing  1 if the map's maximum lies on the object: the pointing game
    near      1 if it lies at most 15 pixels off it, the pointing game's usual tolerance
    energy    share of the map inside the object (Wang et al., Score-CAM, 2020: energy-based pointing game)
    obj_iou   intersection over union of the object and the map above Otsu's threshold (Obj-IoU; TAM, ICCV 2025)
    """
    heat = upsample_cam(cam, mask.shape)
    if not heat.any():
        return dict.fromkeys(("pointing", "near", "energy", "obj_iou"), 0.0)
    distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    off = distance.flat[heat.argmax()]
    grey = np.round(255 * normalize_cam(heat)).astype(np.uint8)
    threshold, _ = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    hot = grey > threshold
    return {
        "pointing": float(off == 0),
        "near": float(off <= NEAR),
        "energy": float(heat[mask].sum() / heat.sum()),
        "obj_iou": float((hot & mask).sum() / (hot | mask).sum()),
    }


@dataclass(frozen=True)
class Faithfulness:
    """Mean probability of the explained tokens as image tokens are revealed or removed, the hottest of a map first."""

    shares: np.ndarray  # (S + 1,) share of the image tokens that is revealed or removed, 0 to 1
    insertion: dict[int | str, np.ndarray]  # layer -> (S + 1,), from the baseline picture to the photo
    deletion: dict[int | str, np.ndarray]  # layer -> (S + 1,), from the photo to the baseline picture
    random_insertion: np.ndarray  # (orders, S + 1), in a random order
    random_deletion: np.ndarray  # (orders, S + 1)
    baseline: str
    forwards: int  # pictures that were run through the model


def area(curve: np.ndarray, shares: np.ndarray) -> float:
    """Area under an insertion or deletion curve, in [0, 1]."""
    return float(np.trapezoid(curve, shares))


def baseline_image(image: Image.Image, baseline: str) -> Image.Image:
    """What removed image tokens show: the photo blurred by a tenth of its shorter side, its mean colour, or black."""
    if baseline not in BASELINES:
        raise ValueError(f"baseline={baseline!r} must be one of {', '.join(BASELINES)}")
    if baseline == "blur":
        return image.filter(ImageFilter.GaussianBlur(0.1 * min(image.size)))
    mean = tuple(np.asarray(image).mean((0, 1)).round().astype(int).tolist())
    return Image.new("RGB", image.size, mean if baseline == "mean" else "black")


def insertion_deletion(
    model,
    processor,
    image,
    token_maps: TokenMaps,
    *,
    steps: int = 64,
    baseline: str = "blur",
    random_orders: int = 5,
    batch_size: int = 8,
    seed: int = 0,
    extra_shares: Iterable[float] = (),
    progress: Callable[[Iterable], Iterable] | None = None,
) -> Faithfulness:
    """Insertion and deletion (Petsiuk et al., RISE, 2018) by whole image tokens, for every map that has a gradient.

    The image tokens are revealed on the baseline picture, or removed from the photo, in `steps` steps (fewer if there
    are fewer tokens) by their rank in the map, ties at random; what counts is the mean probability of the explained
    tokens, after the same words. A map is faithful if insertion lies far above deletion; a random order has them about
    equal, and `random_orders` of them are measured. One map costs 2 * (steps - 1) forward passes, run in batches of
    `batch_size`; each of `extra_shares`, in [0, 1], is measured as well. `progress` wraps the iterable over the orders.

    Raises ValueError for bad arguments, and RuntimeError if memory runs out.
    """
    for name, value, least in (("steps", steps, 1), ("random_orders", random_orders, 0), ("batch_size", batch_size, 1)):
        _check_whole(name, value, least)
    _check_whole("seed", seed, 0)
    photo, rng = load_rgb(image), np.random.default_rng(seed)
    with _borrowed(model):
        inputs = _prepare_inputs(model, processor, photo, token_maps.prompt)
        blank = _prepare_inputs(model, processor, baseline_image(photo, baseline), token_maps.prompt)["pixel_values"]
        positions, grid = _image_grid(model, inputs)
        if grid != token_maps.grid:
            raise ValueError(
                f"the maps have {token_maps.grid} image tokens, the photo {grid}: another photo or processor"
            )
        forced, (scored,) = _read(inputs, token_maps.tokens, [token_maps.target_tokens])
        count = len(positions)
        ends = [pixels.unflatten(0, (count, -1)) for pixels in (blank, inputs["pixel_values"])]  # (N, patches, ...)
        shares = [*np.linspace(0, 1, steps + 1), *extra_shares]
        moved = np.unique(np.round(np.multiply(shares, count)).astype(int))  # (S + 1,)

        def probability(pixels):  # (B, N, patches, ...) -> (B,)
            return _token_probabilities(model, forced, pixels.flatten(1, 2), scored).mean(1)

        def curve(order, start, end):
            values = []
            for i in range(1, len(moved) - 1, batch_size):
                pixels = start.repeat(len(moved[i : min(i + batch_size, len(moved) - 1)]), 1, 1, 1)  # (B, N, ...)
                for picture, number in zip(pixels, moved[i:], strict=False):
                    picture[order[:number]] = end[order[:number]]
                values.append(probability(pixels))
            return np.concatenate(values) if values else np.zeros(0)

        with _memory_explained(count):
            bounds = [probability(pixels[None]) for pixels in ends]
            orders = {
                layer: np.lexsort((rng.random(count), -cam.ravel()))
                for layer, cam in token_maps.maps.items()
                if layer not in token_maps.no_gradient
            }
            orders |= {("random", i): rng.permutation(count) for i in range(random_orders)}
            curves = {}
            for key in (progress or iter)(orders):
                order = torch.as_tensor(orders[key])
                curves[key] = [
                    np.concatenate([bounds[a], curve(order, ends[a], ends[b]), bounds[b]]) for a, b in ((0, 1), (1, 0))
                ]
    random = np.array([pair for key, pair in curves.items() if isinstance(key, tuple)])  # (orders, 2, S + 1)
    random = random.reshape(-1, 2, len(moved))
    layers = {key: pair for key, pair in curves.items() if not isinstance(key, tuple)}
    return Faithfulness(
        moved / count,
        {layer: insertion for layer, (insertion, _) in layers.items()},
        {layer: deletion for layer, (_, deletion) in layers.items()},
        random[:, 0],
        random[:, 1],
        baseline,
        2 + 2 * (len(moved) - 2) * len(curves),
    )


def redraw_weights(modules: Iterable[nn.Module], generator: torch.Generator) -> None:
    """Re-draw the weights of the modules, in place, each tensor from a normal with its own mean and deviation."""
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        if not parameter.is_floating_point() or parameter.is_meta:
            raise ValueError(f"weights of {parameter.dtype} on {parameter.device} cannot be re-drawn")
        values = parameter.detach().float()
        spread = values.std(correction=0).item()
        drawn = torch.randn(values.shape, generator=generator) * spread + values.mean().item()
        parameter.data.copy_(drawn)


def randomized_maps(
    model, processor, image, token_maps: TokenMaps, *, stages: int = 7, seed: int = 0, progress=None
) -> dict[int, TokenMaps]:
    """{number of re-drawn decoder layers: maps of the same answer}: cascading randomisation (Adebayo et al., 2018).

    On a copy of the model, which takes its memory again, weights are re-drawn from the top down: the last decoder layer
    with the norm and, if it is not tied to the embeddings, the head behind it, then further ones, in `stages` even
    steps down to the first; behind the last step the vision tower as well. 0 are the maps that were given. A map that
    depends on what the model has learned changes. `progress` wraps the iterable over the stages.
    """
    _check_whole("stages", stages, 1)
    _check_whole("seed", seed, 0)
    generator, total = torch.Generator().manual_seed(operator.index(seed)), get_model_layers(model)[1]
    numbers = np.unique(np.round(np.linspace(0, total, min(stages, total) + 1)).astype(int)).tolist()
    model, results = copy.deepcopy(model), {0: token_maps}
    layers, _ = get_model_layers(model)
    parent = operator.attrgetter("model.language_model" if hasattr(model.model, "language_model") else "model")(model)
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    for before, number in zip(numbers, (progress or iter)(numbers[1:]), strict=False):
        fresh = [parent.norm, *[head] * (not tied)] if before == 0 else []
        fresh += layers[total - number : total - before]
        if number == total and hasattr(model.model, "visual"):
            fresh.append(model.model.visual)
        redraw_weights(fresh, generator)
        results[number] = _compute_maps(
            model,
            processor,
            image,
            token_maps.prompt,
            list(token_maps.maps),
            lambda text, spans: [token_maps.target_span],
            answer=token_maps.tokens,
            use_smooth=True,
            progress=None,
            **token_maps.settings,
        )[0]
    return results


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks (n,) of the values, equal ones sharing the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two maps, -1 to 1; 0 if one of them is the same everywhere."""
    a, b = _ranks(a.ravel()), _ranks(b.ravel())
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else 0.0


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two (H, W) maps, each scaled by its maximum: at most 1 (Wang et al., 2004).

    Gaussian window of standard deviation 1.5 and 11 x 11 cells, constants 0.01 and 0.03, data range 1.
    """
    a, b = (normalize_cam(cam).astype(np.float64) for cam in (a, b))

    def mean(x):
        return cv2.GaussianBlur(x, (11, 11), 1.5, borderType=cv2.BORDER_REFLECT)

    a_mean, b_mean = mean(a), mean(b)
    a_variance, b_variance = mean(a * a) - a_mean**2, mean(b * b) - b_mean**2
    covariance = mean(a * b) - a_mean * b_mean
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * a_mean * b_mean + c1) * (2 * covariance + c2)
    return float((similarity / ((a_mean**2 + b_mean**2 + c1) * (a_variance + b_variance + c2))).mean())
