"""A checkpoint, from a folder or the hub: its device, processor, weights and identity. Code of its own is never run.

Its files are checked before transformers opens them, see `common/refusals.py`.
"""

import hashlib
import json
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.processing_utils import TextKwargs

from common.adapter import adapter_of, merged
from common.families import known
from common.refusals import MAX_BYTES, check_tokenizer, checkpoint_folder, fetch_weights, read_record
from common.template import render
from smooth_gradcam import FAMILIES, ExplanationWarning, get_model_layers, is_out_of_memory, supported

__all__ = [
    *("count_heads", "count_layers", "load_model", "load_processor", "model_identity", "model_named"),
    "resolve_device",
]


LONGEST_TOKEN = 1000  # characters: an answer of longer ones could fill the memory


def resolve_device(name: str) -> str:
    """The device of that name; "auto" is cuda if there is one, else cpu. Raises ValueError if it is not available.

    On a machine without CUDA, cuda and cuda:N are the cpu, with a warning.
    """
    if name == "map":
        return name
    cuda = torch.cuda.device_count()
    devices = ["cpu"] + (["cuda", *(f"cuda:{i}" for i in range(cuda))] if cuda else [])
    if torch.backends.mps.is_available():
        devices.append("mps")
    if name == "auto":
        return "cuda" if cuda else "cpu"
    if not cuda and re.fullmatch(r"cuda(:\d+)?", name):
        warnings.warn(f"--device {name}: this machine has no CUDA device, so the CPU is used", ExplanationWarning, 2)
        return "cpu"
    if name not in devices:
        raise ValueError(f"--device {name} is not available: choose auto, map, {', '.join(devices)}")
    return name


def count_layers(model_path: str) -> int:
    """The number of decoder layers, from config.json. Raises ValueError if the model's family is not supported."""
    return _count_of(model_path, "num_hidden_layers")


def count_heads(model_path: str) -> int:
    """The number of attention heads of a decoder layer, in the same way."""
    return _count_of(model_path, "num_attention_heads")


def _count_of(model_path: str, setting: str) -> int:
    if adapter := adapter_of(model_path):
        with adapter.of_base() as base:
            return _count_of(base, setting)
    folder, name = checkpoint_folder(model_path), f"--model_path {model_path}"
    config = read_record(folder / "config.json", name)
    decoder = _decoder_settings(config)
    if not isinstance(config.get("text_config", {}), dict) or not isinstance(config.get("vision_config", {}), dict):
        raise ValueError(f"{name} is unreadable: its config.json holds no object where one is expected")
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"{name} is of type {family}, which is not supported: {supported()}")
    count = decoder.get(setting)
    if count is None and (kind := decoder.get("model_type")) in transformers.CONFIG_MAPPING:  # as in LLaVA's
        count = getattr(transformers.CONFIG_MAPPING[kind](), setting, None)
    if type(count) is not int or not 1 <= count < 10_000:
        raise ValueError(f"{name} has a config.json with {setting} {count!r}: it must be 1 or more")
    return count


def _decoder_settings(config: dict) -> dict:
    """The decoder's settings, which older checkpoints keep among the others."""
    decoder = config.get("text_config", {})
    return {**config, **decoder} if isinstance(decoder, dict) else config


def load_processor(model_path: str, max_pixels: int):
    """The model's processor, at `max_pixels` or fewer a photo; its chat template is bounded, see `common/template.py`.

    Raises ValueError if it is missing, or does not belong to this model.
    """
    adapter, name = adapter_of(model_path), f"--model_path {model_path}"
    if adapter and not adapter.has_processor:
        with adapter.of_base() as base:
            return load_processor(base, max_pixels)
    folder = adapter.folder if adapter else checkpoint_folder(model_path)
    check_tokenizer(folder, name)
    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise ValueError(f"{name} lacks its tokenizer: it has neither tokenizer.json nor vocab.json")
    try:
        processor = AutoProcessor.from_pretrained(str(folder), trust_remote_code=False)
    except ImportError as exc:
        raise ValueError(f"{name} needs a package that is not installed: {exc}") from exc
    except Exception as exc:  # transformers raises anything here
        raise ValueError(f"{name} lacks a processor that can be loaded: {type(exc).__name__}: {exc}") from exc
    for component in ("image_processor", "tokenizer", "chat_template"):
        if getattr(processor, component, None) is None:
            raise ValueError(f"{name} lacks a processor that can be loaded: there is no {component}")
    if processor.image_token not in processor.tokenizer.get_vocab():  # transformers 5 falls back to an empty one
        raise ValueError(f"{name} lacks its tokenizer: it has no {processor.image_token}")
    settings = checkpoint_folder(adapter.base if adapter else model_path) / "config.json"
    config = read_record(settings, name)
    _check_fit(processor, config, name)
    for key in TextKwargs.__annotations__:  # such as padding: transformers would apply them to every prompt
        processor.tokenizer.init_kwargs.pop(key, None)
    with model_named(model_path):
        _bound_template(processor)
    try:
        FAMILIES[config["model_type"]].cap(processor.image_processor, max_pixels)
    except (TypeError, KeyError) as exc:
        raise ValueError(f"{name} has a preprocessor_config.json without a valid size, in whole pixels: {exc}") from exc
    return processor


