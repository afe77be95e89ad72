"""A checkpoint, from a folder or the hub: its device, processor, weights and identity. No code of its own is run.

What its files may hold is known before transformers opens them, see `common.refusals`.
"""

import hashlib
import json
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.processing_utils import TextKwargs

from common.refusals import LARGE, check_tokenizer, checkpoint_folder, fetch_weights, read_record
from common.template import render
from smooth_gradcam import FAMILIES, SUPPORTED, ExplanationWarning, get_model_layers, is_out_of_memory

__all__ = ["count_layers", "load_model", "load_processor", "model_identity", "model_named", "resolve_device"]


def resolve_device(name: str) -> str:
    """A device that is there: auto is cuda if there is one, else cpu. Raises ValueError."""
    if name == "map":
        return name
    cuda = torch.cuda.device_count()
    there = ["cpu"] + (["cuda", *(f"cuda:{i}" for i in range(cuda))] if cuda else [])
    if torch.backends.mps.is_available():
        there.append("mps")
    if name == "auto":
        return "cuda" if cuda else "cpu"
    if name not in there:
        raise ValueError(f"--device {name} is not there: choose auto, map, {', '.join(there)}")
    return name


def count_layers(model_path: str) -> int:
    """Decoder layers of the checkpoint, from its config.json. Raises ValueError if it is of no supported family."""
    folder, name = checkpoint_folder(model_path), f"--model_path {model_path}"
    config = read_record(folder / "config.json", name)
    text = decoder_settings(config)
    if not isinstance(config.get("text_config", {}), dict) or not isinstance(config.get("vision_config", {}), dict):
        raise ValueError(f"{name} is unreadable: its config.json holds no record where one should be")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{name} is of type {kind}, which is not supported: {SUPPORTED}")
    layers = text.get("num_hidden_layers")
    if type(layers) is not int or not 1 <= layers < 10_000:
        raise ValueError(f"{name} has a config.json with num_hidden_layers {layers!r}: it must be 1 or more")
    return layers


def decoder_settings(config: dict) -> dict:
    """Those of the decoder, which older checkpoints have beside the others."""
    text = config.get("text_config", {})
    return {**config, **text} if isinstance(text, dict) else config


# model


def cap_pixels(image_processor, max_pixels: int) -> None:
    """Lower the processor's cap on a photo's pixels, never raise it. Raises ValueError below one image token."""
    side = image_processor.patch_size * image_processor.merge_size
    if max_pixels < side * side:
        raise ValueError(f"--max_pixels {max_pixels} is less than one image token: give {side * side} or more")
    size = dict(image_processor.size)
    longest = min(size["longest_edge"], max_pixels)  # in pixels, whatever the names say
    shortest = min(size["shortest_edge"], longest)
    image_processor.size = type(image_processor.size)(shortest_edge=shortest, longest_edge=longest)
    if hasattr(image_processor, "max_pixels"):  # transformers 4 keeps them twice
        image_processor.min_pixels, image_processor.max_pixels = shortest, longest


def load_processor(model_path: str, max_pixels: int):
    """The model's processor, capped; its chat template is bounded, see `common.template`.

    Raises ValueError if it is missing, or not one of this vision-language model.
    """
    folder, name = checkpoint_folder(model_path), f"--model_path {model_path}"
    check_tokenizer(folder, name)
    try:
        processor = AutoProcessor.from_pretrained(str(folder), trust_remote_code=False)
    except ImportError as exc:
        raise ValueError(f"{name} needs a package that is not installed: {exc}") from exc
    except Exception as exc:  # transformers raises anything here
        raise ValueError(f"{name} lacks a processor that can be loaded: {type(exc).__name__}: {exc}") from exc
    for part in ("image_processor", "tokenizer", "chat_template"):
        if getattr(processor, part, None) is None:
            raise ValueError(f"{name} lacks a processor that can be loaded: there is no {part}")
    if processor.image_token not in processor.tokenizer.get_vocab():  # transformers 5 makes do with an empty one
        raise ValueError(f"{name} lacks its tokenizer: it has no {processor.image_token}")
    check_fit(processor, read_record(folder / "config.json", name), name)
    for key in TextKwargs.__annotations__:  # such as padding: transformers would apply them to every prompt
        processor.tokenizer.init_kwargs.pop(key, None)
    with model_named(model_path):
        bound_template(processor)
    try:
        cap_pixels(processor.image_processor, max_pixels)
    except (TypeError, KeyError) as exc:
        raise ValueError(f"{name} has a preprocessor_config.json whose size is none: {exc}") from exc
    return processor


def check_fit(processor, config: dict, name: str) -> None:
    """Raises ValueError if processor and model, each of which may be sound, are not made for each other."""
    images, vision, text = processor.image_processor, config.get("vision_config") or {}, decoder_settings(config)
    tokens = processor.tokenizer.get_vocab()
    wanted = {"image token": (tokens[processor.image_token], config.get("image_token_id"))}
    wanted["do_resize"] = getattr(images, "do_resize", True), True  # or --max_pixels would not act
    for own, models in (("patch_size",) * 2, ("temporal_patch_size",) * 2, ("merge_size", "spatial_merge_size")):
        wanted[own] = getattr(images, own, None), vision.get(models)
    for what, (has, wants) in wanted.items():
        if wants is not None and has != wants:
            raise ValueError(f"{name} has a processor with {what} {has!r}: this model takes {wants!r}")
    most, vocabulary = max(tokens.values()), text.get("vocab_size")
    if vocabulary is not None and most >= vocabulary:
        raise ValueError(f"{name} has a tokenizer with token {most}, and its config.json a vocab_size of {vocabulary}")


