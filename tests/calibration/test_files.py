"""Data files of every format: what a record of each is, and damaged ones named in one line."""

import gzip
import io
import json
import os
import sys

import pytest

from msmoe.calibration.files import DataError, read_file, standard_input
from msmoe.calibration.records import DataWarning, read_calibration, read_records

PAIR = {"source": "one, two", "target": "three"}
OTHER = {"source": "fünf", "target": "sechs"}
LINES = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in (PAIR, OTHER))
CSV = 'source,target\n"one, two",three\nfünf,sechs\n'

SAME = {
    "lines.jsonl": LINES,
    "bom_and_crlf.jsonl": "\ufeff" + LINES.replace("\n", "\r\n"),
    "no_newline_at_the_end.jsonl": LINES[:-1],
    "array.json": json.dumps([PAIR, OTHER], indent=1),
    "array.jsonl": json.dumps([PAIR, OTHER]),
    "wrapped.json": json.dumps({"version": 2, "data": [PAIR, OTHER]}),
    "lines.json": LINES,
    "lines.txt": LINES,
    "lines_without_suffix": LINES,
    "table.csv": CSV,
    "bom_and_crlf.csv": "\ufeff" + CSV.replace("\n", "\r\n"),
    "semicolons.csv": 'source;target\n"one, two";three\nfünf;sechs\n',
    "table.tsv": "source\ttarget\none, two\tthree\nfünf\tsechs\n",
    "table_without_suffix": "source\ttarget\none, two\tthree\nfünf\tsechs\n",
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", SAME)
def test_every_format_gives_the_same_records(name, packed, tmp_path):
    content = SAME[name].encode()
    file = tmp_path / (f"{name}.gz" if packed else name)
    file.write_bytes(gzip.compress(content) if packed else content)
    assert read_records(file) == [PAIR, OTHER]


@pytest.mark.parametrize("name", SAME)
def test_standard_input_is_read_like_a_file(name, monkeypatch):
    if name in ("semicolons.csv", "lines.txt"):
        pytest.skip("told by the suffix")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(SAME[name].encode())))
    assert read_records("-") == [PAIR, OTHER]
    assert read_records("-") == [PAIR, OTHER]  # sequential refit reads the data again


def test_gzip_on_standard_input_is_unpacked(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(LINES.encode()))))
    assert read_records("-") == [PAIR, OTHER]


def test_parquet_gives_the_same_records(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pandas.DataFrame([PAIR, OTHER]).to_parquet(tmp_path / "d.parquet")
    assert read_records(tmp_path / "d.parquet") == [PAIR, OTHER]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "d.parquet").write_bytes(b"PAR1....PAR1")
    with pytest.raises(DataError, match=r"d\.parquet is Parquet, which needs `pip install pyarrow`"):
        read_records(tmp_path / "d.parquet")


def test_a_cut_parquet_file_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "d.parquet").write_bytes(b"PAR1....PAR1")
    with pytest.raises(DataError, match=r"d\.parquet is not whole Parquet"):
        read_records(tmp_path / "d.parquet")


def test_a_folder_saved_by_datasets_is_read_split_by_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {"train": [PAIR, OTHER], "test": [OTHER]}
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()}).save_to_disk(tmp_path / "d")
    assert read_records(tmp_path / "d") == [PAIR, OTHER]
    assert read_records(f"{tmp_path / 'd'}:test") == [OTHER]
    with pytest.raises(DataError, match=r"no split 'dev'; choose .*:NAME with one of train, test"):
        read_records(f"{tmp_path / 'd'}:dev")


def test_a_folder_of_data_files_is_all_of_them_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b.jsonl").write_text(json.dumps(OTHER))
    (tmp_path / "a.csv").write_text('source,target\n"one, two",three\n')
    (tmp_path / "README.md").write_text("no data")
    assert read_records(tmp_path) == [PAIR, OTHER]


def test_of_a_folder_with_splits_the_one_asked_for_is_read_or_train(tmp_path):
    (tmp_path / "train-0.jsonl").write_text(json.dumps(PAIR))
    (tmp_path / "test-0.jsonl").write_text(json.dumps(OTHER))
    assert read_records(tmp_path) == [PAIR]
    assert read_records(f"{tmp_path}:test") == [OTHER]


def test_plain_text_holds_a_record_per_line(tmp_path):
    (tmp_path / "d.txt").write_bytes(b"one two\r\n{three four\r\n")
    assert read_records(tmp_path / "d.txt") == [{"text": "one two"}, {"text": "{three four"}]


