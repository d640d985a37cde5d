"""A trace of a few steps: what it holds, that nothing else changes, and runs that end around its window."""

import gzip
import io
import json
import os
import re
import signal
from collections import Counter

import pytest
from rich.console import Console

from cosmos_ssl.engine.signals import Interrupted
from cosmos_ssl.engine.trace import shares_of

STAGES = (
    "data wait",
    "augment",
    "teacher forward",
    "student forward",
    "losses",
    "backward",
    "optimizer",
    "teacher update",
)
TRAINING = {"batch_size": 4, "precision": "fp32", "device": "cpu", "seed": 3}


class At:
    """A writer that does something when a step is logged."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def scalars(self, step, row):
        if step == self.step:
            self.act()

    def pictures(self, step, pictures):
        pass

    def sync(self):
        pass

    def close(self):
        pass


def regions(run_dir, rank=0):
    """How often each region is in the trace."""
    with gzip.open(run_dir / "trace" / f"rank{rank}.json.gz") as file:
        events = json.load(file)["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


def train(tiny, run_dir, steps, max_steps=None):
    """Train up to 10 steps and trace some; what was said."""
    said = io.StringIO()
    config = tiny.make_config(
        training=TRAINING | {"trace_steps": steps}, schedule={"epochs": 2, "warmup_steps": 2, "max_steps": max_steps}
    )
    tiny.make_trainer(run_dir, config, Console(file=said, width=300), evaluators={"mean": tiny.Mean()}).train()
    return said.getvalue()


def steps_of(found):
    return sorted(int(name.partition("#")[2]) for name in found if name.startswith("ProfilerStep#"))


def test_the_steps_after_the_first_four_are_traced_by_stage(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(tiny, "WIDTH", 600)  # so that products are a share that can be told
    said = train(tiny, tmp_path, 3)
    found = regions(tmp_path)
    assert steps_of(found) == [4, 5, 6]
    assert {stage: found[stage] for stage in STAGES} == dict.fromkeys(STAGES, 3)
    assert found["evaluation"] == found["checkpoint"] == 1  # after step 5, after step 6
    assert f"traced 3 steps, up to step 7: {tmp_path}/trace/rank0.json.gz" in said
    table = (tmp_path / "trace" / "rank0.txt").read_text()
    assert table.startswith("3 steps, up to step 7\n") and "Self CPU" in table and "aten::addmm" in table
    shares = re.findall(r"([a-z ]+) (\d+)%", table.splitlines()[1].removeprefix("time:"))
    assert [kind.strip() for kind, _ in shares] == [
        *("attention", "products", "elementwise and the rest", "copies", "communication", "idle")
    ]
    percent = {kind.strip(): int(share) for kind, share in shares}
    assert sum(percent.values()) == pytest.approx(100, abs=3) and percent["products"] and percent["idle"]
    assert percent["attention"] == percent["communication"] == 0  # the tiny model has none
    assert f"s); {table.splitlines()[1]}" in said


def test_the_shares_of_kernels_by_hand():
    """On two streams; what runs beside one another counts once, as what comes first."""
    kernels = [
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_bias_TNN", 0, 20),
        (
            "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x64_32x4_nt_align8>(T1::Params)",
            20,
            30,
        ),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", 30, 40),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>::Params)", 40, 45),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(...)>", 45, 55),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>", 55, 60),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 40, 70),
        ("Memcpy HtoD (Pinned -> Device)", 65, 80),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", 90, 120),
    ]
    assert shares_of(kernels, 0, 100) == pytest.approx(
        {
            "attention": 0.15,
            "products": 0.30,
            "elementwise and the rest": 0.25,
            "copies": 0.15,
            "communication": 0.05,
            "idle": 0.10,
        }
    )


def test_operators_are_inside_their_stage_and_have_shapes(tiny, tmp_path):
    train(tiny, tmp_path, 1)
    with gzip.open(tmp_path / "trace" / "rank0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    (stage,) = (event for event in events if event["name"] == "student forward" and event["cat"] == "user_annotation")
    inside = [e for e in events if e.get("cat") == "cpu_op" and stage["ts"] <= e["ts"] <= stage["ts"] + stage["dur"]]
    assert any([12, 6] in e["args"]["Input Dims"] for e in inside if e["name"] == "aten::addmm")  # the stem


def test_tracing_changes_no_number(tiny, rows, tmp_path):
    for name, steps in (("plain", 0), ("traced", 4)):
        train(tiny, tmp_path / name, steps)
    assert rows(tmp_path / "traced") == rows(tmp_path / "plain")
    for part in ("student", "teacher", "optimizer"):
        plain, other = (
            (tmp_path / name / "checkpoints/step_00000010" / f"{part}.safetensors").read_bytes()
            for name in ("plain", "traced")
        )
        assert plain == other
    assert not (tmp_path / "plain" / "trace").exists()


@pytest.mark.parametrize(("total", "expected"), [(6, [3, 4, 5]), (5, [2, 3, 4]), (3, [1, 2]), (2, [1])])
def test_a_run_shorter_than_the_window_is_traced_to_its_end(tiny, tmp_path, total, expected):
    said = train(tiny, tmp_path, 3, max_steps=total)
    assert steps_of(regions(tmp_path)) == expected
    assert f"up to step {total}" in said


def test_a_single_step_is_not_traced(tiny, tmp_path):
    said = train(tiny, tmp_path, 3, max_steps=1)
    assert "no trace: training.trace_steps leaves out the first step, and there are no more" in said
    assert not (tmp_path / "trace").exists() and (tmp_path / "result.json").exists()


def test_a_run_is_resumed_with_and_without(tiny, tmp_path):
    trainer = tiny.make_trainer(tmp_path, evaluators={"mean": tiny.Mean()}, writers=[At(3, lambda: 1 / 0)])
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    said = train(tiny, tmp_path, 2)
    assert "resuming" in said and "traced 2 steps, up to step 9" in said  # 3 were done, 4 are left out
    assert "is finished" in train(tiny, tmp_path, 5)


def test_a_signal_among_the_traced_steps_saves_and_leaves(tiny, tmp_path):
    said = io.StringIO()
    endless = tiny.make_config(
        training=TRAINING | {"trace_steps": 1_000}, schedule={"epochs": 100_000, "warmup_steps": 2}
    )
    trainer = tiny.make_trainer(
        tmp_path, endless, Console(file=said, width=300), writers=[At(6, lambda: os.kill(os.getpid(), signal.SIGTERM))]
    )
    with pytest.raises(Interrupted, match=r"SIGTERM: saved .* The same command goes on from there"):
        trainer.train()
    assert "no trace: the run was left before its traced steps were done" in said.getvalue()
    assert not (tmp_path / "trace").exists()
    train(tiny, tmp_path / "other", 1)  # the profiler is free again
    assert steps_of(regions(tmp_path / "other")) == [4]


def test_every_rank_writes_a_trace(ranks, finished, tmp_path):
    codes, said = finished(ranks(tmp_path, 2, training=TRAINING | {"trace_steps": 2}))
    assert codes == [0, 0], said
    assert [steps_of(regions(tmp_path, rank)) for rank in (0, 1)] == [[4, 5], [4, 5]]
    assert [regions(tmp_path, rank)["gradient mean"] for rank in (0, 1)] == [2, 2]


def test_a_folder_that_cannot_take_it_ends_nothing(tiny, tmp_path):
    (tmp_path / "trace").write_text("in the way")
    said = train(tiny, tmp_path, 2)
    assert f"warning: no trace: {tmp_path}/trace/rank0.json.gz cannot be written: File exists" in said
    assert "finished" in said
