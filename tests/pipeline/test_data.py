"""Inputs: what each format means, which rows are refused and how they are named, and how rows become batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import BatchConfig, DataConfig
from pipeline.data import Batch, Encoded, Row, blank_lines, cut, make_batches, place, read_rows
from pipeline.errors import DataError
from predictor.tokens import TokenBatch

LABELS = {"0": "negative", "1": "positive"}


def write(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, **config) -> list[Row]:
    return read_rows(DataConfig(str(path), **({"text": "sentence", "label": "label"} | config)), LABELS)


def refused(path: Path, **config) -> str:
    with pytest.raises(DataError) as error:
        read(path, **config)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    return str(error.value)


ROWS = [Row("a good film", label="1"), Row("dull", label="0")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.tsv", "sentence\tlabel\na good film\t1\ndull\t0\n"),
        ("rows.tsv", "label\tsentence\tsource\n1\ta good film\tx\n0\tdull\ty\n"),
        ("rows.csv", 'sentence,label\n"a good film",1\ndull,0\n'),
        ("rows.jsonl", '{"sentence": "a good film", "label": 1}\n{"label": "0", "sentence": "dull"}\n'),
    ],
    ids=["tsv", "tsv with other columns", "csv", "jsonl"],
)
@pytest.mark.parametrize("ending", ["as written", "without the last newline", "CRLF", "BOM", "BOM and CRLF"])
def test_each_format_gives_its_rows_in_order_whatever_wrote_it(tmp_path, name, content, ending):
    if "without" in ending:
        content = content.removesuffix("\n")
    if "CRLF" in ending:
        content = content.replace("\n", "\r\n")
    if "BOM" in ending:
        content = "\ufeff" + content
    assert read(write(tmp_path, name, content)) == ROWS


@pytest.mark.parametrize("content", ["a good film\ndull\n", "a good film\r\ndull\r\n", "\ufeffa good film\ndull"])
def test_a_txt_file_is_a_text_a_line(tmp_path, content):
    rows = read(write(tmp_path, "rows.txt", content), text="text", label=None)
    assert rows == [Row("a good film"), Row("dull")]


@pytest.mark.parametrize("blank", ["", " ", "\u00a0", "\u2003\u3000"])
def test_blank_lines_of_a_txt_file_are_no_rows_and_are_counted(tmp_path, blank):
    path = write(tmp_path, "rows.txt", f"{blank}\na\n{blank}\n{blank}\nb\nc\n{blank}\n")
    rows = read(path, text="text", label=None)
    assert rows == [Row("a"), Row("b"), Row("c")]
    assert blank_lines(rows) == 3
    assert [place(rows, i) for i in range(3)] == ["row 1, line 2", "row 2, line 5", "row 3, line 6"]
    assert len(read(path, text="text", label=None, limit=2)) == 2
    plain = read(write(tmp_path, "rows.txt", "a\nb\n"), text="text", label=None)
    assert blank_lines(plain) == 0 and place(plain, 1) == "row 2"
    assert "holds no rows" in refused(write(tmp_path, "rows.txt", f"{blank}\n{blank}\n"), text="text", label=None)
    assert blank_lines(read(write(tmp_path, "rows.tsv", "sentence\tlabel\na\t1\n"))) == 0


def test_quotation_marks_in_a_tsv_are_characters(tmp_path):
    texts = ['"good" he said', '"never closed', 'a " in the midst', '""', "it's"]
    path = write(tmp_path, "rows.tsv", "sentence\tlabel\n" + "".join(f"{text}\t1\n" for text in texts))
    assert [row.text for row in read(path)] == texts


def test_quotation_marks_in_a_csv_quote(tmp_path):
    path = write(tmp_path, "rows.csv", 'sentence,label\n"one, two",1\n"he said ""no""",0\n"two\nlines",1\n')
    assert [row.text for row in read(path)] == ["one, two", 'he said "no"', "two\nlines"]


@pytest.mark.parametrize("broken", ['1,"good\n0,dull\n', '1,"good" film\n0,dull\n'])
def test_quotation_marks_in_a_csv_that_do_not_match_are_refused_rather_than_guessed_at(tmp_path, broken):
    """Taken as it comes, a quotation that is never closed would swallow the rest of the file."""
    assert "cannot be read" in refused(write(tmp_path, "rows.csv", "label,sentence\n" + broken))