def test_plain_text_with_blank_lines_holds_a_record_per_paragraph(tmp_path):
    (tmp_path / "d.txt").write_text("\none\ntwo\n \n\nthree\n")
    records = read_records(tmp_path / "d.txt")
    assert records == [{"text": "one\ntwo"}, {"text": "three"}]
    assert [r.place for r in records] == [f"{tmp_path / 'd.txt'}, line {i}" for i in (2, 6)]


def test_lists_in_csv_cells_are_token_ids(tmp_path):
    (tmp_path / "d.csv").write_text('input_ids,labels\n"[5, 6]",[7]\n')
    assert read_records(tmp_path / "d.csv") == [{"input_ids": [5, 6], "labels": [7]}]


@pytest.mark.parametrize("target", ['["x"]', "[1, 2]", "[]", "[[3]]", "7"])
def test_a_csv_text_stays_a_text_whatever_it_looks_like(target, tmp_path):
    quoted = target.replace('"', '""')
    (tmp_path / "d.csv").write_text(f'source,target\n[laughs],"{quoted}"\n')
    assert read_records(tmp_path / "d.csv") == [{"source": "[laughs]", "target": target}]


def test_a_column_may_lie_within_a_csv_cell(tmp_path):
    (tmp_path / "d.csv").write_text('question,answers\nx,"[{""text"": ""y""}]"\n')
    records = read_records(tmp_path / "d.csv", columns={"source": "question", "target": "answers.0.text"})
    assert records == [{"source": "x", "target": "y"}]


def test_a_compressed_file_gives_its_domain_the_plain_name(tmp_path):
    for name in ("news", "code"):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    records = read_calibration([tmp_path / "news.jsonl.gz", tmp_path / "code.jsonl.gz"])
    assert [r.domain for r in records] == ["news", "news", "code", "code"]


# Damage


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("d.csv", "source,target\nx\n", "line 2 has 1 fields, the first line names 2"),
        ("d.csv", 'source,target\n"x,y\n', "line 2 is not CSV"),
        ("d.csv", "text,text\nx,y\n", "line 1 names a column twice"),
        ("d.json", '{"a": [1,\n', "not JSON"),
        ("d.json", "5", "expected a list of records, got int"),
        ("d.jsonl", "[" * 100_000, "nested too deeply"),
        ("d.jsonl", '{"a":' * 100_000, "nested too deeply"),
        ("d.jsonl", '{"text": "a\\ud800b"}', r"line 1: text holds half a surrogate pair, \\ud800"),
        ("d.csv", "source,target\n", "holds no records"),
    ],
)
def test_damage_is_named_with_its_place(name, content, complaint, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=complaint):
        read_records(tmp_path / name)


def test_a_line_without_an_end_in_sight_is_refused(tmp_path):
    with (tmp_path / "d.jsonl").open("wb") as stream:
        stream.truncate(2**27)  # zeros, on disk nothing
    with pytest.raises(DataError, match="line 1 is longer than 64 MiB"):
        read_records(tmp_path / "d.jsonl")


def test_a_cut_gzip_file_is_named(tmp_path):
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(LINES.encode())[:-6])
    with pytest.raises(DataError, match=r"d\.jsonl\.gz is not whole gzip data"):
        read_records(tmp_path / "d.jsonl.gz")


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null"])
def test_a_device_is_never_read(path):
    with pytest.raises(DataError, match=f"{path} is a device, not a regular file: pipe the data into --data -"):
        read_records(path)


def test_a_pipe_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "d.jsonl")
    with pytest.raises(DataError, match=r"d\.jsonl is a pipe, not a regular file"):
        read_records(tmp_path / "d.jsonl")


