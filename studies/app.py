"""An app in the browser: click a word of the answer to see where it came from: python studies/app.py

    photo, prompt -> Answered           Explainer.answer: read once, with the words of the answer
      -> TokenMaps of a word            Explainer.maps: computed when they are first asked for, then kept
      -> picture, text                  view, describe: the overlay of one layer, and what the map rests on
      -> index.html                     Explainer.page: the page of all words, as the words mode writes it

Only `build` and `main` need Gradio. The photos and pages of a run lie in a temporary folder, removed at its end.
"""

import argparse
import html
import os
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# ruff: noqa: E402  (the script's folder is not the project's)
from common.checkpoint import count_layers, load_model, load_processor, model_named, resolve_device
from common.evidence import departures, doubt_of, explain_with_evidence
from common.flags import OneLineParser, make_parser
from common.passes import vision_kept
from common.photos import load_photo
from common.stopping import stoppable
from common.terminal import say
from smooth_gradcam import (
    COLORMAPS,
    METHODS,
    PLAIN,
    ExplanationError,
    Look,
    Reading,
    Settings,
    TokenMaps,
    get_model_layers,
    read,
)
from studies.words import html_data, map_words, split_words, word_tokens, words_html
from visualization_utils import draw_layer, select_layers

__all__ = ["Answered", "Explainer", "answer_html", "build", "describe", "error_html", "main", "open_upload", "view"]

TITLE = "Where each word comes from"
SIDE = 1280  # pixels of the longer side of the picture shown
SESSIONS = 50  # tabs whose answers and maps are kept
STYLE = """
.answer { font-size: 1.1rem; line-height: 2.1; white-space: pre-wrap; overflow-wrap: anywhere; }
.answer button { font: inherit; color: inherit; background: none; border: 0; border-bottom: 2px solid #85837c;
  padding: 0 .1em; margin: 0; cursor: pointer; border-radius: 3px 3px 0 0; line-height: 1.5; }
.answer button:hover, .answer button:focus-visible { background: #8883; }
.answer button[aria-pressed=true] { background: #ffe08a; color: #1c1d20; border-color: #0b5cad; }
.said { margin: 0; } .said.doubt { font-weight: 600; } .said.error { color: #b3261e; font-weight: 600; }
.dark .said.error { color: #ff8a70; }
"""
ON_CLICK = """element.addEventListener('click', event => {
  const word = event.target.closest('[data-word]');
  if (word) trigger('click', {word: Number(word.dataset.word)});
});"""


# what is computed


@dataclass(eq=False)
class Answered:
    """An answer of a tab, the spans of its words, and their maps so far: {(method, word, layer): maps}."""

    reading: Reading
    name: str  # of the photo
    words: list[tuple[int, int]]
    maps: dict[tuple[str, int, int], TokenMaps] = field(default_factory=dict)


class Explainer:
    """The model, for one tab at a time."""

    def __init__(self, model, processor, model_path: str, max_new_tokens: int = 128):
        self.model, self.processor, self.model_path = model, processor, model_path
        self.max_new_tokens, self.lock = max_new_tokens, threading.Lock()
        self.layers = list(range(get_model_layers(model)[1]))

    def answer(self, photo: Image.Image, name: str, prompt: str, given: str = "") -> Answered:
        """The model's answer, or the given one. Raises ValueError or ExplanationError."""
        with self.lock, model_named(self.model_path):
            reading = read(self.model, self.processor, photo, prompt, given.strip() or None, self.max_new_tokens)
        if not (words := split_words(reading.answer, reading.spans)):
            raise ExplanationError(f"the answer {reading.answer!r} has no word to explain: ask something else")
        return Answered(reading, name, words)

    def maps(self, answered: Answered, word: int, method: str, layer: int) -> TokenMaps:
        """The maps of a word, of one clean copy, with this layer's: those of all layers come from one pass, but each of
        the method "needed" takes some runs of the text. Raises ValueError for a word that is not there."""
        if type(word) is not int or not 0 <= word < len(answered.words):
            raise ValueError(f"word {word!r} is not in the answer: choose 0 to {len(answered.words) - 1}")
        with self.lock, model_named(self.model_path):
            if (method, word, layer) not in answered.maps:
                layers = [layer] if method == "needed" else self.layers
                settings, spans = Settings(noise_std=0, method=method), [answered.words[word]]
                with vision_kept(self.model):
                    (maps,) = explain_with_evidence(answered.reading, spans, layers, settings)
                answered.maps |= {(method, word, each): maps for each in layers}
            return answered.maps[method, word, layer]

    def page(self, answered: Answered, method: str, look: Look) -> str:
        """The words page of all but function words at six layers."""
        layers, settings = select_layers("auto", len(self.layers)), Settings(noise_std=0, method=method)
        with self.lock, model_named(self.model_path), vision_kept(self.model):
            maps = map_words(answered.reading, "content", layers, settings)
        tokens = word_tokens(answered.reading, maps)
        return words_html(html_data(answered.reading.photo, answered.name, maps, *tokens, look))