SEPARATORS = "before\u2028after\u2029and\x85then\x0bnext\x0cpage\x1cend"
"""Line breaks to Python's str.splitlines, characters of a sentence to everybody else."""


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "jsonl unescaped", "txt"])
def test_unicode_line_separators_are_characters_of_a_text(tmp_path, suffix):
    name = f"rows.{suffix.split()[0]}"
    text = SEPARATORS.replace("\x0b", "").replace("\x0c", "").replace("\x1c", "") if "unescaped" in suffix else SEPARATORS
    record = {"sentence": text, "label": 1}
    content = {
        "tsv": f"sentence\tlabel\n{text}\t1\n",
        "csv": f"sentence,label\n{text},1\n",
        "jsonl": json.dumps(record) + "\n",
        "jsonl unescaped": json.dumps(record, ensure_ascii=False) + "\n",
        "txt": text + "\n",
    }[suffix]
    path = write(tmp_path, name, content)
    rows = read(path, text="text", label=None) if suffix == "txt" else read(path)
    assert [row.text for row in rows] == [text]


def test_a_passage_longer_than_the_csv_modules_default_limit_is_read(tmp_path):
    passage = "word " * 60_000
    assert read(write(tmp_path, "rows.tsv", f"sentence\tlabel\n{passage}\t1\n"))[0].text == passage


def test_prefix_pair_label_and_target_go_where_they_belong(tmp_path):
    path = write(tmp_path, "rows.jsonl", '{"a": "one", "b": "two", "label": 1, "answer": "three"}\n')
    row = read(path, text=["a", "b"], target="answer", prefix="nli: ")
    assert row == [Row("nli: one", "two", "1", "three")]
    assert read(path, text=["b"], label=None) == [Row("two")]


def test_without_labels_in_the_config_any_label_will_do(tmp_path):
    path = write(tmp_path, "rows.tsv", "sentence\tlabel\na\tanything\n")
    assert read_rows(DataConfig(str(path), "sentence", "label"), {})[0].label == "anything"


@pytest.mark.parametrize(("limit", "count"), [(1, 1), (2, 2), (3, 3), (50, 3), (None, 3)])
def test_limit_reads_only_so_many_rows_and_looks_at_no_later_one(tmp_path, limit, count):
    path = write(tmp_path, "rows.tsv", "sentence\tlabel\na\t1\nb\t0\nc\t1\n")
    assert [row.text for row in read(path, limit=limit)] == ["a", "b", "c"][:count]
    broken = write(tmp_path, "later.tsv", "sentence\tlabel\na\t1\nb\t0\n\t7\n")
    assert len(read(broken, limit=2)) == 2
    assert "row 3" in refused(broken, limit=3)


@pytest.mark.parametrize(
    ("name", "content"),
    [("rows.tsv", "sentence\tgrade\na\t1\n"), ("rows.csv", "sentence,grade\na,1\n"),
     ("rows.jsonl", '{"sentence": "a", "grade": 1}\n')],
)  # fmt: skip
def test_a_missing_column_is_named_with_the_columns_that_are_there(tmp_path, name, content):
    message = refused(write(tmp_path, name, content))
    assert "'label'" in message
    assert "sentence, grade" in message
    assert "'text'" in refused(write(tmp_path, name, content), text="text", label="grade")
    assert "'target'" in refused(write(tmp_path, name, content), label="grade", target="target")


def test_a_txt_file_has_no_column_but_text(tmp_path):
    assert "no column 'sentence'; it has: text" in refused(write(tmp_path, "rows.txt", "a\n"), label=None)


@pytest.mark.parametrize("name", ["rows.tsv", "rows.csv"])
@pytest.mark.parametrize(("row", "found"), [("b", 1), ("a text, with a separator,0", 3)], ids=["too few", "too many"])
@pytest.mark.parametrize("label", ["label", None])
def test_a_row_with_too_few_or_too_many_columns_is_refused_rather_than_cut(tmp_path, name, row, found, label):
    content = f"sentence,label\na,1\n{row}\nc,0\n".replace(",", "\t" if name.endswith("tsv") else ",")
    message = refused(write(tmp_path, name, content), label=label)
    assert f"row 2 has {found} columns, the first line has 2" in message


