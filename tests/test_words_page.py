"""The page of the words mode in a real browser: what it shows, against the figures' own drawing."""

import base64
import io
import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import make_image
from PIL import Image

from common.evidence import Evidence
from common.notebook import Shown
from smooth_gradcam import Look, Settings, TokenMaps, colour_table, overlay_cam, render_cam, upsample_cam
from studies.words import html_data, words_html
from visualization_utils import FADED, settings_text

TEMPLATE = Path(__file__).parents[1] / "studies/words_page.html"
ANSWER = "A red cat sits on the old house."
WORDS = ["red", "cat", "house"]
LAYERS = [0, 5, 16]
SIZE = 168, 112
GRID = 4, 6


# data


def encode(cam):
    scaled = np.round(cam / (cam.max() or 1) * 65535).astype("<u2")
    return base64.b64encode(scaled.tobytes()).decode()


def make_cams(words, layers, grid):
    """Random maps >= 0, {(word, layer): (H, W)}, about half of each zero, of strengths that differ."""
    rng = np.random.default_rng(0)
    cams = {}
    for word in range(words):
        for layer in range(layers):
            cams[word, layer] = np.maximum(rng.normal(size=grid), 0).astype(np.float32) / (1 + word + 3 * layer)
            cams[word, layer].flat[0] += 0.1  # never all zero
    return cams


def make_data(
    *, answer=ANSWER, words=WORDS, layers=LAYERS, size=SIZE, grid=GRID, cams=None, blank=None, spans=None,
    evidence=(0.625, "3 %", {}), unlike=None, **changes,
):  # fmt: skip
    """What Python hands the page. Returns (data, photo, cams).

    `blank` is {(word, layer): why it has no map}, `evidence` (p, kept, {word: doubt}), and `unlike` has the
    correlations below 1, {(word, layer): value}.
    """
    photo, blank, unlike, (p, kept, doubts) = make_image(*size), blank or {}, unlike or {}, evidence
    file = io.BytesIO()
    photo.save(file, "PNG")
    cams = make_cams(len(words), len(layers), grid) if cams is None else cams
    spans = [(answer.index(word), answer.index(word) + len(word)) for word in words] if spans is None else spans
    data = {
        "photo": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
        "width": size[0],
        "height": size[1],
        "file_name": "photo.jpeg",
        "prompt": "What is in this image?",
        "answer": answer,
        "thinking": 0,
        "cut_off": False,
        "grid": list(grid),
        "layers": list(layers),
        "settings": "Score: sum of the logits.",
        "look": {"colours": "plasma", "opacity": None, "scale": "map"},
        "table": base64.b64encode(colour_table("plasma").tobytes()).decode(),
        "faded": FADED,
        "alike": 0.5,
        "words": [
            {
                "text": word,
                "start": spans[i][0],
                "end": spans[i][1],
                "tokens": [" " + word[:1], word[1:]],
                "probabilities": [0.75, 0.5],
                "p": p and f"{p:.2f}",
                "kept": kept,
                "doubt": doubts.get(i, ""),
                "likeness": [unlike.get((i, j), 1.0) for j in range(len(layers))],
                "maps": ["" if (i, j) in blank else encode(cams[i, j]) for j in range(len(layers))],
                "maxima": [float(cams[i, j].max()) for j in range(len(layers))],
                "blank": [blank.get((i, j), "") for j in range(len(layers))],
            }
            for i, word in enumerate(words)
        ],
    }
    return data | changes, photo, cams


