"""The parts of an answer: its words and their maps in one pass, occurrences, and one word in place of another."""

import json
import random
import re
import unicodedata
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_image
from drawn_maps import make_maps, numbered_words
from test_core import (
    ANSWER,
    CLEAN,
    PROMPT,
    decoder,
    dividing_by,
    forced_by_hand,
    raising,
    rms,
    state_of,
    unruly,
)

import smooth_gradcam as core
from common.evidence import Evidence, departures_of_most, doubt_lines, explain_with_evidence
from common.passes import contrasted_passes
from smooth_gradcam import (
    ExplanationWarning,
    Look,
    Reading,
    Settings,
    compute_token_maps,
    explain,
    find_target,
    read,
    render_cam,
    token_spans,
)
from studies.words import (
    choose_words,
    compute_word_maps,
    create_word_maps,
    draw_words,
    map_words,
    name_words,
    split_words,
    word_tokens,
)
from visualization_utils import FADED

UNEVEN = pytest.mark.filterwarnings("ignore:contrast=.* scores are sums:smooth_gradcam.ExplanationWarning")

WORDS = ["the", "red", "cat", "猫"]  # of ANSWER


# the maps of words


@pytest.mark.parametrize("rules", ["detached", "plain"])
@pytest.mark.parametrize(("method", "score"), [("product", "logit"), ("hirescam", "logprob"), ("gradcam", "logit")])
def test_words_maps_are_those_of_the_words_as_targets(model, processor, image, method, score, rules):
    layers = [2, 0, model.model.visual.merger]
    options = {"num_samples": 3, "noise_std": 0.2, "seed": 5, "answer": ANSWER}
    options |= {"method": method, "score": score, "rules": rules}
    together = compute_word_maps(model, processor, image, PROMPT, layers, words="all", **options)
    assert [found.target for found in together] == WORDS
    for found in together:
        alone = compute_token_maps(model, processor, image, PROMPT, layers, target=found.target, **options)
        assert list(found.maps) == list(alone.maps)
        for key, cam in found.maps.items():
            np.testing.assert_allclose(cam, alone.maps[key], rtol=1e-5, atol=1e-7 * cam.max())
        for name in ("grid", "prompt", "answer", "tokens", "target_span", "target_tokens", "no_gradient", "settings"):
            assert getattr(found, name) == getattr(alone, name)
    assert max(found.maps[0].max() for found in together) > 1e-2
    assert not np.allclose(together[1].maps[0], together[2].maps[0], atol=1e-2)


def test_words_of_a_generated_answer_are_explained(model, processor, image):
    options = {"max_new_tokens": 5, "num_samples": 1, "method": "gradcam"}
    (first, *_) = compute_word_maps(model, processor, image, PROMPT, [0], words="all", **options)
    alone = compute_token_maps(model, processor, image, PROMPT, [0], target=first.target, **options)
    assert first.tokens == alone.tokens
    assert len(first.tokens) == 5
    np.testing.assert_allclose(first.maps[0], alone.maps[0], rtol=1e-5)


@pytest.mark.parametrize("words", [["cat"], "all"])
@pytest.mark.parametrize("layers", [[1], [0, 1, 2]])
def test_one_forward_serves_all_words_and_layers_and_one_more_their_evidence(model, processor, image, words, layers):
    forwards = []
    handles = [model.model.register_forward_hook(lambda *_: forwards.append("model"))]
    handles += [model.model.visual.register_forward_hook(lambda *_: forwards.append("vision"))]
    options = {"num_samples": 3, "answer": ANSWER, "words": words}
    compute_word_maps(model, processor, image, PROMPT, layers, **options)
    for handle in handles:
        handle.remove()
    assert forwards == ["vision", "model"] * (3 + 1)


@UNEVEN
def test_contrast_takes_one_forward_more(model, processor, image):
    forwards = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    options = {"num_samples": 3, "answer": ANSWER, "target": "cat", "contrast": "dog", "passes": contrasted_passes}
    compute_token_maps(model, processor, image, PROMPT, [0, 1, 2], **options)
    handle.remove()
    assert len(forwards) == 2 * 3


@pytest.mark.parametrize("rules", ["detached", "plain"])
@pytest.mark.parametrize("score", ["logit", "logprob"])
def test_gradients_of_disjoint_parts_add_up_to_that_of_the_whole(model, processor, image, score, rules):
    inputs = core.prepare_inputs(model, processor, [image], PROMPT)
    tokens = core.tokenise(processor.tokenizer, ANSWER)
    taps = core.find_taps(model, [0, 1, 2, model.model.visual.blocks[0]], "input")
    whole, parts = [range(len(tokens))], [[0, 1, 2], [4, 3], range(5, 6), range(6, len(tokens))]
    assert sorted(i for part in parts for i in part) == list(whole[0])
    with core.borrowed(model):
        (total,), each = (
            list(core.features_and_gradients(model, forced, taps, scored, Settings(score=score, rules=rules)))
            for forced, scored in (core.score_parts(inputs, tokens, some) for some in (whole, parts))
        )
    assert len(each) == len(parts)
    for key, (features, gradient) in total.items():
        added = sum(part[key][1] for part in each)
        torch.testing.assert_close(added, gradient, rtol=1e-6, atol=1e-7)  # parts are float32
        assert all(torch.equal(part[key][0], features) for part in each)
        assert gradient.abs().max() > 1e-2


