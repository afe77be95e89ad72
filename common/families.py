"""Families of models: what differs between them, one entry for each.

Import this file to explain models of the families beside Qwen-VL:

    import common.families
    maps = compute_token_maps(llava, processor, "photo.jpg", "What is it?", [16])

An entry of `FAMILIES` says where the tokens of a photo stand and what grid they have, what of the photo the processor
shows the model, which modules the rules of gradients act on, and what the family's checkpoints look like.

Shapes:  H, W  rows and columns of image tokens     N = H * W     M  image tokens of all pictures of the prompt
         n  pictures in `pixel_values`              P  pixels along the side of an image token
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (its usual name)

from common.tiles import (
    NOTHING,
    cut,
    factor,
    hidden_share,
    intern_beside,
    intern_grids,
    intern_pictures,
    joined,
    onevision_beside,
    onevision_grids,
)
from smooth_gradcam import (
    FAMILIES,
    LARGE,
    NORMS,
    PRODUCTS,
    ExplanationError,
    Family,
    Reading,
    activation_rule,
    half,
    image_rows,
    unwrapped,
)

__all__ = ["FAMILIES", "Known", "cap_pixels", "hidden_with", "known", "photo_tokens", "seen"]


# Qwen-VL


def cap_pixels(image_processor, max_pixels: int) -> None:
    """Lower the processor's cap on a photo's pixels, never raise it. Raises ValueError below one image token's."""
    side = image_processor.patch_size * image_processor.merge_size
    if max_pixels < side * side:
        raise ValueError(f"--max_pixels {max_pixels} is less than one image token: give {side * side} or more")
    size = dict(image_processor.size)
    if not all(type(size[edge]) is int and 1 <= size[edge] < 2**63 for edge in ("longest_edge", "shortest_edge")):
        raise TypeError(f"{size}")
    longest = min(size["longest_edge"], max_pixels)  # in pixels, whatever the names say
    shortest = min(size["shortest_edge"], longest)
    image_processor.size = type(image_processor.size)(shortest_edge=shortest, longest_edge=longest)
    if hasattr(image_processor, "max_pixels"):  # transformers 4 keeps them twice
        image_processor.min_pixels, image_processor.max_pixels = shortest, longest


def _qwen_settings(processor, config: dict) -> dict[str, tuple]:
    images, vision = processor.image_processor, config.get("vision_config") or {}
    pairs = {"image token": (processor.image_token, config.get("image_token_id", 151655))}  # the class' default
    for own, models in (("patch_size",) * 2, ("temporal_patch_size",) * 2, ("merge_size", "spatial_merge_size")):
        pairs[own] = getattr(images, own, None), vision.get(models)
    return pairs | {"do_center_crop": (bool(getattr(images, "do_center_crop", False)), False)}


@dataclass(frozen=True)
class Known(Family):
    """A family with what the files of this folder need of it; the defaults are Qwen-VL's."""

    tower: tuple[str, ...] = ("visual",)  # the parts of `model.model` that make a photo's features, in their order
    merger: str = "visual.merger"  # the part whose output enters the decoder
    patches: Callable = lambda pixels, reading: pixels  # the pixels (k * M, ...), token after token
    pictures: Callable = lambda patches, like, reading: patches  # back from there, in the shape of `like`
    again: Callable = lambda reading: {}  # (reading) -> arguments for the image processor that make the same of a photo
    beside: Callable = lambda reading: NOTHING  # (reading) -> tokens of its photos that are no cells of their maps
    cap: Callable = cap_pixels  # (image processor, max_pixels): heeds --max_pixels
    settings: Callable = _qwen_settings  # (processor, config.json) -> {setting of the processor: (its, the model's)}
    sees_ahead: bool = False  # whether the image tokens of a picture also see those behind them
    classes: str = ""  # those that its files may name beside Qwen-VL's, a regular expression


def known(model) -> Known:
    """The entry of a model whose family is supported."""
    return FAMILIES[model.config.model_type]


