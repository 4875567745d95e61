"""The page in a browser: curves drawn, tables sorted, nothing loaded, readable on a phone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from ditty_di.tasks.report import report
from tests.report.runs import NASTY, write_run, write_sweep

pytest.importorskip("vl_convert")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-sync", "--disable-background-networking", "--disable-component-update"),
)
LOSS = '[data-title="Loss"]'


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Return the page of a sweep with a nasty name, text and value, and with damaged runs."""
    folder = write_sweep(tmp_path_factory.mktemp("swept"), 5, 1000)
    name = NASTY.replace("/", "|")
    write_run(folder / name, text=NASTY, typed={"note": NASTY}, status="failed")
    write_run(folder / "9", status=None)
    (folder / "9/config.yaml").write_text("{")
    (folder / "10").mkdir()
    (folder / "10/metrics.jsonl").touch()
    report(None, runs=str(folder))
    return folder / "report.html"


def data_of(page: Path) -> dict:
    return json.loads(re.search(r'id="data"[^>]*>(.*?)</script>', page.read_text(), re.S)[1])


def test_all_of_a_run_is_in_the_page(tmp_path, capsys):
    run = write_run(tmp_path / "run", 10_000, text=NASTY)
    (run / "checkpoints/step-00010000").mkdir(parents=True)
    manifest = {"step": 10_000, "files": {"a": 1000, "b": 500}}
    (run / "checkpoints/step-00010000/manifest.json").write_text(json.dumps(manifest))
    report(None, runs=[str(run)], output=str(tmp_path / "sub/page.html"))
    page = tmp_path / "sub/page.html"
    assert str(page) in capsys.readouterr().out
    text = page.read_text()
    assert len(text) < 2_000_000, "10,000 steps"
    for said in ("8e07cde, with uncommitted changes", "2 x H100", "me/base", "1.5 kB", "max_steps"):
        assert said in text, said
    assert NASTY not in text and "&lt;script&gt;" in text
    assert "http-equiv" in text and "default-src 'none'" in text
    titles = [chart["title"] for chart in data_of(page)["charts"]]
    assert titles[:3] == ["Loss", "Learning rate", "Gradient norm"] and "Memory" in titles


def test_a_sweep_is_compared_best_first(sweep):
    data, text = data_of(sweep), sweep.read_text()
    assert data["runs"][:5] == ["0", "1", "2", "3", "4"], "by objective"
    assert {"9", "10"} < {*data["runs"]}, "damaged ones are shown"
    assert [axis["name"] for axis in data["sweep"]["axes"]] == [
        *("optimizer.lr", "optimizer.kind", "note", "objective")
    ]
    assert NASTY not in text and "config.yaml cannot be read" in text
    assert "0.000316228" in text, "what differs between the configurations"


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, sweep):
    """Return a function that opens the page; afterwards nothing may have been said or asked for."""
    said: list[str] = []
    asked: list[str] = []
    contexts = []

    def open_page(width: int, scheme: str = "light"):
        contexts.append(
            browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        )
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(sweep.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not said
    assert {*asked} == {sweep.as_uri()}


def painted(page, selector: str) -> int:
    """Return the number of pixels of a plot's canvas that are not empty."""
    page.locator(selector).scroll_into_view_if_needed()
    page.wait_for_selector(f"{selector}[data-drawn] canvas")
    return page.evaluate(
        """selector => {
          const canvas = document.querySelector(selector + " canvas");
          const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          return data.filter((value, n) => n % 4 === 3 && value).length;
        }""",
        selector,
    )


def test_curves_and_parallel_coordinates_are_drawn_and_runs_can_be_hidden(opened):
    page = opened(1280)
    loss = LOSS
    assert painted(page, "#parallel") > 2000
    before = painted(page, loss)
    assert before > 5000
    for box in page.locator("input[data-run]").all()[1:]:
        box.uncheck()
    page.wait_for_timeout(300)
    assert 500 < painted(page, loss) < before
    assert page.evaluate("window.broken") is None, "text of a run was executed"


def test_a_click_on_a_heading_sorts_numbers_as_numbers(opened):
    page = opened(1280)
    column = "#runs tbody tr td:nth-child({})"
    read = lambda n: page.locator(column.format(n)).all_inner_texts()  # noqa: E731
    assert read(4)[:5] == ["2", "2.1", "2.2", "2.3", "2.4"]
    heading = page.locator("#runs th", has_text="optimizer.lr")
    heading.get_by_role("button").click()
    rates = [float(text) for text in read(9) if text != "as it is"]
    assert (
        rates == sorted(rates)
        and len(rates) == 5
        and heading.get_attribute("aria-sort") == ("ascending")
    )
    heading.get_by_role("button").click()
    assert read(9)[:5] == [f"{rate:.5g}" for rate in reversed(rates)], "missing values stay last"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(opened, scheme):
    page = opened(360, scheme)
    assert painted(page, LOSS) > 500
    for details in page.locator("main > section details").all():
        details.evaluate("element => { element.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    shade = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (shade == "rgb(15, 18, 23)") == (scheme == "dark")
