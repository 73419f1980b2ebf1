"""Expert usage per domain: where a record's domain comes from, what is counted, and how it adds up and is stored."""

import json
import sys
from collections import Counter

import pytest
import torch
from safetensors import safe_open
from tiny import LAYERS, profile_small, write_records

from msmoe.calibration.recorder import LayerRecorder
from msmoe.calibration.records import DataError, read_calibration, read_records
from msmoe.calibration.stats import LayerStats, Stats
from msmoe.calibration.tokenization import tokenize
from msmoe.cli import main
from msmoe.demo import CALIBRATION, CHECKPOINT
from msmoe.errors import UserError
from msmoe.layer.routing import Routed

NAMES = ("news", "code", "law")
HOSTILE = (
    "<script>alert('x')</script>", "a\nb\r\n\tc", "x" * 20_000, "Ελληνικά 中文 🦊", "../../etc/passwd", "null", " ",
    "a/b", "\u2028", "\u0000", '"quoted", with: {braces}', "other", "__class__",
)  # fmt: skip


def named(records: list[dict], *domains: str) -> list[dict]:
    """Records with domains in turn; "" leaves a record without the field."""
    names = [domains[i % len(domains)] for i in range(len(records))]
    return [r | {"domain": name} if name else r for r, name in zip(records, names, strict=True)]


def counts_of(stats: Stats) -> dict[str, dict[str, list[int]]]:
    """layer -> domain -> routed tokens."""
    return {
        name: {domain: counts.tolist() for domain, counts in layer.domain_routed.items()}
        for name, layer in stats.layers.items()
    }


def assert_domains_sum_to_routed(stats: Stats) -> None:
    for layer in stats.layers.values():
        assert torch.equal(torch.stack(list(layer.domain_routed.values())).sum(0), layer.routed)
    domains = stats.data["domains"].values()
    for key in ("num_records", "num_tokens"):
        assert sum(d[key] for d in domains) == stats.data[key]


@pytest.fixture(scope="module")
def labelled(records):
    return named(records, *NAMES)


@pytest.fixture(scope="module")
def labelled_data(labelled, tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("labelled") / "d.jsonl", labelled)


@pytest.fixture(scope="module")
def domain_stats(dropping_switch, labelled_data):
    return profile_small(dropping_switch, labelled_data)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line: (exit code, stdout, stderr)."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["msmoe", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return (stop.value.code, *capsys.readouterr())

    return run


# What is counted


def update(recorder: LayerRecorder, experts: list[list[int]], valid: list[list[bool]], *others: torch.Tensor) -> None:
    """Add a batch whose router sent the token at each place (B, S) to the expert given, of three."""
    logits = torch.nn.functional.one_hot(torch.tensor(experts), 3).float()[torch.tensor(valid)]
    inputs, ones = torch.zeros(len(logits), 2), torch.ones(len(logits), 1)
    routed = Routed(inputs, logits.argmax(-1, keepdim=True), ones, logits, inputs, ones.bool())
    recorder.update(routed, {}, torch.tensor(valid), *others)


def test_routed_tokens_are_counted_for_the_domain_of_their_record():
    recorder = LayerRecorder(sample_size=8, seed=0, domains=["code", "news"])
    valid = [[True, True, True], [True, False, False], [True, True, False]]
    records, domains = torch.tensor([5, 6, 7]), torch.tensor([1, 0, 1])
    update(recorder, [[0, 0, 2], [2, 1, 1], [2, 0, 0]], valid, records, domains)
    update(recorder, [[2, 2]], [[True, True]], torch.tensor([8]), torch.tensor([0]))
    layer = recorder.stats()
    assert layer.domain_routed["news"].tolist() == [3, 0, 2]  # 0, 0, 2 of the first and 2, 0 of the third record
    assert layer.domain_routed["code"].tolist() == [0, 0, 3]  # 2 of the second, 2, 2 of the last
    assert layer.routed.tolist() == [3, 0, 5]