def seen(model, processor, picture):
    """What the model sees of a photo, or of a mask of its size, bool (height, width).

    Raises ValueError for a mask of which nothing, or nothing else, is left.
    """
    shown = known(unwrapped(model)).seen
    if not isinstance(picture, np.ndarray):
        return shown(picture, processor.image_processor)
    mask = np.asarray(shown(Image.fromarray(picture), processor.image_processor))
    if mask.all() or not mask.any():
        what = "all" if mask.all() else "nothing"
        raise ValueError(f"the object is {what} of what the processor shows the model of the photo")
    return mask


def photo_tokens(reading: Reading) -> Tensor:
    """The positions of all tokens of the explained photos, in their order: the cells' and those beside them."""
    beside = known(reading.model).beside(reading)
    return torch.cat([reading.positions.cpu(), *beside.wholes, beside.others]).sort().values


def hidden_with(reading: Reading, cells: np.ndarray | Tensor) -> Tensor:
    """The positions of all tokens that are hidden with these cells, bool (N,).

    Beside the cells, those tokens that show the photo as a whole are hidden of which half lies under hidden cells, or
    more; with all cells, all of the photos is.
    """
    cells = torch.as_tensor(cells)
    if cells.all():
        return photo_tokens(reading)
    places, parts = [reading.positions.cpu()[cells]], cells.split([math.prod(grid) for grid in reading.grids])
    for part, grid, whole in zip(parts, reading.grids, known(reading.model).beside(reading).wholes, strict=False):
        if len(whole):
            places.append(whole[hidden_share(part.view(grid), math.isqrt(len(whole))) > 0.4999])  # but for rounding
    return torch.cat(places)


FAMILIES |= {kind: Known(**vars(family)) for kind, family in FAMILIES.items()}


# Qwen3-VL with routed experts in the place of the MLP


def _constant(module, args, output):
    """Hook of the router: each expert's share is a constant, so that all relevance goes to the experts."""
    return tuple(part.detach() for part in output) if isinstance(output, tuple) else output.detach()


def _experts_rule(module, args, output: Tensor) -> Tensor:
    """Hook of all experts of a layer, sum_e w_e down_e(act(gate_e(x)) up_e(x)): of each those of a gated MLP.

    The experts are one module, which may run as one fused kernel. Its output stays, to the bit; the gradient is that of
    the same experts one by one, w_e held constant: the identity rule for act, the uniform rule for its product with up.
    Raises ExplanationError for weights that are quantised, or not in memory.
    """
    if not output.requires_grad:  # below the first tap
        return output
    states = args[0].flatten(0, -2)  # (S, C) of S tokens
    gate_up, down = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    if any(getattr(weight, "dtype", None) != states.dtype or weight.is_meta for weight in (gate_up, down)):
        advice = 'load the model unquantised and without offloading, or use rules="plain"'
        raise ExplanationError(f"{type(module).__name__} has no gradient rule for its weights as they are: {advice}")
    if args[1].is_floating_point():  # transformers 4: weights (S, experts), matrices to the right of the states
        weights, gate_up, down = args[1], gate_up.transpose(1, 2), down.transpose(1, 2)
    else:  # (S, k) indices and weights of the k experts of each token
        weights = states.new_zeros(len(states), module.num_experts).scatter(1, args[1], args[2].to(states.dtype))
    result = torch.zeros_like(states)
    for expert in weights.any(0).nonzero()[:, 0].tolist():
        rows = weights[:, expert].nonzero()[:, 0]
        gate, up = F.linear(states[rows], gate_up[expert]).chunk(2, dim=-1)
        product = activation_rule(None, (gate,), module.act_fn(gate)) * half(None, (), up)
        result = result.index_add(0, rows, weights[rows, expert, None] * F.linear(product, down[expert]))
    result = result.view_as(output)
    return output.detach() + (result - result.detach())


_ATTENTION = {place: rule for place, rule in PRODUCTS.items() if place.startswith("self_attn.")}
_EXPERTS = {"mlp.gate": _constant, "mlp.experts": _experts_rule}
FAMILIES["qwen3_vl_moe"] = replace(FAMILIES["qwen3_vl"], name="Qwen3-VL MoE", products=_ATTENTION | _EXPERTS)


