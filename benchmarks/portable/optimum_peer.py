"""Open a folder with `optimum` as its users do: `python optimum_peer.py JOB.json ANSWER.json`. No compressft there."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import torch
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer

PACKAGES = ("optimum-onnx", "optimum", "transformers", "onnxruntime")


def main() -> None:
    """Tokenise and classify each text by itself."""
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    model = ORTModelForSequenceClassification.from_pretrained(job["model"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    ids, logits = [], []
    for text in job["texts"]:
        inputs = tokenizer(text, truncation=True, max_length=job["max_length"], return_tensors="pt")
        ids.append(inputs["input_ids"][0].tolist())
        with torch.no_grad():
            logits.append(model(**inputs).logits[0].tolist())
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump({"versions": versions, "ids": ids, "logits": logits}, file)


if __name__ == "__main__":
    main()
