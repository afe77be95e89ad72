"""What the tests of the measures share: maps of the tiny model's answer, and maps made by hand."""

import dataclasses

import numpy as np

from common.passes import passes_of
from smooth_gradcam import Settings, explain, find_target

PROMPT = "What is it?"
ANSWER = "the red cat"
CLEAN = Settings(use_smooth=False)


def spot(size, row, column, value=1.0):
    cam = np.zeros(size, np.float32)
    cam[row, column] = value
    return cam


def maps_of(reading, target, layers, settings=CLEAN, occurrence=1):
    span, passes = find_target(reading.answer, target, occurrence), passes_of(settings.contrast)
    return explain(reading, [span], layers, settings, passes=passes)[0]


def with_maps(result, *cams, no_gradient=()):
    maps = {i: np.asarray(cam, np.float32) for i, cam in enumerate(cams)}
    return dataclasses.replace(result, maps=maps, no_gradient=frozenset(no_gradient))


def ranked(rng, grid):
    """A map that has each of 1 ... N once."""
    return 1 + rng.permutation(grid[0] * grid[1]).reshape(grid)


def ranked_maps(reading):
    """A map of a target of several tokens, whose values are all different."""
    result = maps_of(reading, "red cat", [0, 2])
    assert len(result.target_tokens) > 1
    return with_maps(result, ranked(np.random.default_rng(0), result.grid))
