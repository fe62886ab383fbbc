"""A branch finder in a user's file, without changes to the library."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraq import api
from loraq.branches import find
from loraq.config import BranchConfig, Recipe
from loraq.errors import LoraqError
from loraq.quantization.quantizer import quantize_model
from loraq.utils.assets import CHECKOUT
from tests.branches.test_branches import final_error, problem, weights
from tests.quantization.toy import Toy, toy_layers

EXAMPLE = str(CHECKOUT / "notebooks" / "outlier_svd.py")
OWN = """
from loraq.branches import svd
from loraq.branches import Solution

def find(problem, options):
    left, right = svd.start_factors(problem, options)
    return Solution({factor} * left, right, residual=True)
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN.format(factor=1))
    return path


def test_a_file_is_loaded_by_its_path_and_quantises(own):
    recipe = api.recipe("loraq_o2", f"quant.branch.kind={own}", "quant.branch.rank=4")
    model, layers = Toy(), toy_layers()
    mine = quantize_model(model, layers, replace(recipe, skip=None), progress=None)
    built_in = replace(recipe, branch=BranchConfig(kind="svd", rank=4))
    theirs = quantize_model(model, layers, built_in, progress=None)
    for name, tensors in mine.layers.items():
        assert torch.equal(tensors.effective_weight(), theirs.layers[name].effective_weight())


def test_its_contents_are_in_the_key_and_its_folder_is_not(own, tmp_path):
    def identity(path):
        return Recipe(branch=BranchConfig(kind=str(path))).identity()

    before = identity(own)
    assert before["branch"]["kind"].startswith("mine.py@") and str(tmp_path) not in str(before)
    (tmp_path / "other").mkdir()
    copy = tmp_path / "other" / "mine.py"
    copy.write_bytes(own.read_bytes())
    assert identity(copy) == before
    p = problem(weights())
    first = find(p, BranchConfig(kind=str(own)))
    own.write_text(OWN.format(factor=0))
    assert identity(own) != before
    assert find(p, BranchConfig(kind=str(own))).left_BOR.norm() == 0 < first.left_BOR.norm()


def test_a_records_config_names_no_folder(own, tmp_path):
    from loraq.compose import load_rows
    from loraq.runner.evaluate import portable_config

    row = load_rows(["method=loraq_o2", f"quant.branch.kind={own}"])[-1]
    assert str(tmp_path) not in str(portable_config(row))


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("mein.py", None, "Similar names: mine.py"),
        ("mine.py", "def fnid(): ...", "no function 'find'"),
        ("mine.py", "import no_such_module", "ModuleNotFoundError"),
    ],
)
def test_a_mistake_raises_with_a_remedy(own, name, text, words):
    path = own.with_name(name)
    if text is not None:
        path.write_text(text)
    with pytest.raises(LoraqError, match=words):
        api.recipe("loraq_o2", f"quant.branch.kind={path}")
        find(problem(weights()), BranchConfig(kind=str(path)))


def test_the_example_of_the_notebooks_beats_one_svd():
    p = problem(weights())
    one = find(p, BranchConfig(kind="svd"))
    example = find(p, BranchConfig(kind=EXAMPLE))
    assert (final_error(p, example) < final_error(p, one)).all()
    with pytest.raises(LoraqError, match="start=weight"):
        find(p, BranchConfig(kind=EXAMPLE, start="error"))


@pytest.mark.parametrize(
    "returned, words",
    [
        ("(left, right)", r"mine\.py: find\(\) returned a tuple. Return Solution"),
        ("Solution(left, right.mT, residual=True)", r"shapes .* are .*, 4\).*4, "),
        ("Solution(left, right, residual='no')", r"mine\.py: Solution.residual is 'no'"),
        ("Solution(left / 0, right, residual=True)", r"mine\.py: .*left_BOR with \d+ values"),
        (
            "(problem.weight_BOI.sub_(left @ right), Solution(left, right, residual=True))[1]",
            r"mine\.py: find\(\) changed problem\.weight_BOI in place",
        ),
    ],
)
def test_invalid_results_of_a_finder_raise(own, returned, words):
    text = own.read_text()
    own.write_text(text[: text.index("    return")] + f"    return {returned}\n")
    with pytest.raises(LoraqError, match=words):
        find(problem(weights(2, 32, 48), rank=4), BranchConfig(kind=str(own), rank=4))


@pytest.mark.parametrize("place", ["import", "use"])
@pytest.mark.parametrize(
    "statement, words",
    [
        ("raise SystemExit", r"mine\.py': .* raised SystemExit: .*\(line \d+\)"),
        ("raise SystemExit(0)", r"mine\.py': .* raised SystemExit: 0"),
        ("raise GeneratorExit", r"mine\.py': .* raised GeneratorExit"),
        ("raise BaseException('b')", r"mine\.py': .* raised BaseException: b"),
        ("1 / 0", r"mine\.py': .* raised ZeroDivisionError: division by zero \(line \d+\)"),
        ("x = ", r"mine\.py': its import raised SyntaxError.*line \d+"),
    ],
)
def test_whatever_a_file_raises_is_an_error_that_names_it(own, place, statement, words):
    first, head = own.read_text().split("    left", 1)
    own.write_text(f"{statement}\n{own.read_text()}" if place == "import" else
                   f"{first}    {statement}\n    left{head}")  # fmt: skip
    with pytest.raises(LoraqError, match=words):
        find(problem(weights(1, 16, 16), rank=2), BranchConfig(kind=str(own), rank=2))


def test_ctrl_c_in_a_file_stays_ctrl_c_and_names_the_file(own):
    own.write_text("def find(problem, options): raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt) as caught:
        find(problem(weights(1, 16, 16), rank=2), BranchConfig(kind=str(own), rank=2))
    assert "mine.py' was running" in caught.value.__notes__[0]


def test_a_file_that_exits_is_refused_by_the_plan_and_fails_the_run(own, overrides):
    from loraq.runner.estimate import dry_run
    from loraq.runner.experiment import run

    given = ["method=loraq_o2", "quant.branch.rank=2", f"quant.branch.kind={own}", *overrides]
    text = own.read_text()
    own.write_text(f"import sys\nsys.exit()\n{text}")
    with pytest.raises(LoraqError, match=r"mine\.py': its import raised SystemExit"):
        dry_run(given)
    own.write_text(text.replace("    left", "    import sys; sys.exit()\n    left"))
    with pytest.raises(LoraqError, match=r"1 of 2 rows failed:\n.*mine\.py': find.. raised Sys"):
        run(given, progress=False)
