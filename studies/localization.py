"""How well a map fits an object's mask: pointing game, energy, Obj-IoU, and maps to compare with.

Shapes:  H, W  rows and columns of image tokens     height, width  pixels of the photo
"""

import cv2
import numpy as np

from smooth_gradcam import normalize_cam, upsample_cam

__all__ = ["at_border", "centre_map", "fit_of", "localization"]

NEAR = 15  # pixels off the object that still count as a hit (Zhang et al., "Top-down Neural Attention", 2018)


def localization(cam: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """How well a raw (H, W) map fits an object's mask, bool (height, width): values in [0, 1], all 0 for a zero map.

    pointing  1 if the map's maximum lies on the object: the pointing game
    near      1 if it lies at most 15 pixels off the object, the pointing game's usual tolerance
    energy    share of the map inside the object (energy-based pointing game; Wang et al., Score-CAM, 2020)
    obj_iou   intersection over union of the object and the map above Otsu's threshold (Obj-IoU; TAM, ICCV 2025)
    """
    heat = upsample_cam(cam, mask.shape)
    if not heat.any():
        return dict.fromkeys(("pointing", "near", "energy", "obj_iou"), 0.0)
    distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    miss = distance.flat[heat.argmax()]
    grey = np.round(255 * normalize_cam(heat)).astype(np.uint8)
    threshold, _ = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    hot = grey > threshold
    return {
        "pointing": float(miss == 0),
        "near": float(miss <= NEAR),
        "energy": float(heat[mask].sum() / heat.sum()),
        "obj_iou": float((hot & mask).sum() / (hot | mask).sum()),
    }


def at_border(cam: np.ndarray, fit: dict[str, float]) -> float:
    """1 if the map's maximum lies in its outermost cells and off the object, as at an attention sink; otherwise 0.

    `fit` is the map's `localization`.
    """
    y, x = np.unravel_index(cam.argmax(), cam.shape)
    outermost = y in (0, cam.shape[0] - 1) or x in (0, cam.shape[1] - 1)
    return float(outermost and not fit["near"] and cam.any())


def centre_map(grid: tuple[int, int]) -> np.ndarray:
    """A map that ignores the photo: a Gaussian at the centre, as wide as a quarter of each side, float32 (H, W)."""
    y, x = (np.linspace(-1, 1, side) for side in grid)
    return np.exp(-2 * (y[:, None] ** 2 + x**2)).astype(np.float32)


def fit_of(cams: list[np.ndarray], mask: np.ndarray) -> dict[str, float]:
    """`localization` and `at_border` of a word's map, the first; Obj-IoU is the best of the others, its tokens' maps.

    This is how TAM (ICCV 2025) scores a word of several tokens.
    """
    word, *tokens = (localization(cam, mask) for cam in cams)
    best = max(fit["obj_iou"] for fit in tokens or [word])
    return word | {"obj_iou": best, "border": at_border(cams[0], word)}