def test_word_without_gradient_is_reported_alone(model, processor, image, monkeypatch):
    cat = processor.tokenizer.convert_tokens_to_ids("Ġcat")
    monkeypatch.setitem(core.SCORES, "logit", lambda logits, tokens: core.logit_score(logits * (tokens != cat), tokens))
    options = {"num_samples": 2, "answer": "red cat red", "words": "all", "method": "gradcam"}
    found = compute_word_maps(model, processor, image, PROMPT, [0, 2], **options)
    assert [one.no_gradient for one in found] == [set(), {0, 2}, set()]
    assert [one.blank for one in found] == [{}, {0: "no gradient", 2: "no gradient"}, {}]
    assert not any(cam.any() for cam in found[1].maps.values())


def test_word_maps_have_one_target_each_and_no_contrast(model, processor, image):
    for name in ("target", "target_occurrence", "colour"):
        with pytest.raises(TypeError, match=f"'{name}'"):
            compute_word_maps(model, processor, image, PROMPT, [0], words="cat", answer=ANSWER, **{name: "cat"})
    with pytest.raises(ValueError, match="^contrast='cat': a map of each word takes no contrast$"):
        compute_word_maps(model, processor, image, PROMPT, [0], words="cat", answer=ANSWER, contrast="cat")


def test_tokens_of_words_have_the_probabilities_of_a_full_pass(model, processor, image):
    """And take no pass of their own; of a token that writes a part of a character the text is the character."""
    reading = read(model, processor, image, PROMPT, ANSWER)
    found = map_words(reading, ["red", "猫"], [0], Settings(use_smooth=False))
    with core.hooked([model.register_forward_hook(raising(AssertionError("a pass of the model")))]):
        probabilities, texts = word_tokens(reading, found)
    logits = model(**forced_by_hand(reading.inputs, reading.tokens)).logits[0]
    after = logits[-len(reading.tokens) - 1 :].softmax(-1)
    expected = [after[i, token].item() for i, token in enumerate(reading.tokens)]
    assert probabilities == [pytest.approx(expected[4:5], rel=1e-5), pytest.approx(expected[7:], rel=1e-5)]
    assert texts == [["red"], ["猫", "猫", "猫"]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_probabilities_are_of_float32(make_model, processor, image, dtype):
    """Half precision has no numbers near one but one: a token that is all but certain would be certain."""
    model = make_model(dtype)
    reading = read(model, processor, image, PROMPT, "red")
    (token,) = reading.tokens
    model.lm_head.register_forward_hook(lambda module, args, output: torch.zeros_like(output).index_fill(-1, at, 14))
    at = torch.tensor([token])
    ((probability,),), _ = word_tokens(reading, map_words(reading, "red", [0], Settings(use_smooth=False)))
    others = len(processor.tokenizer) - 1
    assert probability == pytest.approx(1 / (1 + others * np.exp(-14)), abs=1e-6)
    assert probability < 1


# what they rest on


def test_words_have_their_evidence_and_are_explained_by_the_tokens_they_need(model, processor, image, tmp_path):
    options = {"use_smooth": False, "seed": 3, "answer": ANSWER}
    found = compute_word_maps(model, processor, image, PROMPT, [0, 2], words="all", **options)
    for one in found:
        by = {"by": explain_with_evidence, "method": "needed", "target": one.target}
        alone = compute_token_maps(model, processor, image, PROMPT, [0, 2], **options, **by)
        assert one.settings == alone.settings
        assert one.evidence[:2] == pytest.approx(alone.evidence[:2], rel=1e-5)
        assert one.likeness == pytest.approx(alone.likeness, abs=1e-3)
        for layer, cam in one.maps.items():
            np.testing.assert_allclose(cam, alone.maps[layer], rtol=1e-4, atol=1e-7)
    options["use_smooth"] = True
    drawn = create_word_maps(model, processor, image, PROMPT, [0], tmp_path, words="cat", quiet=True, **options)
    assert json.loads((tmp_path / "words.json").read_text(encoding="utf-8"))["settings"]["method"] == "needed"
    assert list(drawn) == ["cat"]


def test_word_that_is_the_whole_answer_is_a_word(model, processor, image):
    (found,) = compute_word_maps(model, processor, image, PROMPT, [0], answer="cat", use_smooth=False)
    assert found.settings.method == "needed"


def test_given_method_passes_and_batches_are_taken(model, processor, image):
    reading, batches = read(model, processor, image, PROMPT, ANSWER), []

    def passes(*given):
        batches.append(given[-1])
        yield from core.noisy_passes(*given)

    settings = Settings(2, method="hirescam")
    (found,) = map_words(reading, "cat", [1], settings, passes=passes, batch_size=2)
    (expected,) = explain(reading, [find_target(ANSWER, "cat")], [1], settings)
    np.testing.assert_allclose(found.maps[1], expected.maps[1], rtol=1e-5)
    assert found.settings == expected.settings
    assert batches == [2]


def resting(evidence, likeness=(), count=3):
    """The words w00, w01, ... with this evidence and likeness at layers 3 and 9, and their photo."""
    photo, maps = numbered_words(count, [3, 9])
    pairs = [(pair and Evidence(*pair)) for pair in evidence] + [None] * (count - len(evidence))
    likeness = [dict(zip((3, 9), values, strict=True)) for values in likeness] or [{}] * count
    changes = zip(maps, pairs, likeness, strict=True)
    return photo, [replace(one, evidence=pair, likeness=like) for one, pair, like in changes]


def lines_of(maps):
    return doubt_lines(dict(zip(name_words(maps), maps, strict=True)))


def test_doubted_words_are_named_with_their_reason_from_the_thresholds_on():
    assert lines_of(resting([(0.1, 0.0), (0.5, 0.4), None])[1]) == []
    assert lines_of(resting([(0.5, 0.401), (0.4, 0.5), (0.5, 0.39)])[1]) == [
        "not from the photo: w00 (80 % kept), w01 (100 %)"
    ]
    assert lines_of(resting([(0.099, 0.0), (4e-6, 0.0), (0.5, 0.0)])[1]) == ["hardly said: w00 (p 0.10), w01 (p 4e-6)"]
    assert lines_of(resting([(0.01, 0.01)])[1]) == ["not from the photo: w00 (100 % kept)", "hardly said: w00 (p 0.01)"]


@pytest.mark.parametrize(("count", "end"), [(10, "w09 (100 %)"), (11, "w09 (100 %) and 1 more"), (40, "30 more")])
def test_at_most_ten_doubted_words_are_named(count, end):
    (line,) = lines_of(resting([(1.0, 1.0)] * count, count=count)[1])
    assert line.endswith(end)
    assert line.count("%") == 10


ELSE = "something else than the middle layers (correlation"


@pytest.mark.parametrize(
    ("likeness", "layers", "said"),
    [
        ([(0.29, 0.9), (0.24, 0.1), (0.3, 0.9)], [3, 9], f"of most words, layer 3 shows {ELSE} 0.3)"),
        ([(0.3, 0.9), (0.29, 0.1), (0.3, 0.9)], [3, 9], ""),
        ([(0.1, 0.2), (0.1, 0.2), (0.9, 0.9)], [3, 9], f"of most words, layers 3, 9 show {ELSE} 0.1 to 0.2)"),
        ([(0.1, 0.2), (0.1, 0.2), (0.9, 0.9)], [9], f"of most words, layer 9 shows {ELSE} 0.2)"),
    ],
)
def test_layers_are_named_that_show_something_else_for_most_words(likeness, layers, said):
    maps = resting([(1.0, 0.0)] * 3, likeness)[1]
    assert departures_of_most(maps, layers) == said
    doubted = [replace(one, evidence=Evidence(1.0, 1.0), likeness={3: 0.0, 9: 0.0}) for one in maps]
    assert departures_of_most(maps + 2 * doubted, layers) == said  # they have no say
    assert departures_of_most(doubted, layers) == ""


def test_evidence_is_written():
    photo, maps = resting([(0.5, 0.1), (0.05, 0.05), None], [(0.25, 1.0)] * 3)
    results, files = draw_words(photo, "", maps, [[0.5]] * 3, [["x"]] * 3)
    first, second, third = json.loads(files["words.json"])["words"]
    assert first["evidence"] == {"p": 0.5, "without_photo": 0.1, "kept": 0.2}
    assert (first["doubt"], third["doubt"], third["evidence"]) == ("", "", None)
    assert second["doubt"] == maps[1].evidence.doubt != ""
    assert first["likeness"] == {"3": 0.25, "9": 1.0}
    np.testing.assert_array_equal(files["maps.npz"]["evidence"], [(0.5, 0.1), (0.05, 0.05), (np.nan, np.nan)])


@pytest.mark.parametrize("scale", ["map", "all"])
def test_pictures_of_doubted_words_are_faded(scale):
    photo, maps = resting([(0.5, 0.4), (0.5, 0.401), (0.09, 0.0)])
    results = draw_words(photo, "", maps, [[0.5]] * 3, [["x"]] * 3, Look(scale=scale))[0]
    peak = max(cam.max() for one in maps for cam in one.maps.values())
    for i, (pictures, share) in enumerate(zip(results.values(), (1, FADED, FADED), strict=True)):
        own = maps[i].maps[3].max() if scale == "map" else peak
        expected = render_cam(photo, maps[i].maps[3], Look(scale=scale), own / share)
        for name, picture in zip(("superimposed", "heatmap"), expected, strict=True):
            np.testing.assert_array_equal(pictures[3][name], picture)


@pytest.mark.parametrize("words", ["dog", ["cat", "dog"], "cat,dog", "cat,", "", [], [""]])
def test_word_that_is_not_there_prints_the_answer(model, processor, image, words):
    with pytest.raises(ValueError, match="the red cat 猫") as caught:
        compute_word_maps(model, processor, image, PROMPT, [0], words=words, answer=ANSWER)
    assert "words=" in str(caught.value)


def test_answer_without_words_is_an_error_that_says_so(model, processor, image):
    for words in ("content", "all"):
        with pytest.raises(ValueError, match=r"none in the answer '\?!'"):
            compute_word_maps(model, processor, image, PROMPT, [0], words=words, answer="?!")
    (found,) = compute_word_maps(model, processor, image, PROMPT, [0], words=["?!"], answer="?!", num_samples=1)
    assert found.target == "?!"


# which words an answer has


def tokens_of(spans, span):
    return Reading.tokens_of(SimpleNamespace(spans=spans), span)


def whole(*pieces):
    """The spans of tokens that are these pieces of text."""
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    return "".join(pieces), list(zip([0, *ends], ends, strict=False))


def split(*pieces):
    answer, spans = whole(*pieces)
    return [answer[slice(*span)] for span in split_words(answer, spans)]


def test_word_is_whole_however_many_tokens_write_it():
    assert split("a b", "ig d", "o", "g.") == ["a", "big", "dog"]
    assert split("the", " cattle", "\n\n**", "T", "wo**:") == ["the", "cattle", "Two"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("It's the dogs' ball, isn’t it?", ["It's", "the", "dogs", "ball", "isn’t", "it"]),
        ("'quoted' \"words\" “so” ‘it’ «is»", ["quoted", "words", "so", "it", "is"]),
        (
            "a well-known, two- or three-part dash - or -- so",
            ["a", "well-known", "two", "or", "three-part", "dash", "or", "so"],
        ),
        ("3.5 of 1,000.25, i.e. 7.", ["3.5", "of", "1,000.25", "i", "e", "7"]),
        ("A.I., no.5, 5.a 2024-01-31 50%", ["A", "I", "no", "5", "5", "a", "2024-01-31", "50"]),
        ("snake_case x2 H₂O m² №5", ["snake", "case", "x2", "H₂O", "m²", "5"]),
        ("Café cafe\u0301 naïve STRASSE Straße", ["Café", "cafe\u0301", "naïve", "STRASSE", "Straße"]),
        ("नमस्ते दुनिया, हिन्दी में क्\u200dष।", ["नमस्ते", "दुनिया", "हिन्दी", "में", "क्\u200dष"]),
        ("مرحبا بالعالم، قِطّةٌ صغيرة؟", ["مرحبا", "بالعالم", "قِطّةٌ", "صغيرة"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        ("한국어 단어", ["한국어", "단어"]),
        ("❤\ufe0f love 👩\u200d👧 1\ufe0f\u20e3", ["love", "1\ufe0f\u20e3"]),
        ("", []),
        ("?! … -- '' — 。！", []),
    ],
)
def test_words_of_spaced_scripts(answer, expected):
    assert split(answer) == expected
    assert split(*answer) == expected  # it does not matter where the tokens end


def test_scripts_without_blanks_are_cut_where_the_model_cuts_them():
    assert split("这是", "一只", "猫", "。", "红色", "的") == ["这是", "一只", "猫", "红色", "的"]
    assert split("これは", "ネコ", "です") == ["これは", "ネコ", "です"]
    assert split("人々", "は") == ["人々", "は"]
    assert split("แมว", "สีแดง") == ["แมว", "สีแดง"]
    assert split("ທ່ານ", "ດີ") == ["ທ່ານ", "ດີ"]


def test_mark_stays_with_its_letter():
    """Tokens may end between them, but no one reads half a letter."""
    assert split(*"กินน้ำ") == ["กิ", "น", "น้ำ"[:2], "ำ"]
    assert split("か", "\u3099", "き") == ["か\u3099", "き"]
    assert split(*"हिन्दी") == ["हिन्दी"]
    assert split("❤", "\ufe0f") == []


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (("3.5米", "高"), ["3.5", "米", "高"]),
        (("iPhone手机", "2"), ["iPhone", "手机", "2"]),
        (("T-恤", "a-猫-b", "猫's"), ["T", "恤", "a", "猫", "b", "猫", "s"]),
        (("๓.๕",), ["๓", "๕"]),
    ],
)
def test_change_of_script_ends_a_word_and_leaves_no_joiner_behind(pieces, expected):
    assert split(*pieces) == expected


