"""Photos that a processor cuts into tiles: where their tokens lie on the photo, and what is shown beside them.

Families whose photos are cut show the model the photo twice: as tiles, whose tokens put together are the cells of the
map, and once more as a whole and small, in a thumbnail. Its tokens have no cells of their own. What hides a part of the
photo from the model hides it there, too: see `hidden_with` of `common/families.py`, and `thumbnail_follows`.

Shapes:  H, W  rows and columns of a map's cells     N = H * W     S  pixels of a tile's side
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (its usual name)

from smooth_gradcam import LARGE, Reading

__all__ = [
    *("NOTHING", "Beside", "by_rows", "cut", "factor", "intern_beside", "intern_grids", "intern_pictures", "joined"),
    *("joined_tiles", "onevision_beside", "onevision_grids", "stretches", "thumbnail_follows"),
]


class Beside(NamedTuple):
    """The positions, in the sequence, of the tokens of the explained photos that are no cells of their maps."""

    wholes: tuple[Tensor, ...]  # of each photo, those of the small square that shows it as a whole, if there is one
    others: Tensor  # those that show no place, such as ends of lines


NOTHING = Beside((), torch.zeros(0, dtype=torch.long))


def stretches(marked: Tensor) -> list[Tensor]:
    """The indices of each run of True in a row of bool."""
    places = marked.nonzero()[:, 0]
    breaks = (places.diff() > 1).nonzero()[:, 0] + 1
    return [part for part in places.tensor_split(breaks.cpu()) if len(part)]


def by_rows(rows: int, columns: int, side: int) -> Tensor:
    """(N,): where the token of each cell, in raster order, stands among those of `side` x `side` tokens a tile."""
    return torch.arange(rows * columns * side**2).view(rows, columns, side, side).transpose(1, 2).flatten()


def hidden_share(cells: Tensor, side: int) -> Tensor:
    """Of each token of `side` x `side` that show a photo, which share lies under these cells (H, W) bool: (side^2,)."""

    def overlaps(count):  # (side, count): the share of each of `side` stretches that each of `count` takes
        ends, own = torch.arange(count + 1) / count * side, torch.arange(side)[:, None]
        return (ends[1:].minimum(own + 1) - ends[:-1].maximum(own)).clamp_min(0)

    rows, columns = (overlaps(count) for count in cells.shape)
    return (rows @ cells.float() @ columns.T).flatten()


def joined_tiles(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """Tiles (rows * columns, channels, S, S), row by row, as one picture (channels, rows * S, columns * S)."""
    return tiles.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def thumbnail_follows(thumbnail: Tensor, change: Tensor, rows: int, columns: int) -> Tensor:
    """The thumbnail (channels, S, S) of a photo whose tiles changed by `change` (rows * columns, channels, S, S)."""
    return thumbnail + F.interpolate(joined_tiles(change, rows, columns)[None], thumbnail.shape[1:], mode="area")[0]


def _first_cells(reading: Reading) -> list[int]:
    """The position of the first cell of each explained photo."""
    return reading.positions.cpu()[np.cumsum([0, *map(math.prod, reading.grids)])[:-1]].tolist()


# pictures of one size, cut into squares


def cut(pixels: Tensor, side: int) -> Tensor:
    """Pictures (n, channels, height, width) as squares of `side` pixels, row by row: (n * H * W, channels * side^2)."""
    squares = pixels.unfold(2, side, side).unfold(3, side, side)  # (n, channels, H, W, side, side)
    return squares.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)


def joined(squares: Tensor, like: Tensor, side: int) -> Tensor:
    """The pictures of `cut` again; pixels beyond the last squares are those of `like`."""
    count, channels, height, width = like.shape
    rows, columns = height // side, width // side
    whole = squares.reshape(count, rows, columns, channels, side, side).permute(0, 3, 1, 4, 2, 5)
    result = like.clone()
    result[:, :, : rows * side, : columns * side] = whole.reshape(count, channels, rows * side, columns * side)
    return result


def factor(photo: Image.Image, images) -> int:
    """By how much a photo is made smaller before the processor gets it: only one of more than LARGE pixels is."""
    needed = max(edge for edge in dict(images.size).values() if edge)
    needed *= math.isqrt(getattr(images, "max_patches", 1))  # tiles along a short side
    return max(1, min(photo.size) // (2 * needed)) if photo.width * photo.height > LARGE else 1


# InternVL3: a photo's tiles, row by row, and if there are several its thumbnail


def _intern_layout(photo: Image.Image, images, count: int) -> tuple[int, int]:
    """Rows and columns of the tiles of a photo that is shown in `count` pictures. Raises ValueError if they differ."""
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    if count == 1:
        return 1, 1
    less, tile = factor(photo, images), (images.size["height"], images.size["width"])
    size = tuple(-(-edge // less) for edge in (photo.height, photo.width))  # as it was given to the processor
    columns, rows = get_optimal_tiled_canvas(size, tile, images.min_patches, images.max_patches)
    if rows * columns not in (count, count - 1):
        raise ValueError(f"the processor makes {count} tiles of a photo where {rows} x {columns} are expected")
    return rows, columns


def intern_grids(model, inputs, kind="image", photos=(), processor=None):
    if kind != "image":
        raise ValueError(f"{type(model).__name__}: a video is not supported")
    side = math.isqrt(model.config.image_seq_length)
    runs = stretches(inputs["input_ids"][0] == model.config.image_token_id)  # of each photo
    if len(runs) != len(photos) or sum(map(len, runs)) != len(inputs["pixel_values"]) * side**2:
        counts = f"{sum(map(len, runs))} image tokens of {len(inputs['pixel_values'])} tiles"
        raise ValueError(f"the prompt has {len(runs)} pictures, {counts}, where {len(photos)} photos are given")
    positions, grids = [], []
    for photo, run in zip(photos, runs, strict=True):
        rows, columns = _intern_layout(photo, processor.image_processor, len(run) // side**2)
        positions.append(run[by_rows(rows, columns, side).to(run.device)])
        grids.append((rows * side, columns * side))
    return torch.cat(positions), tuple(grids)


def _intern_photos(reading: Reading):
    """Of each explained photo the positions of all its tokens, its grid, and the place of its first tile."""
    marked = reading.inputs["input_ids"][0].cpu() == reading.model.config.image_token_id
    runs, before = stretches(marked), 0
    starts = _first_cells(reading)
    for run in runs:
        if int(run[0]) in starts:
            yield run, reading.grids[starts.index(int(run[0]))], before
        before += len(run) // reading.model.config.image_seq_length


def intern_beside(reading: Reading) -> Beside:
    return NOTHING._replace(wholes=tuple(run[math.prod(grid) :] for run, grid, _ in _intern_photos(reading)))


def intern_pictures(patches: Tensor, like: Tensor, reading: Reading) -> Tensor:
    """The tiles of these patches; thumbnails change as their photos' tiles do."""
    side = math.isqrt(reading.model.config.image_seq_length)
    pictures = joined(patches, like, like.shape[-1] // side)
    change = pictures - reading.inputs["pixel_values"].to(pictures)
    for run, (height, width), first in _intern_photos(reading):
        last = first + height * width // side**2
        if len(run) > height * width:
            pictures[last] = thumbnail_follows(pictures[last], change[first:last], height // side, width // side)
    return pictures


# LLaVA-OneVision: the photo as a whole, then the lines of its tiles' tokens, each with an end, without the padding's


def _onevision_grid(size: tuple[int, int], config) -> tuple[int, int]:
    """(H, W) of a photo of this size, (height, width), as the model packs its tokens.

    The photo is fitted into the best of the canvases, and cells that show only padding are left out in pairs, one on
    each side: the outermost ones may lie up to half a cell beyond the photo. Too many cells are made fewer.
    """
    from transformers.image_processing_utils import select_best_resolution

    (height, width), vision = size, config.vision_config
    side = vision.image_size // vision.patch_size
    canvas = select_best_resolution((height, width), config.image_grid_pinpoints)
    rows, columns = (edge // vision.image_size * side for edge in canvas)
    if width / height > columns / rows:
        rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
    ratio = math.sqrt(rows * columns / (int(config.vision_aspect_ratio.removeprefix("anyres_max_")) * side**2))
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)


def _onevision_parts(model, inputs) -> list[tuple[Tensor, Tensor]]:
    """Of each photo the positions of its tokens as a whole (K,), and of its lines with their ends (H, W + 1)."""
    config, vision = model.config, model.config.vision_config
    whole = (vision.image_size // vision.patch_size) ** 2
    places = (inputs["input_ids"][0].cpu() == config.image_token_id).nonzero()[:, 0]
    if any(count != 1 for count in inputs["batch_num_images"].tolist()):
        raise ValueError(f"{type(model).__name__}: photos that are shown without tiles are not supported")
    grids = [_onevision_grid(size, config) for size in inputs["image_sizes"].tolist()]
    counts = [whole + height * (width + 1) for height, width in grids]
    if sum(counts) != len(places):
        sizes = " and ".join(f"{height} x {width}" for height, width in grids)
        raise ValueError(f"{len(places)} image tokens do not fill the grid of {sizes}, its {whole} tokens and ends")
    parts = zip(places.split(counts), grids, strict=True)
    return [(part[:whole], part[whole:].view(height, width + 1)) for part, (height, width) in parts]


def onevision_grids(model, inputs, kind="image", *_):
    if kind != "image":
        raise ValueError(f"{type(model).__name__}: a video is not supported")
    lines = [lines[:, :-1] for _, lines in _onevision_parts(model, inputs)]
    cells = torch.cat([cells.flatten() for cells in lines])
    return cells.to(inputs["input_ids"].device), tuple(tuple(cells.shape) for cells in lines)


def onevision_beside(reading: Reading) -> Beside:
    starts = _first_cells(reading)
    own = [part for part in _onevision_parts(reading.model, reading.inputs) if int(part[1][0, 0]) in starts]
    return Beside(tuple(whole for whole, _ in own), torch.cat([lines[:, -1] for _, lines in own]))
