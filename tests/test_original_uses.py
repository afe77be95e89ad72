# ruff: noqa: E501  (uses stand on one line)
"""Code and command lines written for the original tool: what runs, and what differs on purpose, with its error.

Each use is a line (or a few), run in a folder of its own on a tiny model of four layers, with `model`, `processor`,
`image` and `prompt` at hand; GIVEN has what stands above it. What must hold afterwards is asserted in the use itself.
"""

import copy
import functools
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_once, read_once
from PIL import Image

import smooth_gradcam
import test_gradcam
import visualization_utils

GIVEN = {
    "": "",
    "classes": "from smooth_gradcam import SmoothQwenGradCAM, get_model_layers\n"
    "layers, total_layers = get_model_layers(model)",
    "functions": "from visualization_utils import *\nfrom test_gradcam import single_layer_visualization",
}
GIVEN["cam"] = GIVEN["classes"] + (
    "\ncam = SmoothQwenGradCAM(model=model, processor=processor, target_layer=layers[-2], num_samples=2, noise_std=0.15)"
)
GIVEN["pictures"] = GIVEN["cam"] + "\nsuperimposed_image, heatmap = cam.generate_cam(image, prompt)"
GIVEN["results"] = GIVEN["functions"] + (
    "\nresults = create_layer_comparison_grid(model, processor, image, prompt, layer_range=[0, 2], save_dir='out')"
)
GIVEN["multi"] = GIVEN["functions"] + "\nresults = visualize_multiple_layers(model, processor, image, prompt, [1, 3])"
GIVEN["thirds"] = GIVEN["functions"] + "\nresults = create_comparative_analysis(model, processor, image, prompt)"
GIVEN["flags"] = (
    "import sys\nfrom test_gradcam import parse_args\nsys.argv = ['test_gradcam.py', '--model_path', 'm', '--image_path', 'i']"
)

