"""Checkpoints from strangers: what their files may hold, what is said of odd ones, and what has no effect."""

import functools
import json
import os
import pickle
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import CHAT_TEMPLATE, make_image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, dynamic_module_utils
from transformers.utils.chat_template_utils import render_jinja_template

import common.page
import common.template
import smooth_gradcam as core
import test_gradcam
from common.checkpoint import count_layers, load_model, load_processor, model_identity, model_named
from common.refusals import checkpoint_folder, settings, wrong_with
from common.template import render
from smooth_gradcam import ExplanationWarning

ROOT = Path(__file__).parent.parent
ANSWER, PROMPT = "the red cat", "What is it?"


@pytest.fixture(scope="session")
def sound(tmp_path_factory, make_model, processor):
    """A tiny checkpoint with nothing wrong."""
    folder = tmp_path_factory.mktemp("sound")
    make_model(torch.float32).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def make(sound, tmp_path):
    """A function that copies the checkpoint, and changes files: {name: text, record to be merged, or function}."""

    def make(changes=(), folder=tmp_path / "odd"):
        shutil.copytree(sound, folder)
        for name, change in dict(changes).items():
            path = folder / name
            if "image_processor" in change and not path.exists():  # transformers 4 has a file for it
                path, change = folder / "preprocessor_config.json", change["image_processor"]
            if isinstance(change, dict):
                old = json.loads(path.read_text()) if path.exists() else {}
                change = json.dumps(merged(old, change))
            path.parent.mkdir(exist_ok=True)
            path.write_text(change)
        return folder

    return make


def merged(old, new):
    """The record with the new values, at any depth."""
    return old | {
        key: merged(old[key], value) if isinstance(value, dict) and isinstance(old.get(key), dict) else value
        for key, value in new.items()
    }


@pytest.fixture
def asked(monkeypatch):
    """What was asked on the terminal: the answer is always yes."""
    questions = []
    monkeypatch.setattr("builtins.input", lambda *text: questions.append(text) or "y")
    yield questions
    assert not questions


@pytest.fixture
def drive(sound, asked, tmp_path, capsys, blank_figures):
    """Run the driver on a checkpoint; returns (exit code, stdout, stderr)."""
    make_image(110, 90).save(tmp_path / "photo.png")

    def drive(*flags):
        usual = ["--model_path", sound, "--output_dir", tmp_path / "out", "--image_path", tmp_path / "photo.png"]
        usual += ["--mode", "single", "--num_samples", 1, "--device", "cpu", "--max_new_tokens", 3, *flags]
        if "--answer" in flags:
            del usual[usual.index("--max_new_tokens") : usual.index("--max_new_tokens") + 2]
        code = test_gradcam.main(list(map(str, usual)))
        return code, *capsys.readouterr()

    return drive


def refused(run, folder, said):
    """Exit code 2, with one line that names the checkpoint and says this."""
    code, out, err = run
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith(f"test_gradcam.py: error: --model_path {folder}"), err
    assert said in err


# what the files may hold

