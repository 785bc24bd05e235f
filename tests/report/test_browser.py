import json
import shutil

import pytest

from earlybird.report import write
from earlybird.train.points import points_of
from tests.report.folders import write_run
from tests.report.test_tradeoff import rounds, row

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
WebDriverWait = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver on this machine"),
]


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # no sandbox: continuous integration is often root in a container
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(2):
        write_run(folder / f"dense-{seed}", dense=True, seed=seed)
        write_run(folder / f"ticket-with-a-rather-long-name-{seed}", seed=seed, seconds=40)
    write_run(folder / "small", keep=0.3, seconds=30, accuracy=0.8)
    rows = [row("dense", seed=seed, accuracy=0.9 + seed / 100) for seed in range(2)]
    rows += [row("imp-0.25", seed=seed, density=0.25, rounds=rounds(0.9, 0.91, 0.88)) for seed in range(2)]
    (folder / "comparison.json").write_text(json.dumps({"points": points_of(rows, "dense")}))
    return write([folder], folder / "report.html")


def show(browser, report, *, width, scheme):
    browser.get_log("browser")
    browser.get_log("performance")
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(report.as_uri())
    assert browser.execute_script("return document.documentElement.dataset.drawn") == "true"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_draws_everything_quietly_and_fits_the_screen(browser, report, width, scheme):
    show(browser, report, width=width, scheme=scheme)
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []

    drawn, expected = browser.execute_script(
        "return [[...document.querySelectorAll('.chart')].filter(c => c.querySelector('.main-svg')).length,"
        " Object.keys(JSON.parse(document.getElementById('charts').textContent)).length]"
    )
    assert drawn == expected >= 10

    scroll, visible = browser.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert scroll == visible <= width
    smallest = browser.execute_script(
        "return Math.min(...[...document.querySelectorAll('main *, header *, svg text')]"
        ".filter(e => e.childNodes.length && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 11


def test_asks_for_nothing_but_the_file_itself(browser, report):
    show(browser, report, width=1280, scheme="light")
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert report.as_uri() in asked
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert [url for url in asked if url.startswith("file:") and url != report.as_uri()] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser, report, scheme):
    show(browser, report, width=390, scheme=scheme)
    worst, where = browser.execute_script(CONTRAST)
    assert worst >= 4.5, where


def test_charts_follow_a_change_of_the_colour_scheme(browser, report):
    def ink():
        return browser.execute_script("return document.getElementById('bill-seconds').layout.hoverlabel.font.color")

    show(browser, report, width=1280, scheme="light")
    light = ink()
    feature = {"name": "prefers-color-scheme", "value": "dark"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    # the page is told of the change between two frames, so it may be a moment late
    WebDriverWait(browser, 20).until(lambda _: ink() != light)


# Contrast of each piece of text with the nearest ground behind it (WCAG 2.2), the lowest of all.
CONTRAST = """
const channels = (color) => color.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => {
  const [x, y, z] = [r, g, b].map((v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
};
const ground = (e) => {
  for (; e; e = e.parentElement) {
    const c = channels(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] === 1) return c;
  }
  return [255, 255, 255];
};
let worst = 99, where = '';
for (const e of document.querySelectorAll('body *')) {
  const svg = e.closest('svg') !== null;
  const text = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  if (!text || ['SCRIPT', 'STYLE'].includes(e.tagName)) continue;
  const style = getComputedStyle(e);
  const a = light(channels(svg ? style.fill : style.color)), b = light(ground(e.closest('.chart') || e));
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (contrast < worst) [worst, where] = [contrast, e.tagName + ' ' + e.textContent.slice(0, 60)];
}
return [worst, where];
"""
