"""Damages to records: tokenised ones and pairs of texts."""

import gzip
import json
import os
from collections.abc import Callable

from damage import DEEP, LFS, Expect, Table, Trial, as_folder, as_link, as_pipe, remove, rewrite

TOKENS = Table()
PAIRS = Table()
FINE = Expect.SAME
UNNAMED = frozenset({"profile", "evaluate", "recover", "compress"})  # results do not name the file


def bytes_row(table: Table, name: str, change: Callable, expect=Expect.REFUSE, by=None) -> None:
    table.row(name, lambda t: rewrite(t.path, change(t.path.read_bytes(), t.rng)), expect, by)


def line_row(table: Table, name: str, change: Callable, expect=Expect.REFUSE, by=None) -> None:
    """Change one line of the text."""

    def do(trial: Trial) -> None:
        lines = trial.path.read_text().splitlines()
        place = trial.rng.randrange(len(lines))
        lines[place] = change(lines[place])
        rewrite(trial.path, "\n".join(lines) + "\n")

    table.row(name, do, expect, by)


def record_row(table: Table, name: str, change: Callable, expect=Expect.REFUSE, by=None) -> None:
    """Change one record, or every one if the name says so."""

    def do(trial: Trial) -> None:
        records = [json.loads(line) for line in trial.path.read_text().splitlines()]
        places = range(len(records)) if "every" in name else [trial.rng.randrange(len(records))]
        for i in places:
            records[i] = change(records[i])
        rewrite(trial.path, "".join(json.dumps(r) + "\n" for r in records))

    table.row(name, do, expect, by)


def renamed(trial: Trial, ending: str, content: bytes) -> None:
    """Put the data under another name, in the command line too."""
    name = trial.target.split(".")[0] + ending
    remove(trial.path)
    (trial.root / name).write_bytes(content)
    trial.argv[:] = [name if a == trial.target else a for a in trial.argv]


for table in (TOKENS, PAIRS):
    for label, change, expect in (
        ("a byte order mark", lambda b, r: b"\xef\xbb\xbf" + b, FINE), ("CRLF",
        lambda b, r: b.replace(b"\n", b"\r\n"), FINE),
        ("blank lines", lambda b, r: b.replace(b"\n", b"\n\n  \n"), FINE), ("no last newline",
        lambda b, r: b[:-1], FINE),
        ("spaces around", lambda b, r: b.replace(b"\n", b"  \n\t "), FINE),
        ("an array", lambda b, r: b"[" + b.strip().replace(b"\n", b",") + b"]", FINE),
        ("nothing", lambda b, r: b"", Expect.REFUSE), ("blanks only", lambda b, r: b"\n \n\t\n", Expect.REFUSE),
        ("a byte order mark only", lambda b, r: b"\xef\xbb\xbf", Expect.REFUSE),
        ("zeros", lambda b, r: bytes(3000), Expect.REFUSE), ("noise",
        lambda b, r: b"\x80" + r.randbytes(3000), Expect.REFUSE),
        ("no UTF-8", lambda b, r: b.replace(b"[", b"\xff[", 3).replace(b"w", b"\xff", 3), Expect.REFUSE),
        ("Latin-1", lambda b, r: b + '{"source": "w1 é", "target": "w2"}\n'.encode("latin-1"), Expect.REFUSE),
        ("UTF-16", lambda b, r: b.decode().encode("utf-16"), Expect.EITHER),
        ("an LFS pointer", lambda b, r: LFS, Expect.REFUSE), ("a gz under a wrong name",
        lambda b, r: gzip.compress(b), Expect.SAME_OR_REFUSE),
        ("cut in a line", lambda b, r: b[: b.rindex(b"\n", 0, -1) + r.randrange(2, 8)], Expect.REFUSE),
        ("an empty array", lambda b, r: b"[]", Expect.REFUSE), ("empty objects", lambda b, r: b"{}\n{}\n",
        Expect.REFUSE),
        ("a page", lambda b, r: b"<!DOCTYPE html>\n<html>", Expect.REFUSE),
        ("an array cut", lambda b, r: b"[" + b.strip().replace(b"\n", b","), Expect.REFUSE),
        ("a deep array", lambda b, r: DEEP, Expect.REFUSE), ("commas after lines",
        lambda b, r: b.replace(b"}\n", b"},\n"), Expect.REFUSE),
        ("Python text", lambda b, r: b.replace(b'"', b"'"), Expect.REFUSE),
    ):  # fmt: skip
        bytes_row(table, label, change, expect)
    for label, change in {
        "a line too deep": lambda s: DEEP, "a line deep inside": lambda s: s[:-1] + ', "x": ' + DEEP + "}",
        "a line 5": lambda s: "5", "a line of text": lambda s: '"w1 w2"',
        "a line that is no JSON": lambda s: s + "}", "two records in a line": lambda s: s + s,
        "a huge integer in a line": lambda s: s[:-1] + ', "x": ' + "9" * 5000 + "}",
    }.items():  # fmt: skip
        expect = Expect.SAME_OR_REFUSE if "inside" in label or "huge" in label else Expect.REFUSE
        line_row(table, label, change, expect)
    for label, change, expect in (
        ("unknown fields in every record", lambda r: r | {"id": 5, "note": None}, FINE),
        ("an odd unknown field", lambda r: r | {"meta": {"a": [1, {"b": 2}]}}, FINE),
        ("a domain that is a number", lambda r: r | {"domain": 5}, Expect.EITHER),
        ("a domain that is a list", lambda r: r | {"domain": ["a"]}, Expect.EITHER),
        ("a domain null in every record", lambda r: r | {"domain": None}, FINE),
        ("a domain with a line break", lambda r: r | {"domain": "a\nb\x1b[31m"}, Expect.EITHER),
        ("a domain that is a surrogate", lambda r: r | {"domain": "\ud800"}, Expect.EITHER),
        ("an empty record", lambda r: {}, Expect.EITHER), ("a list for a record", lambda r: [r], Expect.REFUSE),
        ("other names in every record", lambda r: {f"my_{k}": v for k, v in r.items()}, Expect.REFUSE),
    ):  # fmt: skip
        record_row(table, label, change, expect)
    table.row("packed", lambda t: renamed(t, ".jsonl.gz", gzip.compress(t.path.read_bytes())), FINE, UNNAMED)
    table.row("packed and cut", lambda t: renamed(t, ".jsonl.gz", gzip.compress(t.path.read_bytes())[:-30]))
    table.row("packed and no gz", lambda t: renamed(t, ".jsonl.gz", t.path.read_bytes()), Expect.EITHER)
    table.row("packed noise", lambda t: renamed(t, ".jsonl.gz", b"\x1f\x8b" + t.rng.randbytes(400)))
    table.row("a bomb", lambda t: renamed(t, ".jsonl.gz", gzip.compress(bytes(10**6)) * 3000))
    table.row("an odd ending", lambda t: renamed(t, ".data", t.path.read_bytes()), Expect.SAME_OR_REFUSE)
    table.row("a broken Parquet", lambda t: renamed(t, ".parquet", b"PAR1" + t.rng.randbytes(200) + b"PAR1"))
    table.row("an empty table", lambda t: renamed(t, ".csv", b""))
    table.row("a table of other columns", lambda t: renamed(t, ".csv", b"a,b\n1,2\n"))
    table.row("a ragged table", lambda t: renamed(t, ".csv", b'source,target\nw1,w2,w3\n"w4\n'), Expect.EITHER)
    table.row("missing", lambda t: remove(t.path))
    table.row("a folder", lambda t: as_folder(t.path))
    table.row("a pipe", lambda t: as_pipe(t.path))
    table.row("endless", lambda t: as_link(t.path, "/dev/zero"))
    table.row("a link to itself", lambda t: as_link(t.path, t.target))
    table.row("a link", lambda t: (os.rename(t.path, t.root / "real.jsonl"), t.path.symlink_to("real.jsonl")), FINE)

