"""On a GPU: what its keys hold and what not, and products that another GPU has made."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from loraq.compose import load_rows
from loraq.errors import LoraqError
from loraq.formats import operator
from loraq.formats.operator import SWITCH
from loraq.metrics.registry import needs_host
from loraq.runner.estimate import describe_plan, dry_run
from loraq.runner.experiment import run
from loraq.runner.other_gpus import FOLDER, note_gpu
from loraq.runner.plan import check_rows, plan_rows
from loraq.runner.product_keys import make_row
from loraq.runner.rows import Stage
from loraq.runner.session import Session
from loraq.runner.store import Store
from loraq.utils import batch_invariance
from loraq.utils.gpu import VARIABLES
from tests.simulated import simulated_cuda

A100 = SimpleNamespace(
    name="NVIDIA A100-SXM4-80GB", major=8, minor=0, multi_processor_count=108, total_memory=2**36
)
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=2**36
)
HALF = SimpleNamespace(**{**vars(H100), "multi_processor_count": 60})
ON_HOST = {Stage.MEASURED, Stage.RECORD}


@pytest.fixture
def use(monkeypatch):
    """Pretend that the machine has this GPU, for plans: nothing is computed on it."""

    def use(*gpus: SimpleNamespace) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpus[index])
        capability = lambda index: (gpus[index].major, gpus[index].minor)  # noqa: E731
        monkeypatch.setattr(torch.cuda, "get_device_capability", capability)

    return use


@pytest.fixture
def given(overrides):
    return ["method=gptq", *(o for o in overrides if o != "device=cpu")]


def keys(given, *more):
    return make_row(load_rows([*given, *more])[-1]).keys


def changed(one, two):
    assert one.keys() == two.keys()
    return {stage for stage in one if one[stage] != two[stage]}


def test_keys_hold_the_model_and_the_libraries_of_the_gpu(given, use, monkeypatch):
    found = []
    for gpu in (A100, H100, HALF):
        use(gpu)
        found.append(keys(given))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90999)
    found.append(keys(given))
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    found.append(keys(given))
    monkeypatch.setattr(torch.version, "hip", "7.1")
    found.append(keys(given))
    for place, one in enumerate(found):
        for two in found[:place]:
            assert changed(one, two) == set(one)


def test_a_process_has_the_keys_of_its_own_gpu(given, use, monkeypatch):
    use(A100)
    alone = keys(given)
    use(H100, A100)
    assert changed(keys(given), alone) == set(alone)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert keys(given) == alone
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(LoraqError, match=r"PyTorch finds 2.*torchrun --nproc-per-node=2"):
        keys(given)


def test_gpus_of_different_models_in_one_run_are_told(given, overrides, use, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("loraq"), "propagate", True)
    store = Store(overrides[-1].removeprefix("output="))
    use(H100, A100)
    plan_rows(load_rows(given), store)
    assert "different models" not in caplog.text
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    plan_rows(load_rows(given), store)
    assert f"GPUs of different models ({H100.name}, {A100.name})" in caplog.text


def test_threads_and_matrix_library_of_the_host_count_for_its_metrics_alone(
    given, use, monkeypatch
):
    on_cpu = {threads: keys(given, "device=cpu", f"threads={threads}") for threads in (1, 2)}
    assert Stage.IMAGES in changed(on_cpu[1], on_cpu[2])
    use(H100)
    by_gpu, also_by_host = "metrics.names=[psnr,ssim]", "metrics.names=[psnr,alignment]"
    for metrics, by_host in ((by_gpu, set()), (also_by_host, ON_HOST)):
        one = keys(given, "threads=1", metrics)
        assert changed(one, keys(given, "threads=2", metrics)) == by_host
        with monkeypatch.context() as patch:
            patch.setattr(batch_invariance, "row_invariant", lambda _threads=None: "another")
            assert changed(one, keys(given, "threads=1", metrics)) == by_host
    assert Stage.IMAGES in changed(one, keys(given, "threads=1", "generate.batch_size=1"))


def test_metrics_with_a_part_on_the_host_are_known():
    assert needs_host(["psnr", "ssim", "lpips", "clip_score", "clip_iqa", "image_reward"]) == []
    assert needs_host(["frechet", "psnr", "kid", "alignment"]) == ["frechet", "kid", "alignment"]


def test_a_gpu_changes_no_key_of_the_cpu(given, use):
    before = keys(given, "device=cpu")
    use(H100)
    assert keys(given, "device=cpu") == before


def test_times_of_one_gpu_do_not_estimate_those_of_another(given, use):
    use(H100)
    row = make_row(load_rows(given)[-1])
    assert H100.name in row.kind(Stage.IMAGES)


def test_the_plan_says_which_gpu_has_made_a_product(given, overrides, use, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("loraq"), "propagate", True)
    store = Store(overrides[-1].removeprefix("output="))
    use(A100)
    reference, made = (make_row(config) for config in load_rows(given))
    with Session(store).using(made):
        assert not torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.deterministic
    assert torch.backends.cudnn.allow_tf32
    store.path(*reference.product(Stage.IMAGES)).mkdir(parents=True)
    folder, name = made.product(Stage.QUANTIZED)
    store.path(folder, name + ".partial").mkdir(parents=True)
    (store.root / FOLDER / "0123456789abcdef.json").write_text("{}")

    use(H100)
    rows = plan_rows(load_rows(given), store)
    assert rows[0].elsewhere == {Stage.IMAGES: f"made by {A100.name}"}
    assert rows[1].elsewhere == {Stage.QUANTIZED: f"begun by {A100.name}"}
    images, quantized = rows[0].keys[Stage.IMAGES], rows[1].keys[Stage.QUANTIZED]
    assert f"made by {A100.name}: images/{images} (reference). GPUs of" in caplog.text
    assert f"begun by {A100.name}: quantised/{quantized} (gptq). GPUs of" in caplog.text
    assert f"this GPU ({H100.name})" in caplog.text
    lines = describe_plan(rows, store).splitlines()
    assert next(line for line in lines if images in line).endswith(f"; made by {A100.name}")

    use(A100)
    assert not any(row.elsewhere for row in plan_rows(load_rows(given), store))


def test_the_plan_says_which_library_has_changed(given, overrides, use, monkeypatch):
    store = Store(overrides[-1].removeprefix("output="))
    use(H100)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90000)
    row = make_row(load_rows(given)[0])
    note_gpu(store, row.arithmetic)
    store.path(*row.product(Stage.IMAGES)).mkdir(parents=True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    words = plan_rows(load_rows(given), store)[0].elsewhere[Stage.IMAGES]
    assert words == f"made by {H100.name} with cuDNN 90000, now 91000"


def test_a_run_on_one_gpu_is_kept_for_it_and_told_to_another(given, monkeypatch):
    """A whole run on a simulated GPU: complete with other threads, but not on another GPU."""
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    given = ["method=rtn", *given[1:]]
    with simulated_cuda(name=H100.name):
        machine = run(given, progress=False).records[-1].machine
        assert machine["device"] == "cuda" and machine["gpu"]["name"] == H100.name
        assert "to make" not in dry_run([*given, "threads=3"])
    with simulated_cuda(name=A100.name, capability=(8, 0)):
        lines = [line for line in dry_run(given).splitlines() if "to make" in line]
    assert len(lines) == 9
    assert all(line.endswith(f"; made by {H100.name}") for line in lines)


def test_keys_hold_what_decides_groups_and_the_sums_of_a_rotation(given, use, monkeypatch):
    """Boards of one name with 8 and 16 GB solve other batches; LORAQ_FUSED=0 rotates elsewhere."""
    boards = [SimpleNamespace(**{**vars(H100), "total_memory": gb << 30}) for gb in (15, 7, 79, 65)]
    found = []
    for board in boards:
        use(board)
        found.append(keys(given))
    assert changed(found[0], found[1]) == changed(found[1], found[2]) == set(found[0])
    assert found[2] == found[3], "as the memory of one model varies with its firmware"
    assert SWITCH in VARIABLES
    monkeypatch.setenv(SWITCH, "0")
    assert changed(keys(given), found[3]) == set(found[3])


def test_keys_hold_the_triton_that_computes_whatever_its_distribution(given, use, monkeypatch):
    """PyTorch for ROCm, and its nightly builds, bring Triton in a distribution of another name."""
    use(H100)
    before = keys(given)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="99.0"))
    assert changed(keys(given), before) == set(before)


def test_a_kernel_that_cannot_be_compiled_is_told_before_anything_runs(given, monkeypatch):
    """As on a system without a C compiler, which Triton needs at the first launch."""
    pytest.importorskip("triton")

    def fails(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr("loraq.formats.triton.fake.supported", lambda *_: True)
    monkeypatch.setattr("loraq.formats.triton.fake.launch", fails)
    monkeypatch.setattr("loraq.formats.triton.probe.check_agreement", lambda *_: None)
    # the simulation runs operators on the host
    monkeypatch.setattr(operator, "fake_quantize_into", operator.launch_supported)
    with simulated_cuda():
        rows = plan_rows(load_rows(given), Store(given[-1].removeprefix("output=")))
        with pytest.raises(
            LoraqError, match=r"C compiler\.\).*apt install gcc python3-dev.*LORAQ_FUSED=0"
        ):
            check_rows(rows)
        monkeypatch.undo()
        monkeypatch.setenv(SWITCH, "0")
        check_rows(rows)
