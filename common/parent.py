"""The pictures of the code behind "From Redundancy to Relevance" (NAACL 2025) as a method.

    METHODS["parent"]    demo_smooth_grad_threshold.py of github.com/zhangbaijin/From-Redundancy-to-Relevance

Import this file to have it in the core, which has the paper's formula as the method "paper". Shapes as there.
"""

import torch
from torch import Tensor

from smooth_gradcam import METHODS

__all__ = ["THRESHOLD", "parent"]

THRESHOLD = 0.5  # share of its maximum below which a map is set to zero


def parent(features: Tensor, gradients: Tensor) -> Tensor:
    """M / max M, zero below half of that; M = ReLU(sum_k alpha_k A_k): (N, C), (N, C) -> (N,) in [0, 1].

    alpha_k is the mean of ReLU(g_k). The paper's text has the mean of g_k, and neither the division nor the threshold:
    see `paper` of the core. As there, layers are read at `post_attention_layernorm` with plain gradients of the sum of
    logits, and of a whole answer the end of turn is scored as well. One copy's map, before the mean over noisy copies;
    the code's defaults are 50 of them, with noise of 0.1.

    What the code does besides, and this does not: it scores each token by the logits at its own position, in place of
    the one before, which predicts it; it adds up the copies' maps as JET colours of 8 bits, which overflow; and its
    script draws the map of the clean photo alone.
    """
    heat = (features @ gradients.relu().mean(0)).relu()
    share = heat / heat.max().clamp_min(torch.finfo(heat.dtype).tiny)
    return torch.where(share < THRESHOLD, 0, share)


METHODS["parent"] = METHODS["paper"]._replace(formula=parent, title="Grad-CAM as coded")
