"""The report in headless Chromium (make test-report): mouse, keys, phone size, print, no scripts.

Pages make no requests, log no messages, and axe finds no serious or critical violation.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from loraq.results.report.page import LIMIT
from loraq.utils.assets import CHECKOUT
from tests.results.report.conftest import DESKTOP, PHONE
from tests.results.report.pages import NAMES, SIDE, WITH_IMAGES

pytestmark = pytest.mark.browser
SCREENSHOTS = CHECKOUT / "outputs" / "report" / "screenshots"  # outputs/ is ignored by git
OPEN = "document.getElementById('large').open"
SHOWN = "document.getElementById('large-image').src"


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("name", NAMES)
def test_every_picture_is_drawn_and_the_page_itself_never_scrolls_sideways(visit, name, size):
    page = visit(name, size)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    page.wait_for_function("[...document.images].every((one) => one.complete)")
    broken = "[...document.images].filter((one) => !one.naturalWidth).length"
    assert page.evaluate(broken) == 0
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width == size[0] == page.evaluate("innerWidth")
    inner = page.evaluate(
        "(({scrollWidth, clientWidth}) => [scrollWidth, clientWidth])"
        "(document.querySelector('#main .scroll'))"
    )
    if size is PHONE:
        assert inner[0] > inner[1]  # a wide table scrolls in its own box


def test_pages_stay_small(pages):
    sizes = {name: path.stat().st_size for name, path in pages.items()}
    print({name: f"{size / 1e6:.2f} MB" for name, size in sizes.items()})
    assert max(sizes.values()) <= LIMIT == 15_000_000


@pytest.mark.parametrize("by", ["mouse", "keys"])
def test_tables_sort(visit, by):
    page = visit("table1")
    head = page.locator("#table-main thead th", has_text="PSNR")

    def press() -> None:
        if by == "mouse":
            head.locator("button").click()
        else:
            head.locator("button").focus()
            page.keyboard.press("Enter")

    def column() -> list[str]:
        place = head.evaluate("(one) => one.cellIndex")
        rows = "(rows, place) => rows.map((row) => row.cells[place].dataset.value)"
        return page.locator("#table-main tbody tr").evaluate_all(rows, place)

    own = column()
    values = sorted(float(value) for value in own if value)
    assert len(values) == 25 and own.count("") == 1
    press()  # the best first, and the row without a value last
    assert head.get_attribute("aria-sort") == "descending"
    assert [float(value) for value in column()[:-1]] == values[::-1] and column()[-1] == ""
    press()
    assert head.get_attribute("aria-sort") == "ascending"
    assert [float(value) for value in column()[:-1]] == values and column()[-1] == ""
    press()
    assert head.get_attribute("aria-sort") is None and column() == own


def test_images_by_mouse(visit):
    page = visit(WITH_IMAGES)
    position = page.locator("#position")
    assert position.inner_text() == "1 of 24"
    page.click("#next")
    assert position.inner_text() == "2 of 24"
    page.click("#previous")
    page.click("#previous")
    assert position.inner_text() == "24 of 24"
    page.locator("#thumbnails button").nth(2).click()
    assert position.inner_text() == "3 of 24"
    assert page.locator(".prompt:visible").count() == 1

    figures = page.locator(".prompt.current figure")
    figures.nth(1).locator(".enlarge").first.click()
    assert page.evaluate(OPEN)
    assert page.evaluate(SHOWN) == figures.nth(1).locator(".plain").get_attribute("src")
    width = page.locator("#large-image").bounding_box()["width"]
    assert width % SIDE == 0 and width > SIDE  # whole pixels
    page.click("#large-next")  # the next prompt's image of the same row
    assert page.locator("#large-prompt").inner_text() == "4 of 24"
    assert page.evaluate(SHOWN) == figures.nth(1).locator(".plain").get_attribute("src")
    page.click("#large-down")
    page.click("#large-difference")
    assert page.evaluate(SHOWN) == figures.nth(2).locator(".difference").get_attribute("src")
    assert "difference" in page.locator("#large-row").inner_text()
    page.click("#large-previous")
    page.click("#large-close")
    assert not page.evaluate(OPEN) and position.inner_text() == "3 of 24"
    figures.nth(1).locator(".difference").click()
    assert page.evaluate(SHOWN) == figures.nth(1).locator(".difference").get_attribute("src")
    page.mouse.click(5, 5)  # beside the picture
    assert not page.evaluate(OPEN)
    page.uncheck("#differences")
    assert page.locator(".difference:visible").count() == 0


def test_images_by_keys(visit):
    page = visit(WITH_IMAGES)
    position = page.locator("#position")
    page.locator("#next").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert position.inner_text() == "3 of 24"
    button = page.locator(".prompt.current .enlarge").first
    while not button.evaluate("(one) => one === document.activeElement"):
        page.keyboard.press("Tab")
    figures = page.locator(".prompt.current figure")
    page.keyboard.press("Enter")
    assert page.evaluate(OPEN)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.locator("#large-prompt").inner_text() == "4 of 24"
    assert page.evaluate(SHOWN) == figures.nth(1).locator(".plain").get_attribute("src")
    page.keyboard.press("d")
    assert page.evaluate(SHOWN) == figures.nth(1).locator(".difference").get_attribute("src")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Escape")
    assert not page.evaluate(OPEN) and position.inner_text() == "3 of 24"
    assert button.evaluate("(one) => one === document.activeElement")  # where one came from


def test_arrow_keys_leave_tables_alone(visit):
    page = visit(WITH_IMAGES)
    page.locator("#main .scroll").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#position").inner_text() == "1 of 24"


def test_diagrams_enlarge_without_steps(visit):
    page = visit("ablation_error_source")
    assert page.locator(".diagram").count() == 2
    page.locator(".diagram .enlarge").last.press("Enter")
    assert page.evaluate(OPEN) and page.locator("#large-steps").is_hidden()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    assert not page.evaluate(OPEN)


def test_marks_are_read_by_mouse_and_keys(visit):
    page = visit("table1")
    marks, reading = page.locator(".pareto .mark"), page.locator("#reading")
    assert marks.count() == 25
    marks.nth(2).focus()
    second = reading.inner_text()
    assert second == marks.nth(2).get_attribute("aria-label")
    page.keyboard.press("Tab")
    assert reading.inner_text() == marks.nth(3).get_attribute("aria-label") != second
    marks.first.locator(".shape").hover(force=True)
    assert "bits per weight, LPIPS" in reading.inner_text()
    assert reading.inner_text() != marks.nth(3).get_attribute("aria-label")


def test_sections_are_marked_while_reading(visit):
    page = visit(WITH_IMAGES)
    for link in page.locator("nav.sections a").all():
        link.click()
        marked = "(one) => one.getAttribute('aria-current') === 'true'"
        page.wait_for_function(marked, arg=link.element_handle())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", NAMES)
def test_axe_finds_nothing_serious(visit, name, scheme):
    page = visit(name, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert serious_violations(page, name, scheme) == []
    if name == WITH_IMAGES:
        page.locator(".prompt.current .enlarge").first.click()
        assert serious_violations(page, f"{name}, enlarged", scheme) == []


def serious_violations(page, name: str, scheme: str) -> list[str]:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response
    print(f"axe {found['testEngine']['version']}, {name}, {scheme}:", end=" ")
    print(f"{len(found['passes'])} rules passed, {len(found['violations'])} violated")
    return [
        f"{rule['id']} ({rule['impact']}): {rule['nodes'][0]['html'][:120]}"
        for rule in found["violations"]
        if rule["impact"] in ("serious", "critical")
    ]


def test_print_is_light_and_complete(visit):
    page = visit(WITH_IMAGES, scheme="dark")
    page.emulate_media(media="print")
    assert page.locator(".prompt:visible").count() == 24
    assert page.locator("nav.sections, .controls, .thumbnails").first.is_hidden()
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(28, 32, 36)"
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")


def test_without_scripts_everything_is_there(visit):
    page = visit(WITH_IMAGES, script=False)
    assert page.locator(".prompt:visible").count() == 24
    assert page.locator(".controls").is_hidden()


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_screenshots(visit, size):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        for scheme in ("light", "dark"):
            page = visit(name, size, scheme)
            path: Path = SCREENSHOTS / f"{name}-{size[0]}-{scheme}.png"
            page.screenshot(path=path, full_page=True)
            assert path.stat().st_size > 10_000
