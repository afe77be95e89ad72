"""Groups of tokens, and the image tokens that an object covers."""

import numpy as np
import pytest
import torch
from flow_by_hand import GROUPS, names_by_hand, prompt_length
from test_core import ANSWER, PROMPT

from smooth_gradcam import read
from studies.decoder import covered_tokens, token_groups


@pytest.fixture(scope="module")
def reading(model, processor, image):
    return read(model, processor, image, PROMPT, ANSWER)


@pytest.fixture(scope="module")
def own(model, processor, image):
    """The model's own, greedy answer."""
    return read(model, processor, image, PROMPT, max_new_tokens=6)


# groups


def test_groups_cover_all_positions_in_their_order(reading):
    groups = token_groups(reading)
    assert list(groups) == GROUPS
    positions = range(prompt_length(reading) + len(reading.tokens))
    assert [i for part in groups.values() for i in part] == list(positions)
    assert [name for name, part in groups.items() for _ in part] == names_by_hand(reading)
    assert groups["image"].tolist() == reading.positions.tolist()


def test_answers_group_begins_where_its_first_token_is_predicted(model, own):
    with torch.no_grad():
        logits = model(**own.inputs).logits[0]
    assert logits[token_groups(own)["answer"][0]].argmax() == own.tokens[0]


# objects


def test_covered_tokens_by_hand():
    mask = np.zeros((112, 168), bool)  # 4 x 6 image tokens of 28 pixels
    mask[28:56, 56:84] = True
    assert np.flatnonzero(covered_tokens(mask, (4, 6))).tolist() == [1 * 6 + 2]
    mask[84:98, :14] = True  # a quarter
    mask[84:98, 28:41] = True  # less
    assert np.flatnonzero(covered_tokens(mask, (4, 6))).tolist() == [1 * 6 + 2, 3 * 6]


def test_object_too_small_for_any_token_is_in_the_one_that_it_covers_most():
    mask = np.zeros((112, 168), bool)
    mask[50:60, 60:65] = True  # 6 rows above the border, 4 below
    assert np.flatnonzero(covered_tokens(mask, (4, 6))).tolist() == [1 * 6 + 2]
