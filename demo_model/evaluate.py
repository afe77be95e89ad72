"""How well the demo model reads scenes it has never seen: python demo_model/evaluate.py

Each scene is described with the documented prompt, by the ordinary processor and greedy generation, and the answer is
read back with a strict grammar: a word that is not one of the known phrases counts as an error. Prints, with 95 %
intervals (Wilson), the share of objects named, of scenes with nothing invented, of objects named and placed right
and, on a question of each kind per scene, of answers that are right to the letter. What is invented is what CHAIR
counts (Rohrbach et al., 2018), and yes or no to "Is there a dog?" what POPE does (Li et al., 2023).

With --hide_image_from LAYER, all of it again with the image's tokens hidden from that decoder layer on: table 1 of
"From Redundancy to Relevance".
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import scenes
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

UNSEEN = 9_000_000  # seeds from here on are never drawn in training
TOPICS = ("list", "where", "there", "count", "place", "beside")


def read_description(answer: str) -> list[tuple[str, str]]:
    """[(kind, place phrase)] of a description; what does not read as "a KIND PLACE" comes back as (text, "")."""
    places = "|".join(sorted(scenes.PLACES, key=len, reverse=True))
    text = re.sub(r"^There (is|are) |\.$", "", answer)
    parts = re.split(r", | and (?=an? |grapes)", text)
    found = [re.fullmatch(rf"(?:an? )?(\w+) ({places})", part) for part in parts]
    return [match.groups() if match else (part, "") for match, part in zip(found, parts, strict=True)]


@torch.inference_mode()
def answers(model, processor, pictures, questions, max_new_tokens=64) -> list[str]:
    """One answer each, greedily; all pictures of one size, so that a batch needs padding on the text side only."""
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}] for question in questions
    ]
    text = [processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    inputs = processor(text=text, images=pictures, padding=True, padding_side="left", return_tensors="pt")
    output = model.generate(**inputs.to(model.device), do_sample=False, max_new_tokens=max_new_tokens)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def interval(right: int, total: int) -> str:
    """Share with its Wilson 95 % interval, in percent."""
    share, z = right / total, 1.96
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * np.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return f"{100 * share:5.1f} %  ({100 * (middle - half):.1f} to {100 * (middle + half):.1f}; {right} of {total})"


def by_size(numbers, size=None) -> list[list[tuple[int, scenes.Scene]]]:
    """Numbered scenes in batches of at most 16 of one size."""
    groups = {}
    for number in numbers:
        scene = scenes.make_scene(UNSEEN + number, size=size)
        groups.setdefault(scene.image.shape, []).append((number, scene))
    return [group[i : i + 16] for group in groups.values() for i in range(0, len(group), 16)]


def evaluate(model, processor, count: int, size=None) -> dict[str, tuple[int, int]]:
    """Name of each figure -> (right, total), over `count` unseen scenes, of (height, width) if given."""
    right, total = Counter(), Counter()

    def note(name, good):
        right[name] += bool(good)
        total[name] += 1

    for batch in by_size(range(count), size):
        pictures = [Image.fromarray(scene.image) for _, scene in batch]
        described = answers(model, processor, pictures, [scenes.DESCRIBE[0]] * len(batch))
        for (_, scene), answer in zip(batch, described, strict=True):
            said = read_description(answer)
            names = [kind for kind, _ in said]
            present = Counter(thing.kind for thing in scene.objects)
            note("scenes with nothing invented", Counter(names) <= present)  # a second mention is an invention too
            note("scenes described without any mistake", answer == scenes.describe(scene))
            for kind in names:
                note("mentioned objects that are there", kind in present)
            for thing in scene.objects:
                note("objects named", thing.kind in names)
                if thing.kind in names:
                    note("named objects placed right", (thing.kind, scenes.PLACES[thing.place]) in said)
        for topic in TOPICS:
            asked = [scenes.ask(scene, np.random.default_rng((UNSEEN, number)), topic) for number, scene in batch]
            given = answers(model, processor, pictures, [question for question, _ in asked])
            for (_, truth), answer in zip(asked, given, strict=True):
                note(f"question '{topic}' answered right", answer == truth)
                if topic == "there":
                    note("yes or no right", answer.split(",")[0] == truth.split(",")[0])
    return {name: (right[name], total[name]) for name in total}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model_path", default=str(Path(__file__).parent))
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of every scene, in pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", help="auto: the checkpoint's; bfloat16 is faster for larger models")
    parser.add_argument(
        "--hide_image_from",
        type=int,
        nargs="+",
        default=[],
        metavar="LAYER",
        help="also with the image hidden from there",
    )
    options = parser.parse_args()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        options.model_path, dtype=options.dtype, trust_remote_code=False, use_safetensors=True
    )
    model = model.to(options.device).eval()
    processor = AutoProcessor.from_pretrained(options.model_path, trust_remote_code=False)
    layers = model.config.text_config.num_hidden_layers
    if wrong := [layer for layer in options.hide_image_from if not 0 <= layer <= layers]:
        parser.error(f"--hide_image_from {wrong[0]}: the image can be hidden from layer 0 to {layers} (nowhere) on")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{options.scenes} unseen scenes, {model.dtype}, {platform.machine()} {options.device}, {versions}")
    sys.path.append(str(Path(__file__).parent.parent))
    from studies.knockout import image_hidden

    for layer in [None, *options.hide_image_from]:
        print("the whole image" if layer is None else f"the image hidden from layer {layer} on")
        with nullcontext() if layer is None else image_hidden(model, layer):
            found = evaluate(model, processor, options.scenes, options.size)
        for name, (right, total) in found.items():
            print(f"  {name:40s} {interval(right, total)}")


if __name__ == "__main__":
    main()
