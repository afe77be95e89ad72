"""Any text, number and list of layers: the right result, or one line that names what is wrong, in bounded time."""

import ast
import functools
import io
import re
import unicodedata
from pathlib import Path

import pytest
import regex
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from test_driver import drive, model_folder, photo_path  # noqa: F401  (fixtures)
from tqdm.auto import tqdm

import test_gradcam
from common import progress
from common.flags import LAYER_NAMES, parse_args
from common.page import excerpt, font_families, split_at_span, text_width, wrap
from common.terminal import plain
from smooth_gradcam import Settings, decode, find_target, occurrences, read, token_spans
from studies.words import split_words
from visualization_utils import select_layers

ROOT = Path(__file__).parent.parent
QUICK = settings(max_examples=60, deadline=2000, suppress_health_check=list(HealthCheck))
RUNS = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>"]

# texts

CONTROL = "\x00\x07\x08\x1b\r\n\t\x7f\x9b\u200e\u202e\u2066\u2029\ufffd"
SCRIPTS = [
    "the red cat",
    "猫狗。",
    "फलाम्",
    "قطةِّ",
    "กขิ้",
    "한글",
    "é e\u0301\u0323",
    "😀👨\u200d👩\u200d👧❤\ufe0f",
    "𠮷²½_-'’",
]
ESCAPES = ["\x1b]0;title\x07", "\x1b[2J", "\x9b31m", "\u202egpj.exe", "cat\nwrote /etc/passwd"]
CHARACTERS = st.one_of(st.sampled_from("".join(SCRIPTS) + CONTROL), st.characters(codec="utf-8"))
PIECES = st.one_of(st.text(CHARACTERS, max_size=6), st.sampled_from([*SCRIPTS, *ESCAPES, " ", "\n"]))
TEXTS = st.lists(PIECES, max_size=8).map("".join)
ANYTHING = st.lists(st.one_of(PIECES, st.sampled_from([*SPECIAL, "\ud800", "a\udcff"])), max_size=8).map("".join)
SAID = st.tuples(st.sampled_from(["a cat ", "", "the dog"]), TEXTS).map("".join)
BLANKS = st.text(" \t\n\u00a0\u3000", max_size=3)


