"""Experiments on the small pipeline: cache, resume, repetition, corrupted products, errors."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from loraq.cli import main
from loraq.compose import load_rows
from loraq.data import data_prompts
from loraq.errors import LoraqError
from loraq.results import record as records
from loraq.runner import experiment, stages
from loraq.runner import generate as generation
from loraq.runner.experiment import run
from loraq.runner.plan import check_rows, plan_rows
from loraq.runner.result_folder import result_folder
from loraq.runner.rows import Row
from loraq.runner.store import Store
from loraq.utils.manifest import read_manifest, write_manifest
from tests.damage import flip_bit
from tests.forked import COMMAND, start


def output(overrides: list[str]) -> Path:
    return Path(overrides[-1].removeprefix("output="))


def moved(overrides: list[str], folder: Path) -> list[str]:
    return [*overrides[:-1], f"output={folder}"]


def comparable(outcome) -> list[dict]:
    return [record.comparable() for record in outcome.records]


METHODS = ["rtn", "svdquant", "loraq_o2"]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs_from_config_to_table(overrides, method):
    outcome = run([f"method={method}", *overrides], progress=False)
    reference, row = outcome.records
    assert reference.row == "reference" and row.row == method
    assert len(row.layers) == 16 and 0 < row.layers[0]["output_error"] < 1
    assert row.metrics["psnr"]["value"] > 5 and len(row.metrics["psnr"]["per_image"]) == 4
    assert (outcome.folder / "main.md").is_file()
    assert method in outcome.text
    if method != "rtn":
        assert 0 < row.budget["branch_bits_per_weight"] <= 0.64


def test_a_recipe_without_kernels_is_refused_before_anything_runs(overrides, monkeypatch):
    """Tests only the plan, which needs no GPU but for the compilation of a kernel."""
    monkeypatch.setattr("loraq.runner.plan.check_kernel", lambda _device: None)
    given = ["method=loraq_o2", "compute=triton", *overrides]

    def planned(*more: str) -> list[Row]:
        rows = plan_rows(load_rows([*given, *more]), Store(str(output(overrides))))
        return [replace(row, device="cuda") for row in rows]

    check_rows(planned())
    with pytest.raises(LoraqError, match=r"g16.*compute=emulate(.|\n)*in row 'loraq_o2'"):
        check_rows(planned("quant.activation.block=16"))


def test_a_second_run_makes_and_loads_nothing(overrides, monkeypatch):
    read, load = [], stages.load_group
    monkeypatch.setattr(
        stages, "load_group", lambda path, *device: read.append(path) or load(path, *device)
    )
    first = run(["method=rtn", *overrides], progress=False)
    assert sorted(read) == sorted(set(read)), "the images and the errors read the layers once"
    monkeypatch.setattr("loraq.runner.session.load_pipeline", None)
    second = run(["method=rtn", *overrides], progress=False)
    assert comparable(first) == comparable(second)
    assert [record.created for record in first.records] == [r.created for r in second.records]


def test_reference_images_are_shared_by_all_methods(overrides, monkeypatch):
    made = []
    original = generation.image_batch
    monkeypatch.setattr(
        generation, "image_batch", lambda *a, **k: made.extend(a[2]) or original(*a, **k)
    )
    run(["method=rtn", *overrides], progress=False)
    first = len(made)
    run(["method=rtn", "format@quant.weight=int8", *overrides], progress=False)
    assert first == 4 + 2 + 4  # reference, measuring inputs, rtn
    assert len(made) - first == 4


def test_the_same_config_from_empty_caches_gives_the_same_record(overrides, tmp_path):
    one = run(["method=svdquant", *moved(overrides, tmp_path / "one")], progress=False)
    two = run(["method=svdquant", *moved(overrides, tmp_path / "two")], progress=False)
    assert comparable(one) == comparable(two)


def test_a_corrupted_product_is_reported_and_made_again(overrides, capsys):
    first = run(["method=loraq_o2", *overrides], progress=False)
    damaged = []
    for stage, pattern in (("images", "*.png"), ("quantised", "*.safetensors")):
        for path in sorted((output(overrides) / stage).glob(f"*/{pattern}"))[:1]:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 0xFF
            damaged.append((path, path.read_bytes()))
            path.write_bytes(bytes(data))
    again = run(["method=loraq_o2", *overrides], progress=False)
    assert capsys.readouterr().err.count("is corrupted") == 2
    assert comparable(first) == comparable(again)
    for path, before in damaged:
        if path.suffix == ".png":
            assert path.read_bytes() == before
        assert path.is_file()


def test_packed_layers_without_all_groups_are_made_again(overrides, capsys):
    """An earlier version could certify them after somebody removed groups during a run."""
    main(["quantize", "--quiet", "method=rtn", *overrides])
    group = min((output(overrides) / "quantised").glob("*/*.safetensors"))
    manifest = read_manifest(group.parent)
    del manifest["files"][group.name]
    write_manifest(group.parent, manifest)
    group.unlink()
    main(["generate", "--quiet", "method=rtn", *overrides])
    assert group.is_file()
    assert "corrupted (groups of layers are missing)" in capsys.readouterr().err


@pytest.mark.parametrize("fault", [LoraqError("no luck today"), RuntimeError("no luck today")])
def test_a_failed_row_is_reported_and_the_others_are_kept(overrides, monkeypatch, capsys, fault):
    original = experiment.quantize_row

    def fails(work, row):
        if row.name == "rtn":
            raise fault
        return original(work, row)

    monkeypatch.setattr(experiment, "quantize_row", lambda work, row: fails(work, row))
    with pytest.raises(LoraqError, match="1 of 2 rows failed"):
        run(["method=rtn", *overrides], progress=False)
    assert "no luck today" in capsys.readouterr().err
    assert len(list((output(overrides) / "record").glob("*/record.json"))) == 1


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["method=loraq_o2", "quant.branch.rank=1000"], ["rank=1000", "64"]),
        (["method=rtn", "quant.skip=[ff_dwon]"], ["ff_dwon", "ff_down"]),
        (["method=rtn", "model.path=/no/such/folder"], ["model.path=/no/such/folder"]),
        (["method=rtn", "metrics.names=[kid]"], ["kid", "data.real"]),
    ],
)
def test_errors_are_raised_before_anything_is_made(overrides, capsys, extra, words):
    with pytest.raises(SystemExit) as caught:
        main(["run", *overrides, *extra])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for word in words:
        assert word in error
    made = [path for path in output(overrides).rglob("*") if path.is_file()]
    assert not made


@pytest.mark.parametrize("command", ["run", "quantize", "fit", "sweep"])
def test_an_unusable_output_folder_is_refused_before_anything_runs(
    overrides, tmp_path, capsys, monkeypatch, command
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("loraq.runner.session.load_pipeline", None)
    with pytest.raises(SystemExit) as caught:
        main([command, "method=rtn", *moved(overrides, tmp_path / "file" / "outputs")])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and "Traceback" not in error
    assert f"'{tmp_path / 'file'}': it is a file, not a folder" in error and "output=" in error


def test_a_table_that_cannot_be_written_is_named(overrides, capsys):
    outcome = run(["method=rtn", *overrides], progress=False)
    (outcome.folder / "main.md").unlink()
    (outcome.folder / "main.md").mkdir()
    commands = (
        ["run", "--quiet", "method=rtn", *overrides],
        ["tables", "--output", overrides[-1][7:]],
    )
    for command in commands:
        with pytest.raises(SystemExit) as caught:
            main(command)
        error = capsys.readouterr().err
        assert caught.value.code == 2 and f"'{outcome.folder}/main.md': it is a folder" in error


def _spoil(name: str, folder: Path) -> None:
    """Make the images of a folder wrong in the way that `name` says."""
    first = sorted(folder.iterdir())[0]
    if name == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif name == "other suffix":
        first.rename(first.with_suffix(".gif"))
    elif name == "cut short":
        first.write_bytes(first.read_bytes()[:-40])
    elif name == "grey":
        Image.open(first).convert("L").save(first)
    elif name == "twice":
        Image.open(first).save(first.with_suffix(".JPG"))


@pytest.fixture
def real_folder(overrides, tmp_path) -> Path:
    """Real images of the run's prompts, half of them with other and upper-case suffixes."""
    folder = tmp_path / "real"
    folder.mkdir()
    for number, prompt in enumerate(data_prompts(load_rows(["method=rtn", *overrides])[0].data)):
        image = Image.effect_noise((64, 64), 50).convert("RGB")
        image.save(folder / f"{prompt.name}{('.png', '.JPG', '.PNG', '.jpeg')[number % 4]}")
    return folder


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("empty", "4 of 4 images are missing"),
        ("other suffix", "1 of 4 images are missing"),
        ("cut short", "cannot read the image"),
        ("grey", "8-bit RGB"),
        ("twice", "several images of 1 names"),
    ],
)
def test_real_images_are_looked_at_by_the_plan(overrides, real_folder, capsys, wrong, words):
    given = [*overrides, "method=rtn", "metrics.names=[kid]", f"data.real={real_folder}"]
    main(["run", "--dry-run", *given])
    _spoil(wrong, real_folder)
    for options in (["--dry-run"], []):
        with pytest.raises(SystemExit) as caught:
            main(["run", *options, *given])
        error = capsys.readouterr().err
        assert caught.value.code == 2 and words in error and "delete" not in error.lower()
    assert not list(output(overrides).iterdir())  # tested for locks, but empty


