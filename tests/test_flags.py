"""The flags: what they take, in which mode, and that nothing heavy is loaded to say so."""

import shlex
import subprocess
import sys

import pytest
import regex
from any_text import BLANKS, QUICK, TEXTS, refused
from flags_in_modes import DRIVER, OUTSIDE, PAIRS
from hypothesis import assume, example, given
from hypothesis import strategies as st

import common.checkpoint
import common.files
import common.flags
import common.page
import smooth_gradcam as core
import test_gradcam
import visualization_utils
from common.flags import CHOICES, EXAMPLES, LAYER_NAMES, MODES_OF_FLAG, OF_ANSWERS, make_parser, parse_args
from studies import faithfulness
from visualization_utils import select_layers

# help


def test_examples_of_the_help_can_be_parsed(capsys):
    with pytest.raises(SystemExit) as exit_info:
        test_gradcam.main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    lines = [line.strip() for line in EXAMPLES.splitlines()[1:]]
    assert len(lines) == 4
    for line in lines:
        assert line in text
        assert shlex.split(line)[:2] == ["python", "test_gradcam.py"]
        test_gradcam.parse_args(shlex.split(line)[2:])


def test_defaults_stand_in_the_help():
    text = " ".join(make_parser()[0].format_help().split())
    for default in ("grid", "the middle layer", "auto", "10", "0.15", "cam_results", "128", "1000000", "logit"):
        assert f"(default: {default})" in text
    assert "chefer: relevance x attention (default: auto)" in text


# which flag acts in which mode


def test_every_flag_of_some_modes_is_known_to_the_parser():
    for flag, mode in PAIRS:
        if mode in MODES_OF_FLAG[flag]:
            value = [] if OUTSIDE[flag] is None else [OUTSIDE[flag]]
            value += ["--target", "cat"] if flag in ("--target_occurrence", "--contrast") else []
            value += ["--method", "attention"] if flag == "--head" else []
            value += {"--together": ["--image_path", "a.png", "b.png"], "--fps": ["--video", "a.mp4"]}.get(flag, [])
            value += ["--window", "2"] if (flag, mode) == ("--mask", "knockout") else []
            value += ["--answers", "a.jsonl"] if flag in OF_ANSWERS else []
            value += {"--fastv": ["--removed", "50"], "--removed": ["--fastv", "2"]}.get(flag, [])
            value += ["--heads"] if (flag, mode) == ("--mask", "flow") else []
            assert parse_args(["--mode", mode, flag, *value]).mode == mode


def test_a_flag_may_be_shortened_as_long_as_it_is_clear(capsys):
    args = parse_args(["--mode", "single", "--num_s", "3", "--noise=0.2", "--layer", "5", "--pr", "What?"])
    assert (args.num_samples, args.noise_std, args.layer, args.prompt) == (3, 0.2, 5, "What?")
    assert "ambiguous option: --lay could match --layer, --layers, --layer_range" in refused(capsys, ["--lay", "3"])
    assert "--layer acts in single mode only" in refused(capsys, ["--layer", "3"])


def test_a_shortened_flag_counts_as_given(capsys):
    for flag, short in (("--noise_std", "--noise"), ("--seed", "--see")):
        assert f"{flag} acts in" in refused(capsys, ["--mode", "knockout", f"{short}=0"])
        assert f"{flag} acts in" in refused(capsys, ["--mode", "knockout", short, "0"])
    assert "--compare: all methods" in refused(capsys, ["--mode", "evaluate", "--com", "--meth", "hirescam"])
    assert (
        parse_args(["--noise", "0", "--num_sam", "5"]).notes == parse_args(["--noise_std=0", "--num_samples=5"]).notes
    )


def test_what_one_flag_leaves_nothing_to_do_for_another_is_noted():
    assert parse_args(["--noise_std", "0"]).notes == []
    assert parse_args(["--noise_std", "0", "--num_samples", "1"]).notes == []
    (note,) = parse_args(["--noise_std", "0", "--num_samples", "5"]).notes
    assert note == "--num_samples 5: without noise, copies would be equal, so one is made"
    args = parse_args(["--layers", "1", "3", "--layer_range", "late"])
    assert (args.layers, args.layer_range) == ([1, 3], [1, 3])
    assert args.notes == ["--layers and --layer_range are both given: the layers are those of --layers"]


# layers, wherever they are taken


@pytest.mark.parametrize("flag", ["--layers", "--layer_range"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["0-3"], [0, 1, 2, 3]),
        (["3,0"], [3, 0]),
        (["0-1,3", "-1"], [0, 1, 3, -1]),
        (["-3,-1"], [-3, -1]),
        (["-3--1"], [-3, -2, -1]),
        (["1", "2"], [1, 2]),
        (["late"], ["late"]),
        (["all"], ["all"]),
    ],
)
def test_layers_are_ranges_lists_and_names_in_each_mode_that_takes_them(flag, words, expected):
    for mode in ("grid", "multi", "words", "evaluate"):
        assert parse_args(["--mode", mode, flag, *words]).layers == expected


# flags without torch


def test_choices_of_the_flags_are_those_of_the_modules():
    assert tuple(core.SCORES) == CHOICES["score"]
    assert sorted(core.METHODS) == sorted(CHOICES["method"])
    assert tuple(core.RULES) == CHOICES["rules"]
    assert CHOICES["tap"] == core.TAPS
    assert CHOICES["baseline"] == faithfulness.BASELINES
    assert visualization_utils.LAYER_RANGES == common.flags.LAYER_NAMES
    assert vars(test_gradcam.Request.of(parse_args([])).settings) == vars(core.Settings(noise_std=0.15, method="auto"))


