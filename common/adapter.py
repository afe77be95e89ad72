"""A LoRA adapter's folder as a checkpoint: its base model is loaded, and the adapter merged into it.

Its files are checked like those of a model, see `common/refusals.py`; of its settings only plain ones of LoRA are used.
"""

import re
from contextlib import contextmanager
from pathlib import Path

import regex
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.refusals import PICKLES, check_files, read_record

__all__ = ["ADAPTER_WEIGHTS", "Adapter", "adapter_of", "merged"]

SETTINGS, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SECONDS = 1  # a pattern of module names may take
NAME = r"[\w.]+"
NUMBERS = {"r": (int, 1), "lora_alpha": ((int, float), 0)}
SWITCHES = ("use_rslora", "use_dora", "lora_bias")
NAMES = ("target_modules", "modules_to_save", "exclude_modules")
PATTERNS = ("rank_pattern", "alpha_pattern")
UNUSED = {"lora_dropout", "inference_mode", "task_type", "auto_mapping", "peft_version", "megatron_core"}
UNUSED |= {"qalora_group_size", "base_model_name_or_path", "peft_type", "init_lora_weights"}  # without effect here


class Adapter:
    """The checked folder of an adapter, the keywords of its LoraConfig, and its base: a model folder or a hub name."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        record = read_record(folder / SETTINGS, name)
        self.options = dict(_plain_options(record, name))
        base = record.get("base_model_name_or_path")
        if not isinstance(base, str) or not base.strip() or "\0" in base:
            raise ValueError(f"{name} names no base model: its {SETTINGS} has base_model_name_or_path {base!r}")
        beside = folder / base
        self.base = str(beside) if not Path(base).is_dir() and beside.is_dir() else base

    @contextmanager
    def of_base(self):
        """Inside, errors of the base model are those of the adapter that names it."""
        try:
            yield self.base
        except ValueError as exc:
            raise ValueError(f"{self.name} is an adapter of {self.base!r}: {exc}") from exc

    @property
    def has_processor(self) -> bool:
        return any((self.folder / file).is_file() for file in ("processor_config.json", "preprocessor_config.json"))


def adapter_of(model_path: str) -> Adapter | None:
    """The adapter in a folder without a model; None for anything else. Raises ValueError for what is refused in it."""
    folder, name = Path(model_path), f"--model_path {model_path}"
    try:
        if not (folder / SETTINGS).exists() or (folder / "config.json").exists():
            return None
    except OSError:  # which `checkpoint_folder` reports
        return None
    check_files(folder, name, foreign={"audio_tokenizer_config.json": "an audio tokenizer"})
    adapter = Adapter(folder, name)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"{name} lacks {ADAPTER_WEIGHTS}: {PICKLES}")
    if (Path(adapter.base) / SETTINGS).exists():
        raise ValueError(f"{name} is an adapter of {adapter.base!r}, an adapter itself: merge that one first")
    return adapter


def _plain_options(record: dict, name: str):
    """The settings that LoraConfig is given. Raises ValueError that names a setting which is not supported."""
    if record.get("peft_type") != "LORA":
        raise ValueError(f"{name} is an adapter of type {record.get('peft_type')!r}: only LORA is supported")
    for key, value in record.items():
        wrong = ValueError(f"{name} has an adapter with {key} {value!r}, which is not supported")
        if key == "init_lora_weights" and value not in (True, False, "gaussian", None):
            raise wrong  # the others change the base model, too
        if key in UNUSED or value is None or value is False or value in ("none", "", [], {}):
            continue
        if key in NUMBERS:
            kind, least = NUMBERS[key]
            valid = isinstance(value, kind) and not isinstance(value, bool) and least <= value <= 2**20
        elif key in SWITCHES:
            valid = value is True
        elif key in PATTERNS:
            valid = isinstance(value, dict) and all(re.fullmatch(NAME, module) for module in value)
            valid = valid and all(type(number) in (int, float) and 0 < number <= 2**20 for number in value.values())
        elif key == "layers_to_transform":
            valid = all(type(layer) is int for layer in (value if isinstance(value, list) else [value]))
        elif key == "layers_pattern":
            valid = isinstance(value, str) and re.fullmatch(NAME, value)
        else:
            valid = key in NAMES and isinstance(value, list) and all(_is_name(module) for module in value)
            valid = valid or (key == "target_modules" and isinstance(value, str))
        if not valid:
            raise wrong
        yield key, value


def _is_name(value) -> bool:
    return isinstance(value, str) and re.fullmatch(NAME, value) is not None


def _targets(model, pattern: str, name: str) -> list[str]:
    """The modules whose whole name has the pattern, which a stranger wrote: it is not left to run for ever."""
    try:
        found = [key for key, _ in model.named_modules() if regex.fullmatch(pattern, key, timeout=SECONDS)]
    except (regex.error, TimeoutError) as exc:
        raise ValueError(f"{name} has target_modules {pattern!r}, which cannot be used as a pattern: {exc}") from exc
    if not found:
        raise ValueError(f"{name} has target_modules {pattern!r}, which no module of its base model has as its name")
    return found


def merged(model, adapter: Adapter):
    """The base model with the adapter merged into its weights.

    Raises ValueError if PEFT is missing, or the adapter does not fit: its weights would be random, or have no effect.
    """
    try:
        import peft
    except ImportError as exc:
        raise ValueError(f"{adapter.name} is an adapter, which needs PEFT: pip install peft") from exc
    options, name = dict(adapter.options), adapter.name
    targets = options.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":
        options["target_modules"] = _targets(model, targets, name)
    try:
        weights, config = load_file(adapter.folder / ADAPTER_WEIGHTS), peft.LoraConfig(**options, inference_mode=True)
        _check_values(weights, [config.r, *config.rank_pattern.values()], name)
        wrapped = peft.PeftModel(model, config)
        weights = {_renamed(key): value for key, value in weights.items()}
        _check_keys(weights.keys(), _state(peft, wrapped).keys(), name)
        peft.set_peft_model_state_dict(wrapped, weights)
        for key, value in _state(peft, wrapped).items():
            if not torch.equal(value, weights[key].to(value)):
                raise ValueError(f"PEFT has not loaded {key}")
        return wrapped.merge_and_unload(safe_merge=True)
    except (OSError, SafetensorError) as exc:
        raise ValueError(f"{name} has an {ADAPTER_WEIGHTS} that cannot be read: {exc}") from exc
    except Exception as exc:  # PEFT and safetensors raise anything here
        if isinstance(exc, ValueError) and str(exc).startswith(name):
            raise
        raise ValueError(f"{name} has an adapter that does not fit its base: {type(exc).__name__}: {exc}") from exc


def _state(peft, wrapped) -> dict:
    return peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)


def _renamed(key: str) -> str:
    """A weight's name in transformers 4.52 and later, which keeps the decoder in a language_model."""
    key = re.sub(r"^base_model\.model\.visual\.", "base_model.model.model.visual.", key)
    return re.sub(r"^(base_model\.model\.model)\.(?!language_model\.|visual\.)", r"\1.language_model.", key)


def _check_values(weights: dict, ranks: list, name: str) -> None:
    """Raises ValueError for values that are not finite, and for a rank that no weight has: PEFT would make room."""
    down = (value for key, value in weights.items() if re.search(r"\.lora_(embedding_)?A\b", key) and value.dim())
    largest = max((value.shape[0] for value in down), default=0)
    if max(ranks) > largest:
        raise ValueError(f"{name} asks for the rank {max(ranks)}: the largest of its weights is {largest}")
    if wrong := [key for key, value in weights.items() if not value.isfinite().all()]:
        raise ValueError(f"{name} has values in {wrong[0]} that are not finite")


def _check_keys(found, wanted, name: str) -> None:
    """Raises ValueError unless the adapter's file has just the weights that its settings call for."""
    if missing := sorted(wanted - found):
        raise ValueError(f"{name} lacks {len(missing)} weights of its adapter, such as {missing[0]}")
    if unknown := sorted(found - wanted):
        raise ValueError(f"{name} has {len(unknown)} weights that its base model has no place for: {unknown[0]}")