RUN = {
    "": r"""
from smooth_gradcam import SmoothQwenGradCAM, get_model_layers
import smooth_gradcam; smooth_gradcam.SmoothQwenGradCAM
from visualization_utils import create_layer_comparison_grid, visualize_multiple_layers, create_comparative_analysis
from visualization_utils import SmoothQwenGradCAM, get_model_layers
from visualization_utils import os, np, Image, plt, gridspec, Rectangle
from visualization_utils import *; create_layer_comparison_grid, visualize_multiple_layers
from test_gradcam import single_layer_visualization
from test_gradcam import main, parse_args
from test_gradcam import SmoothQwenGradCAM, get_model_layers
from test_gradcam import create_layer_comparison_grid, visualize_multiple_layers, create_comparative_analysis
from test_gradcam import Qwen2_5_VLForConditionalGeneration, AutoProcessor, Image, os, argparse
from smooth_gradcam import os, torch, np, cv2, Image, F, warnings
from smooth_gradcam import *; SmoothQwenGradCAM(model, processor, get_model_layers(model)[0][0])
""",
    "classes": r"""
assert total_layers == len(layers) == 4
assert layers[-1] is layers[total_layers - 1]
assert len([layer for i, layer in enumerate(layers) if i % 2 == 0]) == 2
layers, total = get_model_layers(model=model); target_layer = layers[total // 2]
SmoothQwenGradCAM(model, processor, layers[-1])
SmoothQwenGradCAM(model, processor, layers[-1], 5, 0.2)
SmoothQwenGradCAM(model=model, processor=processor, target_layer=layers[3], num_samples=10, noise_std=0.15)
SmoothQwenGradCAM(model, processor, target_layer=layers[0], noise_std=0.3)
SmoothQwenGradCAM(model, processor, layers[1].post_attention_layernorm, 1).generate_cam(image, prompt)
SmoothQwenGradCAM(model, processor, layers[1].mlp, 1).generate_cam(image, prompt)
SmoothQwenGradCAM(model, processor, layers[1].self_attn, 1).generate_cam(image, prompt)
for layer in layers: SmoothQwenGradCAM(model, processor, layer, num_samples=1).generate_cam(image, prompt)
assert SmoothQwenGradCAM(model, processor, layers[0]).num_samples == 10
assert SmoothQwenGradCAM(model, processor, layers[0]).noise_std == 0.1
try: get_model_layers(torch.nn.Linear(1, 1))\nexcept Exception as e: print(f"error: {e}")\nelse: assert False
""",
    "cam": r"""
assert cam.model is model and cam.processor is processor and cam.target_layer is layers[-2]
assert (cam.num_samples, cam.noise_std) == (2, 0.15)
assert cam.device == model.device
inputs = torch.ones(1).to(cam.device)
cam.num_samples = 1; cam.generate_cam(image, prompt)
cam.noise_std = 0.3; assert cam.generate_cam(image, prompt)[0].any() and cam.noise_std == 0.3
cam.target_layer = layers[0]; cam.generate_cam(image, prompt)
cam.device = model.device; cam.generate_cam(image, prompt)
cam.device = "cpu"; cam.device = torch.device("cpu"); cam.device = next(model.parameters()).device
assert cam.feature_maps is None and cam.gradients is None
assert cam.hooks == []
cam._remove_hooks(); cam.remove_hooks(); assert cam.hooks == []
cam.generate_cam(image, prompt); assert cam.feature_maps is None and cam.gradients is None and cam.hooks == []
superimposed, heatmap = cam.generate_cam(image=image, prompt=prompt)
superimposed, heatmap = cam.generate_cam(image, prompt, use_smooth=False)
superimposed, heatmap = cam.generate_cam(image, prompt, True)
overlay = cam.generate_cam(image, prompt)[0]; assert overlay.dtype == np.uint8
cam.generate_cam(image.convert("RGB"), "请详细描述这张图片中的主要内容。")
assert cam.generate_cam(image.resize((112, 168)), prompt)[1].shape == (168, 112, 3)
assert all(map(np.array_equal, cam.generate_cam(image, prompt, False), cam.generate_cam(image, prompt, False)))
model.eval(); cam.generate_cam(image, prompt); model.zero_grad()
import copy; assert copy.copy(cam).generate_cam(image, prompt)[0].shape == np.array(image).shape
""",
    "pictures": r"""
assert superimposed_image.shape == heatmap.shape == np.array(image).shape
assert superimposed_image.dtype == heatmap.dtype == np.uint8
if superimposed_image is not None: Image.fromarray(superimposed_image).save("superimposed_result.png")
Image.fromarray(heatmap).save("heatmap.png"); assert np.array_equal(np.array(Image.open("heatmap.png")), heatmap)
import cv2; assert cv2.imwrite("heatmap.png", heatmap[:, :, ::-1])
import cv2; gray = cv2.cvtColor(heatmap, cv2.COLOR_BGR2GRAY); assert gray.shape == heatmap.shape[:2]
import cv2; cv2.putText(superimposed_image, "layer 2", (5, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 0, 0))
import cv2; cv2.addWeighted(np.array(image), 0.7, heatmap, 0.3, 0)
import matplotlib.pyplot as plt; plt.imshow(heatmap); plt.axis("off"); plt.savefig("heat.png"); plt.close()
np.save("cam.npy", heatmap); assert np.load("cam.npy").max() > 0
both = np.hstack([np.array(image), heatmap, superimposed_image]); Image.fromarray(both).save("both.png")
superimposed_image[:10] = 0; heatmap *= 0
""",
    "functions": r"""
assert sorted(create_layer_comparison_grid(model, processor, image, prompt)) == [0, 1, 2, 3]
create_layer_comparison_grid(model, processor, image, prompt, "early", "results/grid"); open("results/grid/layer_0_heatmap.png")
assert [*create_layer_comparison_grid(model, processor, image, prompt, layer_range="middle")] == [1]
assert [*create_layer_comparison_grid(model, processor, image, prompt, layer_range="late")] == [2, 3]
assert [*create_layer_comparison_grid(model, processor, image, prompt, layer_range="all")] == [0, 1, 2, 3]
assert [*create_layer_comparison_grid(model, processor, image, prompt, layer_range=[3, 1])] == [3, 1]
create_layer_comparison_grid(model=model, processor=processor, image=image, prompt=prompt, layer_range="auto", save_dir="a/b/c")
os.makedirs("old", exist_ok=True); open("old/mine.txt", "w"); create_layer_comparison_grid(model, processor, image, prompt, [0], "old"); open("old/mine.txt")
assert [*visualize_multiple_layers(model, processor, image, prompt)] == [1, 2, 3]
assert [*visualize_multiple_layers(model, processor, image, prompt, layer_indices=[0, 1], save_dir="results/multi")] == [0, 1]
assert [*create_comparative_analysis(model, processor, image, prompt, save_dir="thirds")] == ["early", "middle", "late"]
single_layer_visualization(model, processor, image, prompt, layer_idx=3, num_samples=2, noise_std=0.15, save_dir="results/single"); open("results/single/heatmap.png")
single_layer_visualization(model, processor, image, prompt, -1, 2, 0.1, "s"); open("s/superimposed_result.png")
single_layer_visualization(model, processor, image, prompt, num_samples=1); assert len(os.listdir("cam_results_single")) == 4
for mode in ("early", "late"): create_layer_comparison_grid(model, processor, image, prompt, mode, f"out/{mode}")
try: create_layer_comparison_grid(model, processor, image, prompt, "deep")\nexcept ValueError as e: assert "deep" in str(e)\nelse: assert False
""",
    "results": r"""
assert isinstance(results, dict) and isinstance(results[0], dict)
for layer_idx, result in results.items(): Image.fromarray(result["superimposed"]).save(f"{layer_idx}.png")
for layer_idx in sorted(results): assert results[layer_idx]["heatmap"].shape == np.array(image).shape
assert list(results.keys()) == [0, 2] and len(results) == 2 and 0 in results and max(results) == 2
assert "heatmap" in results[0] and "superimposed" in results[0] and "overlay" not in results[0]
assert results.get(1) is None and results[0].get("heatmap") is not None and results[0].get("x", 5) == 5
shapes = {layer: {name: picture.shape for name, picture in result.items()} for layer, result in results.items()}
assert np.stack([result["heatmap"] for result in results.values()]).shape[0] == 2
assert not np.array_equal(results[0]["heatmap"], results[0]["superimposed"])
results[0]["overlay"] = results[0]["superimposed"]; assert results[0]["overlay"] is results[0]["superimposed"]
results[0]["heatmap"][:5] = 0; assert not results[0]["heatmap"][:5].any()
import cv2; cv2.putText(results[0]["superimposed"], "0", (5, 20), 0, 0.5, (255, 0, 0))
results[0]["superimposed"] = 255 - results[0]["superimposed"]
plain = {layer: dict(result) for layer, result in results.items()}; assert plain[2]["heatmap"].any()
flat = {f"{layer}_{name}": picture for layer, result in results.items() for name, picture in result.items()}; np.savez("all.npz", **flat)
np.savez("layer.npz", **results[0]); assert np.array_equal(np.load("layer.npz")["heatmap"], results[0]["heatmap"])
merged = {**results[0], "layer": 0}; assert merged["heatmap"].any()
merged = results[0] | {"layer": 0}; assert merged["superimposed"].any()
import pickle; pickle.dump(results, open("r.pkl", "wb")); assert pickle.load(open("r.pkl", "rb"))[2]["heatmap"].any()
import copy; twin = copy.deepcopy(results); twin[0]["heatmap"][:] = 0; assert results[0]["heatmap"].any()
twin = results[0].copy(); assert twin["heatmap"].any()
heatmap = results[0].pop("heatmap"); assert heatmap.any() and "heatmap" not in results[0]
del results[0]; results.update({9: {"heatmap": 1}}); assert list(results) == [2, 9]
results[0].update(note="first"); assert results[0]["note"] == "first"
first, *others = results.values(); assert first["superimposed"].dtype == np.uint8
assert os.path.exists("out/layer_comparison_grid.png") and os.path.exists("out/layer_0_heatmap.png")
assert Image.open("out/layer_2_superimposed.png").size == image.size
assert np.array_equal(np.array(Image.open("out/layer_2_heatmap.png")), results[2]["heatmap"])
import glob; assert len(glob.glob("out/layer_*_heatmap.png")) == 2
import shutil; shutil.make_archive("out", "zip", "out"); shutil.rmtree("out")
""",
    "multi": r"""
assert sorted(os.listdir("cam_results_multilayer"))[0] == "all_layers_comparison.png"
assert Image.open("cam_results_multilayer/original_image.png").size == image.size
assert os.path.exists("cam_results_multilayer/layer_1_heatmap.png")
fig_data = [(layer, r["heatmap"], r["superimposed"]) for layer, r in results.items()]; assert fig_data[1][0] == 3
""",
    "thirds": r"""
for stage in ("early", "middle", "late"): assert len(results[stage]) >= 1
assert results["late"][3]["heatmap"].shape == np.array(image).shape
for stage, layers in results.items():\n for layer, result in layers.items(): Image.fromarray(result["heatmap"]).save(f"{stage}_{layer}.png")
assert os.path.exists("cam_results_comparative/early/layer_comparison_grid.png")
assert os.path.exists("cam_results_comparative/late/layer_3_superimposed.png")
""",
    "flags": r"""
args = parse_args(); assert (args.model_path, args.image_path, args.mode) == ("m", "i", "grid")
args = parse_args(); assert (args.num_samples, args.noise_std, args.output_dir) == (10, 0.15, "cam_results")
args = parse_args(); assert not args.layers and args.layer_range == "auto"
sys.argv += ["--layer_range", "late"]; assert parse_args().layer_range == "late"
sys.argv += ["--mode", "multi", "--layers", "6", "12"]; assert parse_args().layers == [6, 12]
sys.argv += ["--mode", "single", "--layer", "27"]; assert parse_args().layer == 27
sys.argv += ["--prompt", "What?"]; assert parse_args().prompt == "What?"
""",
}

