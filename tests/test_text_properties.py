"""Any text, number and list of layers: the right result, or one line that names what is wrong, in bounded time."""

import re
import unicodedata

import pytest
import regex
from any_text import ANYTHING, BLANKS, QUICK, SPECIAL, TEXTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.page import excerpt, font_families, split_at_span, text_width, wrap
from common.terminal import plain
from smooth_gradcam import Settings, decode, find_target, occurrences, read, token_spans
from studies.words import split_words

RUNS = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


# texts


SAID = st.tuples(st.sampled_from(["a cat ", "", "the dog"]), TEXTS).map("".join)


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
def test_an_accent_may_be_typed_as_one_character_or_two(drive, answer, target):
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


# whole runs


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "out" not in path.relative_to(folder).parts}


@RUNS
@given(prompt=SAID, answer=SAID, data=st.data())
def test_a_run_explains_any_text_or_refuses_it_in_one_line(drive, tmp_path, prompt, answer, data):
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


def test_an_answers_escape_sequences_do_not_reach_the_terminal(drive, tmp_path):
    hostile = "\x1b]0;owned\x07 cat\nwrote /etc/passwd \u202etac"
    code, out, err = drive("--answer", hostile, "--layer", 0)
    assert (code, err) == (0, "")
    assert out.split("\n")[:2] == [r"answer: \x1b]0;owned\x07 cat", r"        wrote /etc/passwd \u202etac"]
    path = tmp_path / "\x1b[2Ja.png"
    path.write_bytes(b"no photo")
    code, _, err = drive("--answer", "cat", "--image_path", path)
    assert (code, "\x1b" in err, r"\x1b[2Ja.png" in err) == (2, False, True)