@pytest.mark.parametrize("domain", NAMES)
def test_a_domain_counts_what_its_records_alone_route(domain, dropping_switch, labelled, domain_stats, tmp_path):
    alone = [r for r in labelled if r["domain"] == domain]
    stats = profile_small(dropping_switch, write_records(tmp_path / "d.jsonl", alone))
    for name, layer in stats.layers.items():
        assert torch.equal(domain_stats.layers[name].domain_routed[domain], layer.routed)
    described = domain_stats.data["domains"][domain]
    assert described == {key: stats.data[key] for key in ("num_records", "num_tokens")}


def test_domains_sum_to_all_routed_tokens(domain_stats):
    assert list(domain_stats.data["domains"]) == sorted(NAMES)
    assert_domains_sum_to_routed(domain_stats)


def test_domains_of_a_compressed_checkpoint_are_counted_too(exact, labelled_data):
    assert_domains_sum_to_routed(profile_small(exact, labelled_data))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_counts_do_not_depend_on_the_batch_size(batch_size, dropping_switch, labelled_data, domain_stats):
    assert counts_of(profile_small(dropping_switch, labelled_data, batch_size=batch_size)) == counts_of(domain_stats)


def test_counts_and_names_do_not_depend_on_the_order_of_the_records(dropping_switch, labelled, domain_stats, tmp_path):
    backwards = profile_small(dropping_switch, write_records(tmp_path / "d.jsonl", labelled[::-1]))
    assert counts_of(backwards) == counts_of(domain_stats)
    assert json.dumps(backwards.data["domains"]) == json.dumps(domain_stats.data["domains"])


def test_only_the_chosen_records_are_counted(switch, labelled_data):
    stats = profile_small(switch, labelled_data, samples=10)
    assert sum(d["num_records"] for d in stats.data["domains"].values()) == 10
    assert_domains_sum_to_routed(stats)


def test_the_field_changes_nothing_else(dropping_stats, domain_stats):
    for name, layer in dropping_stats.layers.items():
        other = domain_stats.layers[name]
        for key in ("routed", "dispatched", "gate_mass", "soft_mass", "router_logits_gram", "sequence_counts"):
            assert torch.equal(getattr(layer, key), getattr(other, key))
        assert torch.equal(layer.tokens().key, other.tokens().key)


# Where a domain comes from


def domains_in(*files) -> list[str]:
    return [record.domain for record in read_calibration(files)]


def test_a_single_file_without_domains_has_none(tmp_path, records):
    assert set(domains_in(write_records(tmp_path / "d.jsonl", records[:3]))) == {""}


def test_records_without_a_domain_among_others_are_other(tmp_path, records):
    file = write_records(
        tmp_path / "d.jsonl", [*named(records[:2], "law", ""), *({**records[2], "domain": d} for d in ("", None))]
    )
    assert domains_in(file) == ["law", "other", "other", "other"]


def test_records_of_several_files_go_by_the_stem_of_their_file_unless_they_name_a_domain(tmp_path, records):
    a = write_records(tmp_path / "news.v2.jsonl", named(records[:2], "", "law"))
    b = write_records(tmp_path / "code.jsonl", records[2:4])
    assert domains_in(a, b) == ["news.v2", "law", "code", "code"]


def test_files_of_the_same_stem_go_by_their_path(tmp_path, records):
    files = []
    for folder in ("news", "code"):
        (tmp_path / folder).mkdir()
        files.append(write_records(tmp_path / folder / "train.jsonl", records[:1]))
    assert domains_in(*files) == [str(tmp_path / "news" / "train"), str(tmp_path / "code" / "train")]


def test_a_file_given_twice_is_one_domain(tmp_path, records):
    file = write_records(tmp_path / "d.jsonl", records[:1])
    assert domains_in(file, file) == ["d", "d"]