CODE = "wants to run code of its own (auto_map), which this tool never does"
MODEL = "names a model of its own (audio_tokenizer"
FILES = ["config", "generation_config", "processor_config", "preprocessor_config", "video_preprocessor_config"]
FILES += ["tokenizer_config", "special_tokens_map"]
AUDIO = {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": "trap"}
HELD = [
    *((f"{file}.json", {"auto_map": {"AutoModel": "trap.Trap"}}, CODE) for file in FILES),
    ("tokenizer_config.json", {"auto_map": ["trap.Trap", None]}, CODE),
    ("processor_config.json", {"image_processor": {"auto_map": {"AutoImageProcessor": "trap.Trap"}}}, CODE),
    ("config.json", {"vision_config": {"auto_map": {"AutoConfig": "trap.Trap"}}}, CODE),
    ("generation_config.json", {"custom_generate": "trap"}, "wants to run code of its own (custom_generate)"),
    *((f"{file}.json", {"audio_tokenizer": AUDIO}, MODEL) for file in FILES),
    ("processor_config.json", {"audio_tokenizer": None}, MODEL),
    ("audio_tokenizer_config.json", AUDIO, "holds an audio tokenizer"),
    ("adapter_config.json", {"base_model_name_or_path": "trap"}, "holds an adapter (adapter_config.json)"),
    ("config.json", {"transformers_weights": "pytorch_model.bin"}, "keeps weights in pytorch_model.bin: only"),
    ("config.json", {"transformers_weights": "../model.safetensors"}, "keeps weights in ../model.safetensors: only"),
    ("config.json", {"text_config": {"transformers_weights": "a.bin"}}, "keeps weights in a.bin: only safetensors"),
    ("config.json", {"configuration_files": ["config.4.0.0.json"]}, "names files to be read (configuration_files)"),
    ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.4.json"]}, "to be read (fast_tokenizer_files)"),
    ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}, "names files to be read (vocab_file)"),
    ("tokenizer_config.json", {"tokenizer_file": "../t.json"}, "names files to be read (tokenizer_file)"),
    ("tokenizer_config.json", {"gguf_file": "a.gguf"}, "names files to be read (gguf_file)"),
    ("tokenizer_config.json", {"init_inputs": ["/etc/passwd"]}, "names files to be read (init_inputs)"),
    ("special_tokens_map.json", {"merges_file": "/etc/passwd"}, "names files to be read (merges_file)"),
    ("tokenizer_config.json", {"tokenizer_class": "RagTokenizer"}, "wants the class 'RagTokenizer' (tokenizer_class)"),
    ("config.json", {"tokenizer_class": "BertJapaneseTokenizer"}, "wants the class 'BertJapaneseTokenizer'"),
    ("tokenizer_config.json", {"processor_class": "Wav2Vec2ProcessorWithLM"}, "wants the class 'Wav2Vec2Processor"),
    ("processor_config.json", {"processor_class": "Qwen2AudioProcessor"}, "wants the class 'Qwen2AudioProcessor'"),
    ("preprocessor_config.json", {"image_processor_type": "TimmWrapperImageProcessor"}, "wants the class 'Timm"),
    ("preprocessor_config.json", {"feature_extractor_type": "X"}, "wants the class 'X' (feature_extractor_type)"),
    ("processor_config.json", {"video_processor": {"video_processor_type": 3}}, "wants the class 3"),
    ("config.json", {"_attn_implementation": "someone/kernel"}, "wants attention code 'someone/kernel'"),
    ("config.json", {"attn_implementation": {"text_config": "a/b"}}, "wants attention code {'text_config': 'a/b'}"),
    (
        "config.json",
        {"text_config": {"attn_implementation": "flash_attention_2"}},
        "attention code 'flash_attention_2'",
    ),
    ("config.json", {"experts_implementation": "a/b"}, "wants attention code 'a/b'"),
    ("config.json", {"quantization_config": {"quant_method": "fp8"}}, "is quantised by 'fp8'"),
    ("config.json", {"quantization_config": {"quant_method": ["torchao"]}}, "is quantised by ['torchao']"),
    ("config.json", {"quantization_config": "x"}, "is quantised by 'x'"),
    ("model.safetensors.index.json", {"weight_map": {"a": "w.bin"}}, "keeps weights in w.bin: only safetensors of"),
    ("model.fp16.safetensors.index.json", {"weight_map": {"a": "../w.safetensors"}}, "keeps weights in ../w.safe"),
    ("model.safetensors.index.json", {"weight_map": {"a": 3}}, "has an unreadable model.safetensors.index.json"),
    ("model.safetensors.index.json", {"weight_map": []}, "has an unreadable model.safetensors.index.json"),
    ("config.json", {"vision_config": {"patch_size": 0}}, "has patch_size 0: it must be a whole number, 1 to 1024"),
    ("config.json", {"vision_config": {"depth": 10**9}}, "has depth 1000000000"),
    ("config.json", {"text_config": {"hidden_size": 10**12}}, "has hidden_size 1000000000000"),
    ("config.json", {"text_config": {"num_attention_heads": "4"}}, "has num_attention_heads '4'"),
    ("preprocessor_config.json", {"temporal_patch_size": 10**6}, "has temporal_patch_size 1000000: it must be"),
    *((f"{file}.json", "{", f"is unreadable: its {file}.json is not JSON") for file in FILES),
    *((f"{file}.json", "[]", f"is unreadable: its {file}.json holds no object") for file in FILES),
    ("generation_config.json", "[" * 100_000, "is unreadable: its generation_config.json is not JSON"),
    ("tokenizer_config.json", " " * 2**22 + "{}", "has a tokenizer_config.json of 4194306 bytes: more than"),
]