def _check_fit(processor, config: dict, name: str) -> None:
    """Raises ValueError if processor and model, each of which may be sound, are not made for each other."""
    images, decoder, tokens = processor.image_processor, _decoder_settings(config), processor.tokenizer.get_vocab()
    pairs = FAMILIES[config["model_type"]].settings(processor, config)
    pairs["image token"] = tokens[pairs["image token"][0]], pairs["image token"][1]
    pairs["do_resize"] = getattr(images, "do_resize", True), True  # or --max_pixels would have no effect
    for setting, (value, expected) in pairs.items():
        if expected is not None and value != expected:
            raise ValueError(f"{name} has a processor with {setting} {value!r}: this model takes {expected!r}")
    deviations = np.atleast_1d(getattr(images, "image_std", None) or 1.0).tolist()
    if not all(type(value) in (int, float) and value > 0 for value in deviations):
        raise ValueError(f"{name} has a processor with image_std {images.image_std}: numbers above 0 are needed")
    if (length := max(map(len, tokens))) > LONGEST_TOKEN:
        raise ValueError(f"{name} has a tokenizer with a token of {length} characters: up to {LONGEST_TOKEN} are read")
    largest, vocabulary = max(tokens.values()), decoder.get("vocab_size")
    if vocabulary is not None and largest >= vocabulary:
        raise ValueError(
            f"{name} has a tokenizer with token {largest}, and its config.json a vocab_size of {vocabulary}"
        )


def _bound_template(processor) -> None:
    """Have the chat template rendered in a process that can be stopped, and try it. Raises ValueError if it fails."""
    template = processor.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if not isinstance(template, str):
        raise ValueError("the chat template is not text, or there are several and none is the default")

    def apply_chat_template(conversation, *, tokenize: bool, add_generation_prompt: bool) -> str:
        if tokenize:
            raise ValueError("the chat template is only rendered to text here: tokenize=False")
        variables = {"messages": conversation, "tools": None, "documents": None}
        variables |= {"add_generation_prompt": add_generation_prompt}
        return render(template, json.dumps(dict(processor.tokenizer.special_tokens_map) | variables))

    processor.apply_chat_template = apply_chat_template
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)


def _own_generation(folder: Path, name: str) -> GenerationConfig:
    """The checkpoint's end and padding tokens, and none of its other wishes. Raises ValueError for invalid ones."""
    path = folder / "generation_config.json"
    config = _decoder_settings(read_record(folder / "config.json", name))
    config |= read_record(path, name) if path.is_file() else {}
    tokens = {key: config.get(key) for key in ("eos_token_id", "pad_token_id")}
    for key, value in tokens.items():
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if value is not None and not all(type(token) is int and 0 <= token < 2**31 for token in ids):
            raise ValueError(f"{name} has {key} {value!r}: it must be a token id")
    return GenerationConfig(**tokens)


