"""A random Qwen2.5-VL of the real classes with a real processor: tiny, and made without a download."""

import functools
import itertools
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the library is loaded: no test waits for a network

import numpy as np
import pytest
import torch
from matplotlib import rc_context
from matplotlib.text import Text
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

import common.page
import test_gradcam
from common.checkpoint import load_model, load_processor
from common.page import Paper
from smooth_gradcam import METHODS, read

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
MERGES = ["c a", "ca t", "Ġ cat", "r e", "re d", "Ġ t", "Ġt h", "Ġth e"]
CHAT_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # the tensors are too small for more


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    words = sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES] + SPECIAL
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "bos_token": None}
    config |= {"tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": SPECIAL[1:]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def processor(tokenizer):
    images = Qwen2VLImageProcessor(min_pixels=4 * 28 * 28, max_pixels=200 * 28 * 28)
    return Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def make_model(tokenizer):
    """A function that builds the model in a dtype, always with the same random weights."""
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in SPECIAL}

    def make(dtype=torch.float64, layers=3):
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
        vision |= {"fullatt_block_indexes": [1], "window_size": 112}
        text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "vocab_size": len(tokenizer)}
        text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
        text |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "use_sliding_window": False}
        config = Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
        )
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = Qwen2_5_VLForConditionalGeneration(config)
            for parameter in model.parameters():  # the usual 0.02 makes a model of this size all but blind
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
        model.generation_config.pad_token_id = ids["<|endoftext|>"]
        if dtype == torch.float64:
            _keep_float64(model)
        return quick(model).to(dtype).eval()

    return make


class PatchConv3d(torch.nn.Conv3d):
    """Of patches as large as its kernel: a matrix product, many times as fast as PyTorch's convolution."""

    def forward(self, patches):
        return torch.nn.functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


def quick(model):
    """The same model, with a quick patch embedding, which takes most of a pass of a tiny one."""
    for module in model.modules():
        if type(module) is torch.nn.Conv3d:
            module.__class__ = PatchConv3d
    return model


def _keep_float64(model):
    """The rules of transformers compute in float32; put PyTorch's in their place, which do not."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon))


@pytest.fixture(scope="session")
def model(make_model):
    return make_model()


@pytest.fixture(scope="session")
def image():
    """A landscape photo, 168 x 112 pixels: 4 rows of 6 image tokens."""
    return make_image(168, 112)


DEMO = Path(__file__).parent.parent / "demo_model"
DESCRIBE = "Describe the main content in this image in detail."


@pytest.fixture(scope="session")
def demo():
    """The demo model's own description of demo.jpeg."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(DEMO, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(DEMO, local_files_only=True)
    return read(model, processor, DEMO.parent / "demo.jpeg", DESCRIBE)


@rc_context({"text.hinting": "none"})  # as pages are drawn
def check_layout(figure):
    """Nothing overlaps, nothing runs out of the page, and no text is smaller than 6 points."""
    renderer = figure.canvas.get_renderer()
    boxes = {f"text {i} {t.get_text()}": t.get_window_extent(renderer) for i, t in enumerate(figure.texts)}
    boxes = {name: box for name, box in boxes.items() if box.width > 1}
    boxes |= {f"axes {i}": axes.get_tightbbox(renderer) for i, axes in enumerate(figure.axes)}
    for name, box in boxes.items():
        assert box.x0 >= 0, name
        assert box.y0 >= 0, name
        assert box.x1 <= figure.bbox.width, name
        assert box.y1 <= figure.bbox.height, name
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(wide, high) < 2, (one, other)
    for axes in figure.axes:
        if axes.get_legend():
            legend = axes.get_legend().get_window_extent(renderer)
            assert not legend.overlaps(axes.bbox)
    assert min(text.get_size() for text in figure.findobj(Text) if text.get_text().strip()) >= 6


def make_image(width, height):
    """Smooth random colours, the same for the same size."""
    coarse = np.random.default_rng(width * height).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def drawings(monkeypatch):
    """The pages that are drawn, as matplotlib's figures, and the words on grey panels."""
    pages, panels, real = [], [], common.page.figure_to_array

    def keep(figure):
        if figure.axes:
            pages.append(figure)
        else:
            panels.append("".join(text.get_text() for text in figure.texts))
        return real(figure)

    monkeypatch.setattr(common.page, "figure_to_array", keep)
    return pages, panels


@pytest.fixture
def pages(drawings):
    return drawings[0]


@pytest.fixture
def blank_figures(monkeypatch):
    """Every figure has its names and no content: laying one out takes longer than a pass of the tiny model."""
    usual, blank = Paper.figure, np.zeros((2, 2, 3), np.uint8)
    monkeypatch.setattr(Paper, "figure", lambda *given: dict.fromkeys(usual(*given), blank))


# the driver


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, make_model, processor):
    folder = tmp_path_factory.mktemp("model")
    make_model(torch.float32, layers=4).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photo_path(tmp_path_factory, image):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    image.save(path)
    return path


read_once = functools.cache(load_processor)


@functools.cache
def load_once(*given):
    """Tests that only want a run share the model."""
    return quick(load_model(*given))


@pytest.fixture
def drawn(monkeypatch):
    """Figures are drawn, if coarsely; for tests without this fixture `drive` writes blank ones, which is quicker."""
    monkeypatch.setattr(common.page, "DPI", 40)


@pytest.fixture
def drive(model_folder, photo_path, tmp_path, capsys, monkeypatch, request):
    """Run the driver on the tiny model; returns (exit code, stdout, stderr). Later flags win over the usual ones."""

    monkeypatch.setattr(test_gradcam, "load_model", load_once)
    monkeypatch.setattr(test_gradcam, "load_processor", read_once)
    if "drawn" not in request.fixturenames:
        request.getfixturevalue("blank_figures")

    def drive(*flags):
        usual = ["--mode", "single", "--model_path", model_folder, "--output_dir", tmp_path / "out", "--device", "cpu"]
        usual += ["--image_path", photo_path] if "--answers" not in flags else []
        usual += ["--num_samples", 2] if "knockout" not in flags else []
        try:
            code = test_gradcam.main([str(word) for word in (*usual, *flags)])
        except SystemExit as exc:
            code = exc.code
        return code, *capsys.readouterr()

    return drive


@pytest.fixture
def formula(monkeypatch):
    """A function that gives a method another formula for the test."""

    def replaced(name, other):
        monkeypatch.setitem(METHODS, name, METHODS[name]._replace(formula=other))

    return replaced