def test_a_json_row_without_a_value_is_refused_with_what_it_has(tmp_path):
    path = write(tmp_path, "rows.jsonl", '{"sentence": "a", "label": null, "source": "x"}\n')
    assert "row 1 has no column 'label'; it has: sentence, source" in refused(path)


def test_a_label_outside_the_labels_is_refused_with_those_that_are_known(tmp_path):
    message = refused(write(tmp_path, "rows.tsv", "sentence\tlabel\na\t1\nb\t2\n"))
    assert "row 2 has label '2'; `labels` knows 0, 1" in message


@pytest.mark.parametrize(
    ("name", "content"),
    [("rows.tsv", ""), ("rows.tsv", "\ufeff"), ("rows.tsv", "sentence\tlabel"), ("rows.tsv", "sentence\tlabel\n"),
     ("rows.tsv", "sentence\tlabel\r\n"), ("rows.csv", ""), ("rows.csv", "sentence,label\n"), ("rows.jsonl", ""), ("rows.txt", "")],
)  # fmt: skip
def test_a_file_without_rows_is_refused(tmp_path, name, content):
    text = "text" if name.endswith("txt") else "sentence"
    assert "holds no rows" in refused(write(tmp_path, name, content), text=text)


@pytest.mark.parametrize("blank", ["", " ", "\u00a0", "\u2003\u3000"])
def test_an_empty_text_is_refused_with_its_row(tmp_path, blank):
    assert "row 2: 'sentence' is empty" in refused(write(tmp_path, "rows.tsv", f"sentence\tlabel\na\t1\n{blank}\t0\n"))
    content = json.dumps({"sentence": "a", "label": 1}) + "\n" + json.dumps({"sentence": blank, "label": 1}) + "\n"
    assert "row 2: 'sentence' is empty" in refused(write(tmp_path, "rows.jsonl", content))


def test_an_empty_pair_or_target_is_refused_by_its_own_name(tmp_path):
    path = write(tmp_path, "rows.jsonl", '{"a": "x", "b": " ", "label": 1}\n')
    assert "'b' is empty" in refused(path, text=["a", "b"])
    assert "'b' is empty" in refused(path, text="a", target="b")


@pytest.mark.parametrize("name", ["rows.tsv", "rows.csv"])
def test_an_empty_line_between_rows_is_refused_rather_than_skipped(tmp_path, name):
    """In a file of one column an empty line is an empty text; skipped, every later answer would stand beside another row."""
    path = write(tmp_path, name, "sentence\na\n\nb\n")
    assert "row 2" in refused(path, label=None)
    at_the_end = write(tmp_path, name, "sentence\na\n\n\n")
    assert read(at_the_end, label=None) == [Row("a")]


def test_a_broken_encoding_names_the_line_and_the_byte(tmp_path):
    message = refused(write(tmp_path, "rows.tsv", "sentence\tlabel\na\t1\ncafé\t0\n".encode("latin-1")))
    assert "line 3 is not UTF-8" in message
    assert "0xe9" in message
    assert "line 1 " in refused(write(tmp_path, "rows.tsv", "sentence\tlabel\na\t1\n".encode("utf-16")))


def test_what_is_not_a_json_object_is_refused_with_its_row(tmp_path):
    good = '{"sentence": "a", "label": 1}\n'
    assert "row 2 is not JSON" in refused(write(tmp_path, "rows.jsonl", good + "{broken\n"))
    assert "row 2 is an empty line" in refused(write(tmp_path, "rows.jsonl", good + "\n" + good))
    assert "row 2 is not a JSON object" in refused(write(tmp_path, "rows.jsonl", good + "[1]\n"))


@pytest.mark.parametrize("value", [["a", "b"], {"a": 1}])
def test_a_text_that_is_not_text_is_refused_rather_than_written_out(tmp_path, value):
    content = json.dumps({"sentence": value, "label": 1}) + "\n"
    assert "row 1" in refused(write(tmp_path, "rows.jsonl", content))


