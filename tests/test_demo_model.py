"""The demo model loads as any checkpoint does, reads its scenes, and its maps light up where the objects are."""

import base64
import json
import re

import benchmark_words
import numpy as np
import pytest
import scenes
import torch
import train
from drawn_maps import prose_of
from evaluate import UNSEEN, answers, evaluate, read_description
from PIL import Image
from transformers import AutoProcessor

import common.page
import test_gradcam
from smooth_gradcam import Settings, explain, find_target, get_model_layers, read, upsample_cam

DEMO_MODEL = scenes.OBJECTS.parent
DOCUMENTED = "Describe the main content in this image in detail."
DEMO_KINDS = ("plane", "house", "dog", "bicycle")


@pytest.fixture(scope="module")
def demo(demo):
    return demo.model, demo.processor


def test_folder_is_small_enough_to_live_in_the_repository():
    files = [path for path in DEMO_MODEL.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files if path.parent.name != "eyes") <= 12_000_000
    assert sum(path.stat().st_size for path in (DEMO_MODEL / "eyes").iterdir()) <= 10_000_000


def test_architecture_is_that_of_the_7b_with_28_layers(demo):
    model, processor = demo
    assert get_model_layers(model)[1] == 28
    vision = model.config.vision_config
    assert 0 < len(vision.fullatt_block_indexes) < vision.depth  # window attention and full attention
    assert (vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size) == (2, 14, 2)
    assert [processor.tokenizer.decode([model.config.image_token_id])] == ["<|image_pad|>"]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_training_forward_agrees_with_transformers(demo):
    train.check_forward(demo[0], demo[1].tokenizer)