# pictures of one size, cut into squares


def _filled(model, inputs: dict[str, Tensor], grids: tuple[tuple[int, int], ...]) -> tuple[Tensor, tuple]:
    """Positions of the image tokens, and the grids. Raises ValueError if they do not belong together."""
    positions = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]  # (N,)
    if len(positions) != sum(map(math.prod, grids)):
        sizes = " and ".join(f"{height} x {width}" for height, width in grids)
        raise ValueError(f"{len(positions)} image tokens do not fill the processor's grid of {sizes}")
    return positions, grids


def _reduced(photo: Image.Image, images) -> Image.Image:
    """A photo of up to LARGE pixels as it is; a larger one with a short side twice as long as needed, or more."""
    less = factor(photo, images)
    return photo.reduce(less) if less > 1 else photo


def _projected_rows(key, tensor: Tensor, positions: Tensor, own: Tensor) -> Tensor:
    """`image_rows` of the decoder and of the projector (n, M / n, C); ValueError for modules of the vision tower."""
    if "vision_tower" in str(key):
        raise ValueError(f"layer {key} is in the vision tower, which is not explained here: take the projector")
    if "projector" not in str(key):
        return image_rows(key, tensor, positions, own)
    rows = image_rows(key, tensor.flatten(0, 1), positions, own)
    return rows[positions.argsort().argsort().to(rows.device)]  # tiles: from the sequence's order to the photo's


def _check_one_size(height: int, width: int, max_pixels: int) -> None:
    """Raises ValueError if the model's one size of a photo has more pixels than these."""
    if max_pixels < height * width:
        needed = f"{width} x {height} pixels, which this model takes of any photo: give {height * width} or more"
        raise ValueError(f"--max_pixels {max_pixels} is less than {needed}")


# LLaVA-1.5


