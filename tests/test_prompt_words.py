"""What words take from the prompt: positions by their tokens, shares by plain autograd of a model by the book."""

import json
import re

import numpy as np
import pytest
from drawn_maps import laid_out, texts_of, worded
from family_models import ANSWER, LAYERS, autograd, by_the_book, decoder, make_processor, make_random

from common.page import Paper
from smooth_gradcam import Settings, explain, find_target, read
from studies.prompt_words import Asked, Relevances, Shares, prompt_words

PROMPT = "What is the red cat, 猫?"
CLEAN = Settings(use_smooth=False)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def reading(request, tokenizer, image):
    model = make_random(request.param, tokenizer)
    return read(model, make_processor(request.param, tokenizer), image, PROMPT, ANSWER)


def said(reading, place):
    return reading.processor.tokenizer.decode(reading.inputs["input_ids"][0, place]).strip()


def test_words_of_the_prompt_are_at_their_tokens(reading):
    spans, places = prompt_words(reading)
    assert [PROMPT[slice(*span)] for span in spans] == ["What", "is", "the", "red", "cat", "猫"]
    assert [said(reading, place) for place in places] == ["What", "is", "the", "red", "cat", "猫"]


def test_words_of_all_messages_are_in_their_order(reading, image):
    messages = [
        {"role": "system", "content": "the user"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the red"}]},
        {"role": "assistant", "content": "the cat"},
        {"role": "user", "content": "the cat"},
    ]
    messages[1]["content"][0]["image"] = image
    found = read(reading.model, reading.processor, None, messages, ANSWER)
    spans, places = prompt_words(found)
    words = ["the", "user", "the", "red", "the", "cat", "the", "cat"]
    assert [found.prompt[slice(*span)] for span in spans] == words
    assert [said(found, place) for place in places] == words
    assert sum(places, []) == sorted(sum(places, []))
    lines = found.prompt.split("\n")
    assert [found.prompt[: span[0]].count("\n") for span in spans] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert lines[3] == "user: the cat"


def test_shares_are_those_of_relevance_by_the_book(reading):
    span = find_target(ANSWER, "cat")
    passes = Relevances()
    maps = explain(reading, [find_target(ANSWER, "the"), span], range(LAYERS), CLEAN, passes=passes)
    asked = passes.asked(reading, maps)
    book, indices = by_the_book(reading.model, "attnlrp"), reading.tokens_of(span)
    before = reading.tokens[: indices[-1] + 1]
    first = reading.tokens[: indices[0]]
    places, length = prompt_words(reading)[1], reading.inputs["input_ids"].shape[1]
    together = autograd(book, reading, decoder(book), before)
    earlier = autograd(book, reading, decoder(book), first)  # the score of the words before, to be taken away
    for layer in range(LAYERS):
        features, gradient = together[layer]
        part = gradient.clone()
        part[:, : earlier[layer][1].shape[1]] -= earlier[layer][1]
        relevance = (features * part).sum(-1)[0].numpy()
        relevance /= np.abs(relevance).sum()
        expected = [relevance[place].sum() for place in places]
        own = asked.found[1]
        np.testing.assert_allclose(own.words[layer], expected, rtol=1e-3, atol=1e-5)
        assert own.photo[layer] == pytest.approx(relevance[reading.positions.numpy()].sum(), rel=1e-3, abs=1e-5)
        assert own.answer[layer] == pytest.approx(relevance[length:].sum(), rel=1e-3, abs=1e-5)
        assert np.abs(expected).max() > 1e-4


def test_copies_are_averaged_and_batches_change_nothing(reading):
    settings, found = Settings(num_samples=3), []
    for batch_size in (1, 3):
        passes = Relevances()
        maps = explain(reading, [(0, 3)], [1], settings, passes=passes, batch_size=batch_size)
        found.append(passes.asked(reading, maps).found[0].words)
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("settings", [{"tap": "output"}, {"rules": "plain"}, {"method": "paper"}])
def test_gradients_that_share_no_relevance_out_are_refused(reading, settings):
    with pytest.raises(ValueError, match="needs tap input and rules attnlrp, not tap"):
        explain(reading, [(0, 3)], [1], Settings(use_smooth=False, **settings), passes=Relevances())


# files


def test_command_writes_them_as_figure_numbers_and_page(drive, tmp_path, drawn, pages):
    flags = ("--mode", "words", "--words", "all", "--layers", "0", "1", "2", "--answer", "the red cat")
    code, out, _ = drive(*flags, "--prompt", "What is it?", "--prompt_words")
    assert code == 0
    folder = tmp_path / "out/words"
    record = json.loads((folder / "words.json").read_text())["prompt_words"]
    assert [word["word"] for word in record["words"]] == ["What", "is", "it"]
    assert np.shape(record["shares"]["cat"]["words"]) == (3, 3)
    assert f"red: {100 * record['shares']['red']['photo'][1]:.1f} % from the photo" in out
    assert (folder / "prompt_words.png").exists()
    data = json.loads((folder / "index.html").read_text().split('id="data">')[1].split("</script>")[0])
    assert data["asked"] == [{"start": 0, "end": 4}, {"start": 5, "end": 7}, {"start": 8, "end": 10}]
    np.testing.assert_allclose(data["words"][2]["asked"], record["shares"]["cat"]["words"], atol=1e-4)
    figure = next(page for page in pages if any("from the prompt," in text.get_text() for text in page.texts))
    assert sum(text.get_text() == "What is it?" for text in figure.texts) == 3
    code, _, _ = drive(*flags)
    assert "prompt_words" not in json.loads((folder / "words.json").read_text())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tap", "output"), "--tap cannot be combined with --prompt_words"),
        (("--method", "paper"), "--prompt_words cannot be combined with --method paper"),
        (("--mode", "grid"), "--prompt_words acts in words mode only"),
    ],
)
def test_flags_that_contradict_it_are_refused(drive, flags, message):
    code, _, err = drive("--mode", "words", "--prompt_words", *flags)
    assert code == 2
    assert message in err


