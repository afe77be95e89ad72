"""Eyes for another decoder: trained in seconds for the demo model's own, as a published one's would be in minutes."""

import contextlib
import io

import graft
import numpy as np
import pytest
import scenes
import torch
from safetensors.torch import load_file
from train import Packer

from common.checkpoint import load_model, load_processor
from smooth_gradcam import Settings, explain, read

DEMO = str(graft.DEMO)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the command writes, after a first step of the training and its continuation."""
    folder = tmp_path_factory.mktemp("graft")
    sizes = ["--batch_size", "1", "--own", "4", "--fitted", "4"]
    places = [f"--{name}={folder / name}" for name in ("checkpoint", "eyes", "output")]

    def train(minutes):
        flags = ["graft.py", "--decoder", DEMO, "--train", f"--minutes={minutes}", *sizes, *places]
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
            patch.setattr("sys.argv", flags)
            graft.main()
        return said.getvalue(), torch.load(folder / "checkpoint", weights_only=True)

    said, run = train(1e-6)
    assert "ridge regression" in said
    said, further = train(run["minutes"] + 1e-6)
    assert "ridge regression" not in said  # it goes on
    assert (run["step"], further["step"]) == (1, 2)
    return folder


def test_the_decoder_is_as_published_and_the_eyes_are_the_trained_ones(folder):
    grafted, demo = load_file(folder / "output" / "model.safetensors"), load_file(f"{DEMO}/model.safetensors")
    eyes = load_file(folder / "eyes")
    for name, weights in grafted.items():
        if ".visual." in name or name.startswith("visual."):
            assert (weights == eyes[name.split("visual.")[1]]).all()
        else:
            assert (weights == demo[name]).all()
    (name,) = [name for name in demo if name.endswith("blocks.3.mlp.up_proj.weight")]
    assert not (eyes["blocks.3.mlp.up_proj.weight"] == demo[name]).all()


def test_the_folder_is_an_ordinary_model(folder):
    model, processor = load_model(str(folder / "output"), "cpu", "auto"), load_processor(str(folder / "output"), 10**6)
    reading = read(model, processor, graft.DEMO.parent / "demo.jpeg", "What is in this image?", "A dog.")
    (found,) = explain(reading, [(2, 5)], [14], Settings(use_smooth=False))
    assert found.maps[14].max() > 0


def test_a_choice_is_between_what_is_there_and_what_is_not():
    scene = scenes.make_scene(3)
    present = {thing.kind for thing in scene.objects}
    for seed in range(20):
        question, answer = graft.choice(scene, np.random.default_rng(seed))
        asked = {kind for kind in scenes.KINDS if f" {scenes.a(kind)} " in question.replace("?", " ")}
        assert len(asked) == 2
        (there,) = asked & present
        assert answer in (f"There is {scenes.a(there)}.", f"There are {there}.")


def test_covers_are_shares_of_each_image_token():
    scene = scenes.make_scene(3)
    share = graft.covers(scene)
    np.testing.assert_allclose(share.sum(1), 1, rtol=1e-5)
    kinds = [scenes.KINDS.index(thing.kind) for thing in scene.objects]
    for index, kind in enumerate(kinds):
        assert (share[scene.cells().ravel() == index, kind] > 0.4).all()
    assert not share[:, [i for i in range(len(scenes.KINDS)) if i not in kinds]].any()


def test_a_batch_holds_the_answers_to_be_learned():
    tokenizer = load_processor(DEMO, 10**6).tokenizer
    own = [(number, "What might happen next?", "The dog.") for number in range(32)]
    for seed in (0, 3):
        batch = graft.make_batch(Packer(tokenizer), own, seed, 2)
        assert batch["ids"].shape == batch["segment"].shape == batch["learn"].shape == batch["positions"].shape[1:]
        learned = tokenizer.decode(batch["ids"][0][batch["learn"][0] == 1])
        assert ("The dog." in learned) == (seed == 3)
        assert learned.startswith("There ")


def test_a_decoder_that_is_not_there_is_named():
    with pytest.raises(SystemExit, match="--decoder nowhere/at-all is no model folder"):
        graft.load_decoder("nowhere/at-all")
