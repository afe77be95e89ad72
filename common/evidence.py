"""What an answer rests on: how likely its words are, and how likely they remain without the photo.

    Reading, image tokens to hide -> hidden_probabilities     (runs, answer tokens)

Shapes:  R runs    N image tokens    A answer tokens    L positions of prompt and answer
"""

import copy
import inspect

import numpy as np
import torch
from transformers import DynamicCache

from smooth_gradcam import Reading, at_least_float32, borrowed, hooked, memory_explained, score_parts

__all__ = ["hidden_probabilities"]


def hidden_probabilities(reading: Reading, hidden: np.ndarray, batch_size: int = 8) -> np.ndarray:
    """Probability of each token of the answer, after those before it, while text does not see some image tokens.

    `hidden` is (R, N) bool: in each run, no position behind the photos attends to these image tokens, in any layer.
    A run that hides all of them also hides what stands between several photos. Positions stay as they are. Returns
    float32 (R, A). The photos pass the model once; for each run only the text behind them does so again.
    """
    model, results = reading.model, []
    forced, (scored,) = score_parts(reading.inputs, reading.tokens, [range(len(reading.tokens))])
    first, start = int(reading.positions[0]), int(reading.positions[-1]) + 1
    seen = torch.ones(len(hidden), forced["input_ids"].shape[1], dtype=torch.long)  # (R, L - 1)
    for row, away in zip(seen, torch.as_tensor(hidden), strict=True):
        row[reading.positions.cpu()[away]] = 0
        if away.all():
            row[first:start] = 0
    expected = torch.tensor(scored.expected)[:, None]
    with borrowed(model), memory_explained(len(reading.positions)), torch.no_grad():
        decoder, given = model.model.language_model, {}
        name = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"  # since 5.23
        cache = DynamicCache(config=decoder.config)
        with hooked([decoder.register_forward_pre_hook(lambda *args: given.update(args[2]), with_kwargs=True)]):
            model.model(**forced, **{name: cache}, use_cache=True)
        cache.crop(start - forced["input_ids"].shape[1])  # a count to be removed, as all versions take it
        embeddings, positions = given["inputs_embeds"][:, start:], given["position_ids"][..., start:]
        for mask in seen.split(batch_size):
            count, own = len(mask), copy.deepcopy(cache)
            own.batch_repeat_interleave(count)
            text = {"inputs_embeds": embeddings.expand(count, -1, -1), "attention_mask": mask.to(embeddings.device)}
            text["position_ids"] = positions.expand(*positions.shape[:-2], count, -1)
            states = decoder(**text, **{name: own}, use_cache=True).last_hidden_state
            states = states[:, [position - start for position in scored.predicting]]  # (R, A, C)
            logits = at_least_float32(model.get_output_embeddings()(states.flatten(0, 1)))  # (R * A, V)
            chosen = logits.softmax(-1).gather(1, expected.repeat(count, 1).to(logits.device))
            results.append(chosen.view(count, -1).cpu().numpy())
    return np.concatenate(results)