def test_nothing_on_standard_input_is_said(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(DataError, match="- holds no records"):
        read_records("-")
    standard_input.cache_clear()


@pytest.mark.parametrize("path", ["x\0y", "a" * 5000])
def test_a_name_that_no_file_can_have_is_refused(path):
    with pytest.raises(DataError, match="cannot read"):
        read_records(path)


def test_rows_come_one_by_one(tmp_path):
    (tmp_path / "d.jsonl").write_text(LINES + "{bad\n")
    rows = read_file(tmp_path / "d.jsonl", lambda names: True)
    assert [next(rows)[1], next(rows)[1]] == [PAIR, OTHER]


# Columns, blank records, unused fields, records in memory


def test_columns_say_where_the_fields_are(tmp_path):
    (tmp_path / "d.csv").write_text("question,answer\nx,y\n")
    records = read_records(tmp_path / "d.csv", columns={"source": "question", "target": "answer"})
    assert records == [{"source": "x", "target": "y"}]


def test_a_column_may_lie_within_another():
    rows = [
        {"translation": {"en": "one", "de": "eins"}, "answers": {"text": ["uno", "un"]}},
        {"translation": {"en": "two", "de": "zwei"}, "answers": {"text": []}},
    ]
    german = read_records(rows, columns={"source": "translation.en", "target": "translation.de"})
    assert [dict(r) for r in german] == [
        {"source": "one", "target": "eins", "answers": rows[0]["answers"]},
        {"source": "two", "target": "zwei", "answers": rows[1]["answers"]},
    ]
    with pytest.warns(DataWarning, match="1 of 2 records are blank"):
        [first] = read_records(rows, columns={"source": "translation.en", "target": "answers.text.0"})
    assert first == {"source": "one", "target": "uno"}


def test_a_mask_may_be_of_truth_values():
    [record] = read_records([{"input_ids": [0, 5], "attention_mask": [False, True], "labels": [3]}])
    assert record["attention_mask"] == [0, 1]


def test_a_missing_column_is_named_with_those_there_are():
    with pytest.raises(DataError, match="record 1: no column 'query'; there are question, target"):
        read_records([{"question": "x", "target": "y"}], columns={"source": "query"})


def test_an_unknown_field_of_columns_is_refused_with_the_choices():
    with pytest.raises(
        DataError, match="--columns: 'src' is no field of a record; choose from input_ids, labels, source"
    ):
        read_records([{"a": "x"}], columns={"src": "a"})


BLANK = [
    None, {}, {"text": " \t"}, {"text": None}, {"source": "x", "target": ""}, {"source": None, "target": "y"},
    {"source": "\n", "target": "y"}, {"input_ids": [], "labels": [1]}, {"input_ids": [1], "labels": []},
    {"input_ids": [1], "labels": [1], "attention_mask": [0]}, {"messages": []},
    {"messages": [{"role": "user", "content": "x"}]}, {"messages": [{"role": "assistant", "content": "x"}]},
]  # fmt: skip


@pytest.mark.parametrize("blank", BLANK)
def test_a_blank_record_is_skipped_and_counted(blank):
    with pytest.warns(DataWarning, match="1 of 2 records are blank: skipped"):
        records = read_records([blank, PAIR])
    assert records == [PAIR]
    assert records.num_skipped == 1


def test_data_of_blank_records_alone_are_refused():
    with pytest.raises(DataError, match="records in memory holds no records: all 2 are blank"):
        read_records([{"text": ""}, {"text": " "}])


def test_fields_that_are_not_used_are_named():
    with pytest.warns(DataWarning, match="fields that are not used: title, token_type_ids"):
        read_records([PAIR | {"title": "x"}, PAIR | {"token_type_ids": [0], "id": 7, "domain": "d"}])


def test_a_text_beside_token_ids_without_labels_is_the_record_and_the_ids_are_named():
    with pytest.warns(DataWarning, match="not used: input_ids$"):
        [record] = read_records([{"text": "a b", "input_ids": [1]}])
    assert record.kind == "text"


def test_token_ids_are_the_record_where_there_are_labels_too():
    with pytest.warns(DataWarning, match="not used: source, target$"):
        [record] = read_records([{"input_ids": [1], "labels": [2], **PAIR}])
    assert record.kind == "tokens"


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ({"attention_mask": [1]}, "attention_mask must hold a 0 or 1 for each of the 3 input_ids"),
        ({"attention_mask": [1, 2, 1]}, "attention_mask must hold a 0 or 1"),
        ({"attention_mask": [1, 0, 1]}, "attention_mask hides tokens between others"),
        ({"decoder_attention_mask": [1, 1, 1]}, "decoder_attention_mask must hold a 0 or 1 for each of the 1 labels"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(extra, complaint):
    with pytest.raises(DataError, match=f"record 1: {complaint}"):
        read_records([{"input_ids": [5, 6, 7], "labels": [8], **extra}])


def test_texts_in_a_list_are_records():
    assert read_calibration(["good morning", "one two three"]) == [{"text": "good morning"}, {"text": "one two three"}]


def test_an_iterator_of_records_is_read():
    assert read_calibration(r for r in (PAIR, OTHER)) == [PAIR, OTHER]


def test_a_missing_file_in_a_list_of_files_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    with pytest.raises(DataError, match=r"cannot read my file\.jsonl: No such file"):
        read_calibration([str(tmp_path / "a.jsonl"), "my file.jsonl"])


@pytest.mark.parametrize("data", [5, None, {"text": "a b"}])
def test_what_is_no_data_is_refused(data):
    with pytest.raises(DataError, match="data must be a file, a data set or a list of records, got"):
        read_calibration(data)