COMMANDS = {  # flags behind --model_path and --image_path: files that are there afterwards
    "": "cam_results/grid/layer_comparison_grid.png",
    "--mode grid": "cam_results/grid/layer_3_superimposed.png",
    "--mode grid --layer_range early": "cam_results/grid/layer_0_heatmap.png",
    "--mode grid --layer_range all": "cam_results/grid/layer_2_heatmap.png",
    "--layer_range late": "cam_results/grid/layer_3_heatmap.png",
    "--mode grid --layers 0 2": "cam_results/grid/layer_2_heatmap.png",
    "--layers 0 2": "cam_results/grid/layer_0_heatmap.png",
    "--layers 1 --layer_range auto": "cam_results/grid/layer_1_heatmap.png",
    "--mode single": "cam_results/single/visualization.png",
    "--mode single --layer 3": "cam_results/single/heatmap.png",
    "--mode single --layer -1": "cam_results/single/superimposed_result.png",
    "--mode=single --layer=0 --num_samples=3": "cam_results/single/original_image.png",
    "--mode single --noise_std 0.1 --num_samples 20": "cam_results/single/heatmap.png",
    "--mode multi": "cam_results/multilayer/all_layers_comparison.png",
    "--mode multi --layers 0 1 3": "cam_results/multilayer/layer_3_superimposed.png",
    "--mode comparative": "cam_results/comparative/middle/layer_comparison_grid.png",
    "--mode comparative --output_dir results": "results/comparative/late/layer_3_heatmap.png",
    "--output_dir results/today": "results/today/grid/layer_comparison_grid.png",
    "--prompt 'What is in this image?'": "cam_results/grid/layer_comparison_grid.png",
    "--prompt 请详细描述这张图片中的主要内容。": "cam_results/grid/layer_comparison_grid.png",
    "--device cpu": "cam_results/grid/layer_comparison_grid.png",
    "--device cuda:0": "cam_results/grid/layer_comparison_grid.png",
    "--device cuda": "cam_results/grid/layer_comparison_grid.png",
    "--mode single --num_s 3 --noise 0.2": "cam_results/single/heatmap.png",
    "--out results --dev cpu --prom What?": "results/grid/layer_comparison_grid.png",
    "--mode single --noise_std 0 --num_samples 5": "cam_results/single/heatmap.png",
}

