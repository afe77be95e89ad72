"""Conversations, answers with thinking, and answers that were cut off."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SPECIAL, make_image
from family_models import (
    ALL,
    ANSWER,
    LAYERS,
    PROMPT,
    autograd,
    by_the_book,
    decoder,
    make_processor,
    make_random,
    map_by_hand,
)

import smooth_gradcam as core
from common.evidence import explain_with_evidence, image_hiding
from common.passes import repainted
from smooth_gradcam import ExplanationError, Settings, explain, find_target, read
from studies.decoder import token_groups
from studies.faithfulness import insertion_deletion
from studies.knockout import sever_photo

CLEAN = Settings(use_smooth=False)
SIZES = ((168, 112), (112, 196), (112, 112))  # of pictures, in pixels


def text(said):
    return {"type": "text", "text": said}


def picture(image=None):
    return {"type": "image"} | ({} if image is None else {"image": image})


def user(*parts):
    return {"role": "user", "content": list(parts)}


SYSTEM = {"role": "system", "content": "the cat"}
EARLIER = {"role": "assistant", "content": "a red cat"}


@pytest.fixture(scope="module")
def pictures():
    return [make_image(*size) for size in SIZES]


@pytest.fixture(scope="module")
def talk(pictures):
    """Three pictures: two of earlier turns, and one with the question."""
    first, second, last = pictures
    return [
        SYSTEM,
        user(picture(first), text("the red"), picture(second)),
        EARLIER,
        user(picture(last), text(PROMPT)),
    ]


def same_inputs(one, other):
    return one.inputs.keys() == other.inputs.keys() and all(
        torch.equal(value, other.inputs[name]) for name, value in one.inputs.items()
    )


# messages


def test_one_message_is_the_prompt(model, processor, image):
    plain = read(model, processor, image, PROMPT, ANSWER)
    for messages, given in (
        ([user(picture(), text(PROMPT))], image),
        ([user(picture(image), text(PROMPT))], None),
        ([{"role": "user", "content": PROMPT}], image),
        ((user(text(PROMPT)),), [image]),
    ):
        found = read(model, processor, given, messages, ANSWER)
        assert same_inputs(found, plain)
        assert (found.prompt, found.grid, found.photo.size) == (PROMPT, plain.grid, image.size)
        maps = explain(found, [(0, 3)], [1], CLEAN)[0].maps[1]
        np.testing.assert_array_equal(maps, explain(plain, [(0, 3)], [1], CLEAN)[0].maps[1])


def test_conversation_is_what_the_template_makes_of_it(model, processor, pictures, talk):
    found = read(model, processor, None, talk, ANSWER)
    bare = [
        {**message, "content": [{k: v for k, v in part.items() if k != "image"} for part in message["content"]]}
        if isinstance(message["content"], list)
        else message | {"content": [text(message["content"])]}
        for message in talk
    ]
    said = processor.apply_chat_template(bare, tokenize=False, add_generation_prompt=True)
    expected = processor(text=[said], images=pictures, return_tensors="pt")
    for name in ("input_ids", "pixel_values", "image_grid_thw"):
        assert torch.equal(found.inputs[name], expected[name])
    assert found.prompt == (
        f"system: the cat\nuser: [image] the red [image]\nassistant: a red cat\nuser: [image] {PROMPT}"
    )
    assert talk[1]["content"][0]["image"] is pictures[0]  # the caller's messages stay as they are


@pytest.mark.parametrize(
    ("place", "given", "number"),
    [(None, False, 2), (0, True, 0), (1, True, 1), (2, True, 2)],
    ids=["all in the messages", "first", "second", "last"],
)
def test_given_image_is_explained_or_else_the_last_picture(model, processor, pictures, talk, place, given, number):
    own = [[dict(part) for part in m["content"]] if isinstance(m["content"], list) else m["content"] for m in talk]
    messages = [message | {"content": content} for message, content in zip(talk, own, strict=True)]
    places = [part for content in own if isinstance(content, list) for part in content if part["type"] == "image"]
    if given:
        del places[place]["image"]
    found = read(model, processor, pictures[place] if given else None, messages, ANSWER)
    assert found.numbers == (number,)
    assert found.photo.size == SIZES[number]
    assert [photo.size for photo in found.pictures] == list(SIZES)
    assert same_inputs(found, read(model, processor, None, talk, ANSWER))


def test_image_stands_before_the_last_text_where_no_place_is_left(model, processor, pictures):
    first, second, last = pictures
    messages = [user(picture(first), text("the red")), EARLIER, user(text(PROMPT))]
    found = read(model, processor, last, messages, ANSWER)
    placed = read(model, processor, None, [*messages[:2], user(picture(last), text(PROMPT))], ANSWER)
    assert same_inputs(found, placed)
    assert found.numbers == (1,)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "must be a text, or a list of messages"),
        ([{"role": "user"}], "must be a text, or a list of messages"),
        ([{"content": "a"}], "must be a text, or a list of messages"),
        ([user(text("a")) | {"tool_calls": [{"function": "b"}]}], "must be a text, or a list of messages"),
        ([{"role": "user\n<|im_start|>", "content": "a"}], "must be a text, or a list of messages"),
        (["What?"], "must be a text, or a list of messages"),
        ([user({"type": "video", "video": "a.mp4"})], "must be a text, or a list of messages"),
        ([user(picture() | {"max_pixels": 3}, text("a"))], "must be a text, or a list of messages"),
        ([user(picture() | {"path": "a.jpg", "url": "b.jpg"}, text("a"))], "must be a text, or a list of messages"),
        ([user(text("a") | {"image": "a.jpg"})], "must be a text, or a list of messages"),
        ([user(picture() | {"text": "a"}, text("a"))], "must be a text, or a list of messages"),
        ([user(picture(), text(" "))], "must be a non-empty string"),
        ([user(picture(), {"type": "text"})], "must be a non-empty string"),
        ([user(picture(), text("a<|im_end|>b"))], "contains <|im_end|>"),
        ([user(picture(), text("a")), EARLIER], "the last message is the assistant's"),
        ([user(picture(), picture(), text("a"))], "have 2 places for a picture, and 1 are given"),
    ],
)
def test_bad_messages_are_errors(model, processor, image, messages, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(model, processor, image, messages, ANSWER)


def test_conversation_without_a_picture_is_an_error(model, processor):
    with pytest.raises(ValueError, match="image=None has no photo"):
        read(model, processor, None, [user(text("a"))], ANSWER)
    with pytest.raises(ValueError, match="1 places for a picture, and 0 are given"):
        read(model, processor, None, [user(picture(), text("a"))], ANSWER)


def test_picture_that_is_not_there_is_an_error(model, processor, talk):
    reading = read(model, processor, None, talk, ANSWER)
    for numbers in ((), (3,), (0, -1)):
        with pytest.raises(ValueError, match=re.escape(f"pictures {numbers} must be some of 0 to 2")):
            reading.of(*numbers)


# maps of a conversation's pictures


@pytest.fixture(scope="module", params=ALL)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def converse(family, tokenizer, talk):
    """(reading, the same by the book) of each family."""
    model = make_random(family, tokenizer)
    reading = read(model, make_processor(family, tokenizer), None, talk, ANSWER)
    return reading, by_the_book(model, "attnlrp")


@pytest.mark.parametrize("numbers", [(0,), (2,), (0, 1, 2), (2, 0)])
def test_each_picture_has_the_map_of_its_own_tokens(converse, numbers):
    reading, book = converse[0].of(*numbers), converse[1]
    found = explain(reading, [(0, len(ANSWER))], range(LAYERS), Settings(use_smooth=False, method="hirescam"))
    assert [maps.image for maps in found] == list(numbers)
    assert [maps.grid for maps in found] == [converse[0].of(i).grid for i in numbers]
    expected = autograd(book, reading, decoder(book), reading.tokens)
    for layer in range(LAYERS):
        pair = (tensor[0, reading.positions] for tensor in expected[layer])
        heat = map_by_hand(*pair, "hirescam")
        together = np.concatenate([maps.maps[layer].ravel() for maps in found])
        np.testing.assert_allclose(together, heat, rtol=1e-4, atol=1e-6 * heat.max())


def test_vision_towers_rows_are_those_of_the_picture(converse):
    reading = converse[0]
    merger = reading.model.model.visual.merger
    every = explain(reading.of(0, 1, 2), [(0, 3)], [merger], Settings(use_smooth=False, method="paper"))
    for number in (0, 1, 2):
        (alone,) = explain(reading.of(number), [(0, 3)], [merger], Settings(use_smooth=False, method="paper"))
        ((name, cam),) = alone.maps.items()
        assert cam.shape == every[number].maps[name].shape
        assert alone.image == number


@pytest.mark.parametrize("number", [0, 1, 2])
def test_hidden_picture_is_hidden_from_all_that_follows_it(converse, number):
    """Its keys blocked by an attention mask in one run of the whole sequence, the others' pictures still seen."""
    reading = converse[0].of(number)
    with image_hiding(reading) as hide:
        found = hide(np.array([[True] * len(reading.positions), [False] * len(reading.positions)]))
    forced, (scored,) = core.score_parts(reading.inputs, reading.tokens, [range(len(reading.tokens))])
    length, places = forced["input_ids"].shape[1], reading.positions
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    blind = allowed.clone()
    blind[int(places[-1]) + 1 :, places] = False
    decoder_of = reading.model.model.language_model

    def masked(mask):
        def hook(module, args, kwargs):
            large = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e300)[None, None]
            return args, kwargs | {"attention_mask": large}

        return hook

    for row, mask in ((0, blind), (1, allowed)):
        handles = [
            layer.self_attn.register_forward_pre_hook(masked(mask), with_kwargs=True) for layer in decoder_of.layers
        ]
        try:
            with torch.no_grad():
                logits = reading.model(**forced, use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        chosen = logits.softmax(-1)[scored.predicting, scored.expected]
        np.testing.assert_allclose(found[row], chosen.numpy(), rtol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-4


def test_measures_change_the_explained_picture_alone(converse):
    reading = converse[0].of(1)
    black = repainted(reading, core.load_rgb(np.zeros((196, 112, 3), np.uint8)))
    changed = (black != reading.inputs["pixel_values"]).any(1)
    rows = len(black) // len(reading.own)
    assert torch.equal(changed, reading.own.repeat_interleave(rows))
    (maps,) = explain(reading, [(0, 3)], [1], CLEAN)
    measured = insertion_deletion(reading, maps, steps=3, random_orders=0)
    assert measured.insertion[1][-1] == pytest.approx(measured.deletion[1][0])
    assert measured.insertion[1][0] != pytest.approx(measured.insertion[1][-1], rel=1e-4)


def test_groups_and_truncation_are_of_the_explained_picture(model, processor, talk):
    reading = read(model, processor, None, talk, ANSWER)
    groups = token_groups(reading)
    assert groups["image"].tolist() == reading.positions.tolist()
    severed = sever_photo(reading)
    with image_hiding(reading) as hide:
        hidden = hide(np.ones((1, len(reading.positions)), bool))[0]
    np.testing.assert_allclose(severed.removed[0], hidden, rtol=1e-6)


# thinking


THOUGHT = "<think>the dog</think>\n\nthe red cat"


@pytest.mark.parametrize(
    ("answer", "thinking", "target"),
    [
        ("<think>the dog</think>\n\nthe red cat", "<think>the dog</think>\n\n", "the red cat"),
        ("the dog</think> the red cat", "the dog</think> ", "the red cat"),  # the template has opened it
        ("<think></think>the red cat", "<think></think>", "the red cat"),
        ("the red cat", "", "the red cat"),
    ],
)
def test_answer_is_what_stands_behind_the_thinking(model, processor, image, answer, thinking, target):
    reading = read(model, processor, image, PROMPT, answer)
    assert reading.answer[: reading.thinking] == thinking
    assert reading.answer[slice(*find_target(reading, None))] == target
    (maps,) = explain(reading, [reading.part()], [0], CLEAN)
    assert maps.whole
    assert maps.target == target
    assert (0, 1) != reading.part("all") == (0, len(answer))


def test_target_is_sought_in_its_part(model, processor, image):
    reading = read(model, processor, image, PROMPT, THOUGHT)
    start = THOUGHT.index("the red")
    assert find_target(reading, "the") == (start, start + 3)
    assert find_target(reading, "the", part="thinking") == (7, 10)
    assert find_target(reading, "the", 2, part="all") == (start, start + 3)
    with pytest.raises(ValueError, match=r"target='dog' is not in the answer 'the red cat'"):
        find_target(reading, "dog")
    with pytest.raises(ValueError, match="part='thoughts' must be one of answer, thinking, all"):
        find_target(reading, "the", part="thoughts")


def test_answer_that_never_stops_thinking_has_none(model, processor, image):
    reading = read(model, processor, image, PROMPT, "<think>the red cat")
    with pytest.raises(ExplanationError, match="there is no answer to explain in '<think>the red cat'"):
        find_target(reading, None)
    assert find_target(reading, "cat", part="thinking") == (15, 18)
    with pytest.raises(ExplanationError, match="there is no thinking"):
        read(model, processor, image, PROMPT, "the cat").part("thinking")


def test_special_tokens_of_thinking_end_it_too():
    class Marked:
        def convert_ids_to_tokens(self, ids):
            return [["<think>", "a", "</think>", "b"][i] for i in ids]

    assert core.thinking_end(Marked(), [0, 1, 2, 3], [(0, 0), (0, 1), (1, 1), (1, 3)], "a b") == 2
    assert core.thinking_end(Marked(), [0, 1], [(0, 0), (0, 1)], "a") == 1
    assert core.thinking_end(Marked(), [1, 3], [(0, 1), (1, 2)], "ab") == 0


def test_evidence_of_the_answer_leaves_its_thinking_out(model, processor, image):
    reading = read(model, processor, image, PROMPT, THOUGHT)
    maps, every = explain_with_evidence(
        reading, [reading.part(), reading.part("all")], [0], replace(CLEAN, method="auto")
    )
    assert {maps.settings.method, every.settings.method} == {"gradcam"}
    assert len(maps.evidence.tokens) < len(every.evidence.tokens) == len(reading.tokens)


def test_markers_of_grounding_may_stand_in_an_answer(model, processor, image, monkeypatch):
    tokenizer = processor.tokenizer
    monkeypatch.setattr(core, "GROUNDING", "object|box|quad|think|vision_pad")  # which the tiny tokenizer has
    tokens = core.tokenise(tokenizer, "<|vision_pad|>the cat")
    assert tokenizer.convert_ids_to_tokens(tokens)[0] == "<|vision_pad|>"
    reading = read(model, processor, image, PROMPT, "<|vision_pad|>the cat<|vision_pad|>")
    assert reading.answer == "the cat"
    assert reading.tokens_of(find_target(reading, "cat")) == [i for i, s in enumerate(reading.spans) if s == (3, 7)]
    with pytest.raises(ValueError, match="without special tokens"):
        core.tokenise(tokenizer, f"{SPECIAL[2]} the cat")


def test_numbers_of_a_box_are_targets(model, processor, image):
    answer = '[{"bbox_2d": [10, 20, 110, 210], "label": "cat"}]'
    reading = read(model, processor, image, PROMPT, answer)
    start, end = find_target(reading, "10")
    assert answer[start - 1 : end + 1] == "[10,"
    assert [answer[slice(*reading.spans[i])] for i in reading.tokens_of(find_target(reading, "110"))] == list("110")


# cut off


def test_answer_without_an_end_is_cut_off(model, processor, image):
    reading = read(model, processor, image, PROMPT, max_new_tokens=3)
    assert reading.cut_off
    (maps,) = explain(reading, [reading.part()], [0], CLEAN)
    assert maps.cut_off
    given = read(model, processor, image, PROMPT, reading.answer)
    assert not given.cut_off


def test_answer_with_an_end_is_not_cut_off(model, processor, image, monkeypatch):
    monkeypatch.setattr(core, "generate", lambda *args: (core.tokenise(processor.tokenizer, "the cat"), False))
    assert not read(model, processor, image, PROMPT).cut_off


def test_end_token_says_whether_the_answer_is_cut_off(model, processor, image):
    reading = read(model, processor, image, PROMPT, max_new_tokens=2)
    usual = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = [reading.tokens[-1]]
        tokens, cut_off = core.generate(model, processor.tokenizer, reading.inputs, 2)
    finally:
        model.generation_config.eos_token_id = usual
    assert (tokens, cut_off) == (reading.tokens[:-1], False)


# contrast


def test_contrast_has_its_probability_in_the_place_of_the_words(model, processor, image):
    reading = read(model, processor, image, PROMPT, "the cat is red")
    from common.passes import contrasted_passes

    settings = replace(CLEAN, contrast="red")
    (maps,) = explain_with_evidence(reading, [find_target(reading, "cat")], [0], settings, passes=contrasted_passes)
    (other,) = explain_with_evidence(
        read(model, processor, image, PROMPT, "the red"), [(3, 7)], [0], CLEAN
    )  # with its blank
    assert maps.evidence.contrast == pytest.approx(other.evidence.p, rel=1e-6)
    assert str(maps.evidence).endswith(f"; the contrast's p {other.evidence.p:.2f}") or other.evidence.p < 0.01
    assert other.evidence.contrast is None


# the builders


def test_builders_draw_the_explained_picture_of_messages(model, processor, pictures, tmp_path):
    import test_gradcam
    from studies.words import create_word_maps
    from visualization_utils import create_comparative_analysis, create_layer_comparison_grid

    first, second, _ = pictures
    messages = [user(picture(first), text("the red")), EARLIER, user(picture(second), text(PROMPT))]
    quick = {"answer": ANSWER, "num_samples": 1, "noise_std": 0, "quiet": True, "save_dir": tmp_path}
    for image, size in ((None, second.size), (pictures[2], pictures[2].size)):
        grid = create_layer_comparison_grid(model, processor, image, messages, [0], **quick)
        single = test_gradcam.single_layer_visualization(model, processor, image, messages, 0, **quick)
        words = create_word_maps(model, processor, image, messages, [0], **quick)["cat"]
        thirds = create_comparative_analysis(model, processor, image, messages, **quick)
        for found in (grid[0], single, words[0], thirds["early"][0]):
            assert found["superimposed"].shape == (*size[::-1], 3)
            assert found["cam"].shape == (size[1] // 28, size[0] // 28)
    with pytest.raises(ValueError, match="image=None has no photo"):
        create_layer_comparison_grid(model, processor, None, PROMPT, [0], **quick)


# the command line


@pytest.fixture
def chat(tmp_path, pictures):
    """A function that writes messages to a file, beside pictures a.png and b.png."""
    for name, each in zip("ab", pictures, strict=False):
        each.save(tmp_path / f"{name}.png")

    def write(*messages):
        path = tmp_path / "chat.json"
        path.write_text(json.dumps(list(messages)))
        return path

    return write


@pytest.fixture
def readings(monkeypatch):
    """What the driver has read."""
    import test_gradcam

    found, usual = [], test_gradcam.read
    monkeypatch.setattr(test_gradcam, "read", lambda *given: found.append(usual(*given)) or found[-1])
    return found


def test_system_prompt_stands_before_the_question(drive, readings):
    assert drive("--system", "the cat", "--prompt", "the red", "--answer", "cat")[0] == 0
    assert readings[0].prompt == "system: the cat\nuser: [image] the red"
    ids = readings[0].inputs["input_ids"][0]
    said = readings[0].processor.tokenizer.decode(ids)
    assert "You are a helpful" not in said.split("the cat")[1]


def test_photo_takes_the_place_in_the_messages(drive, readings, chat, photo_path):
    path = chat(user(picture("a.png"), text("the red")), EARLIER, user(picture(), text("the cat")))
    assert drive("--messages", path, "--answer", "cat", "--image_path", photo_path)[0] == 0
    assert readings[0].numbers == (1,)
    assert readings[0].pictures[0].size == SIZES[0]
    assert readings[0].photo.size == (168, 112)


def test_last_picture_of_the_messages_is_explained_without_a_photo(model_folder, readings, chat, tmp_path, capsys):
    import test_gradcam

    path = chat(user(picture("a.png"), text("the red")), EARLIER, user(picture("b.png"), text("the cat")))
    flags = ["--mode", "single", "--model_path", model_folder, "--output_dir", tmp_path / "out", "--messages", path]
    assert test_gradcam.main([*map(str, flags), "--answer", "cat", "--noise_std", "0", "--device", "cpu"]) == 0
    assert (readings[0].numbers, readings[0].photo.size) == ((1,), SIZES[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("5", "the messages are '5': give a list of them"),
        ('"hi"', "the messages are 'hi': give a list of them"),
        (json.dumps([user(picture("a.png") | {"path": "b.png"}, text("a"))]), "must be a text, or a list of messages"),
        ('{"role": "user"}', "give a list of them"),
        (
            '[{"role": "user", "content": [{"type": "image", "image": 3}, {"type": "text", "text": "a"}]}]',
            "give a path",
        ),
        (
            '[{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "a"}]}]',
            "2 pla",
        ),
        ('[{"role": "user", "role": "user", "content": "a"}]', "a name is there twice"),
        ("[" * 50 + "]" * 50, "nested deeper than 20"),
        (
            json.dumps([user(picture("c.png"), text("a"))]),
            "--messages: the image ",
        ),
        (json.dumps([user(picture("https://a.b/c.png"), text("a"))]), "--messages https://a.b/c.png is an address"),
    ],
)
def test_bad_files_of_messages_are_errors(drive, tmp_path, content, message):
    path = tmp_path / "chat.json"
    path.write_text(content)
    code, _, err = drive("--messages", path)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("listed", [False, True])
def test_file_of_messages_is_never_overwritten(drive, tmp_path, pictures, listed):
    path = tmp_path / "out/single" / ("results.jsonl" if listed else "visualization.png")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([user(text("the cat"))]))
    before = path.read_bytes()
    for name, each in zip("ab", pictures, strict=False):
        each.save(tmp_path / f"{name}.png")
    photos = ("--image_path", tmp_path / "a.png", *([tmp_path / "b.png"] if listed else []))
    code, _, err = drive("--mode", "single", "--messages", path, "--answer", "cat", *photos)
    assert code == 2
    assert f"the input {path} lies in" in err
    assert path.read_bytes() == before


def test_file_may_begin_with_a_mark_and_have_null_for_the_place(drive, tmp_path):
    content = json.dumps([user(picture() | {"image": None}, text("the cat"))])
    (tmp_path / "chat.json").write_text(content, encoding="utf-8-sig")
    assert drive("--messages", tmp_path / "chat.json", "--answer", "cat")[0] == 0


def test_words_of_a_cut_off_answer_that_has_none_say_so(drive):
    code, _, err = drive("--mode", "words", "--words", "zebra", "--max_new_tokens", 2)
    assert code == 2
    assert "(it was cut off after 2 tokens: --max_new_tokens)" in err


def test_messages_that_are_no_file_are_errors(drive, tmp_path):
    for path, message in ((tmp_path, "a folder"), (tmp_path / "none.json", "No such file")):
        code, _, err = drive("--messages", path)
        assert code == 2
        assert f"--messages {path}" in err
        assert message in err


def test_flags_of_the_prompt_cannot_be_combined_with_messages(drive, chat):
    for flag in ("--prompt", "--system"):
        code, _, err = drive("--messages", chat(user(text("a"))), flag, "b")
        assert code == 2
        assert f"{flag} cannot be combined with --messages" in err


def test_list_has_conversations_of_its_own(drive, readings, tmp_path, pictures):
    for name, each in zip("abc", pictures, strict=True):
        each.save(tmp_path / f"{name}.png")
    messages = [user(picture("a.png"), text("the red")), EARLIER, user(picture(), text("the cat"))]
    lines = [
        {"image": "b.png", "messages": messages, "answer": "cat"},
        {"image": "c.png", "prompt": "the cat", "answer": "cat"},
    ]
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert drive("--image_path", path)[0] == 0
    assert [(len(reading.pictures), reading.photo.size) for reading in readings] == [(2, SIZES[1]), (1, SIZES[2])]
    readings.clear()
    assert "2 skipped as complete" in drive("--image_path", path)[1]
    make_image(140, 140).save(tmp_path / "a.png")  # the picture of an earlier turn has changed
    code, _, err = drive("--image_path", path)
    assert code == 2
    assert "holds a result" in err
    assert not readings


def test_lists_bad_messages_are_errors_of_their_line(drive, tmp_path, pictures):
    pictures[0].save(tmp_path / "a.png")
    path = tmp_path / "list.jsonl"
    lines = [
        {"image": "a.png", "messages": [{"role": "user", "content": 3}]},
        {"image": "a.png", "messages": [user(text("the cat"))], "prompt": "a"},
        {"image": "a.png", "answer": "cat"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    code, _, err = drive("--image_path", path)
    assert code == 1
    assert "line 1 has messages that cannot be read" in err
    assert "line 2 has a prompt beside its messages" in err


def test_part_of_an_answer_is_explained(drive):
    answer = "<think>the cat</think> the red"
    for flags, said in (
        ((), "explained: the whole answer"),
        (("--target", "the"), "explained: 'the'"),
        (("--part", "thinking", "--target", "cat"), "explained: 'cat'"),
        (("--part", "all"), "explained: the whole answer"),
    ):
        code, out, err = drive("--answer", answer, *flags)
        assert (code, err.count("error")) == (0, 0)
        assert said in out
    code, _, err = drive("--answer", answer, "--target", "cat")
    assert code == 2
    assert "target='cat' is not in the answer 'the red'" in err


def test_words_of_thinking_and_answer_are_drawn_apart(drive, tmp_path):
    code, out, _ = drive(
        "--mode", "words", "--words", "all", "--answer", "<think>the cat</think> red cat", "--layers", 0
    )
    assert code == 0
    assert {"words_by_layer.png", "words_by_layer_thinking.png"} <= {p.name for p in (tmp_path / "out/words").iterdir()}
    record = json.loads((tmp_path / "out/words/words.json").read_text())
    assert record["answer"][: record["thinking"]] == "<think>the cat</think> "
    behind = [word["word"] for word in record["words"] if word["span"][0] >= record["thinking"]]
    assert behind == ["red", "cat"]
    assert [word["word"] for word in record["words"]] == ["the", "cat", *behind]
    code, out, _ = drive(
        "--mode", "words", "--words", "all", "--answer", "<think>the</think> red cat", "--part", "answer"
    )
    assert "explained: red, cat at" in out


def test_cut_off_answer_is_said_everywhere(drive, tmp_path, drawn, pages):
    code, out, err = drive("--max_new_tokens", 4)
    assert code == 0
    assert "warning: the answer was cut off after 4 tokens: --max_new_tokens" in out
    texts = "".join(text.get_text() for page in pages for text in page.texts)
    assert "the answer was cut off after 4 tokens" in texts.replace("\n", " ")