def test_real_images_of_any_suffix_are_compared(overrides, real_folder):
    given = ["metrics.names=[kid,frechet]", f"data.real={real_folder}"]
    outcome = run(["method=reference", *overrides, *given], progress=False)
    assert outcome.records[0].metrics["kid_efflite0"]["n"] == 4


def test_what_metrics_and_the_decoder_cannot_do_is_refused_by_the_plan(overrides, tmp_path):
    def planned(*more: str) -> None:
        rows = load_rows(["method=rtn", *overrides, *more])
        check_rows(plan_rows(rows, Store(rows[0].output)))

    real = f"data.real={tmp_path}"
    names = [prompt.name for prompt in data_prompts(load_rows(["method=rtn", *overrides])[0].data)]
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / f"{names[0]}.png")
    for metric in ("kid", "frechet"):
        with pytest.raises(LoraqError, match=rf"{metric} compares(.|\n)*data\.count=2"):
            planned("data.count=1", f"metrics.names=[{metric}]", real)
    planned("model.height=32")
    with pytest.raises(LoraqError, match=r"lpips needs images of 32 pixels(.|\n)*have 16"):
        planned("model.height=16", "metrics.names=[lpips]")
    for size, near in (
        ("width=72", "64|80"),
        ("height=60", "64"),
        ("width=8", "16"),
    ):
        with pytest.raises(LoraqError, match=rf"no multiple of 16(.|\n)*=({near}),"):
            planned(f"model.{size}")


