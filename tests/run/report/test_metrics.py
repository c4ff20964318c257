"""Reading metrics.jsonl."""

import pytest

from compressft.run.report import load_metrics


def test_rows_in_file_order_blank_lines_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n\n{"step": 1}\n')
    assert load_metrics(path) == [{"step": 2}, {"step": 1}]


@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b"{", '{"stage": "größ'.encode()[:-1], b"12"])
def test_torn_last_line_is_dropped(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + tail)
    assert load_metrics(path) == [{"step": 1}, {"step": 2}]


def test_complete_last_line_without_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert load_metrics(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("broken", ['{"step": 2, "st{"step": 3}', "[1, 2]", "\\"])
@pytest.mark.parametrize("rest", ['{"step": 4}\n', ""])
def test_other_broken_lines_name_file_and_line(tmp_path, broken, rest):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + broken + "\n" + rest)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
        load_metrics(path)


def test_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.touch()
    assert load_metrics(path) == []
