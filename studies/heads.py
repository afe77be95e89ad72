"""Which head looks at the photo, and where: the attention of every head of every layer.

    Reading -> head_attention       (layers, heads, image tokens)
            -> head_rows, head_findings

Shapes:  K  layers     h  heads     N = H * W  image tokens
"""

import numpy as np

from common.attention import read_attention
from common.encoding import decimal
from smooth_gradcam import Reading, borrowed, get_model_layers, memory_explained, score_parts
from studies.localization import localization

__all__ = ["head_attention", "head_findings", "head_rows"]


def head_attention(reading: Reading, span: tuple[int, int]) -> np.ndarray:
    """Attention of each head to each image token, (K, h, N) float32: mean over the positions that predict the span.

    The mean over h is the map of the method "attention". The sum over N is the head's share on the image; the rest of
    its attention is on text. `span` is (start, end) in characters of the answer. One forward pass without noise, in
    chunks of rows.
    """
    total = get_model_layers(reading.model)[1]
    forced, targets = score_parts(reading.inputs, reading.tokens, [reading.tokens_of(span)])
    with borrowed(reading.model), memory_explained(len(reading.positions)):
        found = read_attention(
            reading.model, forced, list(range(total)), targets, lambda weights: weights[..., reading.positions]
        )
    return np.stack([found[layer][0, 0].float().cpu().numpy() for layer in range(total)])


def head_rows(attention: np.ndarray, reading: Reading, mask: np.ndarray | None) -> list[dict]:
    """A row for each head: its layer, its number, its share on the image; with a mask pointing and energy.

    `attention` is that of `head_attention` of a single photo, `mask` the object's pixels, bool (height, width); see
    `localization`.
    """
    rows = []
    for layer, of_heads in enumerate(attention):
        for head, weights in enumerate(of_heads):
            row = {"layer": layer, "head": head, "image": float(weights.sum())}
            if mask is not None:
                fit = localization(weights.reshape(reading.grid), mask)
                row |= {name: fit[name] for name in ("pointing", "energy")}
            rows.append(row)
    return rows


def head_findings(rows: list[dict]) -> list[str]:
    """Sentences on the heads' shares on the image, and on which of them look at the object."""

    def named(row):
        return f"layer {row['layer']}, head {row['head']}"

    least, most = (choose(rows, key=lambda row: row["image"]) for choose in (min, max))
    mean = decimal(np.mean([row["image"] for row in rows]))
    lines = [
        f"heads: the image gets {decimal(least['image'])} ({named(least)}) to {decimal(most['image'])} ({named(most)}) "
        f"of a head's attention, {mean} in the mean"
    ]
    if "energy" in rows[0]:
        on, best = sum(row["pointing"] for row in rows), max(rows, key=lambda row: row["image"] * row["energy"])
        lines.append(
            f"heads: {on:.0f} of {len(rows)} have their maximum on the object; most of a head's attention that is on "
            f"the object: {decimal(best['image'] * best['energy'])} ({named(best)}, with "
            f"{decimal(best['energy'])} of its map inside the object)"
        )
    return lines