def _llava_grids(model, inputs, kind="image", *_):
    if kind != "image" or "image_sizes" in inputs:
        raise ValueError(f"{type(model).__name__}: {'Pixtral' if kind == 'image' else 'a video'} is not supported")
    side = model.config.vision_config.patch_size
    count, _, height, width = inputs["pixel_values"].shape
    return _filled(model, inputs, ((height // side, width // side),) * count)


def _llava_seen(photo: Image.Image, images) -> Image.Image:
    """The photo as far as the image processor shows it, in the photo's own pixels.

    As published, LLaVA-1.5's makes the short side 336 pixels long, and cuts the middle out of the long one. Others pad
    a photo to a square.
    """
    size = dict(images.size)
    if getattr(images, "do_pad", False) and hasattr(images, "pad_to_square"):
        side, mean = max(photo.size), tuple(int(255 * value) for value in images.image_mean)
        square = Image.new(photo.mode, (side, side), mean if photo.mode == "RGB" else 0)
        square.paste(photo, ((side - photo.width) // 2, (side - photo.height) // 2))
        photo = square if photo.width != photo.height else photo
    if not images.do_center_crop:
        return photo
    edge = size.get("shortest_edge")
    scales = [edge / min(photo.size)] * 2 if edge else [size["width"] / photo.width, size["height"] / photo.height]
    crop = images.crop_size["width"], images.crop_size["height"]
    shown = [round(pixels / scale) for pixels, scale in zip(crop, scales, strict=True)]
    if shown == list(photo.size):
        return photo
    left, top = ((whole - part) // 2 for whole, part in zip(photo.size, shown, strict=True))
    return photo.crop((left, top, left + shown[0], top + shown[1]))  # black beyond the photo, as there


def _llava_cap(images, max_pixels: int) -> None:
    _check_one_size(images.crop_size["height"], images.crop_size["width"], max_pixels)


def _llava_settings(processor, config: dict) -> dict[str, tuple]:
    vision, images = config.get("vision_config") or {}, processor.image_processor
    crop = dict(images.crop_size or {})
    return {
        "image token": (processor.image_token, config.get("image_token_index", config.get("image_token_id", 32000))),
        "patch_size": (processor.patch_size, vision.get("patch_size")),
        "a square crop_size": (crop.get("height"), crop.get("width")),
        "crop_size": (crop.get("height"), vision.get("image_size")),
        "do_center_crop": (bool(images.do_center_crop), True),
        "a vision tower of type": ("clip_vision_model", vision.get("model_type")),
        "vision_feature_select_strategy": (
            processor.vision_feature_select_strategy,
            config.get("vision_feature_select_strategy", "default"),
        ),
    }


FAMILIES["llava"] = Known(
    "LLaVA-1.5",
    grids=_llava_grids,
    seen=_llava_seen,
    reduced=_reduced,
    rows=_projected_rows,
    tower=("vision_tower", "multi_modal_projector"),
    merger="multi_modal_projector",
    patches=lambda pixels, reading: cut(pixels, reading.model.config.vision_config.patch_size),
    pictures=lambda patches, like, reading: joined(patches, like, reading.model.config.vision_config.patch_size),
    cap=_llava_cap,
    settings=_llava_settings,
    classes=r"(Llava|CLIP)(Image)?Processor(Fast|Pil)?|LlamaTokenizer(Fast)?",
)


# InternVL3 and Gemma 3: a picture is one square of as many image tokens as the config says, whatever its shape


def _squares(per_picture: str) -> dict:
    """What such families have in common; `per_picture` is the name of that number."""

    def side(model) -> int:
        return math.isqrt(getattr(model.config, per_picture))

    def grids(model, inputs, kind="image", *_):
        if kind != "image":
            raise ValueError(f"{type(model).__name__}: a video is not supported")
        return _filled(model, inputs, ((side(model),) * 2,) * len(inputs["pixel_values"]))

    return {
        "grids": grids,
        "reduced": _reduced,
        "rows": _projected_rows,
        "tower": ("vision_tower", "multi_modal_projector"),
        "merger": "multi_modal_projector",
        "patches": lambda pixels, reading: cut(pixels, pixels.shape[-1] // side(reading.model)),
        "pictures": lambda patches, like, reading: joined(patches, like, like.shape[-1] // side(reading.model)),
    }


def _size_of(processor, config: dict, usual: int) -> dict[str, tuple]:
    """The size of the processor's pictures, and the model's."""
    size, sides = dict(processor.image_processor.size), (config.get("vision_config") or {}).get("image_size", usual)
    sides = list(sides) if isinstance(sides, (list, tuple)) else [sides, sides]
    crops = bool(getattr(processor.image_processor, "do_center_crop", False))
    return {"size": ([size.get("height"), size.get("width")], sides), "do_center_crop": (crops, False)}


# InternVL3's photos are cut into such squares, or tiles; of more than one there is a thumbnail behind them


def _intern_cap(images, max_pixels: int) -> None:
    """As many tiles as have so many pixels, the thumbnail aside. Raises ValueError if that is less than one."""
    height, width = images.size["height"], images.size["width"]
    _check_one_size(height, width, max_pixels)
    images.max_patches = min(images.max_patches, max_pixels // (height * width))
    images.min_patches = min(images.min_patches, images.max_patches)


FAMILIES["internvl"] = Known(
    "InternVL3",
    **_squares("image_seq_length")
    | {"grids": intern_grids, "pictures": intern_pictures, "beside": intern_beside, "cap": _intern_cap}
    | {"again": lambda reading: {"crop_to_patches": len(reading.positions) > reading.model.config.image_seq_length}},
    settings=lambda processor, config: (
        {
            "image token": (processor.image_token, config.get("image_token_id", 151667)),
            "image_seq_length": (processor.image_seq_length, config.get("image_seq_length", 256)),
        }
        | _size_of(processor, config, 448)
    ),
    classes=r"(InternVL|InternVLVideo|GotOcr2Image)Processor(Fast|Pil)?",
)

FAMILIES["gemma3"] = Known(
    "Gemma 3",
    **_squares("mm_tokens_per_image"),
    norms=(*NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    mlp_norm="pre_feedforward_layernorm",
    sees_ahead=True,
    cap=lambda images, max_pixels: _check_one_size(images.size["height"], images.size["width"], max_pixels),
    settings=lambda processor, config: (
        {
            "image token": (
                getattr(processor.tokenizer, "image_token", None),
                config.get("image_token_index", config.get("image_token_id", 262144)),
            ),
            "image_seq_length": (processor.image_seq_length, config.get("mm_tokens_per_image", 256)),
        }
        | _size_of(processor, config, 896)
    ),
    classes=r"Gemma3(Image)?Processor(Fast|Pil)?|GemmaTokenizer(Fast)?",
)


# LLaVA-OneVision: tokens of tiles without those of the padding, so none has pixels or features of its own


def _onevision_rows(key, tensor: Tensor, positions: Tensor, own: Tensor) -> Tensor:
    if "projector" in str(key):
        raise ValueError(f"layer {key} comes before the tiles are put together: take decoder layer 0, which they enter")
    return _projected_rows(key, tensor, positions, own)


def _onevision_patches(pixels: Tensor, reading) -> Tensor:
    name = type(reading.model).__name__
    raise ValueError(f"{name}: its image tokens are put together from tiles, and cannot be removed from a photo")


def _onevision_reduced(photo: Image.Image, images) -> Image.Image:
    """A photo of at most as many pixels as `_onevision_cap` allows: a smaller one is cut into fewer tiles."""
    scale = math.sqrt(getattr(images, "max_pixels", LARGE) / (photo.width * photo.height))
    size = tuple(max(1, int(edge * scale)) for edge in photo.size)
    return photo.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0) if scale < 1 else photo


def _onevision_cap(images, max_pixels: int) -> None:
    _check_one_size(images.size["height"], images.size["width"], max_pixels)
    images.max_pixels = max_pixels


def _onevision_settings(processor, config: dict) -> dict[str, tuple]:
    vision, images = config.get("vision_config") or {}, processor.image_processor
    edge, side = vision.get("image_size", 384), vision.get("patch_size", 14)
    strategy = config.get("vision_feature_select_strategy", "full")
    return {
        "image token": (processor.image_token, config.get("image_token_index", config.get("image_token_id", 151646))),
        "num_image_tokens": (processor.num_image_tokens, (edge // side) ** 2),
        "image_grid_pinpoints": (list(map(list, images.image_grid_pinpoints)), config.get("image_grid_pinpoints")),
        "vision_aspect_ratio": (processor.vision_aspect_ratio, config.get("vision_aspect_ratio", "anyres_max_9")),
        "vision_feature_select_strategy": (processor.vision_feature_select_strategy, strategy),
        "a vision tower of type": ("siglip_vision_model", vision.get("model_type", "siglip_vision_model")),
    } | _size_of(processor, config, 384)


FAMILIES["llava_onevision"] = Known(
    "LLaVA-OneVision",
    grids=onevision_grids,
    reduced=_onevision_reduced,
    rows=_onevision_rows,
    tower=("vision_tower", "multi_modal_projector"),
    merger="multi_modal_projector",
    patches=_onevision_patches,
    beside=onevision_beside,
    cap=_onevision_cap,
    settings=_onevision_settings,
    classes=r"LlavaOnevision(Image|Video)?Processor(Fast|Pil)?",
)


# GLM-4V: pictures as Qwen2-VL's, and one projection for both factors of the MLP


def _second_half(module, args, output: Tensor) -> Tensor:
    """Hook of a projection to gate and up: the uniform rule for the latter."""
    gate, up = output.chunk(2, dim=-1)
    return torch.cat([gate, half(module, args, up)], dim=-1)


FAMILIES["glm4v"] = Known(
    "GLM-4V",
    norms=(*NORMS, "post_self_attn_layernorm", "post_mlp_layernorm"),
    products=_ATTENTION | {"mlp.gate_up_proj": _second_half, "mlp.activation_fn": activation_rule},
    classes=r"Glm4v(Image|Video)?Processor(Fast|Pil)?",
)