def test_a_text_that_is_not_unicode_is_refused_with_its_row(tmp_path):
    """JSON can write half a surrogate pair; no tokenizer reads it."""
    assert "row 1" in refused(write(tmp_path, "rows.jsonl", '{"sentence": "a \\ud800 b", "label": 1}\n'))


def test_of_three_columns_the_second_and_the_third_are_joined_to_one(tmp_path):
    path = write(tmp_path, "rows.tsv", "paragraph\tquestion\tanswer\tlabel\nLong ago.\tWhen?\tLong ago\t1\n")
    row = read(path, text=["paragraph", "question", "answer"], target="answer")
    assert row == [Row("Long ago.", "When? Long ago", "1", "Long ago")]


def test_a_config_without_a_file_says_what_to_download():
    with pytest.raises(DataError) as error:
        read_rows(DataConfig(hub="nyu-mll/glue sst2 validation"), LABELS)
    assert str(error.value) == (
        "data.path is null: download nyu-mll/glue sst2 validation from https://huggingface.co/datasets and pass data.path=FILE"
    )


def test_a_file_that_is_not_there_or_of_no_known_format_is_refused(tmp_path):
    assert "no such file" in refused(tmp_path / "rows.tsv")
    (tmp_path / "folder.tsv").mkdir()
    refused(tmp_path / "folder.tsv")
    refused(write(tmp_path, "file.tsv", "x") / "rows.tsv")
    message = refused(write(tmp_path, "rows.parquet", b"PAR1"))
    assert "unknown format '.parquet'; known: .tsv, .csv, .jsonl, .txt" in message


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("order", ["input", "length"])
def test_cut_covers_each_row_once_in_batches_of_the_size_asked_for(size, order):
    lengths = np.random.default_rng(size).integers(1, 20, 23).tolist()
    batches = cut(lengths, BatchConfig(size=size, order=order))
    assert sorted(np.concatenate(batches).tolist()) == list(range(23))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert 1 <= len(batches[-1]) <= size
    flat = np.concatenate(batches).tolist()
    assert flat == (list(range(23)) if order == "input" else sorted(range(23), key=lambda row: lengths[row]))
    again = cut(lengths, BatchConfig(size=size, order=order))
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_batches_hold_the_tokens_and_targets_of_their_rows():
    rng = np.random.default_rng(0)
    encoded = [
        Encoded((rng.integers(1, 50, n), rng.integers(1, 50, n + 1)), target=rng.integers(1, 50, n + 1)) for n in (5, 2, 9, 2, 1)
    ]
    batches = make_batches(encoded, BatchConfig(size=2, order="length"))
    assert [batch.index for batch in batches] == [0, 1, 2]
    assert [batch.rows.tolist() for batch in batches] == [[4, 1], [3, 0], [2]]
    for batch in batches:
        for position, row in enumerate(batch.rows):
            for stream in range(2):
                np.testing.assert_array_equal(batch.tokens.streams[stream][position], encoded[row].streams[stream])
            np.testing.assert_array_equal(batch.targets[position], encoded[row].target)
    assert make_batches([Encoded((np.array([1]),))], BatchConfig())[0].targets is None


def test_padding_is_on_the_right_of_the_longest_row_and_masked():
    rows = tuple(np.array(ids) for ids in ([5, 6, 7], [8], [9, 10]))
    other = tuple(np.array(ids) for ids in ([1], [1, 2], [3]))
    batch = Batch(0, np.arange(3), TokenBatch((rows, other)))
    ids, mask = batch.pad(0, 99)
    assert ids.tolist() == [[5, 6, 7], [8, 99, 99], [9, 10, 99]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert str(ids.dtype) == str(mask.dtype) == "torch.int64"
    assert batch.pad(1, 0)[0].tolist() == [[1, 0], [1, 2], [3, 0]]


def test_a_real_token_equal_to_the_padding_is_not_masked():
    batch = Batch(0, np.arange(2), TokenBatch(((np.array([4, 0, 5]), np.array([0])),)))
    assert batch.pad(0, 0)[1].tolist() == [[1, 1, 1], [1, 0, 0]]