DIFFER = {  # on purpose, with what is said
    "": {"del np\nfrom smooth_gradcam import *\nnp.zeros(3)": (NameError, "name 'np' is not defined")},
    "classes": {
        "SmoothQwenGradCAM(model, processor, layers[-1], noise_std=1.5)": (ValueError, "noise_std=1.5 must be 0 to 1"),
        "SmoothQwenGradCAM(model, processor, layers[-1], num_samples=0)": (ValueError, "num_samples=0 must be a whole"),
        "SmoothQwenGradCAM(model, processor, layers[-1].mlp).generate_cam(image, prompt)": (
            smooth_gradcam.ExplanationError,
            "has no map (no gradient): choose an earlier layer",
        ),
    },
    "cam": {
        "cam.device = 'cuda:0'": (ValueError, "device='cuda:0' must be the model's, cpu: move the model"),
        "cam._register_hooks()": (AttributeError, "_register_hooks"),
        "cam._add_gaussian_noise_to_pixel_values(torch.ones(4), 0.1)": (AttributeError, "_add_gaussian_noise"),
        "cam._get_visual_token_indices(torch.ones(1, 9))": (AttributeError, "_get_visual_token_indices"),
        "cam._reshape_cam_to_2d(np.ones(3577))": (AttributeError, "_reshape_cam_to_2d"),
        "model.generation_config.eos_token_id = list(range(len(processor.tokenizer))); cam.generate_cam(image, prompt)": (
            smooth_gradcam.ExplanationError,
            "the model's answer is empty",
        ),
    },
    "functions": {
        "create_layer_comparison_grid(model, processor, image, prompt, [0, 99])": (
            ValueError,
            "layer 99 does not exist",
        ),
        "visualize_multiple_layers(model, processor, image, prompt, [6, 12, 18, 27])": (ValueError, "layer 6 does not"),
        "single_layer_visualization(model, processor, image, prompt, layer_idx=99)": (ValueError, "layer 99 does not"),
    },
    "results": {
        "superimposed, heatmap = results[0].values()": (ValueError, "too many values to unpack"),  # and "cam"
        "assert type(results) is dict, type(results)": (AssertionError, "common.notebook.Shown"),
    },
    "flags": {
        "assert parse_args().layer == -1, parse_args().layer": (AssertionError, "None"),  # None: the middle layer
        "assert parse_args().device == 'cuda:0', parse_args().device": (AssertionError, "auto"),  # auto
    },
}
REFUSED = {
    "--mode grid --layer 2": "--layer acts in single mode only; in grid mode use --layers",
    "--layer 2": "--layer acts in single mode only; in grid mode use --layers",
    "--mode single --layers 0 1": "in single mode use --layer",
    "--mode single --layer_range auto": "in single mode use --layer",
    "--mode comparative --layers 0": "in comparative mode early, middle and late layers are chosen automatically",
    "--mode comparative --layer_range auto": "in comparative mode early, middle and late layers are chosen",
    "--mode multi --layers 0 99": "layer 99 does not exist: the model has 0 to 3",
    "--mode single --layer 99": "layer 99 does not exist",
    "--noise_std 1.5": "noise_std=1.5 must be 0 to 1",
    "--num_samples 0": "num_samples=0 must be a whole number",
    "--d cpu": "ambiguous option: --d could match --device, --dtype",
    "--device gpu": "--device gpu is not available: choose auto, map, cpu",
    "--image_path missing.jpg": "missing.jpg does not exist",
}