def test_character_that_many_tokens_share_is_one_word(tokenizer):
    """𠮷 and 猫 are four and three tokens here, the emoji none of a word."""
    answer = "a 𠮷猫😀 cat ก็"
    tokens = tokenizer(answer)["input_ids"]
    spans = token_spans(tokenizer, tokens)
    found = split_words(answer, spans)
    assert [answer[slice(*span)] for span in found] == ["a", "𠮷", "猫", "cat", "ก็"]
    parts = [tokens_of(spans, span) for span in found]
    assert [len(part) for part in parts] == [1, 4, 3, 1, 6]
    assert [tokenizer.decode([tokens[i] for i in part]).strip() for part in parts] == ["a", "𠮷", "猫", "cat", "ก็"]


def test_token_that_ends_inside_a_character_does_not_cut():
    """Tokens of two and a half characters, and of the other half and one more."""
    assert split_words("一只小猫", [(0, 3), (2, 4)]) == [(0, 4)]
    assert split_words("一只小猫", [(0, 2), (2, 3), (2, 3), (3, 4)]) == [(0, 2), (2, 3), (3, 4)]


SCRIPTS = (
    ["abcXYZéß", "0123", "あいカー々", "一二三猫", "กขินำ้", "हिनदी्", "قطةِّ", "дом", "한글", "ꦏ"]
    + [" \n", ".,-'’", "?!\"。、_", "😀❤\ufe0f", "\u0301\u200c\u200d", "𠮷"]
)  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_every_letter_and_digit_is_in_exactly_one_word(tokenizer, seed):
    draw = random.Random(seed)
    seen = 0
    for _ in range(25):
        drawn = "".join(draw.choice(draw.choice(SCRIPTS)) for _ in range(draw.randint(1, 40)))
        ends = [i for i in range(1, len(drawn)) if draw.random() < 0.5] + [len(drawn)]
        pieces = list(zip([0, *ends], ends, strict=False))
        tokens = tokenizer(drawn)["input_ids"]
        decoded = tokenizer.decode(tokens)  # the tokenizer composes letters and marks
        for answer, spans in ((drawn, pieces), (decoded, token_spans(tokenizer, tokens))):
            assert spans[-1][1] == len(answer)
            words = split_words(answer, spans)
            inside = [i for span in words for i in range(*span)]
            assert inside == sorted(set(inside))  # in order, none twice
            assert {i for i, character in enumerate(answer) if character.isalnum()} <= set(inside)
            for start, end in words:
                assert answer[start].isalnum()
                last = answer[end - 1]
                assert last.isalnum() or unicodedata.category(last)[0] == "M" or last in "\u200c\u200d"
                assert not set(answer[start:end]) & set(' \n?!"。、_😀❤')
                assert tokens_of(spans, (start, end))
            seen += len(words)
    assert seen > 300