def test_growing_the_model_changes_no_logit():
    torch.manual_seed(0)
    tokenizer = AutoProcessor.from_pretrained(DEMO_MODEL).tokenizer
    core = train.build_model(train.CORE_LAYERS, tokenizer).eval()
    grown = train.grow(core, tokenizer).eval()
    ids = torch.randint(0, len(tokenizer), (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(core(input_ids=ids).logits, grown(input_ids=ids).logits)


def test_unseen_scenes_are_described(demo, monkeypatch):
    monkeypatch.setattr("evaluate.TOPICS", ("there",))  # the figures below are those of the descriptions
    figures = evaluate(*demo, count=8)
    for name in ("objects named", "scenes with nothing invented", "named objects placed right"):
        right, total = figures[name]
        assert right / total >= 0.8, (name, right, total)


def test_documented_prompt_names_and_places_every_object_of_the_demo_picture(demo):
    image = Image.open(DEMO_MODEL.parent / "demo.jpeg")
    scene = scenes.demo_scene()
    assert answers(*demo, [image], [DOCUMENTED]) == [scenes.describe(scene)]


def test_each_word_of_the_demo_picture_points_at_its_object_under_noise(demo):
    reading, kinds = read(*demo, Image.open(DEMO_MODEL.parent / "demo.jpeg"), DOCUMENTED), DEMO_KINDS
    spans = [find_target(reading.answer, kind) for kind in kinds]
    settings = Settings(3, 0.15, score="logprob", method="hirescam")
    for kind, result in zip(kinds, explain(reading, spans, [6], settings), strict=True):
        mask = scenes.demo_scene().object(kind).mask
        assert mask.flat[upsample_cam(result.maps[6], mask.shape).argmax()], kind


@pytest.mark.parametrize("number", [0, 4])
def test_each_word_of_an_unseen_scene_lights_its_own_object_and_no_other(demo, number):
    rows = benchmark_words.measure(*demo, number, layer=16, method="gradcam")
    assert len(rows) == len(scenes.make_scene(UNSEEN + number).objects) > 1
    assert all(near and not other for _, near, other in rows)


@pytest.fixture
def said_of_words(demo, tmp_path, capsys, monkeypatch, pages):
    """A function that runs words mode on the demo picture: (lines, {word: record}, {word: data of the page}, prose)."""
    monkeypatch.setattr(test_gradcam, "load_model", lambda *given: demo[0])
    monkeypatch.setattr(test_gradcam, "load_processor", lambda *given: demo[1])
    monkeypatch.setattr(common.page, "DPI", 40)

    def run(answer, words):
        flags = ["--mode", "words", "--layers", "14", "--noise_std", "0", "--output_dir", str(tmp_path), "--quiet"]
        assert test_gradcam.main([*flags, "--answer", answer, "--words", words]) == 0
        out, _ = capsys.readouterr()
        data = re.search(r'id="data">(.*?)</script>', (tmp_path / "words/index.html").read_text(encoding="utf-8"))
        records = json.loads((tmp_path / "words/words.json").read_text(encoding="utf-8"))["words"]
        shown = {word["text"]: word for word in json.loads(data[1])["words"]}
        return out.splitlines(), {word["name"]: word for word in records}, shown, prose_of(pages[-1])

    return run


def test_word_that_is_not_seen_is_not_believed_and_one_that_is_has_its_needed_tokens(said_of_words):
    lines, records, shown, prose = said_of_words(scenes.describe(scenes.demo_scene()), "There,dog")
    assert [line for line in lines if "warning" in line] == ["warning: not from the photo: There (100 % kept)"]
    there, dog = records["There"], records["dog"]
    assert there["evidence"]["p"] > 0.9 < there["evidence"]["kept"]
    assert there["doubt"] == "this does not come from the photo (100 % of p is left without it)"
    assert dog["evidence"]["p"] > 0.9
    assert dog["evidence"]["kept"] < 0.1
    assert dog["doubt"] == ""
    assert {word: one["doubt"] for word, one in shown.items()} == {"There": there["doubt"], "dog": ""}
    cam = np.frombuffer(base64.b64decode(shown["dog"]["maps"][0]), "<u2").reshape(12, 16).astype(np.float32)
    assert np.count_nonzero(cam) < 20
    assert scenes.demo_scene().object("dog").mask.flat[upsample_cam(cam, (900, 1200)).argmax()]
    assert "p 1.00, 100 % kept" in prose
    assert "the last two are not to be believed" in prose
    assert "Hot: where the explained words come from, on the image tokens alone that they need" in prose


def test_zebra_that_is_not_there_is_hardly_said(said_of_words):
    lines, records, shown, prose = said_of_words("There is a zebra.", "There,zebra")
    assert "warning: not from the photo: There (100 % kept), zebra (100 %)" in lines
    (unlikely,) = (line for line in lines if line.startswith("warning: hardly said"))
    assert re.fullmatch(r"warning: hardly said: zebra \(p \de-\d\)", unlikely)
    assert records["zebra"]["evidence"]["p"] < 1e-3
    assert records["zebra"]["doubt"].startswith("the model hardly says this (p ")
    assert all(one["doubt"] for one in shown.values())
    assert "Not to be believed, so drawn in 35 % of the colours" in prose
    assert "Hot:" not in prose


@pytest.mark.parametrize("prompt", ["Beschreibe das Bild.", "这张图片里有什么?", "ما هذا؟", "?!", "🙂", "x" * 300])
def test_any_prompt_in_any_script_is_answered_with_something(demo, prompt):
    assert answers(*demo, [Image.fromarray(scenes.make_scene(UNSEEN).image)], [prompt])[0].strip()


def test_same_seed_gives_the_same_scene_and_another_seed_another():
    first, again, other = (scenes.make_scene(seed, size=(280, 280)) for seed in (1, 1, 2))
    assert np.array_equal(first.image, again.image)
    assert not np.array_equal(first.image, other.image)


def test_masks_are_where_the_objects_are():
    bare = [
        scenes.make_scene(5, size=(280, 280), kinds=[kind], places=[4], background="plain") for kind in ("dog", "car")
    ]
    for scene in bare:
        ground = scene.image[0, 0].astype(int)
        drawn = (np.abs(scene.image.astype(int) - ground) > 3).any(-1)
        mask = scene.objects[0].mask
        assert (drawn & ~mask).sum() < 0.12 * mask.sum()  # the soft edge
        assert (mask & ~drawn).sum() < 0.12 * mask.sum()


def test_masks_do_not_overlap_and_lie_in_their_places():
    for seed in range(30):
        scene = scenes.make_scene(seed)
        assert sum(thing.mask.astype(int) for thing in scene.objects).max() <= 1
        for thing in scene.objects:
            rows, columns = np.nonzero(thing.mask)
            middle = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
            place = [int(3 * position / extent) for position, extent in zip(middle, thing.mask.shape, strict=True)]
            assert place == [thing.row, thing.column]


def test_answers_are_true_of_a_known_scene():
    scene = scenes.make_scene(3, size=(336, 336), kinds=["dog", "apple"], places=[0, 5])
    assert scenes.describe(scene) == "There is a dog at the top left and an apple on the right."
    assert scenes.list_objects(scene) == "A dog and an apple."
    assert scenes.where(scene, "apple") == "The apple is on the right."
    assert scenes.is_there(scene, "cat") == "No, there is no cat."
    assert scenes.how_many(scene) == "There are two objects."
    assert scenes.beside(scene, "to the left of", "apple") == "There is a dog to the left of the apple."
    assert scenes.beside(scene, "to the left of", "dog") == "There is nothing to the left of the dog."
    assert scenes.at_place(scene, 0) == "There is a dog at the top left."
    assert read_description(scenes.describe(scene)) == [("dog", "at the top left"), ("apple", "on the right")]


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unicorn.*dog"):
        scenes.make_scene(0, kinds=["unicorn"])
