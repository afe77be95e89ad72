"""A LoRA adapter's folder as a checkpoint: what is refused in it, and that it is the model that PEFT makes of it."""

import json
import os
import re
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from conftest import load_once
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText

import test_gradcam
from common.adapter import adapter_of
from common.checkpoint import count_layers, load_model, load_processor, model_identity
from smooth_gradcam import compute_token_maps

peft = pytest.importorskip("peft")

ANSWER, PROMPT = "the red cat", "What is it?"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_adapter(base, folder, **options):
    model = AutoModelForImageTextToText.from_pretrained(base)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 3, "target_modules": TARGETS} | options))
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


@pytest.fixture
def adapter(model_folder, tmp_path):
    save_adapter(model_folder, tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return str(folder)


def maps_of(model, processor, image):
    found = compute_token_maps(model, processor, image, PROMPT, [0, 2], answer=ANSWER, num_samples=1, noise_std=0)
    return found.maps


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True, "use_rslora": True},
        {"target_modules": r"^(?!.*visual).*(?:q_proj|up_proj)$", "rank_pattern": {"q_proj": 2}},
        {"target_modules": "all-linear"},
        {"modules_to_save": ["norm"], "layers_to_transform": [1, 3], "layers_pattern": "layers"},
    ],
    ids=["plain", "dora", "pattern", "all", "modules"],
)
def test_an_adapters_folder_is_the_model_that_peft_makes_of_it(model_folder, tmp_path, image, options):
    wrapped = save_adapter(model_folder, tmp_path / "adapter", **options)
    path = str(tmp_path / "adapter")
    assert count_layers(path) == 4
    processor, model = load_processor(path, 10**6), load_model(path, "cpu", "auto")
    assert not any("lora" in name for name, _ in model.named_modules())
    found, expected = maps_of(model, processor, image), maps_of(wrapped, processor, image)
    bare = maps_of(load_once(str(model_folder), "cpu", "auto"), processor, image)
    for key, cam in expected.items():
        np.testing.assert_allclose(found[key], cam, atol=1e-3 * cam.max())
        assert np.abs(bare[key] - cam).max() > 0.02 * cam.max()


def test_names_of_older_versions_of_the_model_are_known(adapter, image, model_folder):
    processor, expected = load_processor(str(adapter), 10**6), load_model(str(adapter), "cpu", "auto").state_dict()
    weights = load_file(adapter / "adapter_model.safetensors")
    older = {
        key.replace(".language_model.", ".").replace("model.model.visual", "model.visual"): v
        for key, v in weights.items()
    }
    assert older.keys() != weights.keys()
    save_file(older, adapter / "adapter_model.safetensors")
    found = load_model(str(adapter), "cpu", "auto").state_dict()
    assert processor
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_the_command_line_takes_an_adapter_and_lists_know_it(
    adapter, drive, monkeypatch, model_folder, tmp_path, photo_path
):
    monkeypatch.setattr(test_gradcam, "load_model", load_model)
    monkeypatch.setattr(test_gradcam, "load_processor", load_processor)
    code, out, err = drive("--model_path", adapter, "--answer", ANSWER)
    assert code == 0, err
    (tmp_path / "photos").mkdir()
    shutil.copy(photo_path, tmp_path / "photos")
    code, out, err = drive("--model_path", adapter, "--image_path", tmp_path / "photos", "--answer", ANSWER)
    assert code == 0, err


def test_the_identity_is_that_of_adapter_and_base(adapter, model_folder):
    both, base = model_identity(str(adapter)), model_identity(str(model_folder))
    assert both.endswith(f" on {base}")
    change(adapter, lora_alpha=99)
    assert model_identity(str(adapter)) != both