# which of them are chosen


def chosen(answer, words):
    return [answer[slice(*span)] for span in choose_words(answer, [(i, i + 1) for i in range(len(answer))], words)]


def test_content_leaves_function_words_out_whatever_their_case():
    answer = "The red dog, IS on a Table. It's 猫 的 3.5"
    assert chosen(answer, "all") == ["The", "red", "dog", "IS", "on", "a", "Table", "It's", "猫", "的", "3.5"]
    assert chosen(answer, "content") == ["red", "dog", "Table", "猫", "3.5"]
    with pytest.raises(ValueError, match=r"words='content': there is none in the answer 'It is on the\.'"):
        chosen("It is on the.", "content")
    assert chosen("It is on the.", "all") == ["It", "is", "on", "the"]


@pytest.mark.parametrize("words", ["dog,red cat", " red cat , dog", ["dog", "red cat"], ("dog", "red cat", "dog")])
def test_named_words_come_in_the_answers_order_each_at_all_its_places(words):
    answer = "a dog, a red cat, a Dog, a dog"
    assert choose_words(answer, [], words) == [(2, 5), (9, 16), (27, 30)]
    assert chosen(answer, words) == ["dog", "red cat", "dog"]


def test_named_function_word_and_the_words_content_and_all_can_be_had_in_a_list():
    assert chosen("all the content", "the") == ["the"]
    assert chosen("all the content", ["all", "content"]) == ["all", "content"]
    assert chosen("1,000 cats", ["1,000"]) == ["1,000"]


