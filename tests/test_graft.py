"""Eyes for another decoder: trained in seconds for the demo model's own, as a published one's would be in minutes."""

import contextlib
import io
import json
import re
import shutil

import graft
import numpy as np
import pytest
import scenes
import torch
from safetensors.torch import load_file, save_file
from train import Packer
from transformers import (
    AutoModelForCausalLM,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
)

from common.checkpoint import load_model, load_processor
from smooth_gradcam import Settings, explain, read

DEMO = str(graft.DEMO)
SHIPPED = graft.EYES / "qwen2.5-0.5b-instruct.safetensors"


def run(*flags):
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr("sys.argv", ["graft.py", *map(str, flags)])
        graft.main()
    return said.getvalue()


def refused(*flags):
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as found:
        run(*flags)
    assert isinstance(found.value.code, str)
    assert "\n" not in found.value.code
    return found.value.code


@pytest.fixture
def nothing_loaded(monkeypatch):
    monkeypatch.setattr(graft, "build", lambda name: pytest.fail("weights are loaded"))


def save_qwen2(folder, kind=Qwen2ForCausalLM, **settings):
    """A random Qwen2 with the demo model's tokenizer."""
    settings = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2} | settings
    config = Qwen2Config(vocab_size=536, intermediate_size=48, num_hidden_layers=2, **settings)
    kind(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        shutil.copy(graft.DEMO / name, folder)
    return folder


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """A decoder of width 32."""
    return save_qwen2(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="module")
def same_width(tmp_path_factory):
    """A decoder as wide as the demo model."""
    return save_qwen2(tmp_path_factory.mktemp("same"), hidden_size=96)


def save_eyes(path, width):
    """The shipped eyes, cut to a width."""
    save_file({k: v[:width] if k.startswith(graft.LAST) else v for k, v in load_file(SHIPPED).items()}, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the command writes, after a first step of the training and its continuation."""
    folder = tmp_path_factory.mktemp("graft")
    sizes = ["--batch_size", "1", "--own", "4", "--fitted", "4"]
    places = [f"--{name}={folder / name}" for name in ("checkpoint", "eyes", "output")]

    def train(minutes):
        said = run("--decoder", DEMO, "--train", f"--minutes={minutes}", *sizes, *places)
        return said, torch.load(folder / "checkpoint", weights_only=True)

    said, first = train(1e-6)
    assert "ridge regression" in said
    said, further = train(first["minutes"] + 1e-6)
    assert "ridge regression" not in said  # it goes on
    assert (first["step"], further["step"]) == (1, 2)
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


def test_a_decoder_of_any_width_says_of_text_what_it_said(qwen2, tmp_path):
    eyes = save_eyes(tmp_path / "eyes.safetensors", 32)
    run("--decoder", qwen2, "--eyes", eyes, "--output", tmp_path / "output")
    published = AutoModelForCausalLM.from_pretrained(qwen2)
    grafted = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "output")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(grafted(input_ids=ids).logits, published(input_ids=ids).logits)
    assert (grafted.model.visual.state_dict()[f"{graft.LAST}.bias"] == load_file(eyes)[f"{graft.LAST}.bias"]).all()


# eyes and decoders of other widths


@pytest.mark.usefixtures("nothing_loaded")
def test_widths_are_compared_before_anything_is_loaded(qwen2, tmp_path):
    hint = "train eyes for it with --train --eyes build/eyes.safetensors"
    for flags, width in (((), "896 and 1536"), (("--eyes", save_eyes(tmp_path / "eyes", 64)), 64)):
        said = refused("--decoder", qwen2, "--output", tmp_path / "output", *flags)
        assert said == f"these eyes are for width {width}, and --decoder {qwen2} has 32: {hint}"


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize("name", ["missing", "junk", "other"])
def test_what_is_no_file_of_eyes_is_named(qwen2, tmp_path, name):
    (tmp_path / "junk").write_text("not a safetensors file")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other")
    said = refused("--decoder", qwen2, "--output", tmp_path / "output", "--eyes", tmp_path / name)
    assert said.startswith(f"--eyes {tmp_path / name} is no file of eyes: ")


@pytest.mark.parametrize("width", [32, 64])
def test_eyes_are_found_by_the_width_of_the_decoder(tmp_path, monkeypatch, qwen2, width):
    (tmp_path / "eyes").mkdir()
    files = {width: save_eyes(tmp_path / "eyes" / f"{width}.safetensors", width) for width in (32, 64)}
    monkeypatch.setattr(graft, "EYES", tmp_path / "eyes")
    folder = tmp_path / "decoder"
    folder.mkdir()
    config = json.loads((qwen2 / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": width}))
    monkeypatch.setattr("sys.argv", ["graft.py", f"--decoder={folder}", f"--output={tmp_path / 'output'}"])
    assert graft.check(graft.parse()) == files[width]


# nothing is overwritten that is not ours


@pytest.mark.usefixtures("nothing_loaded")
def test_training_needs_a_file_to_write(qwen2, tmp_path):
    assert refused("--decoder", qwen2, "--output", tmp_path / "output", "--train").startswith("--train needs --eyes")


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize("width", [32, 896])
def test_training_writes_over_no_shipped_eyes(tmp_path, qwen2, width):
    eyes, folder = tmp_path / "eyes", tmp_path / "decoder"
    shutil.copy(SHIPPED, eyes)
    folder.mkdir()
    config = json.loads((qwen2 / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": width}))
    places = [f"--{name}={tmp_path / name}" for name in ("checkpoint", "output")]
    said = refused("--decoder", folder, "--train", "--eyes", eyes, *places)
    assert said.startswith(f"--eyes {eyes} is not known to be for --decoder {folder}, and is kept as it is")
    assert eyes.read_bytes() == SHIPPED.read_bytes()


@pytest.mark.parametrize("flag", ["eyes", "checkpoint"])
@pytest.mark.parametrize("other", ["qwen2", "same_width"])
def test_training_of_another_decoder_is_neither_overwritten_nor_continued(
    folder, tmp_path, request, monkeypatch, flag, other
):
    monkeypatch.setattr(graft, "train_eyes", lambda *args: pytest.fail("it trains"))
    other = request.getfixturevalue(other)
    before = (folder / flag).read_bytes()
    places = {name: tmp_path / name for name in ("eyes", "checkpoint", "output")} | {flag: folder / flag}
    said = refused("--decoder", other, "--train", *(f"--{name}={path}" for name, path in places.items()))
    assert said.startswith(f"--{flag} {folder / flag} is not known to be for --decoder {other}, and is kept as it is")
    assert (folder / flag).read_bytes() == before


def test_a_checkpoint_that_does_not_note_its_decoder_is_of_any_of_its_width(folder, tmp_path, monkeypatch):
    run = torch.load(folder / "checkpoint", weights_only=True)
    torch.save({name: value for name, value in run.items() if name != "decoder"}, tmp_path / "former")
    flags = ["graft.py", "--train", f"--eyes={tmp_path / 'eyes'}", f"--checkpoint={tmp_path / 'former'}"]
    monkeypatch.setattr("sys.argv", flags)
    graft.check_training(graft.parse(), 96, "a hash")
    with pytest.raises(SystemExit, match="--checkpoint .* is not known to be for"):
        graft.check_training(graft.parse(), 32)


@pytest.mark.usefixtures("nothing_loaded")
def test_a_checkpoint_that_is_none_is_named(qwen2, tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other")
    (tmp_path / "junk").write_text("not a checkpoint")
    for path in (tmp_path, tmp_path / "other", tmp_path / "junk"):
        places = ("--eyes", tmp_path / "eyes", "--output", tmp_path / "output", "--checkpoint", path)
        said = refused("--decoder", qwen2, "--train", *places)
        assert said.startswith(f"--checkpoint {path} was not written by --train: ")


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize("output", ["photos", "model", "list", "file", "decoder"])
def test_no_folder_but_its_own_is_written_over(tmp_path, qwen2, output):
    path = tmp_path / output
    if output == "decoder":
        shutil.copytree(qwen2, path)
        qwen2 = path
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | graft.MARK))
    elif output == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        contents = {"photos": "a photo", "model": (graft.DEMO / "config.json").read_text(), "list": "[]"}
        (path / ("photo.png" if output == "photos" else "config.json")).write_text(contents[output])
    said = refused("--decoder", qwen2, "--eyes", save_eyes(tmp_path / "eyes", 32), "--output", path)
    assert said == f"--output {path} is not known to be from graft.py, or is the --decoder: give another"


def test_an_empty_folder_and_its_own_are_written(tmp_path, qwen2):
    flags = ("--decoder", qwen2, "--eyes", save_eyes(tmp_path / "eyes", 32), "--output", tmp_path / "output")
    (tmp_path / "output").mkdir()
    run(*flags)
    (tmp_path / "output" / "model.safetensors").unlink()
    run(*flags)
    assert (tmp_path / "output" / "model.safetensors").exists()


# decoders that are none


def test_a_decoder_that_is_not_there_is_named():
    with pytest.raises(SystemExit, match="--decoder nowhere/at-all is no model folder"):
        graft.load_decoder("nowhere/at-all")


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (None, "is no model folder"),
        ("{", "is no model folder"),
        ("[]", "is no model folder"),
        ('{"hidden_size": 32}', "is no model folder"),
        ('{"model_type": ["qwen2"]}', r"is a \['qwen2'\]: give a qwen2 or a qwen2_5_vl"),
        ('{"model_type": "bert", "hidden_size": 32}', "is a bert: give a qwen2 or a qwen2_5_vl"),
        ('{"model_type": "qwen2_5_vl_vision"}', "is a qwen2_5_vl_vision: give a qwen2 or a qwen2_5_vl"),
        ('{"model_type": "qwen2"}', "without the number vocab_size"),
        ('{"model_type": "qwen2_5_vl", "text_config": 3}', "without the number vocab_size"),
        ('{"model_type": "qwen2_5_vl", "text_config": {"vocab_size": 9}}', "without the number hidden_size"),
        ('{"model_type": "qwen2", "vocab_size": 9, "hidden_size": "32"}', "without the number hidden_size"),
        ('{"model_type": "qwen2", "quantization_config": {"quant_method": "awq"}}', "is quantised"),
    ],
)
def test_a_config_of_no_decoder_is_refused(tmp_path, config, reason):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    said = refused("--decoder", tmp_path, "--output", tmp_path / "output")
    assert re.match(f"--decoder {re.escape(str(tmp_path))} .*{reason}", said)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("pickles", "model.safetensors"),
        ("junk", "header"),
        ("headless", "its weights have no lm_head.weight"),
        ("untold", r"its tokenizer has no <\|image_pad\|>: give a Qwen2.5"),
    ],
)
def test_a_decoder_that_cannot_be_loaded_is_refused(tmp_path, broken, reason):
    folder = save_qwen2(tmp_path / "decoder", Qwen2Model if broken == "headless" else Qwen2ForCausalLM)
    weights = folder / "model.safetensors"
    if broken == "pickles":
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    elif broken == "junk":
        weights.write_bytes(b"junk" * 10)
    elif broken == "untold":
        for path in folder.glob("*token*.json"):
            path.write_text(path.read_text().replace("<|image_pad|>", "<|image_gap|>"))
    said = refused("--decoder", folder, "--eyes", save_eyes(tmp_path / "eyes", 32), "--output", tmp_path / "output")
    assert re.match(f"--decoder {re.escape(str(folder))} cannot be loaded: .*{reason}", said)
    assert not (tmp_path / "output").exists()