# pages


def asked_of(count, prompt):
    """Made-up shares of `count` words of an answer, and their maps."""
    answer = ", ".join(f"w{i:02d}" for i in range(count)) + "."
    maps = worded([f"w{i:02d}" for i in range(count)], answer, (2, 3), [1])
    spans = [match.span() for match in re.finditer(r"\w+", prompt)]
    shares = [
        Shares(np.full((1, len(spans)), (-1) ** i / 100), np.array([0.3]), np.array([-0.1])) for i in range(count)
    ]
    return Asked(prompt, spans, [1], shares), maps


@pytest.mark.parametrize("width", ["page", "column"])
@pytest.mark.parametrize(("count", "prompt"), [(3, PROMPT), (60, 6 * PROMPT), (2, 150 * PROMPT)])
def test_long_answers_and_prompts_take_several_pages_and_each_line_stands_once(count, prompt, width):
    asked, maps = asked_of(count, prompt)
    files = asked.figures(maps, Paper(width))
    assert list(files) == ["prompt_words.png", *(f"prompt_words_{i}.png" for i in range(2, len(files) + 1))]
    assert (len(files) > 1) == (count > 3 or len(prompt) > 1000)
    found, heads = "", []
    for draw in files.values():
        figure = laid_out(draw(), width)
        assert figure.get_size_inches()[1] <= 9
        lines = [text for text in figure.texts if text.get_size() == 7 and text.get_color() != "0.3"]
        own = [text.get_text() for text in lines if text.get_weight() == "bold"]
        heads += own
        found += "".join(text.get_text() for text in lines if text.get_weight() != "bold")
        if len(files) > 1 and count > 3:
            title = " ".join(text.get_text().strip() for text in figure.texts if text.get_size() == 11)
            assert title.endswith(f" ({int(own[0][1:]) + 1}–{int(own[-1][1:]) + 1} of {count})")
    assert list(dict.fromkeys(heads)) == [word.target for word in maps]
    assert found.replace(" ", "") == count * prompt.replace(" ", "")


def test_words_that_come_again_have_their_number():
    asked, _ = asked_of(2, PROMPT)
    maps = worded(["dog", "dog"], "A dog, a dog.", (2, 3), [1])
    figure = asked.figures(maps, Paper())["prompt_words.png"]().figure
    assert {"dog", "dog (2)"} <= set(texts_of(figure))