def test_repeated_word_is_explained_at_each_place(model, processor, image):
    answer = "cat the cat"
    options = {"answer": answer, "use_smooth": False, "method": "gradcam"}
    found = compute_word_maps(model, processor, image, PROMPT, [0], words="cat", **options)
    assert [one.target_span for one in found] == [(0, 3), (8, 11)]
    for i, one in enumerate(found, 1):
        options = CLEAN | {"answer": answer}
        alone = compute_token_maps(model, processor, image, PROMPT, [0], target="cat", target_occurrence=i, **options)
        assert alone.target_span == one.target_span
        np.testing.assert_allclose(one.maps[0], alone.maps[0], rtol=1e-5)
    assert not np.allclose(found[0].maps[0], found[1].maps[0], atol=1e-3)


def test_word_with_other_letter_case_is_hinted_at():
    with pytest.raises(ValueError, match=r"words='dog' is not in the answer 'A Dog\.' .*there is 'Dog'"):
        chosen("A Dog.", "dog")


# occurrences


def test_occurrences_are_counted_among_whole_words_where_there_are_any():
    answer = "cattle, a cat and a cat"
    assert [find_target(answer, "cat", i) for i in (1, 2)] == [(10, 13), (20, 23)]
    assert find_target(answer, "cat") == (10, 13)
    assert [find_target("cattle, bobcat", "cat", i) for i in (1, 2)] == [(0, 3), (11, 14)]
    assert [find_target("大猫和小猫", "猫", i) for i in (1, 2)] == [(1, 2), (4, 5)]
    assert find_target(answer, None) == (0, len(answer))


