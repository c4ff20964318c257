"""The model card of a saved adapter: what it is of, and how it is loaded; nobody has measured it here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressft.adapters.detect import Kind
from compressft.adapters.settled import Settled, origin
from compressft.utils.hub import hub_id

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

TEMPLATE = "---\n{{ card_data }}\n---\n\n{{ text }}\n"
LOADS = {"peft": "peft.PeftModel", "compressft": "compressft.Adapted"}


def adapter_card(settled: Settled, kind: Kind) -> ModelCard:
    """The card of an adapter that is written in PEFT's format or in ours."""
    from huggingface_hub import ModelCard, ModelCardData

    base = origin(settled.plain)
    method = settled.method.type if settled.method is not None else "adapter"
    data = ModelCardData(base_model=hub_id(base), library_name=kind, tags=["compressft", "adapter", method])
    shown = hub_id(base) or type(settled.plain).__name__
    text = (
        f"# {method}\n\nMade with compressft on `{shown}`, which it needs to be loaded:\n\n"
        f'```python\nmodel = {LOADS[kind]}.from_pretrained(base, ".")  # the folder of this card\n```'
    )
    return ModelCard.from_template(data, template_str=TEMPLATE, text=text)