def test_several_files_give_the_statistics_of_their_concatenation(switch, records, tmp_path):
    files = [write_records(tmp_path / f"{n}.jsonl", part) for n, part in (("b", records[:15]), ("a", records[15:]))]
    whole = profile_small(switch, write_records(tmp_path / "all.jsonl", records), samples=30, token_sample=60)
    stats = profile_small(switch, files, samples=30, token_sample=60)
    assert stats.data["source"] == f"{files[0]} + {files[1]}"
    assert stats.data["sha256"] == whole.data["sha256"]
    assert list(stats.data["domains"]) == ["a", "b"]
    for name, layer in whole.layers.items():
        assert torch.equal(stats.layers[name].routed, layer.routed)
        assert torch.equal(stats.layers[name].tokens().key, layer.tokens().key)
    assert_domains_sum_to_routed(stats)


def test_a_list_of_one_file_is_that_file(switch, data, stats):
    assert profile_small(switch, [data]).data == stats.data


def test_no_file_at_all_is_refused(switch):
    with pytest.raises(UserError, match="no calibration data"):
        profile_small(switch, [])


@pytest.mark.parametrize(("value", "kind"), [(0, "int"), (["news"], "list"), (True, "bool")])
def test_a_domain_that_is_no_string_is_named_with_file_and_line(value, kind, switch, records, tmp_path):
    file = write_records(tmp_path / "d.jsonl", [records[0], records[1] | {"domain": value}])
    with pytest.raises(DataError, match=rf"d\.jsonl, line 2: domain must be a string, got {kind}$"):
        profile_small(switch, file)


def test_more_than_256_domains_are_refused_with_their_number(tmp_path, records):
    urls = [records[0] | {"domain": f"https://example.org/{i}"} for i in range(256)]
    assert len(set(domains_in(write_records(tmp_path / "d.jsonl", urls)))) == 256
    with pytest.raises(UserError, match="257 different domains, at most 256"):
        domains_in(write_records(tmp_path / "d.jsonl", [*urls, records[1]]))  # the last is `other`


def test_other_readers_ignore_the_field(tmp_path, records):
    with_field = write_records(tmp_path / "with.jsonl", [r | {"domain": 5} for r in records])
    without = write_records(tmp_path / "without.jsonl", records)
    assert tokenize(read_records(with_field), None) == tokenize(read_records(without), None)


# Sums


def test_domains_add_up_by_name(dropping_switch, records, tmp_path):
    parts = named(records[:15], *NAMES), named(records[15:39], "law", "math")
    a, b = (
        profile_small(dropping_switch, write_records(tmp_path / f"{i}.jsonl", part)) for i, part in enumerate(parts)
    )
    total = a + b
    assert list(total.data["domains"]) == ["code", "law", "math", "news"]
    for name in LAYERS:
        ours, theirs, both = (s.layers[name].domain_routed for s in (a, b, total))
        assert torch.equal(both["code"], ours["code"])
        assert torch.equal(both["law"], ours["law"] + theirs["law"])
        assert torch.equal(both["math"], theirs["math"])
    assert total.data["domains"]["law"]["num_records"] == 5 + 12  # of 15 every third, of 24 every second
    assert_domains_sum_to_routed(total)


def test_the_parts_of_a_file_add_up_to_the_whole(dropping_switch, labelled, domain_stats, tmp_path):
    a, b = (
        profile_small(dropping_switch, write_records(tmp_path / f"{i}.jsonl", part))
        for i, part in enumerate((labelled[:7], labelled[7:]))
    )
    for total in (a + b, b + a):
        assert counts_of(total) == counts_of(domain_stats)
        assert total.data["domains"] == domain_stats.data["domains"]
    assert (a + b).digest == (b + a).digest


def test_a_side_without_domains_is_other_in_the_sum(domain_stats, dropping_stats):
    for total in (domain_stats + dropping_stats, dropping_stats + domain_stats):
        assert list(total.data["domains"]) == ["code", "law", "news", "other"]
        for name, layer in total.layers.items():
            assert torch.equal(layer.domain_routed["other"], dropping_stats.layers[name].routed)
        assert_domains_sum_to_routed(total)


def test_a_sum_without_domains_has_none(stats, switch, records, tmp_path):
    total = stats + profile_small(switch, write_records(tmp_path / "d.jsonl", records[:9]))
    assert "domains" not in total.data
    assert not any(layer.domain_routed for layer in total.layers.values())