@pytest.mark.parametrize(("file", "change", "said"), HELD)
def test_what_a_file_holds_is_refused_before_the_library_sees_it(make, monkeypatch, file, change, said):
    for name in ("AutoProcessor", "AutoModelForImageTextToText"):
        monkeypatch.setattr(f"common.checkpoint.{name}", None)
    folder = make({file: change})
    with pytest.raises(ValueError, match=re.escape(f"--model_path {folder} ")) as caught:
        count_layers(str(folder))
    assert said in str(caught.value)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()


def test_code_beside_an_audio_tokenizer_is_neither_run_nor_asked_about(drive, make, tmp_path):
    audio = {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": str(tmp_path / "trap")}
    folder, sprung = make({"processor_config.json": {"audio_tokenizer": audio}}), tmp_path / "sprung"
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap/trap.py").write_text(f"open({str(sprung)!r}, 'w')\nclass Trap: pass\n")
    code = {"model_type": "trap", "auto_map": {"AutoConfig": "trap.Trap", "AutoModel": "trap.Trap"}}
    (tmp_path / "trap/config.json").write_text(json.dumps(code))
    refused(drive("--model_path", folder), folder, "names a model of its own (audio_tokenizer)")
    assert not sprung.exists()


@pytest.mark.parametrize("wanted", ["AutoImageProcessor", "AutoProcessor", "AutoTokenizer"])
def test_a_checkpoints_own_code_is_never_run(drive, make, tmp_path, wanted):
    sprung, code = tmp_path / "sprung", {wanted: ["trap.Trap", None] if wanted == "AutoTokenizer" else "trap.Trap"}
    names = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
    folder = make(
        {"trap.py": f"open({str(sprung)!r}, 'w')\nclass Trap: pass\n"} | {n: {"auto_map": code} for n in names}
    )
    refused(drive("--model_path", folder), folder, "wants to run code of its own (auto_map), which this tool never")
    assert not sprung.exists()


def test_the_library_does_not_ask_whether_to_run_code(asked):
    with pytest.raises(ValueError, match="custom code"):
        dynamic_module_utils.resolve_trust_remote_code(None, "a/b", has_local_code=False, has_remote_code=True)
    assert not asked


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "chat_template.jinja", "config.json"])
def test_only_regular_files_of_the_folder_itself_are_opened(make, tmp_path, file):
    folder = make()
    (folder / file).replace(tmp_path / "elsewhere")
    (folder / file).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"--model_path .* has a {file} that lies in another folder"):
        checkpoint_folder(str(folder))
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(ValueError, match="that is a folder, a pipe, a device|is not a model folder"):
        checkpoint_folder(str(folder))


def test_a_link_inside_the_folder_is_followed(make):
    folder = make()
    (folder / "parts").mkdir()
    (folder / "model.safetensors").replace(folder / "parts/w.safetensors")
    (folder / "model.safetensors").symlink_to("parts/w.safetensors")
    assert checkpoint_folder(str(folder)) == folder