def test_the_processor_is_the_adapters_own_if_it_has_one(adapter, processor):
    assert load_processor(str(adapter), 10**6).chat_template == processor.chat_template
    processor.save_pretrained(adapter)
    template = adapter / "chat_template.jinja"
    template.write_text(processor.chat_template + "{# own #}")
    assert load_processor(str(adapter), 10**6).chat_template.endswith("{# own #}")


def test_a_base_may_be_beside_the_adapter_or_in_the_current_folder(adapter, model_folder, tmp_path, monkeypatch):
    shutil.copytree(model_folder, adapter / "base")
    assert count_layers(change(adapter, base_model_name_or_path="base")) == 4
    shutil.move(adapter / "base", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert count_layers(change(adapter, base_model_name_or_path="elsewhere")) == 4


SETTINGS = [
    ({"peft_type": "IA3"}, "is an adapter of type 'IA3': only LORA is supported"),
    ({"peft_type": ["LORA"]}, "is an adapter of type ['LORA']"),
    ({"auto_map": {"a": "trap.Trap"}}, "wants to run code of its own (auto_map)"),
    ({"base_model_name_or_path": None}, "names no base model"),
    ({"base_model_name_or_path": "/nowhere"}, "is an adapter of '/nowhere': --model_path /nowhere does not exist"),
    ({"init_lora_weights": "pissa"}, "has an adapter with init_lora_weights 'pissa', which is not supported"),
    ({"loftq_config": {"loftq_bits": 4}}, "has an adapter with loftq_config"),
    ({"target_parameters": ["a"]}, "has an adapter with target_parameters ['a']"),
    ({"layer_replication": [[0, 4]]}, "has an adapter with layer_replication"),
    ({"alora_invocation_tokens": [1]}, "has an adapter with alora_invocation_tokens"),
    ({"bias": "all"}, "has an adapter with bias 'all'"),
    ({"fan_in_fan_out": True}, "has an adapter with fan_in_fan_out True"),
    ({"r": 0}, "has an adapter with r 0"),
    ({"r": 10**9}, "has an adapter with r 1000000000"),
    ({"r": True}, "has an adapter with r True"),
    ({"lora_alpha": "x"}, "has an adapter with lora_alpha 'x'"),
    ({"target_modules": [3]}, "has an adapter with target_modules [3]"),
    ({"modules_to_save": ["(a+)+$"]}, "has an adapter with modules_to_save"),
    ({"rank_pattern": {"(a+)+$": 3}}, "has an adapter with rank_pattern"),
    ({"layers_pattern": "(a+)+$"}, "has an adapter with layers_pattern"),
    ({"revision": "abc"}, "has an adapter with revision 'abc'"),
    ({"covariance_file": "/etc/passwd"}, "names files to be read (covariance_file)"),
    ({"unheard_of": 3}, "has an adapter with unheard_of 3, which is not supported"),
]


@pytest.mark.parametrize(("settings", "said"), SETTINGS)
def test_what_an_adapter_may_not_ask_for_is_refused_by_name(adapter, settings, said):
    path = change(adapter, **settings)
    with pytest.raises(ValueError, match=re.escape(f"--model_path {adapter} ")) as caught:
        count_layers(path)
    assert said in str(caught.value)


def test_the_base_is_checked_like_any_model(adapter, model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "base")
    path = tmp_path / "base/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModel": "trap.Trap"}}))
    change(adapter, base_model_name_or_path=str(tmp_path / "base"))
    for load in (count_layers, model_identity, lambda path: load_processor(path, 10**6)):
        with pytest.raises(ValueError, match="is an adapter of .*wants to run code of its own"):
            load(str(adapter))
    shutil.copytree(adapter, tmp_path / "second")
    change(tmp_path / "second", base_model_name_or_path=str(adapter))
    with pytest.raises(ValueError, match="an adapter itself|it has no config.json|wants to run code"):
        load_model(str(tmp_path / "second"), "cpu", "auto")


