"""A realistic report and its metrics, as a run would hand them over."""

import math

import pytest


@pytest.fixture
def report() -> dict:
    def row(runtime, model, batch, length, p50):
        return {"runtime": runtime, "model": model, "batch": batch, "length": length, "p50": p50, "p90": p50 * 1.06,
                "threads": 2}  # fmt: skip

    latency = [
        row(runtime, model, batch, length, p50)
        for (batch, length), times in {
            (1, 32): (0.62, 3.1, 6.4),
            (1, 128): (1.6, 9.9, 14.2),
            (8, 128): (12.4, 78.0, 92.5),
        }.items()
        for (runtime, model), p50 in zip(
            [("onnxruntime", "compressed"), ("onnxruntime", "base_fp32"), ("torch", "base_fp32")], times, strict=True
        )
    ]
    heads = [7, 6, 6, 5, 6, 6]
    neurons = [412, 380, 296, 351, 448, 417]
    return {
        "name": "banking77-edge",
        "model": "minilm",
        "task": "sequence-classification",
        "quality": {"metric": "accuracy", "split": "test", "baseline": 0.921, "torch": 0.918, "onnx": 0.917},
        "seconds": {"loading": 8.0, "search": 30.0, "training": 200.0, "evaluation": 40.0, "verification": 22.0},
        "parity": {"split": "test", "max_abs_error": 0.0312, "label_agreement": 0.998},
        "verification": [
            {"split": split, "batch": batch, "rows": rows, "max_abs_error": 0.0312, "label_agreement": 0.998,
             "torch": 0.918, "onnx": 0.917}
            for split, rows in (("validation", 385), ("test", 3080)) for batch in (1, 32)
        ],
        "size_bytes": {"base_onnx": 91_600_000, "onnx": 16_000_000, "model": 41_000_000, "delta": 900_000},
        "parameters": {"base": 22_713_986, "total": 15_000_000, "trainable": 14_800_000, "nonzero": 14_000_000},
        "latency_ms": latency,
        "training": {"seconds": 240.0, "examples_per_second": 61.0, "tokens_per_second": 900.0,
                     "peak_memory_bytes": 1_900_000_000},
        "peak_memory_bytes": 2_300_000_000,
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "onnxruntime": "1.24.1"},
        "hardware": {"cpu": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "cores": 2, "memory_bytes": 8_300_000_000},
        "recipe_hash": "sha256:" + "0a1b2c3d" * 8,
        "stages": [
            {"name": "teacher", "seconds": 92.0, "steps": 400, "examples_per_second": 139.0,
             "validation": {"accuracy": 0.925, "loss": 0.31}, "best": None},
            {"name": "student", "seconds": 148.0, "steps": 800, "examples_per_second": 61.0,
             "validation": {"accuracy": 0.919, "loss": 0.34}, "best": {"accuracy": 0.922}},
        ],
        "shapes": {"base": [{"heads": 12, "ffn": 1536}] * 6,
                   "kept": [{"heads": h, "ffn": n} for h, n in zip(heads, neurons, strict=True)]},
        "recipe": "model: minilm\ndata:\n  name: banking77  # 77 intents\nstages:\n- name: teacher\n- name: student\n",
        "notes": ["Latency was taken on a shared machine with 2 cores."],
    }  # fmt: skip


@pytest.fixture
def metrics() -> list[dict]:
    rows = []
    for step in range(20, 1201, 20):
        teacher = step <= 400
        stage, start, length = ("teacher", 0, 400) if teacher else ("student", 400, 800)
        progress = (step - start) / length
        task = 4.3 * math.exp(-4 * progress) + 0.3 if teacher else 0.9 * math.exp(-2 * progress) + 0.25
        task *= 1 + 0.06 * math.sin(step)
        terms = {"task": task}
        status = {}
        if not teacher:
            terms |= {"distill.logits": 0.6 * math.exp(-progress) + 0.05, "distill.hidden": 0.2}
            cubic = 1 - (1 - min(progress / 0.7, 1)) ** 3
            status = {
                "structured": {
                    name: {"now": math.floor(target * cubic * 24) / 24, "planned": target * cubic, "target": target}
                    for name, target in (("ffn", 0.75), ("heads", 0.5))
                },
                "int8": {"bits": {"now": 8, "planned": 8, "target": 8}},
            }
        rows.append({"kind": "train", "stage": stage, "step": step, "epoch": step / 90, "progress": progress,
                     "loss": sum(terms.values()), "learning_rate": 1e-4, "terms": terms, "status": status})  # fmt: skip
        if step % 100 == 0:
            accuracy = 0.925 - 0.6 * math.exp(-6 * progress) if teacher else 0.919 - 0.05 * math.exp(-3 * progress)
            rows.append({"kind": "eval", "stage": stage, "step": step, "split": "validation",
                         "metrics": {"accuracy": accuracy, "loss": 0.4}})  # fmt: skip
    return rows
