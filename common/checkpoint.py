"""A checkpoint, from a folder or the hub: its device, processor, weights and identity. No code of its own is run."""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PretrainedConfig
from transformers.utils import cached_file

from smooth_gradcam import FAMILIES, SUPPORTED, ExplanationWarning

__all__ = ["count_layers", "load_model", "load_processor", "model_identity", "resolve_device"]


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
    folder, name = Path(model_path), f"--model_path {model_path}"
    try:
        if folder.exists() and not (folder / "config.json").is_file():
            raise ValueError(f"{name} is no model folder: it has no config.json")
        if not folder.exists() and (folder.is_absolute() or len(folder.parts) > 2 or model_path.startswith(".")):
            raise ValueError(f"{name} does not exist: give a model folder or a name on the hub")
        config, _ = PretrainedConfig.get_config_dict(model_path)
    except PermissionError as exc:
        raise ValueError(f"{name} cannot be read: {exc.strerror}") from exc
    except (OSError, TypeError, AttributeError, RecursionError) as exc:  # of a config that is no record, too
        missing = "neither a folder nor a name on the hub that can be reached"
        raise ValueError(f"{name} is {'unreadable' if folder.exists() else missing}: {exc}") from exc
    text = config.get("text_config", {}) if isinstance(config, dict) else None
    if not isinstance(text, dict):
        raise ValueError(f"{name} is unreadable: its config.json holds no record where one should be")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{name} is of type {kind}, which is not supported: {SUPPORTED}")
    for part in (config, text, config.get("vision_config") or {}):
        if "/" in f"{part.get('_attn_implementation')} {part.get('attn_implementation')}":
            raise ValueError(f"{name} wants attention code from a hub, which this tool never runs: take that out")
    layers = {**config, **text}.get("num_hidden_layers")
    if type(layers) is not int or not 1 <= layers < 10_000:
        raise ValueError(f"{name} has a config.json with num_hidden_layers {layers!r}: it must be 1 or more")
    return layers


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


def refuse_foreign_code(model_path: str, error: Exception) -> None:
    """Raises ValueError, in our words, if transformers failed because the checkpoint wants to run code of its own."""
    if "trust_remote_code" in str(error):
        raise ValueError(
            f"--model_path {model_path} wants to run code of its own (auto_map), which this tool never does: use a "
            "checkpoint of transformers' own classes"
        ) from error


def load_processor(model_path: str, max_pixels: int):
    """The model's processor, capped. Raises ValueError if it is missing or not one of a vision-language model."""
    try:
        processor = AutoProcessor.from_pretrained(model_path, trust_remote_code=False)
    except Exception as exc:  # transformers raises anything here, from OSError to ImportError
        refuse_foreign_code(model_path, exc)
        raise ValueError(f"--model_path {model_path} lacks a processor that can be loaded: {exc}") from exc
    for part in ("image_processor", "tokenizer", "chat_template"):
        if getattr(processor, part, None) is None:
            raise ValueError(f"--model_path {model_path} lacks a processor that can be loaded: there is no {part}")
    if processor.image_token not in processor.tokenizer.get_vocab():  # transformers 5 makes do with an empty one
        raise ValueError(f"--model_path {model_path} lacks its tokenizer: it has no {processor.image_token}")
    cap_pixels(processor.image_processor, max_pixels)
    return processor


def check_shards(model_path: str) -> None:
    """Raises ValueError if the index of the weights names files that are no safetensors of the same folder."""
    index = "model.safetensors.index.json"
    with suppress(OSError):  # transformers tells what is missing
        path = Path(model_path, index) if Path(model_path).is_dir() else cached_file(model_path, index)
        try:
            names = set(json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"].values())
            foreign = next((name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)), None)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
            raise ValueError(f"--model_path {model_path} has an unreadable {index}: {exc}") from exc
        if foreign is not None:
            raise ValueError(
                f"--model_path {model_path} keeps weights in {foreign}: only safetensors of its own folder are "
                "opened, as pickles (.bin, .pt) can run code"
            )


def load_model(model_path: str, device: str, dtype: str):
    """The model in evaluation mode. Raises ValueError if weights are missing: they would be random."""
    where = {"device_map": "auto"} if device == "map" else {}
    check_shards(model_path)
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            model_path, dtype=dtype, output_loading_info=True, trust_remote_code=False, use_safetensors=True, **where
        )
    except torch.OutOfMemoryError:
        raise
    except OSError as exc:
        raise ValueError(
            f"--model_path {model_path} lacks its weights as safetensors; pickles (.bin, .pt) can run code and are "
            f"never opened: {exc.strerror or 'save it with model.save_pretrained(...) where you trust it'}"
        ) from exc
    except Exception as exc:  # a config can make transformers raise anything
        refuse_foreign_code(model_path, exc)
        raise ValueError(
            f"--model_path {model_path} has weights that are damaged (a git-lfs pointer?) or do not fit its config: "
            f"{type(exc).__name__}: {exc}"
        ) from exc
    if info["missing_keys"]:
        raise ValueError(f"--model_path {model_path} lacks weights, such as {sorted(info['missing_keys'])[0]}")
    if unknown := sorted(info["unexpected_keys"]):
        about = f"--model_path {model_path} has {len(unknown)} weights that its config.json does not know: {unknown[0]}"
        if any(re.search(r"\b(layers|blocks)\.\d+\.", key) for key in unknown):
            raise ValueError(f"{about}, ...: the model would be cut short")
        warnings.warn(about, ExplanationWarning, stacklevel=2)
    return (model if where else model.to(device)).eval()


# a list of photos


def model_identity(model_path: str) -> str:
    """What tells a model from another: of a folder its files of text and, of each tensor, both ends; of a name on the
    hub, its revision.
    """
    folder, state = Path(model_path), hashlib.sha256()
    if not folder.is_dir():
        return f"{model_path} {PretrainedConfig.get_config_dict(model_path)[0].get('_commit_hash')}"
    for path in sorted(folder.iterdir()):
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