def bytes_of(tokenizer, token):
    """What a token writes, by the table of byte-level tokenizers; nothing for special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}
    text = tokenizer.convert_ids_to_tokens(token)
    return b"" if text in tokenizer.all_special_tokens else bytes(table[character] for character in text)


def characters_of(data):
    """Of each byte the number of the character that it has a part in; broken ones end where Unicode says."""
    numbers, number = [], 0
    while len(numbers) < len(data):
        rest = data[len(numbers) :]
        for n in (1, 2, 3, 4):
            try:
                rest[:n].decode()
                length = n
                break
            except UnicodeDecodeError as exc:
                length = exc.end - exc.start
        numbers += [number] * length
        number += 1
    return numbers


@QUICK
@given(st.data())
def test_a_token_spans_the_characters_that_it_has_a_byte_of(tokenizer, data):
    known = [*range(256), *tokenizer("猫😀é\ufffd the red cat")["input_ids"], *tokenizer.all_special_ids]
    drawn = st.one_of(
        st.lists(st.sampled_from(known), max_size=12), TEXTS.map(lambda text: tokenizer(text)["input_ids"])
    )
    tokens = data.draw(drawn)
    written = [bytes_of(tokenizer, token) for token in tokens]
    numbers = characters_of(b"".join(written))
    text = decode(tokenizer, tokens)
    assert len(text) == (numbers[-1] + 1 if numbers else 0)
    spans, at = token_spans(tokenizer, tokens), 0
    assert len(spans) == len(tokens)
    for (start, end), piece in zip(spans, written, strict=True):
        if piece:
            assert (start, end) == (numbers[at], numbers[at + len(piece) - 1] + 1)
        else:
            assert start == end
        at += len(piece)


def test_spans_of_a_long_answer_are_found_in_linear_time(tokenizer, monkeypatch):
    tokens = tokenizer("只棕色的狗坐在草地上\ufffd" * 60)["input_ids"]
    decoded, usual = [0], tokenizer.decode

    def counting(ids, **options):
        decoded[0] += len(ids)
        return usual(ids, **options)

    monkeypatch.setattr(tokenizer, "decode", counting)
    spans = token_spans(tokenizer, tokens)
    assert spans[-1][1] == 11 * 60
    assert decoded[0] < 20 * len(tokens)


@QUICK
@given(text=ANYTHING, prompt=ANYTHING)
def test_prompt_and_answer_are_read_as_they_are_or_refused(model, processor, image, text, prompt):
    tokenizer = processor.tokenizer
    refused = [
        not part.strip() or regex.search(r"\p{Cs}", part) or any(mark in part for mark in SPECIAL)
        for part in (prompt, text)
    ]
    if any(refused):
        with pytest.raises(ValueError, match="^(prompt|answer)="):
            read(model, processor, image, prompt, text)
        return
    reading = read(model, processor, image, prompt, text)
    assert reading.answer == unicodedata.normalize("NFC", text)  # as Qwen's tokenizers have it
    assert reading.prompt == prompt
    assert reading.tokens == tokenizer(text)["input_ids"]
    assert set(reading.tokens_of((0, len(reading.answer)))) == set(range(len(reading.tokens)))
    said = tokenizer.decode(reading.inputs["input_ids"][0])
    assert unicodedata.normalize("NFC", prompt) in said


@QUICK
@given(st.data())
def test_a_target_selects_its_own_characters_without_the_blanks_around_it(tokenizer, data):
    answer = decode(tokenizer, tokenizer(data.draw(TEXTS))["input_ids"])
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(answer))] * 2)))
    part = data.draw(st.one_of(st.just(answer[start:end]), TEXTS))
    target = data.draw(BLANKS) + part + data.draw(BLANKS)
    wanted = target.strip()
    if wanted not in answer:
        wanted = unicodedata.normalize("NFC", wanted)
    if not wanted or wanted not in answer:
        with pytest.raises(ValueError, match="^target="):
            find_target(answer, target)
        return
    spans = token_spans(tokenizer, tokenizer(answer)["input_ids"])
    for first, last in occurrences(answer, target):
        assert answer[first:last] == wanted
        own = [span for span in spans if span[0] < last and span[1] > first]
        assert {i for span in own for i in range(*span)} >= set(range(first, last))
    whole = [
        m.start() for m in re.finditer(f"(?={re.escape(wanted)})", answer) if stands_alone(answer, m.start(), wanted)
    ]
    found = find_target(answer, target)[0]
    assert found == (whole[0] if whole else answer.find(wanted))


def stands_alone(answer, start, word):
    """Whether no letter, digit or mark stands next to it."""
    around = answer[:start][-1:] + answer[start + len(word) :][:1]
    return not any(c.isalnum() or c == "_" or unicodedata.category(c)[0] == "M" for c in around)


@pytest.mark.parametrize("answer", ["caf\u00e9", "cafe\u0301"])
@pytest.mark.parametrize("target", ["\u00e9", "e\u0301"])
def test_an_accent_may_be_typed_as_one_character_or_two(drive, answer, target):  # noqa: F811
    code, out, err = drive("--answer", answer, "--target", f"caf{target}", "--layer", 0)
    assert (code, err) == (0, "")
    assert "explained: the whole answer" in out


@pytest.mark.parametrize("target", ["red ", " red", "\tred\u3000"])
def test_blanks_around_a_target_score_no_other_word(model, processor, image, target):
    reading = read(model, processor, image, "What?", "a red cat")
    assert reading.tokens_of(find_target(reading.answer, target)) == reading.tokens_of((2, 5))
    given = {"num_samples": 1, "noise_std": 0.0}
    assert Settings(**given, contrast=target) == Settings(**given, contrast="red")


@QUICK
@given(text=TEXTS, width=st.floats(0.05, 3), data=st.data())
def test_lines_and_marks_cover_any_text_exactly(text, width, data):
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
    families, _ = font_families(text)
    lines = wrap(text, width, 8, families)
    assert [first for first, _ in lines] == [0, *(last for _, last in lines[:-1])]
    assert lines[-1][1] == len(text)
    for line in lines:
        part = text[slice(*line)]
        assert len(part) <= 1 or text_width(part.rstrip(), 8, families) <= width
        runs = split_at_span(text, line, (start, end))
        assert sorted("".join(run for run, _ in runs)) == sorted(part)
        assert "".join(run for run, marked in runs if marked) == text[max(start, line[0]) : min(end, line[1])]


@QUICK
@given(text=st.one_of(ANYTHING, ANYTHING.map(lambda text: text * 40)), columns=st.integers(20, 80), data=st.data())
def test_an_excerpt_is_short_and_keeps_its_span(text, columns, data):
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
    cut, (first, last) = excerpt(text, (start, end), columns)
    assert not any(c.isspace() and c != " " or unicodedata.category(c) in ("Cc", "Cs") for c in cut)
    assert len(cut) <= columns + 4
    assert 0 <= first <= last <= len(cut)
    shown = "".join(" " if c.isspace() or unicodedata.category(c) in ("Cc", "Cs") else c for c in text[start:end])
    assert shown.startswith(cut[first:last])
    assert end - start > columns // 4 or last - first == end - start  # what is short is not cut


@QUICK
@given(TEXTS)
def test_words_follow_each_other(text):
    spans = [(i, i + 1) for i in range(len(text))]
    words = split_words(text, spans)
    assert all(a < b <= c < d for (a, b), (c, d) in zip(words, words[1:], strict=False))


# flags


def refused(capsys, flags):
    """The one line with which the flags are refused."""
    with pytest.raises(SystemExit) as exc:
        parse_args(flags)
    assert exc.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("test_gradcam.py: error: ")
    assert len(err.splitlines()) == 1
    assert plain(err[:-1]) == err[:-1]
    return err


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


# what is printed


@QUICK
@given(ANYTHING)
def test_a_printed_line_is_one_line_that_steers_nothing(text):
    said = plain(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in said)
    assert not any(
        unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI") for c in said
    )
    assert plain("猫 👨\u200d👩 قطة a\\b") == "猫 👨\u200d👩 قطة a\\b"


def test_all_that_a_run_prints_passes_one_function():
    """But for the line that a parser ends with, which passes `plain`."""
    files = [ROOT / "test_gradcam.py", ROOT / "visualization_utils.py", *(ROOT / "common").glob("*.py")]
    files += [path for path in (ROOT / "studies").glob("*.py") if path.name != "coco.py"]  # a script of its own
    calls = {
        path.name
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("print", "print_exc")
    }
    assert calls == {"terminal.py", "template.py"}  # that is the child of a process that reads what it prints


# whole runs


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "out" not in path.relative_to(folder).parts}


@RUNS
@given(prompt=SAID, answer=SAID, data=st.data())
def test_a_run_explains_any_text_or_refuses_it_in_one_line(drive, tmp_path, prompt, answer, data):  # noqa: F811
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(answer))] * 2)))
    target = data.draw(st.one_of(st.none(), st.just(answer[start:end] + " "), TEXTS))
    (tmp_path / "mine.txt").write_text("mine")
    before = snapshot(tmp_path)
    flags = [f"--prompt={prompt}", f"--answer={answer}", "--layer=0", "--noise_std=0", "--num_samples=1"]
    code, out, err = drive(*flags, *([f"--target={target}"] if target is not None else []))
    assert snapshot(tmp_path) == before
    for line in (out + err).split("\n"):
        assert plain(line) == line
    if code == 0:
        assert out.split("\n")[0] == "answer: " + plain(unicodedata.normalize("NFC", answer).split("\n")[0])
    else:
        assert code == 2
        assert len(err.splitlines()) == 1
        assert err.startswith("test_gradcam.py: error: ")


def test_an_answers_escape_sequences_do_not_reach_the_terminal(drive, tmp_path):  # noqa: F811
    hostile = "\x1b]0;owned\x07 cat\nwrote /etc/passwd \u202etac"
    code, out, err = drive("--answer", hostile, "--layer", 0)
    assert (code, err) == (0, "")
    assert out.split("\n")[:2] == [r"answer: \x1b]0;owned\x07 cat", r"        wrote /etc/passwd \u202etac"]
    path = tmp_path / "\x1b[2Ja.png"
    path.write_bytes(b"no photo")
    code, _, err = drive("--answer", "cat", "--image_path", path)
    assert (code, "\x1b" in err, r"\x1b[2Ja.png" in err) == (2, False, True)


# long sequences


def test_the_time_of_long_sequences_is_forecast(drive, monkeypatch):  # noqa: F811
    monkeypatch.setattr(progress, "LONG", 60)
    prompt = ["--layer", 0, "--prompt", "a " * 40]
    out = drive(*prompt, "--max_new_tokens", 2)[1]
    length = int(re.match(r"reading (\d+) tokens of photo and prompt", out)[1])
    assert length > 80
    assert re.search(rf"\nexpected: 2 noisy copies of {length + 2} tokens, \d+ s each: about \d+ seconds\n", out)
    out = drive(*prompt, "--answer", "cat")[1]
    assert "reading" not in out
    assert "expected: 2 noisy copies" in out
    out = drive(*prompt[2:], "--answer", "cat", "--mode", "evaluate", "--compare", "--steps", 1, "--layers", 0)[1]
    assert "expected: 8 noisy copies" in out
    assert "expected" not in drive(*prompt, "--answer", "cat", "--quiet")[1]
    monkeypatch.setattr(progress, "LONG", 600)
    assert "expected" not in drive(*prompt, "--answer", "cat")[1]


def test_a_bar_counts_the_tokens_of_the_answer(drive, monkeypatch):  # noqa: F811
    bars, usual = [], progress.show_progress

    class Bar(tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options | {"disable": False, "file": io.StringIO(), "mininterval": 0})
            bars.append(self)

    def watched(quiet, *about):
        assert not quiet
        return functools.partial(Bar, **usual(quiet, *about).keywords)

    for module in (progress, test_gradcam):
        monkeypatch.setattr(module, "show_progress", watched)
    code, _, err = drive("--layer", 0, "--max_new_tokens", 3)
    assert (code, err) == (0, "")
    assert [(bar.desc, bar.unit, bar.total, bar.n) for bar in bars] == [
        ("answer", "token", 3, 3),
        ("noisy copies", "copy", 2, 2),
    ]
