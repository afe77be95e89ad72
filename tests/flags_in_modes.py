"""A value of each flag that acts in some modes only."""

from pathlib import Path

from common.flags import FOLDERS, MODES_OF_FLAG

ROOT = Path(__file__).parent.parent


OUTSIDE = {"--layer": "1", "--layer_range": "late", "--layers": "1", "--save_raw": None, "--randomize": None}
OUTSIDE |= {"--words": "cat", "--target": "red", "--target_occurrence": "2", "--contrast": "dog", "--mask": "{mask}"}
OUTSIDE |= {"--baseline": "mean", "--steps": "3", "--compare": None, "--recompute": None}
OUTSIDE |= {"--num_samples": "3", "--noise_std": "0.3", "--seed": "1", "--method": "hirescam", "--score": "logprob"}
OUTSIDE |= {"--rules": "plain", "--tap": "output", "--attention_maps": None, "--taps": None}
OUTSIDE |= {"--colormap": "jet", "--opacity": "fixed:0.5", "--upsample": "cells", "--scale": "all"}
OUTSIDE |= {"--head": "1", "--heads": None, "--heatmaps": None, "--width": "column", "--prompt_words": None}
OUTSIDE |= {"--window": "2", "--keep": "3", "--answers": "list.jsonl", "--hide_from": "2", "--synonyms": "names.txt"}
OUTSIDE |= {"--fastv": "2", "--removed": "50"}
OUTSIDE |= {"--together": None, "--video": "clip.mp4", "--fps": "4"}
PAIRS = [(flag, mode) for flag in MODES_OF_FLAG for mode in FOLDERS]


DRIVER = str(ROOT / "test_gradcam.py")