for key in ("input_ids", "labels"):
    for label, value in {
        "null": None, "text": "1 2 3", "a number": 5, "an object": {"a": 1}, "nested": [[2, 3]], "of text": ["2", "3"],
        "of fractions": [2.0, 3.5], "with a fraction": [2, 3.0], "with true": [2, True], "with null": [2, None],
        "with NaN": [2, float("nan")], "with a huge id": [2, 10**30], "with 2^31": [2, 2**31], "with 2^63": [2, 2**63],
        "with an id of the vocabulary's size": [2, 64], "with a negative id": [2, -5],
        "with the least id": [2, -(2**63)],
        "with infinity": [float("inf")],
    }.items():  # fmt: skip
        blank = Expect.EITHER if value is None else Expect.REFUSE  # a blank record may be left out
        record_row(TOKENS, f"{key} {label}", lambda r, k=key, v=value: r | {k: v}, blank)
    record_row(TOKENS, f"{key} empty", lambda r, k=key: r | {k: []}, Expect.EITHER)
    record_row(TOKENS, f"{key} padding only", lambda r, k=key: r | {k: [0, 0, 0]}, Expect.EITHER)
    record_row(TOKENS, f"{key} missing", lambda r, k=key: {n: v for n, v in r.items() if n != k}, Expect.EITHER)
    record_row(TOKENS, f"{key} of 5,000 ids", lambda r, k=key: r | {k: [3, 4] * 2500}, Expect.EITHER)
    record_row(TOKENS, f"{key} empty in every record", lambda r, k=key: r | {k: []})
    record_row(TOKENS, f"{key} padded in every record", lambda r, k=key: r | {k: r[k] + [0] * (20 - len(r[k]))}, FINE)