def test_whole_words_have_their_vowel_signs():
    assert find_target("फला फल", "फल") == (4, 6)  # not the beginning of another word
    assert find_target("काम म", "म") == (4, 5)  # nor its end
    assert find_target("फला", "फल") == (0, 2)  # unless it stands nowhere else


@pytest.mark.parametrize(
    ("answer", "occurrence", "message"),
    [
        ("a cat, a cat", 3, r"target_occurrence=3 is more than the 2 of 'cat' in 'a cat, a cat'"),
        ("a cattle cat", 2, r"target_occurrence=2 is more than the 1 of 'cat' in"),
        ("a cat", 0, r"target_occurrence=0 must be a whole number, 1 or more"),
        ("a cat", -1, "target_occurrence=-1 must be"),
        ("a cat", 1.5, "target_occurrence=1.5 must be"),
        ("a cat", "2", "target_occurrence='2' must be"),
        ("a dog", 1, r"target='cat' is not in the answer 'a dog' \(letter case counts; its words: a, dog\)$"),
        ("a CAT", 1, r"'cat' is not in the answer 'a CAT' \(letter case counts: there is 'CAT'; its words: a, CAT\)$"),
    ],
)
def test_occurrence_that_is_not_there_says_how_many_are(answer, occurrence, message):
    with pytest.raises(ValueError, match=message):
        find_target(answer, "cat", occurrence)


@pytest.mark.parametrize("target", ["", " "])
def test_empty_target_prints_the_answer(target):
    with pytest.raises(ValueError, match=f"^target='{target}' is not in the answer 'the red cat'"):
        find_target("the red cat", target)


def test_occurrence_without_target_is_an_error(model, processor, image):
    with pytest.raises(ValueError, match="target_occurrence=2 needs a target"):
        compute_token_maps(model, processor, image, PROMPT, [0], **CLEAN, target_occurrence=2)
    options = CLEAN | {"answer": "cat the cat", "target": "cat", "target_occurrence": 3}
    with pytest.raises(ValueError, match="target_occurrence=3 is more than the 2 of 'cat' in 'cat the cat'"):
        compute_token_maps(model, processor, image, PROMPT, [0], **options)


# contrast


@pytest.fixture(scope="session")
def oracles(model):
    return {"plain": model, "detached": dividing_by(model, lambda norm, x: rms(norm, x).detach())}


def by_the_book(model, processor, image, layers, before, scored, score):
    """{layer: (features, gradient)} at the image tokens, of the `scored` tokens after others: full graph and logits."""
    inputs = core.prepare_inputs(model, processor, [image], PROMPT)
    ids = processor.tokenizer.convert_tokens_to_ids(before + scored + ["."])
    assert None not in ids
    output = model(**forced_by_hand(inputs, ids), output_hidden_states=True)
    start = inputs["input_ids"].shape[1] - 1 + len(before)
    logits = output.logits[0] if score == "logit" else output.logits[0].log_softmax(-1)
    total = sum(logits[start + i, ids[len(before) + i]] for i in range(len(scored)))
    hidden = [output.hidden_states[layer] for layer in layers]
    at = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    gradients = torch.autograd.grad(total, hidden)
    return [(a[0, at].detach().numpy(), g[0, at].numpy()) for a, g in zip(hidden, gradients, strict=True)]


PIECES = ["t", "h", "e", "Ġ", "red", "Ġcat", "Ġ", "ç", "Į", "«"]  # the tokens of ANSWER