def bound_template(processor) -> None:
    """Have the chat template rendered where it can be stopped, and try it. Raises ValueError."""
    template = processor.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if not isinstance(template, str):
        raise ValueError("the chat template is no text, or there are several and none is the default")

    def apply_chat_template(conversation, *, tokenize: bool, add_generation_prompt: bool) -> str:
        if tokenize:
            raise ValueError("the chat template gives text here: tokenize=False")
        asked = {"messages": conversation, "tools": None, "documents": None}
        asked |= {"add_generation_prompt": add_generation_prompt}
        return render(template, json.dumps(dict(processor.tokenizer.special_tokens_map) | asked))

    processor.apply_chat_template = apply_chat_template
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    apply_chat_template([{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True)


def own_generation(folder: Path, name: str) -> GenerationConfig:
    """The checkpoint's end and padding tokens, and nothing else that it wants. Raises ValueError."""
    path = folder / "generation_config.json"
    found = decoder_settings(read_record(folder / "config.json", name))
    found |= read_record(path, name) if path.is_file() else {}
    tokens = {key: found.get(key) for key in ("eos_token_id", "pad_token_id")}
    for key, value in tokens.items():
        given = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if value is not None and not all(type(token) is int and token >= 0 for token in given):
            raise ValueError(f"{name} has {key} {value!r}: give the number of a token")
    return GenerationConfig(**tokens)


def load_model(model_path: str, device: str, dtype: str):
    """The model in evaluation mode. Raises ValueError if weights are missing: they would be random."""
    where = {"device_map": "auto"} if device == "map" else {}
    folder, name = checkpoint_folder(model_path), f"--model_path {model_path}"
    where["generation_config"] = own_generation(folder, name)
    try:
        fetch_weights(model_path, folder)
        model, info = AutoModelForImageTextToText.from_pretrained(
            str(folder), dtype=dtype, output_loading_info=True, trust_remote_code=False, use_safetensors=True, **where
        )
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
        about = f"{name} has {len(unknown)} weights that its config.json does not know: {unknown[0]}"
        if any(re.search(r"\b(layers|blocks)\.\d+\.", key) for key in unknown):
            raise ValueError(f"{about}, ...: the model would be cut short")
        warnings.warn(about, ExplanationWarning, stacklevel=2)
    check_weights(model, name)
    return (model if device == "map" else model.to(device)).eval()


def check_weights(model, name: str) -> None:
    """Raises ValueError if a part of the model holds but one number: its file was never filled. Some are looked at."""
    parts = {"embeddings": [model.get_input_embeddings()], "output": [model.get_output_embeddings()]}
    parts |= {"decoder": get_model_layers(model)[0], "vision tower": [model.model.visual]}
    for part, modules in parts.items():
        found = [weight for module in modules for weight in module.parameters() if weight.dim() > 1]
        samples = (weight.flatten()[:: max(1, weight.numel() // 256)] for weight in found if not weight.is_meta)
        alike = [bool((sample == sample[0]).all()) for sample in samples]
        if alike and all(alike):
            raise ValueError(f"{name} has weights of its {part} that are all the same: it knows nothing")


@contextmanager
def model_named(model_path: str):
    """Inside, errors that come of the checkpoint name it, as ValueError.

    Those are what a library raises while transformers runs the model or its processor, but for a lack of memory, and
    what is said of the chat template. What our own files raise, or a library that they call, is left as it is.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as exc:  # panics of the tokenizer's Rust are no Exception
        if isinstance(exc, ValueError) and str(exc).startswith("the chat template"):
            raise ValueError(f"--model_path {model_path}: {exc}") from exc
        root, library = Path(__file__).parents[1], Path(transformers.__file__).parent
        files = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(exc.__traceback__)]
        ours = files[-1].parent in (root, root / "common", root / "studies")
        if ours or not any(file.is_relative_to(library) for file in files):
            raise
        if isinstance(exc, MemoryError) or (isinstance(exc, RuntimeError) and is_out_of_memory(exc)):
            raise
        about = f"the model cannot read this photo and prompt: {type(exc).__name__}: {exc}"
        raise ValueError(f"--model_path {model_path}: {about}") from exc


# a list of photos


def model_identity(model_path: str) -> str:
    """What tells a model from another: of a folder its files of text and, of each tensor, both ends; of a name on the
    hub, its revision.
    """
    folder, state = checkpoint_folder(model_path), hashlib.sha256()
    if not Path(model_path).is_dir():
        return f"{model_path} {folder.name}"
    for path in sorted(folder.iterdir()):
        if not path.is_file() or (path.suffix != ".safetensors" and path.stat().st_size > LARGE):
            continue  # a pipe would be read for ever; such files are not the model's
        if path.suffix in (".json", ".jinja", ".txt"):
            state.update(path.read_bytes())
        elif path.suffix == ".safetensors":
            for part in tensor_ends(path):
                state.update(part)
    return state.hexdigest()


def tensor_ends(path: Path, most: int = 2**15) -> Iterator[bytes]:
    """The header of a safetensors file, and the first and last bytes of each tensor; a damaged one ends early."""
    with path.open("rb") as file, suppress(ValueError, LookupError, TypeError, AttributeError):
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, path.stat().st_size))
        yield header
        for name, tensor in json.loads(header).items():
            if name != "__metadata__":
                start, end = tensor["data_offsets"]
                for at in (start, max(start, end - most)):
                    file.seek(8 + length + at)
                    yield file.read(min(most, end - at))