# browser


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """One headless Chromium. Without it the tests are skipped, but fail where CI_BROWSER=1 promises one."""
    required = os.environ.get("CI_BROWSER") == "1"
    missing = pytest.fail if required else pytest.skip
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        missing("selenium is not installed (tests/requirements.txt)")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    chromedriver = shutil.which("chromedriver")
    if not (chromium and chromedriver):
        missing("no Chromium with its driver on the PATH (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "force-color-profile=srgb"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    yield driver
    driver.quit()


class Page:
    """A page in the browser, by what a person does to it and sees of it."""

    opened = 0

    def __init__(self, driver, path):
        self.driver, self.path = driver, path

    def open(self, data, address="", width=1440, height=900, media=(), mobile=False):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.media(**dict(media))
        self.path.write_text(words_html(data), encoding="utf-8")
        Page.opened += 1  # in the address, as one that differs in its hash alone would not load anew
        self.driver.get(f"{self.path.as_uri()}?{Page.opened}{address}")
        self.wait("document.documentElement.dataset.ready === 'yes'")
        return self

    def resize(self, width, height):
        """The window's size; narrow ones are those of a phone."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 720}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.wait(f"innerWidth === {width} && innerHeight === {height}")

    def media(self, medium="", **features):
        listed = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": medium, "features": listed})

    def js(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition, seconds=10):
        end = time.monotonic() + seconds
        while not self.js(f"return Boolean({condition})"):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.02)

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def word(self, i):
        return self.find(f".word[data-word='{i}']")

    def keys(self, *names):
        """Keys to whatever has the focus."""
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.keys import Keys

        ActionChains(self.driver).send_keys(*(getattr(Keys, name) for name in names)).perform()

    def point_at(self, element):
        from selenium.webdriver import ActionChains

        ActionChains(self.driver, duration=0).move_to_element(element).perform()

    def shift_click(self, element):
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.keys import Keys

        ActionChains(self.driver, duration=0).key_down(Keys.SHIFT).click(element).key_up(Keys.SHIFT).perform()

    def tap(self, x, y):
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
        for kind, points in (("touchStart", [{"x": x, "y": y}]), ("touchEnd", [])):
            self.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})

    def choose(self, name, value):
        self.find(f"#{name} option[value='{value}']").click()

    def pixels(self, selector="#canvas"):
        url = self.js("return document.querySelector(arguments[0]).toDataURL()", selector)
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB")).astype(int)

    def open_numbers(self):
        self.find("#numbers summary").click()
        self.wait("document.querySelector('#numbers caption')")  # the browser tells of the opening a little later

    def status(self):
        return self.find("#status").text

    def address(self):
        return self.js("return location.hash")

    def log(self, kind):
        return self.driver.get_log(kind)


@pytest.fixture
def page(driver, tmp_path):
    """An empty page. After each test: nothing was requested but files, data and blobs, and the console is clean."""
    page = Page(driver, tmp_path / "index.html")
    yield page
    events = [json.loads(entry["message"])["message"] for entry in page.log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith("file:") for url in urls)
    assert {url.split(":")[0] for url in urls} <= {"file", "data", "blob", "about"}
    assert not [entry for entry in page.log("browser") if entry["level"] == "SEVERE"]


def assert_same(pixels, expected, opacity=0.5):
    """Equal but for rounding, of halves too: the map's colour may be the next of the 256."""
    assert pixels.shape == expected.shape
    difference = np.abs(pixels - expected)
    assert difference.max() <= 4 * opacity + 2
    assert difference.mean() < 0.3


def is_shown(page, photo, cam):
    assert_same(page.pixels(), render_cam(photo, cam)[0])


def is_grey(page, why):
    """The panel of a layer that has no map, and why it has none."""
    pixels = page.pixels()
    assert (pixels == pixels[..., :1]).all()  # no colour, of photo or map
    assert (pixels[[0, -1]] == 204).all()
    assert (pixels < 100).any()  # letters
    assert page.status().endswith(f"{why}: no map")


# the file


def test_template_has_one_placeholder_and_refers_to_nothing_outside():
    text = TEMPLATE.read_text(encoding="utf-8")
    assert text.count("__DATA__") == 1
    assert not re.findall(r"https?:|//\w|\bsrc=|<link|@import|url\(", text)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\son\w+=", text)


# the maps


def test_each_word_and_layer_has_its_own_map_as_the_figures_draw_it(page):
    data, photo, cams = make_data()
    page.open(data)
    for word in range(len(WORDS)):
        page.word(word).click()
        for i, button in enumerate(page.driver.find_elements("css selector", "#strip button")):
            button.click()
            is_shown(page, photo, cams[word, i])


def test_page_reads_what_python_writes(page):
    answer, spans, cams = "🐕 ein Hund", [(0, 1), (6, 10)], make_cams(2, 3, GRID)
    cams[0, 0][:] = 0
    words = [
        TokenMaps(
            maps={layer: cams[i, j] for j, layer in enumerate(LAYERS)},
            grid=GRID,
            prompt="What?",
            answer=answer,
            tokens=[1, 2, 3],
            target=answer[slice(*span)],
            target_span=span,
            target_tokens=[i],
            no_gradient=frozenset([16]),
            settings=Settings(5, 0.1),
            evidence=[Evidence(0.5, 0.5), Evidence(0.98, 0.03)][i],
            likeness={0: 0.2, 5: 1.0},
        )
        for i, span in enumerate(spans)
    ]
    photo = Image.new("RGB", SIZE, (120, 120, 120))  # which JPEG leaves as it is
    data = html_data(photo, "photo.png", words, [[0.9], [0.8]], [["🐕"], [" Hund"]])
    assert {*data} == {*make_data()[0]}
    assert {*data["words"][0]} == {*make_data()[0]["words"][0]}
    page.open(data, "#word=1&layer=5")
    is_shown(page, photo, cams[1, 1])
    assert page.status().startswith("Hund · layer 5")
    assert page.status().endswith("p 0.98, 3 % kept")
    page.keys("ARROW_LEFT")
    assert_same(page.pixels(), render_cam(photo, cams[0, 1], peak=cams[0, 1].max() / FADED)[0])
    assert page.find("#hottest").text == "not to be believed: this does not come from the photo"
    page.keys("ARROW_UP")
    is_grey(page, "no gradient")
    page.keys("ARROW_DOWN", "ARROW_DOWN")
    is_grey(page, "zero everywhere")


@pytest.mark.parametrize(
    ("size", "grid"),
    [((90, 170), (6, 3)), ((640, 48), (1, 40)), ((40, 320), (40, 1)), ((112, 112), (1, 1)), ((101, 67), (3, 5))],
    ids=["portrait", "one row", "one column", "one cell", "odd"],
)
def test_photo_and_grid_of_any_shape(page, size, grid):
    data, photo, cams = make_data(size=size, grid=grid, words=["cat"], layers=[7])
    is_shown(page.open(data), photo, cams[0, 0])


@pytest.mark.parametrize("why", ["no gradient", "zero everywhere"])
def test_layer_without_a_map_is_grey_with_words(page, why):
    data, photo, cams = make_data(blank={(0, 1): why})
    page.open(data, "#word=0&layer=5")
    is_grey(page, why)
    assert page.js("return getComputedStyle(document.getElementById('bar')).visibility") == "hidden"
    assert (page.pixels("#strip button:nth-child(2) canvas") == page.pixels("#canvas")[:1, :1, :1]).any()
    assert np.ptp(page.pixels("#strip button:nth-child(1) canvas"), axis=2).any()
    page.open_numbers()
    assert f"{why}: no map" in page.find("#numbers table").text
    page.keys("ARROW_DOWN")
    is_shown(page, photo, cams[0, 0])
    page.keys("ARROW_UP")
    page.choose("scale", "word")
    is_grey(page, why)


@pytest.mark.parametrize("why", ["no gradient", "zero everywhere"])
def test_words_of_a_grey_panel_fit_in_it_and_say_why(page, why):
    data, _, _ = make_data(blank={(0, 1): why}, words=["red"])
    said = "window.said = []; const fill = CanvasRenderingContext2D.prototype.fillText;"
    said += "CanvasRenderingContext2D.prototype.fillText = function (text, ...at) {"
    said += " said.push([text, this.measureText(text).width, this.canvas.width]); fill.call(this, text, ...at); };"
    page.open(data, "#word=0&layer=0")
    page.js(said + "change({ layer: 1 })")
    drawn = page.js("return said")
    assert {text for text, *_ in drawn} == {f"{why}:", "no map"}
    assert all(0 < width < room for _, width, room in drawn)


def test_opacity_follows_the_value_unless_it_is_fixed(page):
    data, photo, cams = make_data()
    page.open(data, "#word=1&layer=0")
    cold = upsample_cam(cams[1, 0], SIZE[::-1]) == 0
    assert cold.any()
    assert (page.pixels()[cold] == np.asarray(photo)[cold]).all()
    is_shown(page, photo, cams[1, 0])
    page.find("#follow").click()
    assert page.find("#opacity-value").text == "50 %"
    assert_same(page.pixels(), render_cam(photo, cams[1, 0], Look(opacity=0.5))[0])
    page.find("#opacity").click()  # its middle
    page.keys("END")
    assert_same(page.pixels(), render_cam(photo, cams[1, 0])[1], 1)
    page.keys(*["ARROW_LEFT"] * 20)
    assert_same(page.pixels(), render_cam(photo, cams[1, 0], Look(opacity=0.8))[0], 0.8)
    page.keys("HOME")
    assert (page.pixels() == np.asarray(photo)).all()
    page.find("#follow").click()
    is_shown(page, photo, cams[1, 0])


def test_colour_maps_and_their_bar_over_mid_grey(page):
    data, photo, cams = make_data()
    page.open(data, "#word=1&layer=0")
    opacity = np.minimum(np.arange(256) / 255 / 0.5, 1)[None] * 0.7
    for name in ("viridis", "cividis", "jet", "plasma"):
        page.choose("colours", name)
        assert_same(page.pixels(), render_cam(photo, cams[1, 0], Look(name))[0])
        grey = np.full((1, 256, 3), 128, np.uint8)
        assert_same(page.pixels("#bar canvas"), overlay_cam(grey, colour_table(name)[None], opacity), 0.7)


def test_page_opens_with_the_look_of_the_figures(page):
    look = Look("inferno", opacity=0.4, scale="all")
    given = {"colours": "inferno", "opacity": 0.4, "scale": "all"}
    data, photo, cams = make_data(look=given, table=base64.b64encode(colour_table("inferno").tobytes()).decode())
    page.open(data, "#word=1&layer=0")
    peak = max(cam.max() for cam in cams.values())
    assert_same(page.pixels(), render_cam(photo, cams[1, 0], look, peak)[0])
    assert page.js("return $('colours').value") == "inferno"
    page.choose("colours", "plasma")
    assert_same(page.pixels(), render_cam(photo, cams[1, 0], Look(opacity=0.4), peak)[0])


def test_scales_compare_the_layers_of_a_word_and_all_maps(page):
    data, photo, cams = make_data()
    page.open(data, "#word=1&layer=16")
    peaks = {"word": max(cams[1, i].max() for i in range(3)), "all": max(cam.max() for cam in cams.values())}
    assert cams[1, 2].max() < 0.5 * peaks["word"] < 0.9 * peaks["all"]
    for scale, says in (("word", "word’s maximum"), ("all", "all words and layers")):
        page.choose("scale", scale)
        assert_same(page.pixels(), render_cam(photo, cams[1, 2], peak=peaks[scale])[0])
        assert says in page.find("#meaning").text
    page.choose("scale", "map")
    is_shown(page, photo, cams[1, 2])


def test_large_photo_is_drawn_at_once(page):
    data, photo, cams = make_data(size=(1024, 768), grid=(27, 36))
    page.open(data, "#word=1&layer=0")
    is_shown(page, photo, cams[1, 0])
    step = "const start = performance.now(); change({ layer: arguments[0] }); return performance.now() - start"
    assert min(page.js(step, layer) for layer in (1, 2, 1, 2)) < 500  # milliseconds, on a slow machine


# hand and keys


def test_hovering_previews_and_leaving_returns_to_the_pinned_word(page):
    data, photo, cams = make_data()
    page.open(data, "#word=0&layer=0")
    page.point_at(page.word(2))
    is_shown(page, photo, cams[2, 0])
    assert page.address() == "#word=0&layer=0"
    page.point_at(page.find("h1"))
    is_shown(page, photo, cams[0, 0])


def test_click_pins(page):
    data, photo, cams = make_data()
    page.open(data, "#word=0&layer=0")
    page.word(2).click()
    page.point_at(page.find("h1"))
    is_shown(page, photo, cams[2, 0])
    assert [page.word(i).get_attribute("aria-pressed") for i in range(3)] == ["false", "false", "true"]


def test_tap_pins(page):
    data, photo, cams = make_data()
    page.open(data, "#word=0&layer=0", width=390, height=844, mobile=True)
    box = page.word(1).rect
    page.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait("document.querySelector('.word.pinned').dataset.word === '1'")
    is_shown(page, photo, cams[1, 0])
    assert page.address() == "#word=1&layer=0"


def test_arrow_keys_change_word_and_layer_and_stop_at_the_ends(page):
    data, photo, cams = make_data()
    page.open(data, "#word=0&layer=5")
    page.keys("ARROW_RIGHT")
    is_shown(page, photo, cams[1, 1])
    page.keys("ARROW_UP")
    is_shown(page, photo, cams[1, 2])
    page.keys("ARROW_UP", "ARROW_LEFT", "ARROW_LEFT", "ARROW_LEFT")
    is_shown(page, photo, cams[0, 2])
    page.keys("ARROW_DOWN", "ARROW_DOWN", "ARROW_DOWN")
    is_shown(page, photo, cams[0, 0])
    assert page.address() == "#word=0&layer=0"


def test_words_and_layers_are_one_stop_of_tab_each(page):
    data, photo, cams = make_data()
    page.open(data, "#word=0&layer=0")
    page.keys("TAB", "TAB")
    assert page.js("return document.activeElement === arguments[0]", page.word(0))
    assert page.js("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keys("ARROW_RIGHT", "TAB")
    stops = []
    for _ in range(4):
        stops.append(page.js("return document.activeElement.id || document.activeElement.parentElement.id"))
        page.keys("TAB")
    assert stops == ["photo", "layer", "strip", "second"]
    page.js("document.querySelector('#strip [tabindex=\"0\"]').focus()")
    page.keys("ARROW_RIGHT")
    is_shown(page, photo, cams[1, 1])
    assert page.js("return document.activeElement.textContent") == "5"


def test_escape_returns_to_the_pinned_word_then_to_the_photo(page):
    data, photo, cams = make_data()
    page.open(data, "#word=1&layer=0")
    page.point_at(page.word(2))
    page.keys("ESCAPE")
    is_shown(page, photo, cams[1, 0])
    page.keys("ESCAPE")
    assert (page.pixels() == np.asarray(photo)).all()
    assert page.address() == "#word=none&layer=0"
    page.keys("ARROW_RIGHT")
    is_shown(page, photo, cams[1, 0])


def test_photo_only_and_back(page):
    data, photo, cams = make_data()
    page.open(data, "#word=1&layer=0")
    page.find("#photo-only").click()
    assert (page.pixels() == np.asarray(photo)).all()
    assert "photo only" in page.status()
    page.find("#photo-only").click()
    is_shown(page, photo, cams[1, 0])


def test_text_stays_under_the_pointer_when_two_words_come_back(page):
    page.open(rich_data(SIZE), "#word=1&layer=10&with=2&compare=side")
    page.find("#photo-only").click()
    before = page.word(0).rect
    page.point_at(page.word(0))
    assert page.find("#second-canvas").is_displayed()
    assert page.word(0).rect == before


def test_layer_slider_is_labelled_with_the_layer(page):
    data, photo, cams = make_data()
    page.open(data, "#word=1&layer=0")
    page.find("#layer").send_keys("")
    page.js("document.getElementById('layer').focus()")
    page.keys("ARROW_RIGHT", "ARROW_UP")
    is_shown(page, photo, cams[1, 2])
    assert page.find("#layer-value").text == "16"
    assert page.find("#layer").get_attribute("aria-valuetext") == "layer 16"


def test_right_to_left_answer_is_walked_in_its_direction(page):
    words = ["קטה", "אדום", "בית"]
    data, photo, cams = make_data(answer="קטה אדום ליד בית", words=words)
    page.open(data, "#word=0&layer=0")
    page.keys("ARROW_LEFT")
    is_shown(page, photo, cams[1, 0])
    assert page.word(1).rect["x"] < page.word(0).rect["x"]


# the address


def test_address_links_a_view(page):
    data, photo, cams = make_data()
    page.open(data, "#word=2&layer=16")
    is_shown(page, photo, cams[2, 2])
    page.js("location.hash = '#word=1&layer=0'")
    page.wait("document.querySelector('.word.pinned').dataset.word === '1'")
    is_shown(page, photo, cams[1, 0])
    page.js("location.hash = '#word=none'")
    page.wait("!document.querySelector('.word.pinned')")
    assert (page.pixels() == np.asarray(photo)).all()


@pytest.mark.parametrize(
    "address",
    ["#word=3&layer=1", "#word=-1&layer=", "#word=1.5&layer=x", "#word=length", "#word=01", "#%E0%A4%A", "#&=&"],
)
def test_wrong_address_is_ignored(page, address):
    data, photo, cams = make_data()
    is_shown(page.open(data, address), photo, cams[0, 1])  # the first word, the middle layer


# text that is not ours


def test_hostile_text_stays_text_and_spans_count_characters(page):
    hostile = "<img src=x onerror=\"document.title='hacked'\"> </script><script>document.title='hacked'</script> &amp; "
    answer = hostile + "\u2028 “it's” 🐕‍🦺 a 狗在房子里 \U00020000 dog\n<b>end</b>"
    words = ["🐕‍🦺", "狗", "房子", "dog", "<b>end</b>"]
    data, photo, cams = make_data(answer=answer, words=words, file_name=hostile, prompt=hostile, settings=hostile)
    for word in data["words"]:
        word["tokens"], word["probabilities"] = [hostile], [1.0]
    page.open(data, "#word=4&layer=0")
    assert page.js("return document.getElementById('answer').textContent") == answer
    assert page.js("return [...document.querySelectorAll('.word')].map((word) => word.textContent)") == words
    for name in ("prompt", "file"):
        assert page.js("return document.getElementById(arguments[0]).textContent", name) == hostile
    assert page.js("return document.querySelector('#tokens code').textContent") == hostile
    assert page.js("return document.querySelectorAll('img, b, main script').length") == 0
    assert page.js("return document.title").startswith(hostile[:10])
    is_shown(page, photo, cams[4, 0])
    page.word(1).click()
    is_shown(page, photo, cams[1, 0])


def test_words_that_overlap_are_all_shown_and_the_answer_is_not_changed(page):
    answer = "The red cat sits"
    data, photo, cams = make_data(answer=answer, words=["red cat", "cat", "sits"])
    page.open(data, "#word=0&layer=0")
    assert page.js("return document.getElementById('answer').textContent") == answer
    for word in (1, 2):
        page.keys("ARROW_RIGHT")
        is_shown(page, photo, cams[word, 0])


def test_no_request_can_leave_even_if_asked_for(page):
    page.open(make_data()[0])
    page.js(
        "window.stopped = []; addEventListener('securitypolicyviolation', (event) => stopped.push(event.blockedURI));"
        "new Image().src = 'http://127.0.0.1:9/image'; fetch('http://127.0.0.1:9/fetch').catch(() => {})"
    )
    page.wait("stopped.length === 2")
    events = [json.loads(entry["message"])["message"] for entry in page.log("performance")]
    ends = [event["params"].get("blockedReason") for event in events if event["method"] == "Network.loadingFailed"]
    assert set(ends) == {"csp"}
    page.log("browser")  # the refusals
    page.open(make_data()[0])


# the rest of the page


@pytest.fixture
def downloads(page, tmp_path):
    """A function that clicks a button and returns the path of the file it saves."""
    behavior = {"behavior": "allow", "downloadPath": str(tmp_path)}
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", behavior)

    def click(button, name):
        page.find(f"#{button}").click()
        path, end = tmp_path / name, time.monotonic() + 10
        while not path.exists():
            assert time.monotonic() < end, list(tmp_path.iterdir())
            time.sleep(0.02)
        return path

    return click


def test_saved_picture_is_the_view_in_the_photos_size_over_colours_and_caption(page, downloads):
    data, photo, cams = make_data()
    page.open(data, "#word=1&layer=16", width=390, height=844)  # shown smaller or larger than it is
    page.js(
        "window.said = []; const fill = CanvasRenderingContext2D.prototype.fillText;"
        "CanvasRenderingContext2D.prototype.fillText = function (text, ...at) { said.push(text);"
        " fill.call(this, text, ...at); };"
    )
    saved = np.asarray(Image.open(downloads("save", "photo_cat_layer_16.png")).convert("RGB")).astype(int)
    assert_same(saved[: SIZE[1], : SIZE[0]], render_cam(photo, cams[1, 2])[0])
    below = saved[SIZE[1] :]
    assert len(below) > 60
    assert (np.ptp(below, axis=2).max(axis=1) > 100).any()  # the colour scale
    said = " ".join(page.js("return said"))
    assert all(text in said for text in ("cat · layer 16", ANSWER, "0.75", "own maximum"))


def test_sheets_of_all_layers_and_all_words(page, downloads):
    data, photo, cams = make_data()
    page.open(data, "#word=1&layer=16")
    layers = np.asarray(Image.open(downloads("save-layers", "photo_cat_all_layers.png")).convert("RGB")).astype(int)
    words = np.asarray(Image.open(downloads("save-words", "photo_all_words_layer_16.png")).convert("RGB")).astype(int)
    for saved, first in ((layers, cams[1, 0]), (words, cams[0, 2])):
        assert_same(saved[: SIZE[1], : SIZE[0]], render_cam(photo, first)[0])
        assert saved.shape[1] >= 2 * SIZE[0]
    second = words[: SIZE[1], words.shape[1] - SIZE[0] :] if words.shape[1] < 2.5 * SIZE[0] else None
    if second is not None:
        assert np.ptp(second, axis=2).max() > 30


def test_numbers_are_saved_as_csv(page, downloads):
    data, _, cams = make_data()
    page.open(data, "#word=1&layer=16")
    rows = downloads("save-numbers", "photo_cat_layer_16.csv").read_text().strip().split("\n")
    assert rows[0] == '"cat, layer 16, raw: row\\column",0,1,2,3,4,5'
    np.testing.assert_allclose(numbers_of(rows), cams[1, 2], atol=2e-5 * cams[1, 2].max())
    page.choose("second", 2)
    page.choose("compare", "difference")
    rows = downloads("save-numbers", f"photo_cat_minus_{WORDS[2]}_layer_16.csv").read_text().strip().split("\n")
    assert rows[0].split('"')[1] == f"cat minus {WORDS[2]}, layer 16, raw: row\\column"
    np.testing.assert_allclose(numbers_of(rows), cams[1, 2] - cams[2, 2], atol=4e-5 * cams[1, 2].max())


def numbers_of(rows):
    return np.array([[float(cell) for cell in row.split(",")[1:]] for row in rows[1:]])


def test_opens_on_the_strongest_word_that_is_believed(page):
    shown = []
    cams = {(word, layer): cam * (1 + 2 * word) ** 2 for (word, layer), cam in make_cams(3, 3, GRID).items()}
    for doubts in ({}, {2: PHOTOLESS}, dict.fromkeys(range(3), PHOTOLESS)):
        data = make_data(cams=cams, evidence=(0.5, "100 %", doubts))[0]
        believed = {word["maxima"][1]: word["text"] for word in data["words"] if not word["doubt"]}
        every = {word["maxima"][1]: word["text"] for word in data["words"]}
        page.open(data)
        shown.append(page.find(".word.pinned").text)
        assert shown[-1] == (believed or every)[max(believed or every)]
    assert shown == ["house", "cat", "house"]


def test_nothing_is_painted_over_the_picture_that_stays_while_the_page_scrolls(page):
    """On a phone, and above a flat photo on any screen, the numbers unfolded."""
    words = [f"word{i}" for i in range(20)]
    for size, width, height in ((SIZE, 390, 844), ((640, 160), 1280, 800)):
        data = make_data(answer=" ".join(words), words=words, layers=list(range(28)), size=size)[0]
        page.open(data, width=width, height=height, mobile=width < 720)
        page.open_numbers()
        over = page.js(
            "const view = document.getElementById('view'), over = new Set(); let stuck = 0;"
            "for (let y = 0; y < document.documentElement.scrollHeight; y += 90) {"
            "  scrollTo(0, y); const box = view.getBoundingClientRect(); stuck += box.top === 0;"
            "  for (let i = 1; i < 8; i++) for (let j = 1; j < 8; j++) {"
            "    const found = document.elementFromPoint(box.x + i * box.width / 8, box.y + j * box.height / 8);"
            "    if (!view.contains(found)) over.add(found.outerHTML.slice(0, 60)); } }"
            "return [stuck, [...over]]"
        )
        assert over[0] > 5
        assert over[1] == []


def test_headers_of_the_matrix_stay_and_hide_each_other_nowhere(page):
    words = [f"word{i}" for i in range(40)]
    page.open(make_data(answer=" ".join(words), words=words, layers=list(range(60)))[0])
    corner = page.js(
        "const [scroll, first] = ['#strengths .scroll', '#matrix th'].map((name) => document.querySelector(name));"
        "scroll.scrollIntoView(); scroll.scrollTo(200, 200); const box = scroll.getBoundingClientRect();"
        "const at = (x, y) => document.elementFromPoint(box.x + x, box.y + y);"
        "return [scroll.scrollLeft, scroll.scrollTop, at(4, 4) === first, at(4, 100).scope, at(200, 4).scope]"
    )
    assert corner == [200, 200, True, "row", "col"]


# cells, places, comparison, strengths


def test_cell_under_the_pointer_is_outlined_and_read(page):
    data, _, cams = make_data()
    page.open(data, "#word=1&layer=5")
    row, column = 2, 4
    box = page.js("return document.getElementById('canvas').getBoundingClientRect()")
    move = {"type": "mouseMoved", "x": box["x"] + box["width"] * 4.5 / 6, "y": box["y"] + box["height"] * 2.5 / 4}
    page.driver.execute_cdp_cmd("Input.dispatchMouseEvent", move)
    text = page.find("#readout").text
    assert f"row {row}, column {column}" in text
    share, raw = re.search(r"([\d.]+) % of the map’s maximum \(([\d.e-]+)\)", text).groups()
    assert float(raw) == pytest.approx(cams[1, 1][row, column], rel=0.01, abs=1e-6)
    assert float(share) == pytest.approx(100 * cams[1, 1][row, column] / cams[1, 1].max(), abs=0.6)
    shares = {word: cams[i, 1][row, column] / cams[i, 1].sum() for i, word in enumerate(WORDS)}
    order = [word for word in sorted(shares, key=shares.get, reverse=True) if shares[word] > 0]
    assert re.findall(r"(\w+) [\d.]+ %(?:,|$)", text.split("own map in this cell: ")[1] if order else "") == order
    outline = page.js("return document.querySelector('#photo .cell').getBoundingClientRect()")
    assert outline["x"] == pytest.approx(box["x"] + box["width"] * 4 / 6, abs=1)
    assert outline["height"] == pytest.approx(box["height"] / 4, abs=1)


def test_cell_is_moved_and_kept_with_keys_and_told_to_screen_readers(page):
    data, _, cams = make_data()
    page.open(data, "#word=1&layer=5")
    page.keys("TAB", "TAB", "TAB")
    row, column = np.unravel_index(cams[1, 1].argmax(), GRID)  # it begins where the map is largest
    spoken = "return document.getElementById('spoken').textContent"
    assert page.js(spoken).startswith(f"row {row}, column {column}, 100 % of the map’s maximum")
    page.keys("ARROW_LEFT" if column else "ARROW_RIGHT", "ENTER")
    column += -1 if column else 1
    assert page.js(spoken).startswith(f"row {row}, column {column}")
    assert page.js(spoken).endswith("kept")
    page.keys("TAB")
    assert f"row {row}, column {column}" in page.find("#readout").text
    page.keys("ESCAPE")
    assert not page.find("#readout").is_displayed()


def test_place_of_the_map_is_told_by_ninths(page):
    cams = make_cams(3, 3, GRID)
    cams[1, 1] = np.zeros(GRID, np.float32)
    cams[1, 1][3, 0], cams[1, 1][0, 5] = 3, 2
    page.open(make_data(cams=cams)[0], "#word=1&layer=5")
    assert "hottest: bottom left, 60 % of the map there" in page.find("#hottest").text
    assert page.find("#hottest").get_attribute("aria-live") == "polite"


def test_two_words_side_by_side_and_as_a_difference(page):
    data, photo, cams = make_data()
    page.open(data, "#word=1&layer=5")
    page.choose("second", 2)
    is_shown(page, photo, cams[1, 1])
    assert_same(page.pixels("#second-canvas"), render_cam(photo, cams[2, 1])[0])
    first, second = page.find("#canvas").rect, page.find("#second-canvas").rect
    assert first["x"] + first["width"] <= second["x"]
    page.choose("compare", "difference")
    assert not page.find("#second-canvas").is_displayed()
    difference = cams[1, 1] / cams[1, 1].max() - cams[2, 1] / cams[2, 1].max()
    share = upsample_cam(difference / np.abs(difference).max(), SIZE[::-1])[..., None]
    ends = np.where(share > 0, [178, 24, 43], [33, 102, 172])
    opacity = 0.7 * np.minimum(2 * np.abs(share), 1)
    grey = np.asarray(photo) @ [[0.3], [0.59], [0.11]]  # on a red photo, red and blue would not be seen
    expected = grey * (1 - opacity) + opacity * (255 + np.abs(share) * (ends - 255))
    assert np.abs(page.pixels() - expected).max() <= 4
    assert page.find("#bar .ticks").text.startswith("−1")


def test_matrix_shows_strengths_and_leads_to_word_and_layer(page):
    data, photo, cams = make_data()
    page.open(data, "#word=0&layer=0")
    tints = page.js(
        "return [...document.querySelectorAll('#matrix td')].map((td) => Number(td.style.getPropertyValue('--t')))"
    )
    maxima = np.array([[cams[i, j].max() for j in range(3)] for i in range(3)])
    np.testing.assert_allclose(tints, (1 + np.log10(maxima / maxima.max()) / 3).ravel(), atol=2e-3)
    page.find("#matrix td[data-word='1'][data-layer='1']").click()
    is_shown(page, photo, cams[1, 1])
    page.keys("ARROW_RIGHT", "ARROW_DOWN")
    is_shown(page, photo, cams[2, 2])
    assert page.js("return document.querySelectorAll('#matrix td[tabindex=\"0\"]').length") == 1
    assert page.address() == "#word=2&layer=16"


def test_words_are_tinted_by_strength_and_weak_maps_are_called_weak(page):
    cams = make_cams(3, 3, GRID)
    cams[1, 1] *= 0.04 * cams[0, 1].max() / cams[1, 1].max()
    page.open(make_data(cams=cams)[0], "#word=1&layer=5")

    def strength(word):
        return float(page.js("return arguments[0].style.getPropertyValue('--t')", page.word(word)))

    assert "weak: 4 % of the strongest map at this layer" in page.find("#hottest").text
    assert strength(1) == pytest.approx(0.04, abs=0.001)
    assert strength(0) == 1
    assert "probability 0.375" in page.word(1).get_attribute("title")
    page.keys("ARROW_LEFT")
    assert "weak" not in page.find("#hottest").text


PHOTOLESS = "this does not come from the photo (100 % of p is left without it)"
UNLIKELY = "the model hardly says this (p 4e-6)"
DOUBTED = 0.5, "100 %", {0: PHOTOLESS, 2: f"{UNLIKELY} and {PHOTOLESS}"}  # of the three words the first and the last


@pytest.mark.parametrize("look", [{}, {"scale": "all"}, {"opacity": 0.5}], ids=str)
def test_doubted_words_are_faded_in_every_picture_as_the_figures_fade_them(page, look):
    data, photo, cams = make_data(evidence=DOUBTED)
    data["look"] |= look
    page.open(data, "#word=0&layer=5&with=1&compare=side")
    given, peak = Look(**look), max(cam.max() for cam in cams.values())
    full = [peak if look.get("scale") == "all" else cams[word, 1].max() for word in range(3)]
    for word, share, part in ((0, FADED, "#canvas"), (1, 1, "#second-canvas")):
        assert_same(page.pixels(part), render_cam(photo, cams[word, 1], given, full[word] / share)[0])
    page.keys("ARROW_RIGHT", "ARROW_RIGHT")
    assert_same(page.pixels(), render_cam(photo, cams[2, 1], given, full[2] / FADED)[0])
    small = page.pixels("#strip button:nth-child(2) canvas")
    large = Image.fromarray(page.pixels().astype(np.uint8)).resize(small.shape[1::-1])
    assert np.abs(small - np.asarray(large).astype(int)).mean() < 4  # photos are made smaller in other ways


def test_difference_to_a_doubted_word_is_faded(page):
    data, photo, cams = make_data(evidence=DOUBTED)
    page.open(data, "#word=1&layer=5&with=2&compare=difference")
    difference = cams[1, 1] / cams[1, 1].max() - cams[2, 1] / cams[2, 1].max()
    share = FADED * upsample_cam(difference / np.abs(difference).max(), SIZE[::-1])[..., None]
    ends = np.where(share > 0, [178, 24, 43], [33, 102, 172])
    opacity = 0.7 * np.minimum(2 * np.abs(share), 1)
    grey = np.asarray(photo) @ [[0.3], [0.59], [0.11]]  # on a red photo, red and blue would not be seen
    expected = grey * (1 - opacity) + opacity * (255 + np.abs(share) * (ends - 255))
    assert np.abs(page.pixels() - expected).max() <= 4
    assert "The largest difference has 35 % of the colours." in page.find("#meaning").text
    assert "house: not to be believed: the model hardly says this and" in page.find("#hottest").text


def test_doubted_words_look_different_and_say_why(page):
    page.open(make_data(evidence=DOUBTED)[0], "#word=1&layer=5")
    style = "const { color, fontStyle, textDecorationStyle } = getComputedStyle(arguments[0]);"
    style += " return [color, fontStyle, textDecorationStyle]"
    first, other, last = (page.js(style, page.word(i)) for i in range(3))
    assert first == last
    assert first[0] != page.js(style, page.find("#answer"))[0]
    assert first[1:] == ["italic", "dotted"]
    assert other[1:] == ["normal", "solid"]
    assert page.find("#doubts").is_displayed()
    said = page.word(2).get_attribute("title")
    assert "not to be believed: the model hardly says this and this does not come from the photo" in said
    assert "believed" not in page.word(1).get_attribute("title")
    assert page.find("#hottest").text.startswith("hottest: ")
    page.keys("ARROW_RIGHT")
    assert page.status().endswith("p 0.50, 100 % kept")
    told = page.find("#hottest").text
    assert told == "not to be believed: the model hardly says this and this does not come from the photo"
    assert page.find("#meaning").text.startswith("Not to be believed, so faded: each map’s own maximum, ")
    assert page.find("#evidence").text.endswith("their mean is p 0.50; without the photo, 100 % of it is kept.")
    assert page.js(style, page.word(2))[1:] == ["italic", "dotted"]  # shown and kept, too


def test_page_without_doubt_says_nothing_of_it(page):
    for evidence in ((0.5, "3 %", {}), (None, None, {})):
        page.open(make_data(evidence=evidence)[0], "#word=1&layer=5&row=1&column=1")
        assert not page.find("#doubts").is_displayed()
        assert "believed" not in page.find("main").text
        assert ("p 0.50, 3 % kept" in page.find("#readout").text) == bool(evidence[0])
        assert ("kept" in page.find("main").text) == bool(evidence[0])
        assert "null" not in page.find("main").text


def test_strength_of_doubted_words_is_faded_and_told(page):
    data, _, cams = make_data(evidence=DOUBTED)
    page.open(data, "#word=1&layer=5")
    maxima = np.array([[cams[i, j].max() for j in range(3)] for i in range(3)])
    shares, cells = np.array([FADED, 1, FADED]), "return [...document.querySelectorAll('#matrix td')]"
    tints = page.js(f"{cells}.map((td) => Number(td.style.getPropertyValue('--t')))")
    expected = shares[:, None] * (1 + np.log10(maxima / maxima.max()) / 3)
    np.testing.assert_allclose(tints, expected.ravel(), atol=2e-3)
    labels = page.js(f"{cells}.map((td) => td.ariaLabel)")
    assert [label.endswith(", not to be believed") for label in labels] == [True] * 3 + [False] * 3 + [True] * 3
    heads = page.driver.find_elements("css selector", "#matrix tbody th")
    assert [head.value_of_css_property("font-style") for head in heads] == ["italic", "normal", "italic"]
    own = [float(page.js("return arguments[0].style.getPropertyValue('--t')", page.word(i))) for i in range(3)]
    assert own == pytest.approx(shares * maxima[:, 1] / maxima[:, 1].max(), abs=1e-3)


def test_cell_says_which_of_its_maps_are_doubted(page):
    cams = {key: np.full(GRID, 1 + key[0], np.float32) for key in np.ndindex(3, 3)}
    page.open(make_data(cams=cams, evidence=DOUBTED)[0], "#word=0&layer=5&row=2&column=4")
    text = page.find("#readout").text
    assert "100 % of the map’s maximum (1.00), not to be believed" in text
    assert "p 0.50, 100 % kept" in text
    assert text.endswith("cat 4.2 %, red 4.2 % (doubted), house 4.2 % (doubted)")  # what is believed comes first
    page.keys("TAB", "TAB", "TAB", "ARROW_LEFT")
    assert "not to be believed" in page.js("return document.getElementById('spoken').textContent")


def test_layer_that_shows_something_else_says_so(page):
    unlike = {(1, 0): 0.49, (1, 1): 0.5, (0, 0): 0.1, (2, 0): None}  # of the first not to be believed, the last unknown
    page.open(make_data(unlike=unlike, evidence=(0.5, "3 %", {0: UNLIKELY}))[0], "#word=1&layer=0")
    assert page.find("#hottest").text.endswith(" · unlike the middle layers (correlation 0.5)")
    assert "unlike the middle layers" in page.word(1).get_attribute("title")
    page.keys("ARROW_UP")
    assert "unlike" not in page.find("#hottest").text
    page.keys("ARROW_DOWN")
    for key, word in (("ARROW_LEFT", "red"), ("ARROW_RIGHT", "cat"), ("ARROW_RIGHT", "house")):
        page.keys(key)
        assert page.status().startswith(word)
        assert ("unlike" in page.find("#hottest").text) == (word == "cat")


def test_saved_pictures_say_what_is_not_to_be_believed(page, downloads):
    said = "window.said = []; const fill = CanvasRenderingContext2D.prototype.fillText;"
    said += "CanvasRenderingContext2D.prototype.fillText = function (text, ...at) { said.push(text);"
    said += " fill.call(this, text, ...at); };"
    data, photo, cams = make_data(evidence=DOUBTED, unlike={(1, 0): 0.2}, size=(560, 392))
    page.open(data, "#word=0&layer=5")
    page.js(said)

    def told(button, name):
        downloads(button, name)
        return " ".join(page.js("return said.splice(0)"))

    found = told("save", "photo_red_layer_5.png")
    saved = np.asarray(Image.open(page.path.with_name("photo_red_layer_5.png")).convert("RGB")).astype(int)
    assert_same(saved[:392, :560], render_cam(photo, cams[0, 1], peak=cams[0, 1].max() / FADED)[0])
    assert "red: not to be believed: this does not come from the photo" in found
    assert "so faded: each map’s own maximum" in found
    assert "red: not to be believed" in told("save-layers", "photo_red_all_layers.png")
    found = told("save-words", "photo_all_words_layer_5.png")
    assert all(text in found for text in ("red, doubted", "house, doubted", "Doubted: hardly said, or not from"))
    assert "cat, doubted" not in found
    assert "Share of each map’s own maximum" in found
    page.keys("ARROW_RIGHT", "ARROW_DOWN")
    assert "cat: unlike the middle layers (correlation 0.2)" in told("save", "photo_cat_layer_0.png")
    assert "Unlike the middle layers: layer 0" in told("save-layers", "photo_cat_all_layers.png")
    assert "Unlike the middle layers: cat" in told("save-words", "photo_all_words_layer_0.png")


def test_link_keeps_the_whole_view_and_can_be_copied(page):
    data, photo, cams = make_data()
    page.open(data, "#word=1&layer=5")
    page.choose("colours", "viridis")
    page.choose("scale", "word")
    page.find("#follow").click()
    page.choose("second", 2)
    address = page.address()
    assert address == "#word=1&layer=5&colours=viridis&opacity=50&scale=word&with=2&compare=side"
    page.open(data, address)
    page.js(
        "Object.defineProperty(navigator, 'clipboard', { value: { writeText: async (text) => (window.got = text) } })"
    )
    page.find("#copy").click()
    page.wait("window.got === location.href")
    peak = max(cams[2, i].max() for i in range(3))
    expected = render_cam(photo, cams[2, 1], Look("viridis", opacity=0.5), peak=peak)[0]
    assert_same(page.pixels("#second-canvas"), expected)
    assert page.address() == address


def test_kept_cell_is_in_the_link_and_a_tap_keeps_one(page):
    data, _, cams = make_data()
    page.open(data, "#word=1&layer=5&row=2&column=4")
    assert "row 2, column 4" in page.find("#readout").text
    page.find("h1").click()
    assert "row 2, column 4" in page.find("#readout").text  # a kept one stays
    page.keys("ESCAPE")
    assert page.address() == "#word=1&layer=5"
    page.open(data, "#word=1&layer=5&row=4&column=1")  # there are four rows
    assert not page.find("#readout").is_displayed()
    page.open(data, "#word=1&layer=5", width=390, height=844, mobile=True)
    box = page.js("return document.getElementById('canvas').getBoundingClientRect()")
    page.tap(box["x"] + box["width"] * 1.5 / 6, box["y"] + box["height"] * 3.5 / 4)
    page.wait("document.querySelector('#photo .cell.pinned')")
    assert page.address() == "#word=1&layer=5&row=3&column=1"
    assert f"({cams[1, 1][3, 1]:.3g})"[:4] in page.find("#readout").text


def test_shift_and_click_compares_with_a_word_and_again_with_none(page):
    data, photo, cams = make_data()
    page.open(data, "#word=1&layer=5")
    page.word(0).click()  # from here the browser would select
    page.word(1).click()
    for second, address in ((2, "#word=1&layer=5&with=2&compare=side"), (None, "#word=1&layer=5")):
        page.shift_click(page.word(2))
        page.point_at(page.find("h1"))
        assert page.address() == address
        assert page.js("return getSelection().toString()") == ""
        is_shown(page, photo, cams[1, 1])
        assert page.find("#second-canvas").is_displayed() == (second is not None)


def test_a_word_is_not_compared_with_itself_where_the_pointer_rests_on_it(page):
    data, photo, cams = make_data()
    page.open(data, "#word=1&layer=5")
    page.word(1).click()
    page.shift_click(page.word(2))  # which makes the text narrower, so that words move under the pointer
    is_shown(page, photo, cams[1, 1])
    assert page.find("#second-canvas").is_displayed()
    page.point_at(page.find("h1"))
    page.choose("compare", "difference")
    difference = page.pixels()
    page.point_at(page.word(2))
    np.testing.assert_array_equal(page.pixels(), difference)
    page.point_at(page.word(0))
    assert abs(page.pixels() - difference).max() > 20


def test_where_copying_is_not_allowed_the_link_is_selected(page):
    page.open(make_data()[0], "#word=1&layer=5")
    page.js("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.find("#copy").click()
    page.wait("document.activeElement.id === 'link'")
    assert page.js("return getSelection().toString()") == page.js("return location.href")


def test_a_hundred_words_of_28_layers_open_and_change_only_what_differs(page):
    words = [f"word{i}" for i in range(100)]
    data, _, _ = make_data(
        answer=" ".join(f"{word}." for word in words),
        spans=[(i, i + len(word)) for i, word in zip(np.cumsum([0] + [len(w) + 2 for w in words]).tolist(), words)],  # noqa: B905
        words=words, layers=list(range(28)), size=(1024, 768), grid=(27, 36),
    )  # fmt: skip
    page.open(data)
    assert page.js("return document.querySelectorAll('*').length") > 2800  # a cell of each word and layer
    step = (  # how many nodes change: the page redraws what differs, not all of its cells
        "const done = arguments[arguments.length - 1]; let count = 0;"
        "const size = (node) => 1 + (node.querySelectorAll?.('*').length ?? 0);"
        "const seen = new MutationObserver((records) => {"
        "  for (const record of records) count += [...record.addedNodes].reduce((sum, n) => sum + size(n), 1); });"
        "seen.observe(document, {subtree: true, childList: true, attributes: true, characterData: true});"
        "change(arguments[0]); setTimeout(() => { seen.disconnect(); done(count); }, 50);"
    )
    counts = [page.driver.execute_async_script(step, {"pinned": i, "layer": i % 28}) for i in range(3)]
    counts += [page.driver.execute_async_script(step.replace("change(", "changeCell("), {"cell": i}) for i in range(3)]
    assert 0 < max(counts) < 600


@pytest.mark.parametrize("strength", [1, 1e-6, 4e7])
def test_table_has_the_raw_numbers(page, strength):
    _, _, cams = make_data()
    cams = {key: cam * np.float32(strength) for key, cam in cams.items()}
    data, _, _ = make_data(cams=cams)
    page.open(data, "#word=1&layer=5")
    page.open_numbers()
    unit = re.search(r"units of (1e-?\d+)", page.find("#numbers caption").text)
    unit = float(unit[1]) if unit else 1
    rows = page.js(
        "return [...document.querySelectorAll('#numbers tr')].slice(1)"
        ".map((row) => [...row.querySelectorAll('td')].map((cell) => Number(cell.textContent)))"
    )
    np.testing.assert_allclose(np.array(rows) * unit, cams[1, 1], atol=0.01 * cams[1, 1].max())
    top = page.find("#numbers td.top").text
    assert float(top) == np.max(rows)
    page.keys("ARROW_UP")
    assert page.find("#numbers td.top").text != top


def test_tokens_probabilities_and_maximum_are_told(page):
    data, _, cams = make_data()
    page.open(data, "#word=1&layer=5")
    cells = page.js("return [...document.querySelectorAll('#tokens td')].map((cell) => cell.textContent)")
    assert cells == [" c", "0.750", "at", "0.500"]
    maximum = float(re.search(r"maximum ([\d.e-]+)", page.status())[1])
    assert maximum == pytest.approx(cams[1, 1].max(), rel=0.005)
    assert page.status().startswith("cat · layer 5")
    assert page.find("#status").get_attribute("aria-live") == "polite"


def test_no_words_at_all(page):
    data, photo, _ = make_data(words=[])
    page.open(data, "#word=0&layer=5")
    assert (page.pixels() == np.asarray(photo)).all()
    assert page.status() == "no word to explain"
    assert page.find("#answer").text == ANSWER
    assert page.find("#save").is_displayed()
    page.keys("ARROW_RIGHT", "ARROW_UP", "ESCAPE")
    assert (page.pixels() == np.asarray(photo)).all()


def test_settings_end_before_the_photo_is_told(page):
    page.open(make_data(settings=settings_text(Settings(5, 0.1)))[0])
    assert re.search(r"[^.]\. Photo: 168 × 112 pixels, seen as 6 × 4 image tokens\.$", page.find("#settings").text)


def test_negative_shares_have_the_minus_sign_of_the_scale(page):
    data = rich_data(SIZE)
    data["words"][1]["asked"] = [[-0.02, -0.01]] * 6
    page.open(data, "#word=1&layer=10")
    assert "30 % from the photo, −3 % from these words" in page.find("#sources").text


def test_every_control_has_a_name(page):
    page.open(make_data()[0])
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"button", "slider", "combobox", "image", "img", "DisclosureTriangle", "link"}
    named = [
        (node["role"]["value"], node["name"]["value"]) for node in nodes if node.get("role", {}).get("value") in roles
    ]
    assert len(named) > len(WORDS) + len(LAYERS) + 8
    assert [role for role, name in named if not name.strip()] == []


# looks


@pytest.mark.parametrize("size", [SIZE, (90, 170), (640, 48)], ids=["landscape", "portrait", "panorama"])
def test_phone_needs_no_scrolling_sideways_and_keeps_the_picture_in_view(page, size):
    words = ["word", "x" * 300]
    layers = list(range(28))
    data, _, _ = make_data(
        answer=f"A {words[0]} " + "and more " * 300 + words[1], words=words, size=size, layers=layers,
        evidence=(0.05, "100 %", {0: f"{UNLIKELY} and {PHOTOLESS}"}),
    )  # fmt: skip
    page.open(data, width=360, height=844, mobile=True)
    page.open_numbers()
    assert page.js("return document.documentElement.scrollWidth") <= 360
    page.js("scrollTo(0, 700)")
    box = page.find("#view").rect
    top = page.js("return document.getElementById('view').getBoundingClientRect().top")
    assert top == 0
    assert box["height"] <= 0.45 * 844 + 1


def test_on_a_phone_the_word_in_focus_is_not_under_the_picture(page):
    data, _, _ = make_data(answer="blank\n" * 15 + "first second" + " and" * 600, words=["first", "second"])
    page.open(data, "#word=0", width=390, height=844, mobile=True)
    page.js("scrollTo(0, arguments[0].getBoundingClientRect().top - 100)", page.word(1))  # where it cannot be seen
    page.keys("ARROW_RIGHT")
    edges = "[arguments[0].getBoundingClientRect(), document.getElementById('view').getBoundingClientRect()]"
    word, view = page.js(f"return {edges}", page.word(1))
    assert view["bottom"] <= word["top"] <= 844 - word["height"]


def test_wide_screen_has_the_picture_left_of_the_answer_and_all_of_it_in_view(page):
    data, _, _ = make_data(size=(90, 170))
    page.open(data)
    picture, answer = page.find("#canvas").rect, page.find("#answer").rect
    assert picture["x"] + picture["width"] < answer["x"]
    assert picture["y"] + picture["height"] < 900
    assert picture["width"] / picture["height"] == pytest.approx(90 / 170, rel=0.01)
    assert page.js("return document.documentElement.scrollWidth") <= 1440


CONTRAST = """
const luminance = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
  .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const ground = (node) => {
  const colour = getComputedStyle(node).backgroundColor;
  return /, 0\\)$/.test(colour) ? ground(node.parentElement) : colour;
};
const ratios = {};
for (const node of document.querySelectorAll("body *")) {
  const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  if (!own || !node.checkVisibility() || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(node.tagName)) continue;
  const pair = [getComputedStyle(node).color, ground(node)].map(luminance).sort((a, b) => b - a);
  ratios[`${node.tagName}#${node.id}.${node.className}`] = (pair[0] + 0.05) / (pair[1] + 0.05);
}
return ratios;
"""


def test_light_and_dark_differ_and_both_can_be_read(page):
    grounds = set()
    for scheme in ("light", "dark"):
        media = {"prefers_color_scheme": scheme, "prefers_reduced_motion": "reduce"}
        page.open(rich_data(SIZE), "#word=1&layer=10&with=2&compare=side&row=1&column=1", media=media)
        page.find("#photo-only").click()
        page.word(1).click()
        page.open_numbers()
        ratios = page.js(CONTRAST)
        assert len(ratios) > 25
        assert {"DIV#.", "P#sources.soft", "P#thought.", "FIGCAPTION#name."} < {*ratios}  # of the readout, and more
        assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}
        grounds.add(page.js("return getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2


def test_selection_is_seen_in_forced_colours(page):
    page.open(make_data()[0], "#word=1&layer=5", media={"forced_colors": "active"})
    ground = "return getComputedStyle(arguments[0]).backgroundColor"
    assert page.js(ground, page.word(1)) != page.js(ground, page.word(0))
    border = "return getComputedStyle(document.querySelectorAll('#strip button')[arguments[0]]).borderTopColor"
    assert page.js(border, 1) != page.js(border, 0)
    outline = "return getComputedStyle(document.querySelector('#matrix [aria-selected=true]')).outlineStyle"
    assert page.js(outline) == "solid"


SCREENS = [(390, 844), (1024, 768), (1280, 800), (1920, 1080), (2560, 1440)]
SHAPES = {"4:3": (80, 60), "9:16": (54, 96), "1:3": (40, 120), "4:1": (160, 40)}
LAID_OUT = """
const parts = {};
for (const name of ["h1", "#file", "#canvas", "#second-canvas", "#status", "#hottest", "#layers", "#strip", "#bar",
  "#prompt", "#sources", "#thought", "#answer", "#hint", "#doubts", "#controls .row > *", "#controls .check",
  "#controls .slider", "#strengths h2", "#strengths p", "#strengths .scroll", "#tokens", "#numbers", "#settings"]) {
  [...document.querySelectorAll(name)].filter((node) => node.checkVisibility())
    .forEach((node, i) => { parts[`${name} ${i}`] = node.getBoundingClientRect(); });
}
const names = Object.keys(parts), faults = [];
for (const [i, one] of names.entries()) {
  const a = parts[one];
  if (a.left < -0.5 || a.right > innerWidth + 0.5) faults.push(`${one} leaves the window`);
  for (const other of names.slice(i + 1)) {
    const b = parts[other], across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    if (across > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1) faults.push(`${one} over ${other}`);
  }
}
const pen = document.createElement("canvas").getContext("2d");
for (const node of document.querySelectorAll("#controls select, #controls button, .slider, .check")) {
  pen.font = getComputedStyle(node).font;
  const texts = node.id === "second" ? [] : [...(node.options ?? [])].map(({ text }) => pen.measureText(text).width);
  if (Math.max(0, ...texts) + 16 + 20 > node.offsetWidth && texts.length) faults.push(`${node.id} cuts its options`);
  if (node.scrollWidth > node.clientWidth) faults.push(`${node.id} is cut`);
}
if (document.documentElement.scrollWidth > innerWidth) faults.push("the page scrolls sideways");
const photo = parts["#canvas 0"], matrix = $("matrix").offsetWidth, room = $("strengths").offsetWidth;
if (photo.bottom > innerHeight) faults.push("the photo is not all in the window");
return [faults, photo.width / innerWidth, photo.height / innerHeight, matrix / room];
"""


def rich_data(size, **changes):
    """Data with all that a page can say: thinking, doubts, and what the words take from the prompt."""
    answer = "<think>The red one?</think> A cat sits on the old house."
    data = make_data(
        answer=answer, size=size, evidence=DOUBTED, layers=[0, 5, 10, 15, 20, 27], unlike={(1, 0): 0.2}, **changes
    )[0]
    data |= {"thinking": answer.index(" A cat"), "asked": [{"start": 0, "end": 4}, {"start": 8, "end": 12}]}
    for word in data["words"]:
        word |= {"asked": [[0.02, -0.01]] * 6, "from_photo": [0.3] * 6}
    return data


@pytest.mark.parametrize("shape", SHAPES)
def test_page_fits_every_screen_and_uses_its_room(page, shape):
    """No part over another, cut or outside; the photo has the window's width or height, the matrix most of its own."""
    page.open(rich_data(SHAPES[shape]), "#word=1&layer=10")
    for width, height in SCREENS:
        page.resize(width, height)
        page.js("change({ second: null })")
        faults, across, down, matrix = page.js(LAID_OUT)
        assert faults == [], (width, height)
        if width == 390:
            assert across > 0.8 or down > 0.28
        else:
            large = {"4:3": down > 0.5, "9:16": down > 0.6, "1:3": down > 0.88, "4:1": across > 0.93}
            assert large[shape], (width, across, down)
        assert matrix > 0.5, (width, height)
        page.js("change({ second: 2, compare: 'side' })")
        faults = page.js(LAID_OUT)[0]
        assert faults == [] or (width == 390 and faults == ["the photo is not all in the window"]), (width, height)


def test_long_answer_and_many_layers_fit_every_screen(page):
    words = [f"word{i}" for i in range(100)]
    answer = " and ".join(words)
    spans = [(answer.index(f"{word} "), answer.index(f"{word} ") + len(word)) for word in words[:-1]]
    spans += [(len(answer) - len(words[-1]), len(answer))]
    page.open(make_data(answer=answer, words=words, spans=spans, layers=list(range(28)))[0])
    for width, height in SCREENS:
        page.resize(width, height)
        faults, _, _, matrix = page.js(LAID_OUT)
        assert faults == [], (width, height)
        if width >= 1920:  # on others it scrolls in its own frame
            assert 0.75 < matrix <= 1, (width, height)


@pytest.mark.parametrize("shape", SHAPES)
def test_readout_hides_its_cell_nowhere_and_stays_in_the_window(page, shape):
    page.open(rich_data(SHAPES[shape]), "#word=1&layer=10")
    for width, height in (SCREENS[0], SCREENS[2]):
        page.resize(width, height)
        for second in ("null", "2"):
            faults = page.js(
                f"change({{ second: {second}, compare: 'side' }}); const faults = [];"
                "for (let cell = 0; cell < H * W; cell++) {"
                "  changeCell({ cell }); const box = $('readout').getBoundingClientRect();"
                "  if (box.left < 0 || box.right > innerWidth || box.top < 0 || box.bottom > innerHeight)"
                "    faults.push(`${cell} outside`);"
                "  for (const one of [...document.querySelectorAll('.cell')].filter((one) => one.checkVisibility())) {"
                "    const at = one.getBoundingClientRect();"
                "    if (Math.min(at.right, box.right) > Math.max(at.left, box.left) &&"
                "      Math.min(at.bottom, box.bottom) > Math.max(at.top, box.top)) faults.push(`${cell} hidden`); } }"
                "changeCell({ cell: null }); return faults"
            )
            assert faults == [], (width, height, second)


def test_kept_readout_stays_in_the_window_when_the_page_scrolls(page):
    page.open(rich_data(SHAPES["4:1"]), "#word=1&layer=10&row=3&column=2", width=390, height=844, mobile=True)
    page.js("scrollTo(0, 500)")
    page.wait("$('readout').getBoundingClientRect().top >= 0 && $('view').getBoundingClientRect().top === 0")


def test_each_stop_of_tab_is_seen(page):
    """It has an outline, lies in the window, and nothing is over it, on a phone and on a desk."""
    for width, height in (SCREENS[0], SCREENS[2]):
        page.open(rich_data(SHAPES["4:3"]), "#word=1&layer=10", width=width, height=height, mobile=width < 720)
        stops = []
        for _ in range(30):
            page.keys("TAB")
            stop = page.js(
                "const node = document.activeElement, box = node.getBoundingClientRect();"
                "if (node === document.body) return null;"
                "const y = Math.min(box.y + box.height / 2, innerHeight - 2);"
                "const at = document.elementFromPoint(box.x + box.width / 2, y);"
                "const name = node.id || node.dataset.word || node.parentElement.id || node.className || node.tagName;"
                "return [name, getComputedStyle(node).outlineStyle, node.contains(at)]"
            )
            if stop is None:
                break
            stops.append(stop)
        assert len(stops) > 15
        assert [stop for stop in stops if stop[1:] != ["solid", True] and stop[1:] != ["auto", True]] == []


def test_reduced_motion_is_respected(page):
    data, _, _ = make_data()
    duration = "return getComputedStyle(document.querySelector('.word')).transitionDuration"
    page.open(data, media={"prefers_reduced_motion": "no-preference"})
    assert page.js(duration) != "0s"
    page.media(prefers_reduced_motion="reduce")
    assert page.js(duration) == "0s"


def test_print_has_picture_and_text_without_controls(page):
    data, _, _ = make_data()
    page.open(data)
    page.media(medium="print", prefers_color_scheme="dark")
    shown = {name: page.find(f"#{name}").is_displayed() for name in ("canvas", "answer", "bar", "controls", "layer")}
    assert shown == {"canvas": True, "answer": True, "bar": True, "controls": False, "layer": False}
    light = page.js("return getComputedStyle(document.body).color.match(/\\d+/g).map(Number)")
    assert max(light) < 60


def test_page_works_in_the_frame_of_a_notebook(page):
    """Which has no address to keep a view in, and may run the page's script but nothing else."""
    data, photo, cams = make_data()
    page.path.write_text("<meta charset='utf-8'>" + Shown({}, page=words_html(data))._repr_html_(), encoding="utf-8")
    page.driver.get(page.path.as_uri())
    page.driver.switch_to.frame(0)
    page.wait("document.documentElement.dataset.ready === 'yes'")
    page.word(1).click()
    is_shown(page, photo, cams[1, 1])
    page.driver.switch_to.default_content()


# several pictures of one prompt, and frames of a video


def make_several(video=False, sizes=((168, 112), (84, 140), (140, 140)), maps=None):
    """Pictures whose maps stand one after the other. Returns (data, photos, {(word, layer): [cam of each picture]}).

    `maps` counts the map of each picture; None is a map of its own.
    """
    maps = range(len(sizes)) if maps is None else maps
    photos = [make_image(*size).rotate(5 * i) for i, size in enumerate(sizes)]
    grids = {number: (size[1] // 28, size[0] // 28) for number, size in zip(maps, sizes, strict=True)}
    rng, cams, joint = np.random.default_rng(5), {}, {}
    for word in range(len(WORDS)):
        for layer in range(len(LAYERS)):
            own = [np.maximum(rng.normal(size=grid), 0).astype(np.float32) * (1 + n) for n, grid in grids.items()]
            if (word, layer) == (2, 1):
                own[0][:] = 0
            cams[word, layer] = [own[number] for number in maps]
            joint[word, layer] = np.concatenate([cam.ravel() for cam in own])[None]
    data, _, _ = make_data(size=sizes[0], grid=joint[0, 0].shape, cams=joint, video=video)
    data["pictures"] = []
    for i, (photo, number) in enumerate(zip(photos, maps, strict=True)):
        file = io.BytesIO()
        photo.save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        own = {"name": f"{i / 2:.1f} s" if video else f"{i + 1} {'abc'[i]}.png", "map": number, "grid": grids[number]}
        data["pictures"].append(own | {"photo": url, "width": photo.width, "height": photo.height})
    return data, photos, cams


def slide(page, name, value):
    page.js("const own = document.getElementById(arguments[0]); own.value = arguments[1]; "
            "own.dispatchEvent(new Event('input'))", name, value)  # fmt: skip


def test_slider_changes_the_picture_and_its_map(page):
    """All pictures on the scale of the strongest, each with its own grid and shape."""
    data, photos, cams = make_several()
    page.open(data, "#word=1&layer=5&picture=0")
    peak = max(cam.max() for cam in cams[1, 1])
    for i in (0, 1, 2, 1):
        slide(page, "picture", i)
        assert_same(page.pixels(), render_cam(photos[i], cams[1, 1][i], peak=peak)[0])
        assert page.address() == f"#word=1&layer=5&picture={i}"
        assert page.find("#picture-value").text == f"{i + 1} of 3"
        assert f"{i + 1} {'abc'[i]}.png" in page.status()
    assert min(cam.max() for cam in cams[1, 1]) < 0.7 * peak
    slide(page, "layer", 2)
    assert_same(page.pixels(), render_cam(photos[1], cams[1, 2][1], peak=max(cam.max() for cam in cams[1, 2]))[0])


def test_frames_of_a_temporal_patch_share_its_map(page):
    data, photos, cams = make_several(True, ((168, 112),) * 5, (0, 0, 1, 1, 2))
    page.open(data, "#word=0&layer=0&picture=1")
    peak = max(cam.max() for cam in cams[0, 0])
    for i in range(5):
        slide(page, "picture", i)
        assert_same(page.pixels(), render_cam(photos[i], cams[0, 0][i], peak=peak)[0])
        assert page.find("#picture-value").text == f"{i / 2:.1f} s"
    assert page.find("#picture-label").text == "Time"
    assert "5 frames, seen as 3 times 6 × 4 image tokens: 2 frames have one map" in page.find("#settings").text
    assert not np.array_equal(cams[0, 0][1], cams[0, 0][2])


def test_page_opens_at_the_picture_with_most_of_the_map(page):
    data, photos, cams = make_several()
    page.open(data, "#word=0&layer=0")
    word, layer = page.js("return [state.pinned, state.layer]")
    assert (word, layer) == (0, 0)
    page.open(data)
    word, layer, picture = page.js("return [state.pinned, state.layer, state.picture]")
    assert picture == int(np.argmax([cam.sum() for cam in cams[word, layer]]))
    peak = max(cam.max() for cam in cams[word, layer])
    assert_same(page.pixels(), render_cam(photos[picture], cams[word, layer][picture], peak=peak)[0])


def test_share_of_the_map_in_a_picture_is_told(page):
    data, _, cams = make_several()
    for i in (1, 2):
        page.open(data, f"#word=0&layer=16&picture={i}")
        share = cams[0, 2][i].sum() / sum(cam.sum() for cam in cams[0, 2])
        assert page.find("#hottest").text.startswith(f"{100 * share:.0f} % of the map in this picture; hottest: ")
    page.open(data, "#word=2&layer=5&picture=0")
    assert page.find("#hottest").text.startswith("none of the map in this picture")
    assert_same(page.pixels(), np.asarray(make_image(168, 112)))
    cell = int(cams[0, 2][1].argmax())
    page.open(data, f"#word=0&layer=16&picture=1&row={cell // 3}&column={cell % 3}")
    share = cams[0, 2][1].max() / sum(cam.sum() for cam in cams[0, 2])
    assert f"red {round(100 * share, 1):g} %" in page.find("#readout").text
    assert f"({cams[0, 2][1].max():.3g})" in page.find("#readout").text


def test_difference_has_one_scale_over_all_pictures(page):
    data, _, cams = make_several()
    page.open(data, "#word=0&layer=0&with=1&compare=difference&picture=1")
    maxima = [max(cam.max() for cam in cams[word, 0]) for word in (0, 1)]
    apart = [a / maxima[0] - b / maxima[1] for a, b in zip(cams[0, 0], cams[1, 0], strict=True)]
    largest = max(np.abs(one).max() for one in apart)
    for i in range(3):
        found = page.js("return Array.from(drawn(0, 0, true, arguments[0]).shares)", i)
        np.testing.assert_allclose(found, (apart[i] / largest).ravel(), atol=1e-4)


def test_pictures_are_chosen_in_their_strip_and_by_keys(page):
    data, _, _ = make_several()
    page.open(data, "#word=0&layer=0&picture=0")
    buttons = page.driver.find_elements("css selector", "#frames button")
    assert [button.text for button in buttons] == ["1 a.png", "2 b.png", "3 c.png"]
    buttons[2].click()
    assert page.address() == "#word=0&layer=0&picture=2"
    page.keys("ARROW_LEFT")
    assert page.address() == "#word=0&layer=0&picture=1"
    page.keys("ARROW_LEFT", "ARROW_LEFT", "ARROW_LEFT")
    assert page.address() == "#word=0&layer=0&picture=0"
    assert [button.get_attribute("aria-checked") for button in buttons] == ["true", "false", "false"]
    page.js("document.getElementById('picture').focus()")
    page.keys("ARROW_RIGHT")
    assert page.address() == "#word=0&layer=0&picture=1"


def test_kept_cell_stays_in_frames_and_goes_with_another_grid(page):
    data, _, _ = make_several()
    page.open(data, "#word=0&layer=0&picture=0&row=3&column=5")
    assert page.js("return state.pinnedCell") == 23
    slide(page, "picture", 1)
    assert page.js("return state.pinnedCell") is None
    data, _, _ = make_several(True, ((168, 112),) * 3)
    page.open(data, "#word=0&layer=0&picture=0&row=3&column=5")
    slide(page, "picture", 2)
    assert page.address() == "#word=0&layer=0&picture=2&row=3&column=5"


def test_numbers_are_those_of_the_shown_picture(page):
    data, _, cams = make_several()
    page.open(data, "#word=0&layer=5&picture=1")
    page.open_numbers()
    rows = page.driver.find_elements("css selector", "#numbers tr")[1:]
    assert len(rows) == 5
    shown = [[float(cell.text) for cell in row.find_elements("css selector", "td")] for row in rows]
    np.testing.assert_allclose(shown, cams[0, 1][1], atol=0.006)


def test_one_photo_has_no_slider_over_pictures(page):
    page.open(make_data()[0])
    assert not page.find("#pictures").is_displayed()
    assert not page.find("#frames").is_displayed()
    assert "picture" not in page.address()


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 800), (2560, 1440)])
@pytest.mark.parametrize("video", [False, True])
def test_page_of_several_pictures_fits_the_window(page, width, height, video):
    sizes = ((168, 112),) * 12 if video else ((168, 112), (56, 280), (280, 84))
    data, _, _ = make_several(video, sizes)
    page.open(data, width=width, height=height, mobile=width < 720)
    for i in range(3):
        slide(page, "picture", i)
        assert page.js("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        box, slider = page.find("#canvas").rect, page.find("#picture").rect
        assert box["height"] > 60
        if not (i == 1 and not video):  # a tall one is told of beside it
            assert slider["y"] >= box["y"] + box["height"]
        assert slider["y"] + slider["height"] <= height