record_row(TOKENS, "labels padded with -100 in every record", lambda r: r | {"labels": r["labels"] + [-100] * 4}, FINE)
record_row(TOKENS, "labels of -100 only", lambda r: r | {"labels": [-100, -100]}, Expect.EITHER)
record_row(TOKENS, "a mask of ones in every record", lambda r: r | {"attention_mask": [1] * len(r["input_ids"])}, FINE)
record_row(
    TOKENS, "padded by a mask in every record",
    lambda r: r | {"input_ids": r["input_ids"] + [0] * 5, "attention_mask": [1] * len(r["input_ids"]) + [0] * 5}, FINE,
)  # fmt: skip
record_row(
    TOKENS, "padded on the left by a mask in every record",
    lambda r: r | {"input_ids": [0] * 5 + r["input_ids"], "attention_mask": [0] * 5 + [1] * len(r["input_ids"])}, FINE,
)  # fmt: skip
record_row(
    TOKENS, "a mask over other ids in every record",
    lambda r: r | {"input_ids": r["input_ids"] + [7] * 5, "attention_mask": [1] * len(r["input_ids"]) + [0] * 5}, FINE,
)  # fmt: skip
for label, mask in {
    "too short": [1],
    "of text": "11",
    "null": None,
    "of twos": [2] * 3,
    "of zeros": [0, 0, 0],
    "nested": [[1]],
}.items():
    record_row(
        TOKENS, f"a mask {label}", lambda r, m=mask: r | {"input_ids": [4, 5, 6], "attention_mask": m}, Expect.EITHER
    )
record_row(TOKENS, "text beside the ids", lambda r: r | {"text": "w1 w2 w3"}, Expect.EITHER)
record_row(TOKENS, "source beside the ids", lambda r: r | {"source": "w1 w2 w3"}, Expect.EITHER)
record_row(TOKENS, "text for ids", lambda r: {"text": "w1 w2 w3"}, Expect.EITHER)
record_row(TOKENS, "a pair for ids", lambda r: {"source": "w1 w2", "target": "w3"}, Expect.EITHER)
record_row(TOKENS, "text and labels only", lambda r: {"text": "w1 w2", "labels": [4]}, Expect.EITHER)
line_row(TOKENS, "input_ids twice", lambda s: s[:-1] + ', "input_ids": [4, 5]}', Expect.EITHER)
line_row(TOKENS, "input_ids with NaN", lambda s: s.replace("[", "[NaN, ", 1))
line_row(TOKENS, "input_ids with -0", lambda s: s.replace("[", "[-0, ", 1), Expect.EITHER)
line_row(TOKENS, "input_ids with 1e1", lambda s: s.replace("[", "[1e1, ", 1))
TOKENS.row(
    "three hundred domains",
    lambda t: rewrite(t.path, "".join(json.dumps({"input_ids": [3, 4], "labels": [5],
    "domain": f"d{i}"}) + "\n" for i in range(300))),
    Expect.EITHER,
)  # fmt: skip
TOKENS.row("one record", lambda t: rewrite(t.path, '{"input_ids": [5, 6], "labels": [7]}\n'), Expect.EITHER)
TOKENS.row("one id each", lambda t: rewrite(t.path, '{"input_ids": [5], "labels": [7]}\n' * 3), Expect.EITHER)

for key in ("source", "target"):
    for label, value, expect in (
        ("null", None, Expect.EITHER), ("a number", 5, Expect.REFUSE), ("a list", ["w1"], Expect.REFUSE),
        ("an object", {"a": "w1"}, Expect.REFUSE), ("true", True, Expect.REFUSE), ("empty", "", Expect.EITHER),
        ("blank", "  \n ", Expect.EITHER), ("a lone surrogate", "w1 \ud800", Expect.EITHER), ("of null bytes", "\0w1\0",
        Expect.EITHER), ("with line separators", "w1\u2028w2\x85w3", Expect.EITHER), ("unknown words", "ä ö",
        Expect.EITHER),
        ("of 2,000 words", "w1 " * 2_000, Expect.EITHER), ("special tokens", "<pad> </s> <extra_id_0>",
        Expect.EITHER),
        ("emoji", "\U0001f600 w1", Expect.EITHER), ("right to left", "\u202ew1", Expect.EITHER),
    ):  # fmt: skip
        record_row(PAIRS, f"{key} {label}", lambda r, k=key, v=value: r | {k: v}, expect)
    record_row(PAIRS, f"{key} missing", lambda r, k=key: {n: v for n, v in r.items() if n != k}, Expect.EITHER)
    record_row(PAIRS, f"{key} blank in every record", lambda r, k=key: r | {k: " "}, Expect.REFUSE)
    record_row(PAIRS, f"{key} with spaces around in every record", lambda r, k=key: r | {k: f" {r[k]}  "}, FINE)
record_row(PAIRS, "the same target in every record", lambda r: r | {"target": "w1"}, Expect.EITHER)
record_row(PAIRS, "ids beside the texts", lambda r: r | {"input_ids": [4, 5], "labels": [6]}, Expect.EITHER)
record_row(PAIRS, "only labels beside the texts", lambda r: r | {"labels": [6]}, Expect.EITHER)
record_row(PAIRS, "chat", lambda r: {"messages": [{"role": "user", "content": 5}]}, Expect.EITHER)
record_row(PAIRS, "chat in every record", lambda r: {"messages": "hello"})
record_row(PAIRS, "empty chat in every record", lambda r: {"messages": []})