# Files


def test_without_domains_neither_file_mentions_them(stats, tmp_path):
    stats.save(tmp_path / "stats")
    assert "domain" not in (tmp_path / "stats" / "stats.json").read_text()
    with safe_open(tmp_path / "stats" / "stats.safetensors", "pt") as stored:
        assert not [key for key in stored.keys() if "domain" in key]  # noqa: SIM118 - no mapping


def test_the_rows_of_the_stored_counts_follow_the_names_in_the_json(domain_stats, tmp_path):
    domain_stats.save(tmp_path / "stats")
    names = list(json.loads((tmp_path / "stats" / "stats.json").read_text())["data"]["domains"])
    assert names == ["code", "law", "news"]
    with safe_open(tmp_path / "stats" / "stats.safetensors", "pt") as stored:
        for name, layer in domain_stats.layers.items():
            counts = stored.get_tensor(f"{name}/domain_routed")
            assert (counts.dtype, counts.shape) == (torch.int64, (3, layer.num_experts))
            assert counts.tolist() == [layer.domain_routed[domain].tolist() for domain in names]


def test_hostile_names_survive_the_round_trip(switch, records, tmp_path):
    data = write_records(tmp_path / "d.jsonl", named(records, *HOSTILE))
    stats = profile_small(switch, data)
    stats.save(tmp_path / "stats")
    loaded = Stats.load(tmp_path / "stats")
    assert list(loaded.data["domains"]) == sorted(HOSTILE)
    assert loaded.data == stats.data
    assert counts_of(loaded) == counts_of(stats)
    assert loaded.digest == stats.digest
    assert set(loaded.domain_frame().domain) == set(HOSTILE)


def test_half_a_surrogate_pair_survives_the_round_trip(switch, records, tmp_path):
    stats = profile_small(switch, write_records(tmp_path / "d.jsonl", named(records[:2], "\ud800", "b")))
    stats.save(tmp_path / "stats")
    assert list(Stats.load(tmp_path / "stats").data["domains"]) == ["b", "\ud800"]


def test_the_digest_sees_which_domain_a_token_belongs_to(dropping_switch, labelled, domain_stats, tmp_path):
    swapped = profile_small(dropping_switch, write_records(tmp_path / "d.jsonl", named(labelled, *NAMES[::-1])))
    same_data = Stats(swapped.layers, domain_stats.data, domain_stats.checkpoint)
    assert same_data.digest != domain_stats.digest


@pytest.mark.parametrize("domains", [{"code": {}}, {"a": {}, "b": {}, "c": {}, "d": {}}, 5])
def test_names_that_do_not_fit_the_stored_counts_are_refused(domains, domain_stats, tmp_path):
    domain_stats.save(tmp_path / "stats")
    file = tmp_path / "stats" / "stats.json"
    content = json.loads(file.read_text())
    content["data"]["domains"] = domains
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"data\.domains"):
        Stats.load(tmp_path / "stats")


def test_names_without_stored_counts_are_refused(dropping_stats, tmp_path):
    dropping_stats.save(tmp_path / "stats")
    file = tmp_path / "stats" / "stats.json"
    content = json.loads(file.read_text())
    content["data"]["domains"] = {"code": {"num_records": 1, "num_tokens": 1}}
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="damaged statistics"):
        Stats.load(tmp_path / "stats")


# Frames


def layer_with(domain_routed: dict[str, list[int]]) -> LayerStats:
    counts = {name: torch.tensor(values) for name, values in domain_routed.items()}
    routed = torch.stack(list(counts.values())).sum(0)
    nothing = torch.zeros(0)
    return LayerStats(
        routed=routed, dispatched=routed, gate_mass=nothing, soft_mass=nothing, router_logits_gram=nothing,
        input_sum=nothing, input_abs_sum=nothing, input_square_sum=nothing, sequence_counts=nothing,
        sample=lambda: pytest.fail("no token is needed"), sample_size=1, domain_routed=counts,
    )  # fmt: skip