@UNEVEN
@pytest.mark.parametrize("rules", ["detached", "plain"])
@pytest.mark.parametrize("score", ["logit", "logprob"])
@pytest.mark.parametrize(
    ("target", "contrast", "scored", "instead"),
    [
        ("cat", "car", slice(5, 6), ["Ġ", "ca", "r"]),  # the blank belongs to the token, and stays
        ("red", "cat", slice(4, 5), ["cat"]),
        ("猫", "a", slice(7, 10), ["a"]),
        ("red cat", "a", slice(4, 6), ["a"]),
        ("the", "a 猫", slice(0, 3), ["a", "Ġ", "ç", "Į", "«"]),
    ],
)
def test_contrast_is_the_difference_of_two_full_passes(
    model, oracles, processor, image, target, contrast, scored, instead, score, rules
):
    assert processor.tokenizer(ANSWER)["input_ids"] == processor.tokenizer.convert_tokens_to_ids(PIECES)
    layers, before = [0, 1, 2], PIECES[: scored.start]
    first, second = (
        by_the_book(oracles[rules], processor, image, layers, before, each, score) for each in (PIECES[scored], instead)
    )
    for method in ("paper", "gradcam", "hirescam"):
        options = {
            "tap": "input",
            "target": target,
            "contrast": contrast,
            "passes": contrasted_passes,
            "score": score,
            "rules": rules,
            "method": method,
        }
        found = compute_token_maps(model, processor, image, PROMPT, layers, **CLEAN, **options)
        for cam, (features, one), (same, other) in zip(found.maps.values(), first, second, strict=True):
            np.testing.assert_allclose(features, same, atol=1e-9)
            expected = core.METHODS[method].formula(torch.as_tensor(features), torch.as_tensor(one - other))
            np.testing.assert_allclose(cam.ravel(), expected, rtol=1e-5, atol=1e-7)
        assert max(cam.max() for cam in found.maps.values()) > 1e-2
        assert not found.no_gradient
    assert found.settings.contrast == contrast
    assert (found.answer, found.target) == (ANSWER, target)


@pytest.mark.parametrize("method", ["gradcam", "hirescam", "product"])
@pytest.mark.parametrize("tap", ["input", "output"])
def test_word_in_its_own_place_has_no_gradient_anywhere(model, processor, image, method, tap):
    layers = [0, 1, 2, decoder(model)[1].input_layernorm, model.model.visual.blocks[1], model.model.visual.merger]
    options = {"num_samples": 2, "answer": ANSWER, "method": method, "tap": tap}
    for target, score in (("red", "logit"), ("cat", "logprob"), ("red cat", "logprob"), ("猫", "logit")):
        options |= {"target": target, "contrast": target, "passes": contrasted_passes, "score": score}
        found = compute_token_maps(model, processor, image, PROMPT, layers, **options)
        assert found.no_gradient == set(found.maps)
        assert len(found.maps) == 6
        assert not any(cam.any() for cam in found.maps.values())


def test_contrast_takes_the_place_of_the_occurrence_that_is_explained(model, processor, image):
    maps = []
    for occurrence in (1, 2):
        options = CLEAN | {
            "answer": "cat the cat",
            "target": "cat",
            "contrast": "red",
            "passes": contrasted_passes,
            "target_occurrence": occurrence,
        }
        maps.append(compute_token_maps(model, processor, image, PROMPT, [0], method="hirescam", **options).maps[0])
    assert not np.allclose(*maps, atol=1e-3)
    options |= {
        "answer": "cat the cat",
        "target": "the cat",
        "contrast": "the red",
        "passes": contrasted_passes,
        "target_occurrence": 1,
    }
    # "the" is the same in both; its logits are those of the same positions: it cancels
    same = compute_token_maps(model, processor, image, PROMPT, [0], method="hirescam", **options).maps[0]
    np.testing.assert_allclose(same, maps[1], rtol=1e-5, atol=1e-7)


@UNEVEN
def test_contrast_in_the_vision_tower(model, processor):
    """What the merger gives enters layer 0 unchanged; below it the gradients are those of two passes too."""
    visual = model.model.visual
    image = make_image(196, 140)
    for contrast in ("car", "a"):  # longer and as long
        options = CLEAN | {"target": "cat", "contrast": contrast, "passes": contrasted_passes, "method": "hirescam"}
        found = compute_token_maps(model, processor, image, PROMPT, [0, visual.merger, visual.blocks[0]], **options)
        maps = found.maps
        np.testing.assert_allclose(maps["model.visual.merger"], maps[0], rtol=1e-5)
        assert maps[0].shape == (5, 7)
        assert min(cam.max() for cam in maps.values()) > 1e-3
        assert not found.no_gradient
    gradients = []
    inputs = core.prepare_inputs(model, processor, [image], PROMPT)
    taps = core.find_taps(model, [visual.blocks[0]], "input")
    for word in ("cat", "a"):
        tokens = core.tokenise(processor.tokenizer, f"the red {word}")
        forced, scored = core.score_parts(inputs, tokens, [range(5, len(tokens))])
        with core.borrowed(model):
            (pairs,) = core.features_and_gradients(model, forced, taps, scored, Settings().settled())
        gradients.append(pairs["model.visual.blocks.0"])
    (features, first), (_, second) = gradients
    heat = core.hirescam(features.float(), (first - second).float()).numpy()
    expected = core.to_grid("model.visual.blocks.0", heat, (5, 7), model.config.vision_config)
    np.testing.assert_allclose(maps["model.visual.blocks.0"], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contrast": "dog"}, "contrast='dog' needs a target"),
        (
            {"target": "cat", "contrast": "dog<|im_end|>", "passes": contrasted_passes},
            r"contrast=.*dog<\|im_end\|>.* without special tokens",
        ),
        (
            {"target": "cat", "contrast": "<|image_pad|>", "passes": contrasted_passes},
            r"contrast=.* without special tokens",
        ),
        ({"target": "dog", "contrast": "cat", "passes": contrasted_passes}, "target='dog' is not in the answer"),
    ],
)
def test_contrast_that_cannot_be_is_named(model, processor, image, options, message):
    with pytest.raises(ValueError, match=message):
        compute_token_maps(model, processor, image, PROMPT, [0], **CLEAN, **options)


