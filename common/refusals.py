"""What is refused in the files of a checkpoint, which are checked before transformers opens any of them.

A checkpoint is a folder, or a name on the hub, of which only the files named here are fetched. Its JSON files can name
code, other models and other files, which the library would run, load or open, or ask on the terminal whether to do so.
"""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

from transformers import dynamic_module_utils
from transformers.utils import cached_file

from common.families import FAMILIES

__all__ = [
    *("MAX_BYTES", "PICKLES", "check_files", "check_tokenizer", "checkpoint_folder", "fetch_weights", "hub_folder"),
    *("read_record", "settings", "wrong_with"),
]

dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # the library must refuse foreign code without asking

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FETCHED = ("generation_config.json", "processor_config.json", "preprocessor_config.json", INDEX)
FETCHED += ("video_preprocessor_config.json", "tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt")
FETCHED += ("added_tokens.json", "special_tokens_map.json", "chat_template.json", "chat_template.jinja")
OPENED = r".*config.*\.json|tekken\.json|.*\.(jinja|model|safetensors|safetensors\.index\.json)"
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "tekken.json")  # no settings
FOREIGN_MODELS = {"adapter_config.json": "an adapter", "audio_tokenizer_config.json": "an audio tokenizer"}
TOKENIZER_STEPS = ("Sequence", "NFC", "NFD", "NFKC", "NFKD", "Split", "ByteLevel", "ByteFallback", "Fuse")
TOKENIZER_STEPS += ("TemplateProcessing", "Prepend", "Metaspace", "Strip")
MAX_SETTINGS, MAX_BYTES = 2**22, 2**26  # bytes of a file of settings, and of any other than the weights

CODE = "wants to run code of its own ({key}), which this tool never does: use a checkpoint of transformers' own classes"
PICKLES = "only safetensors of its own folder are opened, as pickles (.bin, .pt) can run code"
CLASSES = r"Qwen(2|2_5_|3)(VL)?(Image|Video)?(Processor|Tokenizer)(Fast|Pil)?|PreTrainedTokenizerFast|TokenizersBackend"
SIZES = r"depth|(num_|num_attention_|num_key_value_)heads|(in_channels|in_chans|max_position_embeddings|num_labels)"
SIZES += r"|(hidden|out_hidden|intermediate|window|vocab|patch|temporal_patch|merge|spatial_merge)_size|head_dim"
LIMITS = {"depth": 1000, "patch_size": 1024, "num_labels": 10_000}
LIMITS |= dict.fromkeys(("temporal_patch_size", "merge_size", "spatial_merge_size"), 64)
QUANTISED = (None, "bitsandbytes", "awq", "gptq", "compressed-tensors")  # run by packages, without kernels from a hub


def wrong_with(key: str, value, classes: str = CLASSES) -> str | None:
    """Why a setting of this name and value is refused, at any depth of any file; None if it is not.

    `classes` are those that may be named, a regular expression.
    """
    if key in ("auto_map", "custom_generate"):
        return CODE.format(key=key)
    if key.startswith("audio_tokenizer"):
        return f"names a model of its own ({key}): take that out"
    if key == "transformers_weights":
        return f"keeps weights in {value}: {PICKLES}"
    if value in (None, [], {}):
        return None
    if key == "init_inputs" or re.search("_files?$", key):
        return f"names files to be read ({key}): only those of its own folder are, by their usual names"
    names = list(value.values()) if isinstance(value, dict) else [value]
    if re.fullmatch("tokenizer_class|(.*_)?(processor|extractor)_(class|type)", key):
        if not all(isinstance(name, str) and re.fullmatch(classes, name) for name in names):
            return f"wants the class {value!r} ({key}), which is not one of this family's"
    elif re.search("(attn|experts)_implementation$", key):
        if any(name not in (None, "eager", "sdpa") for name in names):
            return f"wants attention code {value!r}: this tool runs eager and sdpa, and none from a hub: take that out"
    elif key == "quantization_config":
        method = value.get("quant_method") if isinstance(value, dict) else value
        if method not in QUANTISED:
            return f"is quantised by {method!r}: of those, {', '.join(QUANTISED[1:])} are run, without code from a hub"
    elif key == "device":
        return f"wants its photos on the device {value!r}: take that out, --device says where the model is"
    elif re.fullmatch(SIZES, key):
        most, listed = LIMITS.get(key, 2**24), isinstance(value, list) and key == "patch_size"  # as InternVL's
        if not all(type(one) is int and 1 <= one <= most for one in (value if listed else [value])):
            return f"has {key} {value!r}: it must be a whole number, 1 to {most}"
    return None


def settings(record) -> Iterator[tuple[str, object]]:
    """Every key and its value at any depth."""
    for node in _objects(record):
        yield from node.items()


def _objects(record) -> Iterator[dict]:
    """Every object at any depth."""
    nodes = [record]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            yield node
            nodes.extend(node.values())
        elif isinstance(node, list):
            nodes.extend(node)


def _no_number(constant: str):
    raise ValueError(f"{constant} is not a number")


def read_record(path: Path, name: str) -> dict:
    """The object in a JSON file. Raises ValueError that begins with `name`, the flag and its value."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except PermissionError as exc:
        raise ValueError(f"{name} cannot be read: {exc.strerror}") from exc
    except (OSError, ValueError, RecursionError) as exc:
        raise ValueError(f"{name} is unreadable: its {path.name} is not JSON: {exc}") from exc
    if not isinstance(record, dict):
        raise ValueError(f"{name} is unreadable: its {path.name} holds no object where one is expected")
    return record


def _check_file(path: Path, folder: Path, name: str) -> None:
    """Raises ValueError unless it is a regular file of the folder itself, or of the hub's cache, and not too large."""
    real, home = path.resolve(), folder.resolve()
    cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not real.is_file():
        raise ValueError(f"{name} has a {path.name} that is a folder, a pipe, a device or a link that leads nowhere")
    if not (real.is_relative_to(home) or real.is_relative_to(cache)):
        raise ValueError(f"{name} has a {path.name} that lies in another folder, {real.parent}: copy it here")
    limit = MAX_SETTINGS if path.suffix == ".json" and path.name not in VOCABULARIES else MAX_BYTES
    if path.suffix != ".safetensors" and path.stat().st_size > limit:
        raise ValueError(f"{name} has a {path.name} of {path.stat().st_size} bytes: more than {limit} are not read")