RUN = [(given, use.replace(r"\n", "\n")) for given, uses in RUN.items() for use in uses.strip().split("\n")]
DIFFER = [(given, use, *error) for given, uses in DIFFER.items() for use, error in uses.items()]


MADE = {}


def once(function, key):
    """The same function, which makes what has the same key once: how it is made is not what is tried."""

    def made(*given, **settings):
        known = function.__name__, key(*given), repr({k: v for k, v in settings.items() if not callable(v)})
        if known not in MADE:
            MADE[known] = function(*given, **settings)
        return copy.deepcopy(MADE[known])

    return made


@pytest.fixture
def _quick(monkeypatch, blank_figures):
    usual = smooth_gradcam.generate
    monkeypatch.setattr(smooth_gradcam, "generate", lambda *given: usual(*given[:3], 3))
    builders = once(visualization_utils.compute_token_maps, lambda m, p, photo, *given: (photo.tobytes(), repr(given)))
    monkeypatch.setattr(visualization_utils, "compute_token_maps", builders)
    driver = once(test_gradcam.explain_with_evidence, lambda reading, *given: (reading.prompt, repr(given[:3])))
    monkeypatch.setattr(test_gradcam, "explain_with_evidence", driver)


@pytest.fixture
def use(make_model, processor, image, tmp_path, monkeypatch, _quick):
    """A function that runs a use behind what is GIVEN."""
    monkeypatch.setattr("sys.argv", ["test_gradcam.py"])
    monkeypatch.chdir(tmp_path)
    model = tiny(make_model)
    monkeypatch.setattr(model, "generation_config", copy.deepcopy(model.generation_config))
    names = {"model": model, "processor": processor, "image": image, "prompt": "What is in this image?"}
    names |= {"np": np, "torch": torch, "os": os, "Image": Image}

    def run(given, code):
        exec(compile(f"{GIVEN[given]}\n{code}", "use", "exec"), names)

    return run


