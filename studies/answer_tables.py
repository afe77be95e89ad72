"""What a model answers when the image is hidden from a layer on, scored: table 1 of "From Redundancy to Relevance".

Readings, layers -> said_when_hidden     the greedy answer, the image hidden from that layer on
  -> Scored                              against the truth of each question, see `answers.py`
  -> answers.csv, answers_table.csv, answers_table.tex, lines
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext

from common.encoding import to_csv
from smooth_gradcam import Reading, borrowed, decode, generate, memory_explained, thinking_end, token_spans
from studies.answers import LABELS, MEASURES, Scored, kind_of, score, score_table
from studies.knockout import image_hidden
from studies.tables import RESAMPLES, to_latex, to_text

__all__ = ["answer_tables", "said_by", "said_when_hidden", "score_files"]

NOWHERE = "nowhere"  # in the table: the whole image
HINTS = {  # on the columns, of each kind of question
    "yes or no": "yes or no as POPE reads it: no if the first sentence has no or not, else yes",
    "choice": "choice: the letter",
    "open": "open: min(people who said the same / 3, 1)",
    "caption": "CHAIR_i: invented objects among those mentioned, CHAIR_s: captions that invent, named: objects "
    "mentioned of those that are there",
    "words": "words: the answer begins with the right one",
}


def said_by(reading: Reading, max_new_tokens: int) -> str:
    """What the model answers now, greedily; of a reasoning model what stands behind its thinking."""
    tokenizer = reading.processor.tokenizer
    with borrowed(reading.model), memory_explained(len(reading.positions)):
        tokens, _ = generate(reading.model, tokenizer, reading.inputs, max_new_tokens)
    text = decode(tokenizer, tokens)
    return text[thinking_end(tokenizer, tokens, token_spans(tokenizer, tokens), text) :]


def said_when_hidden(reading: Reading, layer: int | None, max_new_tokens: int) -> str:
    """`said_by` with the image hidden from decoder layer `layer` on; None hides nothing."""
    with nullcontext() if layer is None else image_hidden(reading.model, layer):
        return said_by(reading, max_new_tokens)


def answer_tables(
    readings: list[Reading], photos: list[str], truths: list[dict], layers: Iterable[int], names: dict[str, str],
    *, max_new_tokens: int, progress: Callable = iter,
) -> tuple[dict[str, str], list[str]]:  # fmt: skip
    """({file name: content}, the table in lines): answers with the whole image, and hidden from each of the layers on.

    `photos` and `truths` are those of the readings, `names` those of `read_names`, for captions. `progress` wraps the
    iterable over the runs.
    """
    scored = []
    for layer in (None, *layers):
        for reading, photo, truth in progress(list(zip(readings, photos, truths, strict=True))):
            said = said_when_hidden(reading, layer, max_new_tokens)
            labels = {"hidden_from": NOWHERE if layer is None else layer}
            scored.append((reading.prompt, Scored(photo, truth, labels, said, score(said, truth, names))))
    return score_files("answers", scored, LABELS)


def score_files(
    name: str,
    scored: list[tuple[str, Scored]],
    labels: dict[str, str],
    columns: Callable = lambda line: {},
    measures: dict[str, str] = MEASURES,
) -> tuple[dict[str, str], list[str]]:
    """({name.csv: what was said, name_table.csv and .tex: the scores}, the table in lines) of (prompt, answer).

    `labels` and `measures` are {column: its head}; `columns(line)` is what else a line of the table has.
    """
    table = [line | columns(line) for line in score_table(one for _, one in scored)]
    labels = {label: head for label, head in labels.items() if any(line.get(label, "") != "" for line in table)}
    kinds = dict.fromkeys(kind_of(one.truth) for _, one in scored)
    photos = len({one.photo for _, one in scored})
    count = sum(one.labels == scored[0][1].labels for _, one in scored)
    caption = f"Greedy answers to {count} questions about {photos} photos; "
    caption += "; ".join(HINTS[kind] for kind in kinds) + f"; 95 % of {RESAMPLES} resamples of the photos"
    rows = []
    for prompt, one in scored:
        truth = {key: one.truth[key] for key in ("answer", "answers", "objects", "task") if key in one.truth}
        row = {"photo": one.photo, "prompt": prompt} | one.labels | {"said": one.said}
        row |= {key: value if isinstance(value, str) else "; ".join(value) for key, value in truth.items()}
        for measure, (part, whole) in one.scores.items():
            row |= {measure: f"{float(part):.4g}", f"{measure}_of": f"{float(whole):.4g}"}
        rows.append(row)
    files = {
        f"{name}.csv": to_csv(rows),
        f"{name}_table.csv": to_csv(table),
        f"{name}_table.tex": to_latex(table, caption, labels, measures, {}),
    }
    return files, [caption, *to_text(table, labels, measures)]