def load_model(model_path: str, device: str, dtype: str):
    """The model in evaluation mode, of an adapter's folder its base with the adapter merged into it.

    Raises ValueError if weights are missing: they would be random.
    """
    if adapter := adapter_of(model_path):
        with adapter.of_base() as base:
            model = load_model(base, device, dtype)
        return merged(model, adapter).eval()
    folder, name = checkpoint_folder(model_path), f"--model_path {model_path}"
    keywords = {"generation_config": _own_generation(folder, name)}
    keywords |= {"device_map": "auto"} if device == "map" else {}
    keywords |= {"dtype": dtype, "output_loading_info": True, "trust_remote_code": False, "use_safetensors": True}
    try:
        fetch_weights(model_path, folder)
        model, info = AutoModelForImageTextToText.from_pretrained(str(folder), **keywords)
    except torch.OutOfMemoryError:
        raise
    except ImportError as exc:
        raise ValueError(f"{name} needs a package that is not installed: {exc}") from exc
    except OSError as exc:
        raise ValueError(
            f"{name} lacks its weights as safetensors; pickles (.bin, .pt) can run code and are "
            f"never opened: {exc.strerror or 'save it with model.save_pretrained(...) where you trust it'}"
        ) from exc
    except Exception as exc:  # a config can make transformers raise anything
        raise ValueError(
            f"{name} has weights that are damaged (a git-lfs pointer?) or do not fit its config: "
            f"{type(exc).__name__}: {exc}"
        ) from exc
    if info["missing_keys"]:
        raise ValueError(f"{name} lacks weights, such as {sorted(info['missing_keys'])[0]}")
    if unknown := sorted(info["unexpected_keys"]):
        message = f"{name} has {len(unknown)} weights that its config.json does not know: {unknown[0]}"
        if any(re.search(r"\b(layers|blocks)\.\d+\.", key) for key in unknown):
            raise ValueError(f"{message}, ...: the model would be cut short")
        warnings.warn(message, ExplanationWarning, stacklevel=2)
    _check_weights(model, name)
    return (model if device == "map" else model.to(device)).eval()


def _check_weights(model, name: str) -> None:
    """Raises ValueError if all weights of a component are one number, of a file that was never filled; samples them."""
    components = {"embeddings": [model.get_input_embeddings()], "output": [model.get_output_embeddings()]}
    components |= {"decoder": get_model_layers(model)[0]}
    components |= {"vision tower": [model.model.get_submodule(part) for part in known(model).tower]}
    for component, modules in components.items():
        matrices = [weight for module in modules for weight in module.parameters() if weight.dim() > 1]
        samples = (weight.flatten()[:: max(1, weight.numel() // 256)] for weight in matrices if not weight.is_meta)
        constant = [bool((sample == sample[0]).all()) for sample in samples]
        if constant and all(constant):
            raise ValueError(f"{name} has weights of its {component} that are all the same: it knows nothing")


@contextmanager
def model_named(model_path: str):
    """Inside, errors caused by the checkpoint are raised as ValueError that names it.

    Those are errors of libraries while transformers runs the model or its processor, except for running out of memory,
    and errors of the chat template. Errors of our own files, or of a library that they call, stay as they are.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as exc:  # a panic of the tokenizer's Rust is not an Exception
        if isinstance(exc, ValueError) and str(exc).startswith("the chat template"):
            raise ValueError(f"--model_path {model_path}: {exc}") from exc
        root, library = Path(__file__).parents[1], Path(transformers.__file__).parent
        files = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(exc.__traceback__)]
        ours = files[-1].parent in (root, root / "common", root / "studies")
        if ours or not any(file.is_relative_to(library) for file in files):
            raise
        if isinstance(exc, MemoryError) or (isinstance(exc, RuntimeError) and is_out_of_memory(exc)):
            raise
        message = f"the model cannot read this photo and prompt: {type(exc).__name__}: {exc}"
        raise ValueError(f"--model_path {model_path}: {message}") from exc


def model_identity(model_path: str) -> str:
    """A text that differs between models: the revision of a name on the hub, a hash of a folder.

    The hash is that of the folder's text files and of both ends of each tensor; an adapter's base comes behind it.
    """
    adapter, state = adapter_of(model_path), hashlib.sha256()
    folder = adapter.folder if adapter else checkpoint_folder(model_path)
    if not Path(model_path).is_dir():
        return f"{model_path} {folder.name}"
    for path in sorted(folder.iterdir()):
        if not path.is_file() or (path.suffix != ".safetensors" and path.stat().st_size > MAX_BYTES):
            continue  # reading a pipe would never end; such files are not the model's
        if path.suffix in (".json", ".jinja", ".txt"):
            state.update(path.read_bytes())
        elif path.suffix == ".safetensors":
            for block in _tensor_ends(path):
                state.update(block)
    if adapter:
        with adapter.of_base() as base:
            return f"{state.hexdigest()} on {model_identity(base)}"
    return state.hexdigest()


def _tensor_ends(path: Path, count: int = 2**15) -> Iterator[bytes]:
    """The header of a safetensors file, and the first and last `count` bytes of each tensor, as far as it is sound."""
    with path.open("rb") as file, suppress(ValueError, LookupError, TypeError, AttributeError):
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, path.stat().st_size))
        yield header
        for name, tensor in json.loads(header).items():
            if name != "__metadata__":
                start, end = tensor["data_offsets"]
                for offset in (start, max(start, end - count)):
                    file.seek(8 + length + offset)
                    yield file.read(min(count, end - offset))
