"""The app: what it shows without Gradio, and all of it in a real browser with Gradio."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import make_image

from common.evidence import Evidence
from smooth_gradcam import ExplanationError, Look, Settings, TokenMaps
from studies.app import Explainer, answer_html, describe, error_html, main, open_upload, view
from visualization_utils import draw_layer

ROOT = Path(__file__).parents[1]
PROMPT = "What is it?"


@pytest.fixture
def explainer(model, processor):
    return Explainer(model, processor, "model")


def maps_of(word="cat", evidence=(0.9, 0.1), cams=None, likeness=None):
    cams = {0: np.ones((4, 6), np.float32)} if cams is None else cams
    about = (4, 6), PROMPT, f"a {word}", [1, 2], word, (2, 2 + len(word)), [1], frozenset()
    return TokenMaps(cams, *about, Settings(noise_std=0), evidence=Evidence(*evidence), likeness=likeness or {})


# what is computed


def test_a_given_answer_has_all_its_words(explainer, image):
    answered = explainer.answer(image, "a.png", PROMPT, "  the red cat ")
    assert [answered.reading.answer[slice(*span)] for span in answered.words] == ["the", "red", "cat"]
    assert answered.maps == {}


def test_maps_of_all_layers_are_made_once_for_a_word_and_method(explainer, image):
    answered = explainer.answer(image, "a.png", PROMPT, "the red cat")
    first = explainer.maps(answered, 2, "gradcam", 1)
    assert first.target == "cat"
    assert list(first.maps) == [0, 1, 2]
    assert first.settings.num_samples == 1
    assert explainer.maps(answered, 2, "gradcam", 0) is first
    assert explainer.maps(answered, 2, "hirescam", 1) is not first


def test_needed_tokens_are_searched_at_the_layer_that_is_looked_at(explainer, image):
    answered = explainer.answer(image, "a.png", PROMPT, "the red cat")
    first = explainer.maps(answered, 2, "needed", 1)
    assert list(first.maps) == [1]
    assert explainer.maps(answered, 2, "needed", 1) is first
    assert list(explainer.maps(answered, 2, "needed", 0).maps) == [0]


@pytest.mark.parametrize("word", [3, -1, "0", 1.0, True, None])
def test_a_word_that_is_not_there_is_an_error(explainer, image, word):
    answered = explainer.answer(image, "a.png", PROMPT, "the red cat")
    with pytest.raises(ValueError, match="is not in the answer: choose 0 to 2"):
        explainer.maps(answered, word, "gradcam", 0)


def test_an_answer_without_words_is_an_error(explainer, image):
    with pytest.raises(ExplanationError, match="no word to explain"):
        explainer.answer(image, "a.png", PROMPT, "...")


def test_an_empty_prompt_is_an_error(explainer, image):
    with pytest.raises(ValueError, match="prompt"):
        explainer.answer(image, "a.png", " ")


def test_the_model_is_free_again_after_an_error(explainer, image, monkeypatch):
    answered = explainer.answer(image, "a.png", PROMPT, "the red cat")
    monkeypatch.setattr("studies.app.explain_with_evidence", lambda *_: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(MemoryError):
        explainer.maps(answered, 0, "gradcam", 0)
    assert not explainer.lock.locked()
    assert answered.maps == {}


def test_the_page_is_that_of_the_words_mode(explainer, image):
    answered = explainer.answer(image, "my <photo>.png", PROMPT, "the red cat")
    page = explainer.page(answered, "gradcam", Look("viridis"))
    data = json.loads(re.search(r'id="data">(.*)</script>', page)[1])
    assert [word["text"] for word in data["words"]] == ["red", "cat"]
    assert data["layers"] == [0, 1, 2]
    assert data["look"]["colours"] == "viridis"
    assert "<photo>" not in page


# what is shown


def test_answers_are_escaped(explainer, image):
    answered = explainer.answer(image, "a.png", PROMPT, 'red <img src=x onerror="alert(1)"> & cat')
    shown = answer_html(answered, 0)
    assert set(re.findall(r"<(/?\w+)", shown)) == {"div", "/div", "button", "/button"}
    assert "&lt;" in shown
    assert "&amp;" in shown
    assert shown.count('aria-pressed="true"') == 1
    assert re.findall(r'data-word="(\d+)"', shown) == [str(i) for i in range(len(answered.words))]


def test_the_text_has_p_and_what_is_left_without_the_photo():
    text = describe(maps_of(), 0)
    assert "“cat” at layer 0: p 0.90, 11 % of it left without the photo." in text
    assert "doubt" not in text


def test_doubt_is_said_in_words_and_seen():
    believed, doubted, photo = maps_of(), maps_of(evidence=(0.9, 0.89)), make_image(168, 112)
    text = describe(doubted, 0)
    assert "Not to be believed, so faded: this does not come from the photo (99 % of p is left without it)" in text
    change = [np.abs(view(photo, maps, 0, Look()) - np.asarray(photo, float)).mean() for maps in (believed, doubted)]
    assert change[1] < change[0]


def test_a_layer_without_a_map_or_unlike_the_middle_is_named():
    cams = {0: np.zeros((4, 6), np.float32), 1: np.ones((4, 6), np.float32)}
    maps = maps_of("<b>", cams=cams, likeness={1: 0.1})
    assert "There is no map at this layer: zero everywhere." in describe(maps, 0)
    assert "Layer 1 shows something else than the middle layers (correlation 0.1)" in describe(maps, 1)
    assert "<b>" not in describe(maps, 1)


def test_the_picture_is_the_overlay_of_the_layer():
    photo, maps = make_image(168, 112), maps_of()
    np.testing.assert_array_equal(view(photo, maps, 0, Look("jet")), draw_layer(photo, maps, 0, True, Look("jet")))
    assert view(make_image(2000, 1000)).size == (1280, 640)


def test_a_bad_photo_is_called_by_its_name(tmp_path):
    path = tmp_path / "holiday.jpg"
    path.write_text("no photo")
    with pytest.raises(ValueError, match=r"^the image holiday.jpg cannot be read"):
        open_upload(str(path))
    with pytest.raises(ValueError, match="choose one"):
        open_upload(None)


def test_errors_are_escaped_and_those_of_the_program_go_to_the_terminal(capsys):
    assert "&lt;b&gt; is bad" in error_html(ValueError("<b>\nis bad"))
    assert capsys.readouterr().err == ""
    assert 'role="alert"' in error_html(RuntimeError("out of memory"))
    assert "RuntimeError: out of memory" in capsys.readouterr().err


# the command line


def test_without_gradio_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert re.fullmatch(r"app.py: error: the app needs Gradio \(.*\): pip install gradio\n", capsys.readouterr().err)


def test_a_port_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--port", "70000"])
    assert "--port 70000: give 1 to 65535" in capsys.readouterr().err


# in a browser


@pytest.fixture
def address(tmp_path):
    """The address of the app, which runs in a process of its own until the test ends."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, "studies/app.py", "--device", "cpu", "--port", str(port)]
    environment = os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as app:
        try:
            assert app.stdout.readline().startswith("open http"), "the app did not start: see its stderr"
            yield f"http://127.0.0.1:{port}/"
        finally:
            app.send_signal(signal.SIGTERM)
            try:
                app.wait(20)
            except subprocess.TimeoutExpired:
                app.kill()
                raise
    assert list(temporary.glob("app_*")) == []  # nothing of anyone's photos is left