# what is shown


def open_upload(path: str | None) -> Image.Image:
    """The photo of an uploaded file. Raises ValueError that calls the file by its name alone."""
    if not path:
        raise ValueError("there is no photo: choose one")
    try:
        return load_photo(path)
    except ValueError as exc:
        raise ValueError(str(exc).removeprefix("--image_path: ").replace(path, Path(path).name)) from exc


def view(photo: Image.Image, maps: TokenMaps | None = None, layer: int = 0, look: Look = PLAIN):
    """The photo in the size of the screen, or a layer's map over it, faded if in doubt; a grey panel without a map."""
    small = photo.copy()
    small.thumbnail((SIDE, SIDE))
    return small if maps is None else draw_layer(small, maps, layer, True, look)


def answer_html(answered: Answered, chosen: int | None = None) -> str:
    """The answer with a button for each word; whatever the model says is escaped."""
    parts, end, answer = [], 0, answered.reading.answer
    for i, (start, stop) in enumerate(answered.words):
        button = f'<button type="button" data-word="{i}" aria-pressed="{str(i == chosen).lower()}">'
        parts += [html.escape(answer[end:start]), button, html.escape(answer[start:stop]), "</button>"]
        end = stop
    return f'<div class="answer">{"".join(parts)}{html.escape(answer[end:])}</div>'


def message_html(text: str, kind: str = "") -> str:
    """A line below the picture; `kind` is "doubt", "error" or nothing."""
    role = ' role="alert"' if kind == "error" else ""
    return f'<p class="said {kind}"{role}>{html.escape(text)}</p>'


def describe(maps: TokenMaps, layer: int) -> str:
    """What the map of a word at a layer rests on, and what speaks against it, as HTML."""
    lines = [message_html(f"“{maps.target}” at layer {layer}: {maps.evidence}.")]
    if layer in maps.blank:
        lines.append(message_html(f"There is no map at this layer: {maps.blank[layer]}.", "doubt"))
    if doubt := doubt_of(maps):
        lines.append(message_html(f"Not to be believed, so faded: {doubt}.", "doubt"))
    if apart := departures(maps, [layer]):
        lines.append(message_html(f"{apart[0].upper()}{apart[1:]}.", "doubt"))
    return "".join(lines)


def error_html(exc: Exception) -> str:
    """The line that the app shows for an error; one that is no fault of the request also goes to the terminal."""
    text = " ".join(str(exc).split()) or type(exc).__name__
    if not isinstance(exc, (ValueError, ExplanationError)):
        say(f"app.py: error: {type(exc).__name__}: {text}", sys.stderr)
    return message_html(text, "error")


# the app


class Handlers:
    """What the app does at each event: its outputs in order, the last of them the message."""

    def __init__(self, gr, explainer: Explainer, folder: Path):
        self.gr, self.explainer, self.folder = gr, explainer, folder

    def said(self, function, count: int):
        """The handler with its errors as messages, the last of its `count` outputs; the others stay as they are."""

        def run(*given):
            try:
                return function(*given)
            except Exception as exc:  # of any library: the app goes on
                return [*[self.gr.skip() for _ in range(count - 1)], error_html(exc)]

        return run

    def choose(self, path):
        """A new photo: the last one's answer goes, even if the new one cannot be opened."""
        try:
            picture, message = view(open_upload(path)), ""
        except ValueError as exc:
            picture, message = None, error_html(exc)
        return None, None, "", picture, self.gr.DownloadButton(visible=False), message

    def ask(self, path, prompt, given):
        answered = self.explainer.answer(open_upload(path), Path(path).name, prompt, given or "")
        _, word, _, *rest = self.choose(path)
        return (
            answered,
            word,
            answer_html(answered),
            *rest[:-1],
            message_html("Click a word to see where it came from."),
        )

    def look(self, answered, word, layer, method, colours):
        if answered is None or word is None:  # a slider moved before there is a word
            return [self.gr.skip() for _ in range(4)]
        maps = self.explainer.maps(answered, word, method, int(layer))
        picture = view(answered.reading.photo, maps, int(layer), Look(colours))
        return word, answer_html(answered, word), picture, describe(maps, int(layer))

    def page(self, answered, method, colours):
        if answered is None:
            raise ValueError("there is no answer yet: press Ask first")
        path = Path(tempfile.mkdtemp(dir=self.folder), "index.html")
        path.write_text(self.explainer.page(answered, method, Look(colours)), encoding="utf-8")
        return self.gr.DownloadButton(value=str(path), visible=True), message_html("The page of all words is ready.")