def test_the_domain_frame_has_shares_within_domain_and_layer():
    layer = layer_with({"code": [1, 3, 0, 0], "news": [0, 0, 0, 0]})
    frame = Stats({"l": layer}, {"domains": {"code": {}, "news": {}}}, {}).domain_frame()
    assert list(frame.columns) == ["domain", "layer", "expert", "routed", "usage_frequency"]
    assert frame.domain.tolist() == ["code"] * 4 + ["news"] * 4
    assert frame.expert.tolist() == [0, 1, 2, 3] * 2
    assert frame.routed.tolist() == [1, 3, 0, 0, 0, 0, 0, 0]
    assert frame.usage_frequency.tolist() == [0.25, 0.75, 0.0, 0.0] + [0.25] * 4  # 1/4, 3/4; no token: uniform


def test_the_domain_frame_sums_to_the_frame(domain_stats):
    totals = domain_stats.domain_frame().groupby(["layer", "expert"]).routed.sum()
    frame = domain_stats.to_frame().set_index(["layer", "expert"])
    assert totals.sort_index().tolist() == frame.routed.sort_index().tolist()


def test_the_domain_frame_without_domains_has_columns_and_no_row(stats):
    frame = stats.domain_frame()
    assert list(frame.columns) == ["domain", "layer", "expert", "routed", "usage_frequency"]
    assert len(frame) == 0


# Command line


def test_profile_takes_several_files(run, switch, records, tmp_path):
    files = [write_records(tmp_path / f"{name}.jsonl", records[:5]) for name in ("news", "code")]
    code, out, _ = run("profile", switch, "--data", files[0], "--data", files[1], "--out", tmp_path / "stats", "--json")
    described = json.loads(out)["data"]
    assert code == 0
    assert described["source"] == f"{files[0]} + {files[1]}"
    assert {name: d["num_records"] for name, d in described["domains"].items()} == {"code": 5, "news": 5}
    assert_domains_sum_to_routed(Stats.load(tmp_path / "stats"))


def test_profile_reads_the_domain_field(run, switch, labelled_data, tmp_path):
    code, out, _ = run("profile", switch, "--data", labelled_data, "--out", tmp_path / "stats", "--json")
    assert code == 0
    assert {name: d["num_records"] for name, d in json.loads(out)["data"]["domains"].items()} == {
        "code": 13, "law": 13, "news": 14  # 40 records in turn
    }  # fmt: skip


def test_profile_says_in_one_line_what_is_wrong_with_a_domain(run, switch, records, tmp_path):
    data = write_records(tmp_path / "d.jsonl", [records[0] | {"domain": {"name": "news"}}])
    code, _, err = run("profile", switch, "--data", data, "--out", tmp_path / "stats")
    assert code == 2
    assert err.strip().splitlines() == [f"msmoe: {data}, line 1: domain must be a string, got dict"]


# The embedded data


def test_every_record_of_the_demo_has_its_domain():
    records = read_records(CALIBRATION)
    for record in records:
        if "source" in record:
            assert record["source"].partition(":")[0].replace(" ", "_") == record["domain"]
    tasks = "movie_sentiment", "question_type", "sms_spam", "news_topic", "tweet_sentiment", "language"
    texts = "dialogue", "code", "reviews", "interface", "news", "tweets", "sms", "movies"
    assert Counter(r["domain"] for r in records) == dict.fromkeys(tasks, 32) | dict.fromkeys(texts, 40)


def test_the_demo_sends_unlike_texts_to_more_different_experts_than_like_ones():
    """By the total variation distance of the usage of two domains; `news` and `news_topic` hold the same articles."""
    stats = profile_small(CHECKPOINT, CALIBRATION, samples=512, batch_size=32)
    usage = stats.domain_frame().query("layer == 'encoder.block.3.layer.1.mlp'")
    usage = usage.pivot(index="domain", columns="expert", values="usage_frequency")
    distance = lambda a, b: float((usage.loc[a] - usage.loc[b]).abs().sum() / 2)
    assert distance("code", "dialogue") > 2 * distance("news", "news_topic")
