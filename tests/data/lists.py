"""What works on tables and columns, on lists of rows: as tests write them."""

import numpy as np

from compressft.data import splits


def canonical_rows(rows, columns, fields):
    return list(splits.canonical(lambda: iter(rows), columns, fields))


def classes(rows, label):
    names = sorted({row[label] for row in rows}) if label else [""]
    return names, np.array([names.index(row[label]) if label else 0 for row in rows])


def carve(rows, fraction, label, seed):
    return [[rows[i] for i in part] for part in splits.carve(classes(rows, label), fraction, seed)]


def balanced(rows, per_class, label, seed):
    return [rows[i] for i in splits.balanced(classes(rows, label), per_class, seed)]