@functools.cache
def tiny(make_model):
    return make_model(torch.float32, layers=4)


@pytest.fixture
def command(model_folder, image, tmp_path, monkeypatch, capsys, _quick):
    """A function that runs a command line; returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(test_gradcam, "load_model", load_once)
    monkeypatch.setattr(test_gradcam, "load_processor", read_once)
    monkeypatch.chdir(tmp_path)
    image.save("photo.jpg")

    def run(flags):
        argv = ["--model_path", str(model_folder), "--image_path", "photo.jpg", *shlex.split(flags)]
        try:
            code = test_gradcam.main(argv)
        except SystemExit as exc:
            code = exc.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(("given", "code"), RUN)
def test_code_for_the_original_runs(use, given, code):
    use(given, code)


@pytest.mark.parametrize("flags", COMMANDS)
def test_command_line_for_the_original_runs(command, flags):
    code, _, err = command(flags)
    assert code == 0, err
    assert Path(COMMANDS[flags]).stat().st_size > 0


@pytest.mark.parametrize(("given", "code", "error", "said"), DIFFER)
def test_code_that_differs_on_purpose_says_how(use, given, code, error, said):
    with pytest.raises(error, match=re.escape(said)):
        use(given, code)


@pytest.mark.parametrize("flags", REFUSED)
def test_command_line_that_differs_on_purpose_says_how(command, flags):
    code, out, err = command(flags)
    assert (code, out) == (2, "")
    assert REFUSED[flags] in err
    assert err.count("\n") == 1


def test_most_uses_of_the_original_run():
    running, differing = len({*RUN}) + len(COMMANDS), len(DIFFER) + len(REFUSED)
    print(f"{running} of {running + differing} uses run")
    assert len({*RUN}) == len(RUN)
    assert running >= 98
    assert running + differing >= 123
    assert running / (running + differing) >= 98 / 123


@pytest.mark.parametrize(
    ("flags", "stream", "note"),
    [
        (
            "--layers 1 --layer_range late",
            1,
            "note: --layers and --layer_range are both given: the layers are those of",
        ),
        ("--noise_std 0 --num_samples 5", 1, "note: --num_samples 5: without noise, copies would be equal, so one is"),
        (
            "--device cuda:0",
            2,
            "test_gradcam.py: warning: --device cuda:0: this machine has no CUDA device, so the CPU",
        ),
    ],
)
def test_what_a_flag_of_the_original_does_not_do_is_said_once(command, monkeypatch, flags, stream, note):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert command(flags)[stream].count(note) == 1
    assert note not in command("--mode single")[stream]
