"""Which words of an answer are explained: what a word is, which are content words, and which part they are in."""

import re
import unicodedata
from collections.abc import Iterable

from smooth_gradcam import Reading, TokenMaps, occurrences

__all__ = ["choose_words", "name_words", "split_words", "words_of"]

UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
FUNCTION_WORDS = """
a an the this that these those some any each every all both no not nor and or but so than then as if while because of
in on at by for from to into onto with without within over under above below between among through across along around
near behind beside beyond against toward towards about up down out off upon is are was were be been being am do does
did done has have had having can could will would shall should may might must i you he she it we they me him her us
them my your his its our their there here who whom whose which what when where why how it's that's there's isn't aren't
also just very too such other another more most much many only own same
的 了 着 在 是 和 与 及 或 有 也 都 就 而 但 把 被 这 那 其 之 一个 这个 那个 个
"""  # of English and Chinese


def split_words(answer: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, end) in characters of each word of the answer; `spans` are those of its tokens, see `token_spans`.

    A word is a run of letters, digits and their marks, with an apostrophe, hyphen or decimal point inside it. In
    scripts without blanks (Chinese, Japanese, Thai, Lao, Khmer, Burmese) a word is a token of the model.
    """
    inside_tokens = {i for first, last in spans for i in range(first + 1, last)}
    cuts = {start for start, _ in spans} - inside_tokens
    unspaced = [bool(UNSPACED.match(character)) for character in answer]
    words = []
    for i, character in enumerate(answer):
        inside = bool(words) and words[-1][1] == i
        if character.isalnum():
            if inside and unspaced[i] == unspaced[i - 1] and not (unspaced[i] and i in cuts):
                words[-1] = words[-1][0], i + 1
            else:
                words.append((i, i + 1))
        elif inside and (unicodedata.category(character)[0] == "M" or character in "\u200c\u200d"):  # (non-)joiners
            words[-1] = words[-1][0], i + 1
        elif inside and answer[i + 1 : i + 2].isalnum() and not (unspaced[i - 1] or unspaced[i + 1]):
            number = answer[i - 1].isdigit() and answer[i + 1].isdigit()
            if character in "-'\u2019" or (character in ".," and number):
                words[-1] = words[-1][0], i + 1
    return words


def choose_words(answer: str, spans: list[tuple[int, int]], words) -> list[tuple[int, int]]:
    """The spans in characters of the chosen words, in the answer's order; `words` as in `compute_word_maps`.

    "content" leaves out the words of `FUNCTION_WORDS`, English and Chinese, in any letter case. Raises ValueError if
    nothing is left, or for a word that is not in the answer.
    """
    if isinstance(words, str) and words in ("content", "all"):
        marks = [mark.span() for mark in re.finditer("</?think>", answer)]
        chosen = split_words(answer, spans)
        chosen = [word for word in chosen if not any(start < word[0] < end for start, end in marks)]
        if words == "content":
            function_words = FUNCTION_WORDS.split()
            chosen = [span for span in chosen if answer[slice(*span)].lower() not in function_words]
        if not chosen:
            raise ValueError(f"words={words!r}: there is none in the answer {answer!r}; name the parts to explain")
        return chosen
    chosen = set()
    if not isinstance(words, Iterable):
        raise ValueError(f'words={words!r} must be "content", "all", or words of the answer')
    for word in words.split(",") if isinstance(words, str) else words:
        chosen.update(occurrences(answer, word.strip() if isinstance(word, str) else word, "words"))
    if not chosen:
        raise ValueError(f'words={words!r} must be "content", "all", or words of the answer {answer!r}')
    return sorted(chosen)


def words_of(reading: Reading, words, part: str = "all") -> list[tuple[int, int]]:
    """The spans of the chosen words that are in this part of the answer, see `choose_words` and `Reading.part`."""
    start, end = reading.part(part)
    try:
        chosen = choose_words(reading.answer, reading.spans, words)
    except ValueError as exc:
        if not reading.cut_off:
            raise
        raise ValueError(f"{exc} (it was cut off after {len(reading.tokens)} tokens: --max_new_tokens)") from exc
    spans = [span for span in chosen if start <= span[0] and span[1] <= end]
    if not spans:
        raise ValueError(f"words={words!r}: none is in the part {part!r}, {reading.answer[start:end]!r}")
    return spans


def name_words(word_maps: list[TokenMaps]) -> list[str]:
    """A name for each word: the word, and from its second occurrence on a number, "dog (2)".

    The number is the `target_occurrence` that explains this word, in the part of the answer that all the words are in.
    """
    first, places = word_maps[0], {}
    begin = first.thinking if first.target_span[0] >= first.thinking else 0
    for text in dict.fromkeys(word.target for word in word_maps):
        own = [tuple(word.target_span) for word in word_maps if word.target == text]
        found = [(begin + start, begin + end) for start, end in occurrences(first.answer[begin:], text)]
        places[text] = found + [span for span in own if span not in found]  # such as the second of "cat", "cat_2"
    numbers = [places[word.target].index(tuple(word.target_span)) + 1 for word in word_maps]
    return [
        f"{word.target} ({number})" if number > 1 else word.target
        for word, number in zip(word_maps, numbers, strict=True)
    ]