@pytest.fixture
def cache(make, tmp_path, monkeypatch):
    """The hub's cache with the checkpoint someone/tiny in it, as the hub's client lays it out."""
    home = tmp_path / "cache/models--someone--tiny"
    make(folder=tmp_path / "files")
    for path in (tmp_path / "files").iterdir():
        (home / "blobs").mkdir(parents=True, exist_ok=True)
        (home / "snapshots/abc123").mkdir(parents=True, exist_ok=True)
        path.replace(home / "blobs" / path.name)
        (home / "snapshots/abc123" / path.name).symlink_to(f"../../blobs/{path.name}")
    (home / "refs").mkdir()
    (home / "refs/main").write_text("abc123")
    for where in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.TRANSFORMERS_CACHE"):
        monkeypatch.setattr(where, str(tmp_path / "cache"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub = functools.partial(common.refusals.cached_file, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr("common.refusals.cached_file", hub)
    common.refusals.hub_folder.cache_clear()
    yield home
    common.refusals.hub_folder.cache_clear()


def test_a_name_on_the_hub_is_loaded_from_the_folder_that_was_looked_through(drive, cache):
    assert drive("--model_path", "someone/tiny", "--answer", ANSWER)[0] == 0
    assert checkpoint_folder("someone/tiny") == cache / "snapshots/abc123"
    assert model_identity("someone/tiny") == "someone/tiny abc123"
    code, _, err = drive("--model_path", "someone/tiny", "--layer", 28)
    assert code == 2
    assert "the model has 0 to 2" in err


def test_a_name_on_the_hub_is_refused_for_what_its_files_hold(drive, cache):
    path = cache / "blobs/preprocessor_config.json"
    path.write_text(json.dumps({"auto_map": {"AutoProcessor": "trap.Trap"}}))
    (cache / "snapshots/abc123/preprocessor_config.json").unlink(missing_ok=True)
    (cache / "snapshots/abc123/preprocessor_config.json").symlink_to("../../blobs/preprocessor_config.json")
    refused(drive("--model_path", "someone/tiny"), "someone/tiny", CODE)


# weights


def change_weights(folder, change):
    """Save what the function makes of the weights' dictionary."""
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_weights_are_an_error_and_never_random(drive, make):
    folder = make()
    change_weights(folder, lambda weights: {k: v for k, v in weights.items() if "layers.2.mlp.up_proj" not in k})
    refused(drive("--model_path", folder), folder, "lacks weights, such as")


@pytest.mark.parametrize("named", [None, "pytorch_model.bin"])
def test_pickled_weights_are_never_opened(drive, make, tmp_path, named):
    folder = make({"config.json": {"transformers_weights": named}} if named else ())
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    index = {"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    said = "only safetensors of its own folder are opened, as pickles (.bin, .pt) can run code" if named else (
        "lacks its weights as safetensors; pickles (.bin, .pt) can run code and are never opened"
    )  # fmt: skip
    refused(drive("--model_path", folder), folder, said)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("shard", ["w.bin", "../other/model.safetensors", "/tmp/model.safetensors"])
def test_index_of_weights_names_safetensors_of_its_folder_only(drive, make, shard):
    folder = make({"model.safetensors.index.json": {"metadata": {}, "weight_map": {"a": shard}}})
    (folder / "model.safetensors").rename(folder / "w.bin")
    said = f"keeps weights in {shard}: only safetensors of its own folder are opened, as pickles"
    refused(drive("--model_path", folder), folder, said)


def test_sharded_weights_are_loaded(drive, make):
    folder = make()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for shard in set(names.values()):
        part = {name: weights[name] for name in names if names[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert drive("--model_path", folder, "--answer", ANSWER)[0] == 0


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\nsize 9\n", b""])
def test_damaged_weights_are_refused_with_their_folder(drive, make, content):
    folder = make()
    (folder / "model.safetensors").write_bytes(content)
    refused(drive("--model_path", folder), folder, "has weights that are damaged")


@pytest.mark.parametrize(("part", "named"), [("embeddings", "embed_tokens"), ("decoder", "layers"), ("vision", "vis")])
def test_weights_that_are_all_the_same_are_refused(drive, make, part, named):
    folder = make()
    change_weights(folder, lambda weights: {k: v.zero_() if named in k else v for k, v in weights.items()})
    refused(drive("--model_path", folder), folder, f"has weights of its {part}")


def test_an_answer_of_one_token_is_told_of(model, processor, image, monkeypatch):
    def generate(input_ids, **_):
        return torch.cat([input_ids, torch.full((1, 8), 3)], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    with pytest.warns(ExplanationWarning, match="the model repeats one token, .*: its weights may be damaged"):
        core.read(model, processor, image, PROMPT)


def test_model_with_fewer_layers_than_its_weights_is_refused(drive, make):
    fewer = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "max_window_layers": 2}
    folder = make({"config.json": {"text_config": fewer}})
    code, _, err = drive("--model_path", folder)
    assert code == 2
    assert re.search(r"has \d+ weights that its config.json does not know: \S*layers.2\.\S*, ...: the model would", err)


def test_weights_beside_the_model_are_warned_of(drive, make):
    folder = make()
    change_weights(folder, lambda weights: weights | {"value_head.weight": torch.zeros(2)})
    code, _, err = drive("--model_path", folder, "--answer", ANSWER)
    assert code == 0
    assert err.endswith("has 1 weights that its config.json does not know: value_head.weight\n")


def test_a_model_is_known_by_its_weights_and_files(make):
    folder = make()
    os.mkfifo(folder / "pipe.txt")
    known = [model_identity(str(folder))]
    for change in (0.9, 0.8):
        change_weights(folder, lambda weights, by=change: {name: weight * by for name, weight in weights.items()})
        known.append(model_identity(str(folder)))
    for file in ("generation_config.json", "tokenizer_config.json"):
        (folder / file).write_text((folder / file).read_text() + " ")
        known.append(model_identity(str(folder)))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:3000])  # damaged: told when it is loaded
    known.append(model_identity(str(folder)))
    assert len(set(known)) == 6


def test_published_settings_are_none_of_those_that_are_refused():
    vision = {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    vision |= {"in_chans": 3, "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2, "window_size": 112}
    vision |= {"spatial_patch_size": 14, "temporal_patch_size": 2, "fullatt_block_indexes": [7], "tokens_per_second": 2}
    config = {"num_key_value_heads": 2, "vocab_size": 151936, "sliding_window": 32768, "max_window_layers": 70}
    config |= {"max_position_embeddings": 128000, "tie_word_embeddings": True, "vision_config": vision}
    config |= {"_attn_implementation_autoset": True, "attn_implementation": None, "_name_or_path": "/home/me/model"}
    config |= {"quantization_config": {"load_in_4bit": True}, "head_dim": None, "torch_dtype": "bfloat16"}
    tokenizer = {"tokenizer_class": "Qwen2TokenizerFast", "add_bos_token": False, "vocab_file": None, "unk_token": None}
    images = {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen2_5_VLProcessor", "size": {}}
    images |= {"video_processor_type": "Qwen3VLVideoProcessor", "merge_size": 2, "crop_size": None, "resample": 3}
    generation = {"cache_implementation": "hybrid", "pad_token_id": 151643, "repetition_penalty": 1.05}
    for record in (config, tokenizer, images, generation):
        assert [wrong for key, value in settings(record) if (wrong := wrong_with(key, value))] == []


# what is said of odd checkpoints

ROPE = {"type": "mrope", "mrope_section": [1, 1, 1]}
ROPE = {"text_config": {"rope_parameters": ROPE, "rope_scaling": ROPE}}  # as transformers 5 and 4 call it
GROWING = {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40}
TOKENIZER, PROCESSOR, TEMPLATE = "tokenizer_config.json", "processor_config.json", "chat_template.jinja"
IMAGES, UNBOUND = "image_processor", {"min_pixels": None, "max_pixels": None}
ODD = {  # what is odd: the file, the change, what is said
    "act": ("config.json", {"text_config": {"hidden_act": "zebra"}}, "KeyError: 'zebra'"),
    "wide": ("config.json", {"text_config": {"hidden_size": 64}}, "do not fit its config"),
    "heads": ("config.json", {"text_config": {"num_attention_heads": 5}}, ""),
    "groups": ("config.json", {"text_config": {"num_key_value_heads": 3}}, ""),
    "rope": ("config.json", ROPE, "cannot read this"),
    "rope type": (
        "config.json",
        {"text_config": {"rope_parameters": {"rope_type": "zebra"}, "rope_scaling": {"type": "z"}}},
        "",
    ),
    "layers": ("config.json", {"text_config": {"layer_types": ["zebra"] * 3}}, ""),
    "tower": ("config.json", {"vision_config": {"num_heads": 5}}, ""),
    "window": ("config.json", {"vision_config": {"window_size": 3}}, ""),
    "merge": ("config.json", {"vision_config": {"spatial_merge_size": 4}}, "merge_size 2: this model takes 4"),
    "no vision": ("config.json", {"vision_config": None}, "holds no object"),
    "vision list": ("config.json", {"vision_config": [3]}, "holds no object"),
    "image token": ("config.json", {"image_token_id": 7}, "image token"),
    "vocabulary": ("config.json", {"text_config": {"vocab_size": 30}}, "has a tokenizer with token"),
    "no vocabulary": ("config.json", {"text_config": {"vocab_size": None}}, ""),
    "quantised": ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "needs a package"),
    "text dtype": ("config.json", {"dtype": "zebra"}, ""),
    "end": ("generation_config.json", {"eos_token_id": "x"}, "has eos_token_id 'x': it must be a token id"),
    "padding": ("generation_config.json", {"pad_token_id": [1]}, "has pad_token_id [1]: it must be a token id"),
    "minus": ("generation_config.json", {"eos_token_id": [3, -1]}, "has eos_token_id [3, -1]"),
    "damaged": ("generation_config.json", '{"eos_token_id": ', "its generation_config.json is not JSON"),
    "size": (PROCESSOR, {IMAGES: {"size": {"height": 3}}}, ""),
    "size text": (PROCESSOR, {IMAGES: {"size": "large"}}, ""),
    "size none": (PROCESSOR, {IMAGES: UNBOUND | {"size": {"longest_edge": "a"}}}, ""),
    "patch": (PROCESSOR, {IMAGES: {"patch_size": 7}}, "has a processor with patch_size 7: this model takes 14"),
    "patch zero": (PROCESSOR, {IMAGES: {"patch_size": 0}}, "patch_size 0"),
    "merge zero": (PROCESSOR, {IMAGES: {"merge_size": 0}}, "merge_size 0"),
    "frames": (PROCESSOR, {IMAGES: {"temporal_patch_size": 3}}, "temporal_patch_size 3"),
    "mean": (PROCESSOR, {IMAGES: {"image_mean": [0.5, 0.5]}}, ""),
    "deviation": (PROCESSOR, {IMAGES: {"image_std": "grey"}}, ""),
    "resample": (PROCESSOR, {IMAGES: {"resample": 99}}, ""),
    "size nan": (PROCESSOR, {IMAGES: {"size": {"longest_edge": float("nan"), "shortest_edge": 1}}}, "NaN is not a"),
    "size minus": (PROCESSOR, {IMAGES: UNBOUND | {"size": dict(longest_edge=-5, shortest_edge=-5)}}, "a valid size"),
    "crop": (PROCESSOR, {IMAGES: {"do_center_crop": True}}, "has a processor with do_center_crop True"),
    "deviations": (PROCESSOR, {IMAGES: {"image_std": [0, 0, 0]}}, "image_std"),
    "device": (PROCESSOR, {IMAGES: {"device": "meta"}}, "wants its photos on the device 'meta'"),
    "labels": ("config.json", {"num_labels": 10**8}, "has num_labels 100000000"),
    "eps": ("config.json", {"text_config": {"rms_norm_eps": float("nan")}}, "NaN is not a number"),
    "far end": ("generation_config.json", {"eos_token_id": 2**70}, "has eos_token_id"),
    "long token": (TOKENIZER, {"added_tokens_decoder": {"300": {"content": "B" * 2000}}}, ""),
    "video in template": (TEMPLATE, "<|video_pad|>" + CHAT_TEMPLATE, "the chat template shows 2 pictures where 1"),
    "no resize": (PROCESSOR, {IMAGES: {"do_resize": False}}, "has a processor with do_resize False"),
    "other tokenizer": (TOKENIZER, {"tokenizer_class": "BertTokenizer"}, "wants the class 'BertTokenizer'"),
    "other processor": (PROCESSOR, {"processor_class": "LlavaProcessor"}, "wants the class 'LlavaProcessor'"),
    "tokens": ("tokenizer.json", "{}", ""),
    "cut tokens": ("tokenizer.json", '{"version": ', ""),
    "growing": ("tokenizer.json", {"normalizer": GROWING}, "with a step 'Replace': those are run that cannot make"),
    "token list": (TOKENIZER, {"added_tokens_decoder": [3]}, "lacks a processor that can be loaded"),
    "syntax": (TEMPLATE, "{% for message in %}", "the chat template cannot be rendered: TemplateSyntaxError"),
    "name": (TEMPLATE, "{{ messages.nothing.at.all }}", "the chat template cannot be rendered: UndefinedError"),
    "raises": (TEMPLATE, "{{ raise_exception('no pictures') }}", "cannot be rendered: TemplateError: no pictures"),
    "no prompt": (TEMPLATE, CHAT_TEMPLATE.replace("part['text']", "''"), "the chat template drops the prompt 'What"),
    "no image": (
        TEMPLATE,
        CHAT_TEMPLATE.replace("<|image_pad|>", ""),
        "the chat template shows 0 pictures where 1 are",
    ),
    "two images": (TEMPLATE, CHAT_TEMPLATE.replace("<|image_pad|>", "<|image_pad|>" * 2), "shows 2 pictures where 1"),
    "no template": (TEMPLATE, "", ""),
    "escape": (TEMPLATE, "{{ ''.__class__.__mro__ }}", "cannot be rendered: SecurityError"),
}


@pytest.mark.parametrize("what", ODD)
def test_an_error_that_a_checkpoint_causes_names_it(drive, make, tmp_path, what):
    file, change, said = ODD[what]
    folder = make({file: change})
    refused(drive("--model_path", folder, "--prompt", PROMPT), folder, said)
    assert not (tmp_path / "out").exists()


def test_a_prompt_is_neither_padded_nor_cut_as_a_checkpoint_wishes(make, tmp_path):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
    prompts = []
    for wish in ({}, {"padding": "max_length", "max_length": 5000}, {"truncation": True, "max_length": 7}):
        processor = load_processor(str(make({TOKENIZER: wish}, tmp_path / "-".join(["wish", *wish]))), 10**6)
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompts += processor(text=[text], images=[make_image(56, 56)], return_tensors="pt")["input_ids"].tolist()
    assert prompts[0] == prompts[1] == prompts[2]


def test_a_panic_of_the_tokenizer_is_told(make, drive):
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    folder = make(
        {"tokenizer.json": {"pre_tokenizer": split}, TOKENIZER: {"tokenizer_class": "PreTrainedTokenizerFast"}}
    )
    code, out, err = drive("--model_path", folder, "--prompt", "a" * 40 + "!")
    assert (code, out) == (2, "")
    assert f"error: --model_path {folder}: the model cannot read this photo and prompt: PanicException" in err


def test_a_given_answer_meets_the_same_end(drive, make):
    folder = make({"config.json": ROPE})
    refused(drive("--model_path", folder, "--answer", ANSWER), folder, "the model cannot read this photo and prompt")


def test_what_is_not_the_checkpoints_fault_is_not_said_to_be(model):
    def fail(*_):
        raise error

    ours = compile("def ours(*_): {}['a bug of ours']", core.__file__, "exec")
    exec(ours, names := {})
    for error, hook in ((MemoryError(), fail), (torch.OutOfMemoryError("CUDA"), fail), (KeyError(), names["ours"])):
        handle = model.register_forward_pre_hook(hook)
        with pytest.raises(type(error)), model_named("tiny"):
            model.generate(torch.tensor([[1]]), max_new_tokens=1)
        handle.remove()
    for own in (ValueError("prompt='' must be a text"), RuntimeError("matplotlib")):
        with pytest.raises(type(own), match=f"^{re.escape(str(own))}$"), model_named("tiny"):
            raise own


# chat templates


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "longer than 1 seconds"),
        ("{{ 10 ** (10 ** 9) }}", "longer than 1 seconds"),
        ("{{ 'a' * 10 ** 10 }}", "cannot be rendered: MemoryError"),
        (
            "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            "MemoryError|longer than 1 s",
        ),
        ("{{ range(99999) | list | length * 'a' }}", "makes more than 20000 characters of its own"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}aa{% endfor %}{% endfor %}", "more than 20000"),
        ("{{ raise_exception('a' * 10 ** 6) }}", "TemplateError: a{200,300}$"),
        ("{% set n = namespace(__class__=3) %}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "TypeError: no loader|cannot be rendered"),
    ],
)
def test_a_template_has_bounds_of_time_memory_and_length(monkeypatch, template, said):
    monkeypatch.setattr(common.template, "SECONDS", 1)
    start = time.monotonic()
    with pytest.raises(ValueError, match=said):
        render(template, "{}")
    assert time.monotonic() - start < 5


EVERY = (
    "{%- set n = namespace(a=1) %}{% generation %}{{ messages | tojson(indent=1) }}{% endgeneration %}\n"
    "   {% for m in messages %}  {% if loop.index > 1 %}{% break %}{% endif %}\n{{ m.role }}{% set n.a = 2 %}\n"
    "{% endfor %}{{ n.a }} {{ dict(a=2) }} {{ messages[::-1][0].role.upper() }} {{ strftime_now('%Y') }}"
    "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }} é\u4e2d <b>& {{ '<b>' }}"
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, EVERY, (ROOT / "demo_model/chat_template.jinja").read_text()])
def test_a_template_gives_what_it_gives_in_the_library(template):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\u4e2d <a> é \U0001f600?"}]}]
    (wanted,), _ = render_jinja_template([chat], chat_template=template, add_generation_prompt=True, eos_token="e")
    variables = {"messages": chat, "tools": None, "documents": None, "add_generation_prompt": True, "eos_token": "e"}
    assert render(template, json.dumps(variables)) == wanted


def test_a_loaded_processor_gives_the_librarys_text(sound):
    mine, usual = load_processor(str(sound), 10**6), AutoProcessor.from_pretrained(sound)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
    how = {"tokenize": False, "add_generation_prompt": True}
    assert mine.apply_chat_template(chat, **how) == usual.apply_chat_template(chat, **how)


# the answer

WISHES = [
    {"repetition_penalty": 50.0, "no_repeat_ngram_size": 1, "min_length": 90, "min_new_tokens": 5},
    {"do_sample": True, "temperature": 9.0, "top_k": 3, "top_p": 0.1, "num_beams": 3, "num_return_sequences": 2},
    {"max_time": 1e-9, "stop_strings": "a", "max_length": 1, "forced_eos_token_id": 4, "forced_bos_token_id": 4},
    {"sequence_bias": [[[5], 99.0]], "bad_words_ids": [[6]], "begin_suppress_tokens": [1, 2, 3], "guidance_scale": 3.0},
    {"return_dict_in_generate": True, "output_logits": True, "cache_implementation": "static", "penalty_alpha": 0.5},
    {"exponential_decay_length_penalty": [1, 9.0], "remove_invalid_values": True, "custom": 3, "num_beam_groups": 2},
]


def argmax_tokens(model, inputs, count, ends):
    """The greedy answer by a plain loop over whole sequences."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id")
    banned, tokens = [getattr(model.config, name) for name in names], []
    while len(tokens) < count:
        more = torch.tensor([tokens], dtype=torch.long)
        whole = {"input_ids": torch.cat([inputs["input_ids"], more], 1)}
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        if "mm_token_type_ids" in inputs:
            whole["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(more)], 1)
        logits = model(**inputs | whole, use_cache=False).logits[0, -1]
        logits[banned] = -torch.inf
        tokens.append(int(logits.argmax()))
        if tokens[-1] in ends:
            return tokens[:-1]
    return tokens


@pytest.mark.parametrize("wishes", WISHES)
def test_the_answer_is_greedy_whatever_the_generation_config_says(model, processor, image, monkeypatch, wishes):
    inputs = core.prepare_inputs(model, processor, [image], PROMPT)
    ends = {*model.generation_config.eos_token_id, processor.tokenizer.eos_token_id}
    with torch.no_grad():
        wanted = argmax_tokens(model, inputs, 7, ends)
    own = type(model.generation_config)(**model.generation_config.to_dict())
    for name, value in wishes.items():
        setattr(own, name, value)
    monkeypatch.setattr(model, "generation_config", own)
    assert core.read(model, processor, image, PROMPT, max_new_tokens=7).tokens == wanted
    assert model.generation_config is own


def test_settings_of_a_checkpoints_generation_have_no_effect(drive, make):
    usual = drive()
    assert usual[0] == 0
    folder = make({"generation_config.json": functools.reduce(dict.__or__, WISHES) | {"watermarking_config": "x"}})
    code, out, err = drive("--model_path", folder)
    assert (code, out.splitlines()[0]) == (0, usual[1].splitlines()[0]), err
    wanted = json.loads((folder / "generation_config.json").read_text())
    kept = load_model(str(folder), "cpu", "auto").generation_config
    assert (kept.eos_token_id, kept.pad_token_id) == (wanted["eos_token_id"], wanted["pad_token_id"])
    assert kept.repetition_penalty in (None, 1.0)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHAT_TEMPLATE.replace("part['text']", "'Hello'"), "drops the prompt 'What is it\\?': the question was never"),
        (CHAT_TEMPLATE.replace("part['text']", "part['text'] | upper"), "the chat template drops the prompt"),
        (CHAT_TEMPLATE.replace("<|image_pad|>", ""), "the chat template shows 0 pictures where 1 are given"),
    ],
)
def test_a_template_that_drops_what_it_is_given_is_an_error(model, processor, image, monkeypatch, template, said):
    monkeypatch.setattr(processor, "chat_template", template)
    with pytest.raises(ValueError, match=said):
        core.read(model, processor, image, PROMPT, ANSWER)


def test_a_template_may_trim_the_prompt(model, processor, image, monkeypatch):
    trimming = CHAT_TEMPLATE.replace("part['text']", "part['text'] | trim")
    monkeypatch.setattr(processor, "chat_template", trimming)
    assert core.read(model, processor, image, f" {PROMPT}\n", ANSWER).answer == ANSWER