def test_flags_are_those_of_the_command_line_unless_given(monkeypatch):
    monkeypatch.setattr("sys.argv", ["test_gradcam.py", "--mode", "single", "--layer", "5"])
    assert parse_args().layer == 5
    assert parse_args([]).layer is None


WITHOUT_TORCH = """
import runpy, sys
class Refuse:
    def find_spec(self, name, *_):
        if name in ("torch", "transformers", "numpy", "matplotlib"):
            raise SystemExit(f"{name} is imported")
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "flags", [["--help"], ["--lyer", "3"], ["--steps", "3"], ["--method", "cam"], ["--layer", "x"]]
)
def test_help_and_wrong_flags_are_answered_before_torch_is_imported(flags):
    command = [sys.executable, "-c", WITHOUT_TORCH, DRIVER, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if flags == ["--help"] else 2), done.stderr
    assert "is imported" not in done.stderr


# any text, number and list of layers


def layers_by_hand(text):
    """The layers of "0-3,7,-1", or None."""
    if text.strip() in LAYER_NAMES:
        return [text.strip()]
    found = []
    for part in text.strip().split(","):
        ends = [part.strip()]
        for i, character in enumerate(part.strip()):
            if character == "-" and i > 0 and part.strip()[i - 1] != "-":
                ends = [part.strip()[:i], part.strip()[i + 1 :]]
                break
        digits = [end.removeprefix("-") for end in ends]
        if not all(end.isdecimal() and len(end) < 5 for end in digits):
            return None
        first, last = int(ends[0]), int(ends[-1])
        if first > last or (ends[0][0] == "-") != (ends[-1][0] == "-") and first < 0:
            return None
        found += range(first, last + 1)
    return found


NUMBER = st.one_of(
    st.integers(-40, 40).map(str), st.sampled_from(["", "٣", "²", "07", "99999", "1e3", "x", "--1", "-"])
)
SPAN = st.one_of(NUMBER, st.tuples(NUMBER, NUMBER).map("-".join))
LAYERS = st.one_of(
    st.lists(st.tuples(BLANKS, SPAN).map("".join), min_size=1, max_size=4).map(",".join),
    st.sampled_from([*LAYER_NAMES, "auto ", "AUTO", "all,1"]),
    TEXTS,
)


@QUICK
@given(text=LAYERS, total=st.integers(1, 40))
def test_layers_are_those_that_an_independent_parser_finds_or_refused(capsys, text, total):
    expected = layers_by_hand(text)
    flags = ["--mode", "grid", f"--layers={text}"]
    if expected is None:
        assert "--layers" in refused(capsys, flags)
        return
    layers = parse_args(flags).layers
    assert layers == expected
    if layers[0] in LAYER_NAMES:
        assume(total >= 3)
        assert set(select_layers(layers[0], total)) <= set(range(total))
    elif all(-total <= layer < total for layer in expected):
        assert select_layers(layers, total) == list(dict.fromkeys(layer % total for layer in expected))
    else:
        with pytest.raises(ValueError, match=rf"does not exist: the model has 0 to {total - 1}"):
            select_layers(layers, total)


COUNTS = ["num_samples", "max_new_tokens", "max_pixels", "target_occurrence", "steps", "window", "keep", "batch_size"]
MODE = {"target_occurrence": "single --target=a", "steps": "evaluate", "window": "knockout", "keep": "knockout"}
NUMBERS = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["9" * 19, str(2**63 - 1), str(2**63), "9" * 5000, "-0", "٣", "1_0", "0x1", "١.٥", ".5", "1e-3"]),
    st.text(st.sampled_from("0123456789.-_e infa٣²\x1b"), max_size=6),
)


@QUICK
@example(flag="seed", text="--")
@given(flag=st.sampled_from([*COUNTS, "seed", "layer"]), text=NUMBERS)
def test_whole_numbers_are_what_python_reads_within_their_range_or_refused(capsys, flag, text):
    try:
        number = int(text)
    except ValueError:
        number = None
    least = {"seed": 0, "layer": -(10**9)}.get(flag, 1)
    flags = ["--mode", *MODE.get(flag, "single").split(), f"--{flag}={text}"]
    if number is not None and flag in ("num_samples", "seed") and not least <= number < 2**63:
        with pytest.raises(ValueError, match=f"^{flag}="):
            test_gradcam.Request.of(parse_args(flags))
    elif number is None or (flag != "layer" and not least <= number < 2**63):
        assert f"--{flag}" in refused(capsys, flags)
    else:
        assert getattr(parse_args(flags), flag) == number


@QUICK
@given(text=NUMBERS)
def test_shares_are_what_python_reads_from_0_to_1_or_refused(capsys, text):
    try:
        number = float(text)
    except ValueError:
        number = None
    inside = number is not None and 0 <= number <= 1
    if inside:
        assert test_gradcam.Request.of(parse_args([f"--noise_std={text}"])).settings.noise_std == number
    elif number is None:
        assert "--noise_std" in refused(capsys, [f"--noise_std={text}"])
    else:
        with pytest.raises(ValueError, match="^noise_std="):
            test_gradcam.Request.of(parse_args([f"--noise_std={text}"]))
    flags = [f"--opacity=fixed:{text}"]
    if inside and regex.fullmatch(r"\p{Nd}*\.?\p{Nd}+", text):
        assert parse_args(flags).opacity == number
    else:
        assert "--opacity" in refused(capsys, flags)