def build(gr, explainer: Explainer, folder: Path, photo: Path, prompt: str):
    """The Blocks of the app, opened with a photo and a prompt; pages to download are written to the folder."""
    last, do = len(explainer.layers) - 1, Handlers(gr, explainer, folder)
    methods = [name for name in METHODS if name != "auto"]
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        answered, word = gr.State(), gr.State()
        gr.Markdown(f"# {TITLE}")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                file = gr.File(str(photo), label="Photo", file_types=["image"], height=130, elem_id="photo")
                asked = gr.Textbox(prompt, label="Prompt", lines=2, elem_id="prompt")
                hint = "Explain this text in place of the model's own answer"
                given = gr.Textbox(label="Answer (optional)", info=hint, elem_id="given")
                button = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column(scale=3, min_width=300):
                text = gr.HTML(js_on_load=ON_CLICK, elem_id="answer")
                shown = {"show_label": False, "interactive": False, "buttons": ["download", "fullscreen"]}
                picture = gr.Image(view(open_upload(str(photo))), format="png", elem_id="picture", **shown)
                message = gr.HTML(elem_id="message")
                layer = gr.Slider(0, last, (last + 1) // 2, step=1, label="Layer", elem_id="layer")
                with gr.Row():
                    method = gr.Dropdown(methods, value="needed", label="Method", min_width=240, elem_id="method")
                    colours = gr.Dropdown(
                        list(COLORMAPS), value="plasma", label="Colours", elem_id="colours", min_width=240
                    )
                page = gr.Button("Make a page of all words", elem_id="make")
                download = gr.DownloadButton("Download index.html", visible=False, elem_id="download")
        options = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        fresh, seen = [answered, word, text, picture, download, message], [word, text, picture, message]
        choices, look = [layer, method, colours], do.said(do.look, len(seen))

        def click(answered, layer, method, colours, event: gr.EventData):
            return look(answered, event.word, layer, method, colours)

        file.change(do.said(do.choose, len(fresh)), file, fresh, **options)
        button.click(do.said(do.ask, len(fresh)), [file, asked, given], fresh, **options)
        text.click(click, [answered, *choices], seen, **options)
        for choice in choices:
            choice.change(look, [answered, word, *choices], seen, trigger_mode="always_last", **options)
        page.click(do.said(do.page, 2), [answered, method, colours], [download, message], **options)
    return blocks


def serve(args: argparse.Namespace, folder: Path, prompt: str):
    """The running app. Raises ValueError or OSError for flags that cannot be met, ImportError without Gradio."""
    switches = {"GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
    os.environ.update(switches)  # read when Gradio is imported
    import gradio as gr

    transformers.logging.set_verbosity_error()
    device = resolve_device(args.device)
    count_layers(args.model_path)  # whether it is a model of ours
    processor = load_processor(args.model_path, args.max_pixels)
    explainer = Explainer(load_model(args.model_path, device, args.dtype), processor, args.model_path)
    blocks = build(gr, explainer, folder, ROOT / "demo.jpeg", prompt)
    blocks.launch(
        server_name=args.host, server_port=args.port, share=args.share, inbrowser=False, prevent_thread_lock=True,
        css=STYLE, footer_links=[], state_session_capacity=SESSIONS, max_file_size="50mb", quiet=True,
    )  # fmt: skip
    return blocks


def main(arguments=None) -> None:
    """The command line; `arguments` None are those of the process. Returns once the app is stopped."""
    tool, about = make_parser()[0], __doc__.split("\n")[0]  # what the tool has too has the tool's defaults
    parser = OneLineParser(prog="app.py", description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model_path", default=tool.get_default("model_path"), help="model folder, or a hub name")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps, or map")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="auto: the checkpoint's")
    parser.add_argument("--max_pixels", type=int, default=tool.get_default("max_pixels"), help="of a photo")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--share", action="store_true", help="also a public address, by way of Gradio's servers")
    args = parser.parse_args(arguments)
    if not 1 <= args.port <= 65535:
        parser.error(f"--port {args.port}: give 1 to 65535")
    with tempfile.TemporaryDirectory(prefix="app_", ignore_cleanup_errors=True) as folder:
        try:
            blocks = serve(args, Path(folder), tool.get_default("prompt"))
        except ImportError as exc:
            parser.error(f"the app needs Gradio ({exc}): pip install gradio")
        except (ValueError, OSError) as exc:
            parser.error(str(exc))
        say(f"open {blocks.share_url or blocks.local_url} in a browser; Ctrl-C ends the app")
        try:
            threading.Event().wait()
        finally:
            blocks.close()


if __name__ == "__main__":
    with stoppable():
        main()