@pytest.mark.parametrize(
    ("target", "contrast", "tokens"),
    [
        ("cat", "d", None),  # two tokens with the blank, which stays
        ("cat", "do", (3, 1)),
        ("red cat", "d", None),
        ("猫", "a", (1, 3)),
        ("猫", "ab", None),
        ("the", "them<>", None),
        ("the", "123 56", None),
        ("the", "123 567", (7, 3)),
    ],
)
def test_contrast_of_another_length_is_warned_of(model, processor, image, recwarn, target, contrast, tokens):
    """Of more than twice or less than half the tokens."""
    reading = read(model, processor, image, PROMPT, ANSWER)
    explain(
        reading,
        [find_target(ANSWER, target)],
        [0],
        Settings(use_smooth=False, contrast=contrast),
        passes=contrasted_passes,
    )
    expected = []
    if tokens:
        message = f"contrast={contrast!r} has {tokens[0]} tokens, the target {tokens[1]}: scores are sums over tokens, "
        expected = [(ExplanationWarning, message + "so the map mostly shows the difference in length")]
    assert [(type(warning.message), str(warning.message)) for warning in recwarn] == expected


# nothing is left behind


@UNEVEN
@pytest.mark.parametrize(
    ("compute", "options", "error"),
    [
        (compute_word_maps, {"words": "all", "method": "product"}, None),
        (compute_word_maps, {"words": "cat", "rules": "plain"}, None),
        (compute_token_maps, {"target": "cat", "contrast": "a dog", "passes": contrasted_passes}, None),
        (compute_token_maps, {"target": "cat", "target_occurrence": 1}, None),
        (compute_word_maps, {"words": "dog"}, ValueError),
        (compute_token_maps, {"target": "cat", "contrast": "<|im_end|>", "passes": contrasted_passes}, ValueError),
        (compute_token_maps, {"target": "cat", "target_occurrence": 9}, ValueError),
    ],
)
def test_model_and_random_state_are_as_before(make_model, processor, image, compute, options, error):
    model = unruly(make_model)
    before = state_of(model, image)
    if error:
        with pytest.raises(error):
            compute(model, processor, image, PROMPT, [0, 2], answer=ANSWER, **options)
    else:
        compute(model, processor, image, PROMPT, [0, 2], answer=ANSWER, num_samples=2, **options)
    assert state_of(model, image) == before


@UNEVEN
@pytest.mark.parametrize("forwards", [1, 2])
def test_model_is_as_before_when_the_other_pass_fails(make_model, processor, image, forwards):
    model = unruly(make_model)
    calls = []

    def stumble(*arguments):
        calls.append(1)
        if len(calls) == forwards:
            raising(KeyError("stumble"))(*arguments)

    decoder(model)[2].register_forward_pre_hook(stumble)
    before = state_of(model, image)
    options = {"answer": ANSWER, "target": "cat", "contrast": "dog", "passes": contrasted_passes}
    with pytest.raises(KeyError, match="stumble"):
        compute_token_maps(model, processor, image, PROMPT, [0, 2], **options)
    assert state_of(model, image) == before
    assert len(calls) == forwards


# names


@pytest.mark.parametrize(
    ("answer", "thinking", "names"),
    [
        ("left dog, left cat; left", 0, ["left", "dog", "left (2)", "cat", "left (3)"]),
        ("a hot-dog, a dog", 0, ["a", "hot-dog", "a (2)", "dog (2)"]),  # the first stands inside "hot-dog"
        ("the cat</think>the cat", 15, ["the", "cat"]),
        ("Cat cat", 0, ["Cat", "cat"]),
    ],
)
def test_number_in_a_name_is_the_target_occurrence(answer, thinking, names):
    maps = []
    for match in re.finditer(r"[\w-]+", answer[thinking:]):
        start, end = (thinking + place for place in match.span())
        word = make_maps({3: np.ones((2, 3), np.float32)}, answer=answer, target=match[0])
        maps.append(replace(word, target_span=(start, end), thinking=thinking))
    assert name_words(maps) == names
    for word, name in zip(maps, names, strict=True):
        number = int(name.split(" (")[1][:-1]) if " (" in name else 1
        start, end = find_target(answer[thinking:], word.target, number)
        assert (start + thinking, end + thinking) == word.target_span


def test_words_that_no_target_occurrence_explains_have_names_of_their_own():
    maps = [make_maps({3: np.ones((2, 3), np.float32)}, answer="cat_2 cat", target="cat") for _ in range(2)]
    maps[1] = replace(maps[1], target_span=(6, 9))
    assert name_words(maps) == ["cat (2)", "cat"]