@pytest.mark.parametrize(
    "overrides, folder",
    [
        ([], r"table1"),
        (["output=elsewhere", "device=cpu", "tracking.mode=disabled"], r"table1"),
        (["model=tiny_sana"], r"table1-tiny_sana"),
        (["data.count=16"], r"table1-[0-9a-f]{6}"),
        (["model=tiny_sana", "data.count=16"], r"table1-tiny_sana-[0-9a-f]{6}"),
    ],
)
def test_other_models_and_settings_have_separate_result_folders(overrides, folder):
    row = SimpleNamespace(config=load_rows(["experiment=table1"])[0])
    assert re.fullmatch(folder, result_folder([row], ["experiment=table1", *overrides]).name)


def test_the_result_folder_of_one_method_has_its_name(tmp_path):
    def name(*overrides: str) -> str:
        rows = [SimpleNamespace(config=config) for config in load_rows(overrides)]
        return result_folder(rows, overrides).name

    assert name("method=loraq_best") == "loraq_best"
    assert re.fullmatch(r"loraq_o2-tiny_sana-[0-9a-f]{6}",
                        name("method=loraq_o2", "model=tiny_sana", "data.count=16"))  # fmt: skip


def test_images_of_one_colour_are_in_the_record_and_the_table(
    overrides, tiny_folder, tmp_path, caplog
):
    """A decoder that makes only black: the 16-bit images pass as the reference of all rows."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_folder, tmp_path / "black")
    (weights,) = (tmp_path / "black/vae").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["decoder.conv_out.weight"].zero_()
    save_file(tensors, weights, {"format": "pt"})
    given = [f"model.path={tmp_path / 'black'}", "data.count=2", "generate.batch_size=2"]
    outcome = run(["method=reference", *overrides, *given], progress=False)
    record = outcome.records[0]
    assert record.images["one_colour"] == record.images["names"]
    assert "2 of 2 images of row 'reference' have one colour only (t_0, t_1)" in caplog.text
    assert (
        "2 of 2 images have one colour only (t_0, t_1)" in (outcome.folder / "main.md").read_text()
    )


def test_dry_run_prints_the_plan_and_makes_nothing(overrides, capsys):
    main(["run", "--dry-run", "method=svdquant", *overrides])
    text = capsys.readouterr().out
    assert "to make" in text and "modelled for a CPU" in text and "In all about" in text
    assert not output(overrides).exists()
    other = ["model.domain=photographs", "data.domain=emoji"]  # nothing is measured
    main(["quantize", "--dry-run", "method=svdquant", *other, *overrides])
    made = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "to make" in line]
    assert "quantised" in made and not {"images", "measured", "record"} & set(made)
    run(["method=svdquant", *overrides], progress=False)
    main(["run", "--dry-run", "method=svdquant", *overrides])
    assert "to make" not in capsys.readouterr().out
    layers = min(output(overrides).glob("quantised/*/*.safetensors"))
    flip_bit(layers, -2)
    main(["run", "--dry-run", "method=svdquant", *overrides])
    told = capsys.readouterr()
    assert "to make" in told.out and f"{layers.name} does not match" in told.err
    assert layers.is_file(), "a plan renamed a product"
    flip_bit(layers, -2)
    main(["run", "--dry-run", "method=svdquant", "quant.seed=1", *overrides])
    assert "measured on" in capsys.readouterr().out


def test_kill_9_while_quantising_and_while_generating(overrides, tmp_path):
    """Finished groups and batches are not made again, except damaged ones; records are equal."""
    overrides = [o for o in overrides if not o.startswith(("data.count", "generate.", "output="))]
    overrides += ["data.count=8", "generate.batch_size=1", "model.steps=6"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = ["run", "--quiet", "method=loraq_o2", *overrides, f"output={killed}"]

    def kill_when(pattern: str) -> set[tuple[str, int]]:
        process = start(COMMAND, *command)
        deadline = time.monotonic() + 400
        while not list(killed.glob(pattern)) and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        process.join()
        return {(str(path), path.stat().st_mtime_ns) for path in killed.glob(pattern)}

    def damage(pieces: set[tuple[str, int]]) -> set[tuple[str, int]]:
        """Flip a bit of one piece, unless the product is finished; returns the others."""
        path, modified = min(pieces)
        if ".partial/" not in path:
            return pieces
        flip_bit(Path(path), -9)
        return pieces - {(path, modified)}

    groups = damage(kill_when("quantised/*/*.safetensors"))
    batches = damage(kill_when("images/*/batches/00001.json"))
    one = run(["method=loraq_o2", *overrides, f"output={killed}"], progress=False)

    for path, modified in groups | batches:
        now = Path(path.replace(".partial", ""))
        assert now.stat().st_mtime_ns == modified, f"{now} was made again"
    two = run(["method=loraq_o2", *overrides, f"output={whole}"], progress=False)
    assert comparable(one) == comparable(two)
    for name in ("quantised/*/*.safetensors", "images/*/*.png"):
        made = [{p.name: p.read_bytes() for p in folder.glob(name)} for folder in (killed, whole)]
        assert made[0] and made[0] == made[1], name
    tables = [(outcome.folder / "main.md").read_bytes() for outcome in (one, two)]
    assert tables[0] == tables[1]


def test_tables_and_cache_read_finished_products(overrides, capsys):
    root = str(output(overrides))
    outcome = run(["method=rtn", *overrides], progress=False)
    grid = outcome.folder / "grid.png"
    drawn = grid.read_bytes()
    flip_bit(grid, -30)
    (outcome.folder / "main.md").unlink()
    main(["tables", "--output", root])
    assert "rtn" in capsys.readouterr().out
    assert (outcome.folder / "main.md").is_file()
    main(["cache", "--output", root, "--verify"])
    assert "finished" in capsys.readouterr().out
    run(["method=rtn", *overrides], progress=False)
    assert grid.read_bytes() == drawn, "a damaged picture was not drawn again"
    with pytest.raises(SystemExit):
        main(["tables", "--output", root, "nothing"])


def test_quantize_generate_and_evaluate_run_only_their_stages(overrides, capsys):
    root = output(overrides)
    main(["quantize", "--quiet", "method=rtn", *overrides])
    assert "bits/weight" in capsys.readouterr().out
    assert not (root / "images").exists()
    main(["generate", "--quiet", "method=rtn", *overrides])
    assert len(list(root.glob("images/*/*.png"))) == 8
    assert not (root / "record").exists()
    main(["evaluate", "--quiet", "method=rtn", *overrides])
    made = [records.load_record(path) for path in sorted(root.glob("record/*/record.json"))]
    assert {record.row for record in made} == {"reference", "rtn"}
    assert json.loads((next(root.glob("results/*/rows.json"))).read_text())["rows"]
