"""The page of an experiment that was run: whole in itself, and what it says is the records'."""

from __future__ import annotations

import base64
import io
import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from loraq.cli import main
from loraq.errors import LoraqError
from loraq.results.committed import import_experiment
from loraq.results.experiment_folder import rewrite_tables
from loraq.results.plots.grid import DIFFERENCE_GAIN
from loraq.results.report import write_report
from loraq.runner.experiment import run
from tests.damage import flip_bit

VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """Elements as (tag, attributes, text of their own), and whether tags close as they opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict, list[str]]] = []
        self.open: list[int] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag):
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data):
        if self.open:
            self.elements[self.open[-1]][2].append(data)

    def of(self, tag: str, **wanted: str) -> list[tuple[dict, str]]:
        """(attributes, text) of the elements with these attributes (`class_` for `class`)."""
        pairs = {name.rstrip("_"): value for name, value in wanted.items()}
        return [
            (attributes, "".join(text).strip())
            for name, attributes, text in self.elements
            if name == tag and all(attributes.get(k) == v for k, v in pairs.items())
        ]


@pytest.fixture(scope="module")
def finished(tiny_folder, captions, tmp_path_factory):
    """Two rows on the little pipeline, and the folder of their tables."""
    from tests.conftest import overrides

    asked = overrides.__wrapped__(tiny_folder, captions, tmp_path_factory.mktemp("report"))
    outcome = run(["method=rtn", *asked], progress=False)
    return outcome, outcome.folder


@pytest.fixture(scope="module")
def page(finished):
    path = write_report(finished[1], finished[1] / "report.html")
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_carries_everything_in_itself(page):
    for tag, attributes, _ in page.elements:
        for name in ("src", "href"):
            source = attributes.get(name, "#")
            assert source.startswith(("#", "data:image/")), (tag, source)
        assert tag not in ("link", "iframe")
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for a, _ in page.of("a")]
    assert set(targets) <= set(ids)
    assert all(a.get("alt") is not None for a, _ in page.of("img"))


def test_the_table_says_what_the_records_say(page, finished):
    records = finished[0].records
    heads = [text for _, text in page.of("th", scope="row")]
    assert [heads[0], heads[1]] == [record.label for record in records]
    psnr = records[1].metrics["psnr"]
    cells = [(a["data-value"], text) for a, text in page.of("td") if "data-value" in a]
    shown = f"{psnr['value']:.2f}"
    assert [float(value) for value, text in cells if text == shown] == [psnr["value"]]
    assert not page.of("span", class_="interval")  # committed records have them: test_parts.py
    assert any("too few images (N < 8) for an interval" in text for _, text in page.of("li"))


def test_the_images_are_the_rows_and_their_differences_are_exact(page, finished):
    records = finished[0].records
    names = records[0].images["names"]
    prompts = page.of("div", class_="prompt")
    assert [a["data-name"] for a, _ in prompts] == names
    assert [a["data-text"] for a, _ in prompts] == [f"a {w}" for w in _words(len(names))]
    for attributes, _ in page.of("img"):  # they have their place before one scrolls to them
        if attributes.get("class") in ("plain", "difference"):
            assert (attributes["width"], attributes["height"]) == ("64", "64")
            assert "loading" not in attributes
    plain = [_pixels(a["src"]) for a, _ in page.of("img", class_="plain")]
    apart = [_pixels(a["src"]) for a, _ in page.of("img", class_="difference")]
    assert len(plain) == 2 * len(names) and len(apart) == len(names)
    for place, name in enumerate(names):
        first, second = plain[2 * place : 2 * place + 2]
        files = list((finished[1].parents[1] / "images").glob(f"*/{name}.png"))
        originals = [np.asarray(Image.open(file).convert("RGB")) for file in files]
        assert any((first == image).all() for image in originals)
        gap = np.minimum(abs(first.astype(int) - second) * DIFFERENCE_GAIN, 255)
        assert (apart[place] == gap).all()


def _words(count: int) -> list[str]:
    colours, animals = ["red", "green", "blue"], ["cat", "dog", "fish"]
    return [f"{colours[i % 3]} {animals[i // 3 % 3]}" for i in range(count)]


def _pixels(source: str) -> np.ndarray:
    data = base64.b64decode(source.split(",", 1)[1])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_every_row_has_its_configuration(page, finished):
    texts = [text for _, text in page.of("pre")]
    for place, record in enumerate(finished[0].records):
        command, settings = texts[2 * place : 2 * place + 2]
        assert command.startswith(f"loraq run method={record.config['method']} ")
        assert "data.count=4" in command and 'model.path="…/tiny"' in command
        assert json.loads(settings) == record.config
    assert len(texts) == 2 * len(finished[0].records)
    assert any("Published by others" in text for _, text in page.of("strong"))


def test_without_images_the_page_says_how_to_get_them(finished, tmp_path):
    output = finished[1].parents[1]
    shutil.copytree(output, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "images")
    folder = tmp_path / "moved" / "results" / finished[1].name
    text = write_report(folder, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The images are not available" in text and 'class="prompt"' not in text


def test_images_and_records_that_were_changed_are_refused(finished, tmp_path):
    outcome, folder = finished
    output = tmp_path / "moved"
    shutil.copytree(folder.parents[1], output)
    folder = output / "results" / folder.name
    last = json.loads((folder / "rows.json").read_text())["rows"][-1]
    record = output / "record" / last["record"] / "record.json"
    image = output / "images" / last["images"] / f"{outcome.records[-1].images['names'][0]}.png"
    flip_bit(image, -20)
    with pytest.raises(LoraqError, match=rf"{last['images']}.*{image.name} does not match"):
        write_report(folder, tmp_path / "page.html")
    rewrite_tables(output, [])
    flip_bit(record, record.read_text().index('"value": ') + 11)  # a digit
    with pytest.raises(LoraqError, match=rf"{last['record']}.*record\.json does not match"):
        rewrite_tables(output, [])
    with pytest.raises(LoraqError, match=rf"{last['record']}.*record\.json does not match"):
        import_experiment(folder, tmp_path)
    (folder / "rows.json").write_text("{")
    with pytest.raises(LoraqError, match=r"Cannot read .*rows\.json"):
        rewrite_tables(output, [])


def test_the_command_and_its_refusals(finished, tmp_path, capsys):
    output = finished[1].parents[1]
    target = tmp_path / "page.html"
    main(["report", finished[1].name, "--output", str(output), "--to", str(target)])
    assert target.is_file() and "open it in a browser" in capsys.readouterr().out
    assert finished[1].name.startswith("rtn-")
    main(["report", "rtn", "--output", str(output)])  # the only settings that it was run with
    assert str(finished[1] / "report.html") in capsys.readouterr().out
    with pytest.raises(LoraqError, match=r"Unknown row 'rtm'. Did you mean 'rtn'"):
        write_report(finished[1], target, ["rtm"])
    with pytest.raises(LoraqError, match="Unknown experiment"):
        write_report(finished[1].parent / "demp", target)
    with pytest.raises(LoraqError, match="Did you mean 'demo'"):
        write_report(tmp_path / "none" / "results" / "demp", target)