@pytest.fixture
def tab(tmp_path):
    """A headless Chromium that saves downloads in `tmp_path`."""
    missing = pytest.fail if os.environ.get("CI_BROWSER") == "1" else pytest.skip
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not (chromium and shutil.which("chromedriver")):
        missing("no Chromium with its driver on the PATH (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def wait(tab, condition, seconds=180):
    """The value of a JavaScript expression once it is true."""
    end = time.monotonic() + seconds
    while not (value := tab.execute_script(f"return {condition}")):
        assert time.monotonic() < end, f"never true: {condition}"
        time.sleep(0.1)
    return value


def click_word(tab, word):
    tab.execute_script(f"[...document.querySelectorAll('[data-word]')].find(b => b.textContent === '{word}').click()")


def test_a_word_is_clicked_in_a_browser(address, tab, tmp_path):
    tab.get(address)
    source = "document.querySelector('#picture img')?.src"
    text = "document.querySelector('#message')?.innerText ?? ''"
    photo = wait(tab, source)
    wait(tab, "document.querySelector('#ask')").click()
    wait(tab, "document.querySelectorAll('[data-word]').length > 5")

    click_word(tab, "dog")
    wait(tab, f"/“dog” at layer 14: p 1.00, 0 % of it left without the photo/.test({text})")
    dog = wait(tab, f"{source} !== '{photo}' && {source}")
    assert tab.execute_script("return document.querySelector('[aria-pressed=true]').textContent") == "dog"

    slider = tab.find_element("css selector", "#layer input[type=range]")
    slider.send_keys("\ue014")  # arrow right
    wait(tab, f"({text}).includes('“dog” at layer 15')")
    wait(tab, f"{source} !== '{dog}'")

    click_word(tab, "There")
    wait(tab, f"({text}).includes('Not to be believed, so faded: this does not come from the photo')")

    tab.find_element("css selector", "#make").click()
    wait(tab, "document.querySelector('#download')", 400).click()
    end = time.monotonic() + 30
    while not (page := tmp_path / "index.html").is_file():
        assert time.monotonic() < end, "nothing was downloaded"
        time.sleep(0.1)
    assert '"text": "bicycle"' in page.read_text(encoding="utf-8")

    given = tab.find_element("css selector", "#given textarea, #given input")
    given.send_keys("...")
    tab.find_element("css selector", "#ask").click()
    wait(tab, f"({text}).includes('no word to explain')")
    given.clear()
    given.send_keys("a dog <img src=x onerror=\"document.title='bad'\"> ${document.title='bad'} {{value}}")
    tab.find_element("css selector", "#ask").click()
    wait(tab, "document.querySelector('#answer').innerText.includes('${document.title=')")
    assert tab.title == "Where each word comes from"
    assert tab.execute_script("return document.querySelectorAll('#answer img').length") == 0