def test_a_folder_with_a_model_and_an_adapter_is_refused(adapter, model_folder):
    shutil.copy(model_folder / "config.json", adapter)
    with pytest.raises(ValueError, match="holds an adapter .* beside a model: take one of them out"):
        count_layers(str(adapter))


def test_weights_of_an_adapter_are_a_regular_file_of_safetensors(adapter, tmp_path):
    path = adapter / "adapter_model.safetensors"
    path.replace(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="lacks adapter_model.safetensors: only safetensors"):
        count_layers(str(adapter))
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match="lacks adapter_model.safetensors: only safetensors"):
        load_model(str(adapter), "cpu", "auto")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="lies in another folder"):
        count_layers(str(adapter))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="that is a folder, a pipe"):
        count_layers(str(adapter))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda weights: dict(list(weights.items())[1:]), "lacks 1 weights of its adapter, such as base_model"),
        (lambda weights: weights | {"base_model.model.odd.lora_A.weight": torch.ones(3, 3)}, "has no place for"),
        (lambda weights: {key: value[:, :1] for key, value in weights.items()}, "does not fit its base"),
        (lambda weights: {key: value[:1] for key, value in weights.items()}, "asks for the rank 3"),
        (lambda weights: {key: value * torch.nan for key, value in weights.items()}, "that are not finite"),
    ],
    ids=["missing", "unexpected", "shapes", "ranks", "nan"],
)
def test_an_adapter_that_does_not_fit_is_an_error(adapter, changed, said):
    path = adapter / "adapter_model.safetensors"
    save_file({key: value.contiguous() for key, value in changed(load_file(path)).items()}, path)
    with pytest.raises(ValueError, match=re.escape(f"--model_path {adapter} ")) as caught:
        load_model(str(adapter), "cpu", "auto")
    assert said in str(caught.value)


def test_a_damaged_adapter_is_told(adapter):
    path = adapter / "adapter_model.safetensors"
    for damaged in (path.read_bytes()[:-9], b"version https://git-lfs"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="has an adapter_model.safetensors that cannot be read"):
            load_model(str(adapter), "cpu", "auto")


def test_a_rank_that_is_not_in_the_file_takes_no_memory(adapter, monkeypatch):
    monkeypatch.setattr(peft, "PeftModel", None)  # which would make room for it
    for settings in ({"r": 2**20}, {"rank_pattern": {"q_proj": 2**20}}):
        with pytest.raises(ValueError, match="asks for the rank 1048576: the largest of its weights is 3"):
            load_model(change(adapter, **settings), "cpu", "auto")
    save_file({"base_model.model.lora.weight": torch.ones(1)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="asks for the rank 1048576: the largest of its weights is 0"):
        load_model(str(adapter), "cpu", "auto")


def test_a_pattern_is_not_left_to_run_for_ever(adapter):
    start = time.monotonic()
    with pytest.raises(ValueError, match="cannot be used as a pattern|no module of its base"):
        load_model(change(adapter, target_modules="(.*)*(.*)*(.*)*(.*)*(.*)*(.*)*(.*)*!"), "cpu", "auto")
    with pytest.raises(ValueError, match="cannot be used as a pattern"):
        load_model(change(adapter, target_modules="("), "cpu", "auto")
    assert time.monotonic() - start < 20


def test_peft_is_asked_for_where_it_is_missing(adapter, monkeypatch):
    assert adapter_of(str(adapter)).base
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="is an adapter, which needs PEFT: pip install peft"):
        load_model(str(adapter), "cpu", "auto")


def test_adapter_of_an_adapter_is_refused(adapter, tmp_path):
    """Of itself, too, which would never end."""
    (tmp_path / "second").mkdir()
    for file in adapter.iterdir():
        shutil.copy(file, tmp_path / "second")
    for base in (tmp_path / "adapter", tmp_path / "second", "../second"):
        with pytest.raises(ValueError, match="an adapter itself: merge that one first"):
            count_layers(change(tmp_path / "second", base_model_name_or_path=str(base)))
