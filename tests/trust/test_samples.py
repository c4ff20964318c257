"""Whatever is set aside, balanced or limited: labels are those of all rows as given, and every row is accounted for."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from compressft.data.rows import ROW_KEY
from compressft.data.source import DataConfig
from compressft.data.splits import load_splits
from compressft.errors import UserError
from compressft.tasks import TASKS
from tests.tiny_folder import write_jsonl

KINDS = {
    "sequence-classification": lambda label: {"text": f"a {label}", "label": label},
    "token-classification": lambda label: {"tokens": ["a", "b"], "tags": ["O", f"B-{label}"]},
}


@settings(max_examples=120)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    labels=st.lists(st.sampled_from("abcdefgh"), min_size=4, max_size=40),
    held_out=st.lists(st.sampled_from("abcdefgh"), max_size=6),
    per_class=st.none() | st.integers(2, 5),
    limit=st.none() | st.integers(2, 30),
    fraction=st.floats(0.05, 0.5),
    seed=st.integers(0, 3),
)
def test_labels_and_rows(tmp_path_factory, kind, labels, held_out, per_class, limit, fraction, seed):
    folder, row = tmp_path_factory.mktemp("rows"), KINDS[kind]
    given_rows = [{**row(label), "number": i} for i, label in enumerate(labels)]
    files = {"train": str(write_jsonl(folder / "train.jsonl", given_rows))}
    if held_out:
        files["validation"] = str(write_jsonl(folder / "validation.jsonl", [row(label) for label in held_out]))
    config = DataConfig(**files, per_class=per_class, limit=limit, validation_fraction=fraction, seed=seed)
    fields, known = TASKS[kind].fields, TASKS[kind].labels_of([row(label) for label in labels])
    try:
        splits = load_splits(config, fields)
    except UserError as error:
        lone = kind == "sequence-classification" and not held_out and len(set(labels)) == len(labels)
        unseen = kind == "sequence-classification" and set(held_out) - set(labels)
        assert (lone and "too few rows" in str(error)) or (unseen and "does not occur in train" in str(error))
        return
    assert TASKS[kind].labels_of(splits.known) == known, "also of classes whose rows were all set aside or left out"
    places = [one[ROW_KEY] for one in (*splits.train, *splits.validation)]
    assert len(places) == len(set(places)), "no row is both trained and validated on"
    used = sum(place.startswith(files["train"]) for place in places)
    assert used + splits.left_out == len(labels)
    if per_class is None and limit is None:
        assert splits.left_out == 0
    again = load_splits(config, fields)
    assert (again.train, again.validation) == (splits.train, splits.validation)


def test_the_seed_chooses(tmp_path):
    rows = [KINDS["sequence-classification"](label) for label in "abcd" * 10]
    random.Random(1).shuffle(rows)
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    first = load_splits(DataConfig(train=path, limit=10, seed=1), TASKS["sequence-classification"].fields)
    other = load_splits(DataConfig(train=path, limit=10, seed=2), TASKS["sequence-classification"].fields)
    assert first.train != other.train and len(first.train) == len(other.train) == 10