def _check_index(record: dict, path: Path, name: str) -> None:
    """Raises ValueError if the index of the weights names other files than safetensors of the same folder."""
    files = record.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{name} has an unreadable {path.name}: it has no weight_map of file names")
    if foreign := next((file for file in files.values() if not re.fullmatch(r"[\w.-]+\.safetensors", file)), None):
        raise ValueError(f"{name} keeps weights in {foreign}: {PICKLES}")


def check_tokenizer(folder: Path, name: str) -> None:
    """Raises ValueError if a step of the tokenizer could make a prompt longer: a few such steps fill any memory."""
    path = folder / "tokenizer.json"
    record = read_record(path, name) if path.is_file() else {}
    stages = [record.get(stage) for stage in ("normalizer", "pre_tokenizer", "post_processor", "decoder")]
    for step in _objects(stages):
        if "type" in step and step["type"] not in TOKENIZER_STEPS and not _replaces_in_place(step):
            steps = ", ".join(TOKENIZER_STEPS)
            raise ValueError(
                f"{name} has a {path.name} with a step {step['type']!r}: those are run that cannot make a text longer "
                f"each time, {steps}, and Replace of as many characters"
            )


def _replaces_in_place(step: dict) -> bool:
    """Whether a step replaces a text by one that is not longer, as LLaMA's does with blanks."""
    pattern, content = step.get("pattern"), step.get("content")
    old = pattern.get("String") if isinstance(pattern, dict) and list(pattern) == ["String"] else None
    texts = isinstance(old, str) and isinstance(content, str) and bool(old)
    return step["type"] == "Replace" and texts and len(content) <= len(old)


@functools.lru_cache
def hub_folder(model_path: str) -> Path:
    """The folder in the hub's cache with the checkpoint's files of one revision, without weights. Raises OSError."""
    folder = Path(cached_file(model_path, "config.json")).parent
    missing = dict.fromkeys(("missing_entries", "connection_errors", "gated_repo"), False)
    missing = {f"_raise_exceptions_for_{reason}": value for reason, value in missing.items()}
    for file in FETCHED:
        cached_file(model_path, file, revision=folder.name, **missing)
    return folder


def checkpoint_folder(model_path: str) -> Path:
    """The folder of a checkpoint, or of a name on the hub, after its files have been checked.

    Raises ValueError that names the flag, the file, and what is refused in it.
    """
    folder, name = Path(model_path), f"--model_path {model_path}"
    try:
        if folder.exists() and not (folder / "config.json").is_file():
            raise ValueError(f"{name} is not a model folder: it has no config.json")
        if not folder.exists():
            if folder.is_absolute() or len(folder.parts) > 2 or model_path.startswith("."):
                raise ValueError(f"{name} does not exist: give a model folder or a name on the hub")
            folder = hub_folder(model_path)
    except PermissionError as exc:
        raise ValueError(f"{name} cannot be read: {exc.strerror}") from exc
    except OSError as exc:
        missing = "neither a folder nor a name on the hub that can be reached"
        raise ValueError(f"{name} is {'unreadable' if folder.exists() else missing}: {exc}") from exc
    check_files(folder, name)
    return folder


def check_files(folder: Path, name: str, foreign: dict[str, str] = FOREIGN_MODELS) -> None:
    """Raises ValueError that begins with `name` for what is refused in the files of a folder."""
    try:
        files = [path for path in sorted(folder.iterdir()) if path.name in FETCHED or re.fullmatch(OPENED, path.name)]
        files += sorted(folder.glob("*_templates/*.jinja"))
        for path in files:
            if path.name in foreign:
                raise ValueError(
                    f"{name} holds {foreign[path.name]} ({path.name}) beside a model: take one of them out"
                )
            _check_file(path, folder, name)
    except PermissionError as exc:
        raise ValueError(f"{name} cannot be read: {exc.strerror}") from exc
    except OSError as exc:
        raise ValueError(f"{name} is unreadable: {exc}") from exc
    kind = read_record(folder / "config.json", name).get("model_type") if folder / "config.json" in files else None
    known = [FAMILIES[kind]] if isinstance(kind, str) and kind in FAMILIES else FAMILIES.values()
    classes = "|".join([CLASSES, *(family.classes for family in known if family.classes)])
    for path in files:
        if path.suffix == ".json" and path.name not in VOCABULARIES:
            record = read_record(path, name)
            if path.name.endswith(".safetensors.index.json"):
                _check_index(record, path, name)
                continue
            for key, value in settings(record):
                if reason := wrong_with(key, value, classes):
                    raise ValueError(f"{name} {reason} (in its {path.name})")


def fetch_weights(model_path: str, folder: Path) -> None:
    """Fetch the weights of a name on the hub into its `checkpoint_folder`. Raises OSError if they cannot be had."""
    if Path(model_path).is_dir():
        return
    index = folder / INDEX
    files = read_record(index, f"--model_path {model_path}")["weight_map"].values() if index.is_file() else [WEIGHTS]
    for file in sorted(set(files)):
        cached_file(model_path, file, revision=folder.name)
