"""The README's picture of the words page, in a headless Chromium: the word dog at layer 10, a cell of it kept.

python test_gradcam.py --mode words --output_dir cam_results/examples && python tests/draw_page.py
"""

import shutil
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

EXAMPLES = Path(__file__).parents[1] / "cam_results/examples"
VIEW = "#word=5&layer=10&row=9&column=1"
SIZE = (1280, 900)


def main() -> None:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars", "--window-size={},{}".format(*SIZE)):
        options.add_argument(argument)
    with webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver"))) as driver:
        size = {"width": SIZE[0], "height": SIZE[1], "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get((EXAMPLES / "words/index.html").as_uri() + VIEW)
        end = time.monotonic() + 20
        while driver.execute_script("return document.documentElement.dataset.ready") != "yes":
            if time.monotonic() > end:
                raise TimeoutError("the page is not ready after 20 seconds")
            time.sleep(0.05)
        driver.save_screenshot(str(EXAMPLES / "page.png"))


if __name__ == "__main__":
    main()
