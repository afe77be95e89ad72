"""Photos that a processor cuts into tiles: where their tokens lie on the photo, and what is shown beside them.

Families whose photos are cut show the model the photo twice: as tiles, whose tokens put together are the cells of the
map, and once more as a whole and small, in a thumbnail. Its tokens have no cells of their own. What hides a part of the
photo from the model hides it there, too: see `hidden_with` of `common/families.py`, and `thumbnail_follows`.

Shapes:  H, W  rows and columns of a map's cells     N = H * W     K  tokens beside them     S  pixels of a tile's side
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (its usual name)

__all__ = ["NOTHING", "Beside", "by_rows", "cells_under", "joined_tiles", "stretches", "thumbnail_follows"]


class Beside(NamedTuple):
    """The tokens of the explained photos that are no cells of their maps."""

    positions: Tensor  # (K,) in the sequence, of those that show the photo as a whole
    under: Tensor  # (N,) which of the K shows the place of each cell; empty if there are none
    others: Tensor  # positions of those that show no place, such as ends of lines


NOTHING = Beside(*(torch.zeros(0, dtype=torch.long) for _ in Beside._fields))


def stretches(marked: Tensor) -> list[Tensor]:
    """The indices of each run of True in a row of bool."""
    places = marked.nonzero()[:, 0]
    breaks = (places.diff() > 1).nonzero()[:, 0] + 1
    return [part for part in places.tensor_split(breaks.cpu()) if len(part)]


def by_rows(rows: int, columns: int, side: int) -> Tensor:
    """(N,): where the token of each cell, in raster order, stands among those of `side` x `side` tokens a tile."""
    return torch.arange(rows * columns * side**2).view(rows, columns, side, side).transpose(1, 2).flatten()


def cells_under(grid: tuple[int, int], small: tuple[int, int]) -> Tensor:
    """(N,): which cell of a smaller grid of the same photo lies under the centre of each cell, both in raster order."""
    row, column = ((2 * torch.arange(many) + 1) * few // (2 * many) for many, few in zip(grid, small, strict=True))
    return (row[:, None] * small[1] + column).flatten()


def joined_tiles(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """Tiles (rows * columns, channels, S, S), row by row, as one picture (channels, rows * S, columns * S)."""
    return tiles.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def thumbnail_follows(thumbnail: Tensor, change: Tensor, rows: int, columns: int) -> Tensor:
    """The thumbnail (channels, S, S) of a photo whose tiles changed by `change` (rows * columns, channels, S, S)."""
    return thumbnail + F.interpolate(joined_tiles(change, rows, columns)[None], thumbnail.shape[1:], mode="area")[0]
