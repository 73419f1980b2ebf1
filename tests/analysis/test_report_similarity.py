import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import vl_convert
from msmoe.analysis.report.artefacts import CheckpointFolder, gather
from msmoe.analysis.report.charts import to_spec
from msmoe.analysis.report.document import Figure, Note, Table
from msmoe.analysis.report.sections.similarity import chapter
from msmoe.analysis.report.sections.similarity import images as similarity_images
from msmoe.analysis.report.sections.similarity import matrices as similarity_matrices
from msmoe.analysis.report.sections.similarity.alignment import layer_frame as alignment_layers
from msmoe.analysis.report.sections.similarity.alignment import member_frame
from msmoe.analysis.report.sections.similarity.matrices import cluster, find_similarities
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform
from tiny import LAYERS, layer_plan, plan_for

from msmoe.checkpoint import Checkpoint
from msmoe.planning.parameters import Parameters
from msmoe.planning.similarity import similarity

HOSTILE = '</script><b onload="x">\u202e\n' + 1000 * "y"
MATRIX = np.array([[1, 0.9, 0.2], [0.9, 1, 0.4], [0.2, 0.4, 1]])


def silent(note):
    pass


def blocks(section, kind):
    return [block for block in section.blocks if isinstance(block, kind)]


def render(section):
    for figure in blocks(section, Figure):
        for chart in (figure.chart, figure.still or figure.chart):
            assert "<svg" in vl_convert.vegalite_to_svg(to_spec(chart, title="Title"))


@pytest.fixture
def two_groups(switch):
    """Experts 0, 1, 2 and 3, 4, 5 of the second layer merged; the others left alone."""
    return plan_for(Checkpoint(switch), {LAYERS[1]: layer_plan(6, [0, 1, 2], [3, 4, 5])})


def test_a_layers_row_names_mean_extremes_and_the_most_similar_pair():
    row = chapter.layer_frame({"a": MATRIX}, {}).iloc[0]
    assert row["mean"] == pytest.approx((0.9 + 0.2 + 0.4) / 3)
    assert (row.highest, row.lowest, row.pair) == (0.9, 0.2, "0 and 1")
    assert np.isnan(row.inside)


def test_inside_is_over_pairs_of_one_group_and_between_leaves_removed_experts_out():
    matrix = np.eye(4) + 0.1  # pairs with expert 3, which is removed: 0.1, and must not count
    matrix[0, 1] = matrix[1, 0] = 0.8
    matrix[0, 2] = matrix[2, 0] = 0.3
    matrix[1, 2] = matrix[2, 1] = 0.5
    row = chapter.layer_frame({"a": matrix}, {"a": np.array([0, 0, 2, -1])}).iloc[0]
    assert row.inside == pytest.approx(0.8)
    assert row["between"] == pytest.approx((0.3 + 0.5) / 2)
    assert row.difference == pytest.approx(0.4)


def test_the_dendrogram_is_that_of_scipy():
    values = np.random.default_rng(0).random((9, 9))
    matrix = (values + values.T) / 2
    np.fill_diagonal(matrix, 1)
    found = cluster(matrix)
    tree = linkage(squareform(1 - matrix, checks=False), "average", optimal_ordering=True)
    drawn = dendrogram(tree, no_plot=True)
    assert found.order.tolist() == drawn["leaves"]
    expected = sorted(
        (x[0] / 10, y[0], x[2] / 10, y[3], y[1]) for x, y in zip(drawn["icoord"], drawn["dcoord"], strict=True)
    )
    np.testing.assert_allclose(sorted(map(tuple, found.joins)), expected, atol=1e-12)


def test_a_layer_of_one_expert_has_no_joins():
    assert cluster(np.ones((1, 1))).joins.shape == (0, 5)


def test_statistics_alone_give_router_logits(stats):
    found = find_similarities(gather([stats]), silent)
    gram = stats.layers[LAYERS[0]].router_logits_gram
    norm = gram.diagonal().sqrt()
    expected = (1 + gram / (norm[:, None] * norm[None, :])) / 2
    assert (found.base, found.metric, found.note) == ("router-logits", "cosine", "")
    np.testing.assert_allclose(found.matrices[LAYERS[0]], expected.numpy(), atol=1e-12)


def test_the_base_of_the_plan_is_shown_where_weights_are_there(switch, stats, two_groups):
    plan = replace(two_groups, parameters=Parameters(similarity="expert-output", metric="euclidean"))
    artefacts = gather([switch, stats, plan])
    found = find_similarities(artefacts, silent)
    expected = similarity(artefacts.planner.view(LAYERS[2]), base="expert-output", metric="euclidean")
    assert (found.base, found.note) == ("expert-output", "")
    np.testing.assert_array_equal(found.matrices[LAYERS[2]], expected.numpy())


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        ("expert-output", "give the original checkpoint"),
        ("random", "random numbers show nothing"),
        ("gradient", "--gradients"),
        (HOSTILE, "does not know it"),
    ],
)
def test_a_base_that_cannot_be_had_falls_back_to_router_logits_and_says_why(stats, two_groups, base, reason):
    plan = replace(two_groups, parameters=Parameters(similarity=base))
    section = chapter.section(gather([stats, plan]), silent)
    assert reason in blocks(section, Note)[0].text
    assert section.lead.startswith("By router-logits (cosine)")


def test_a_base_that_takes_too_long_falls_back(switch, stats, two_groups, monkeypatch):
    monkeypatch.setattr(similarity_matrices, "MAX_WORK", 1)
    plan = replace(two_groups, parameters=Parameters(similarity="weight"))
    found = find_similarities(gather([switch, stats, plan]), silent)
    assert found.base == "router-logits"
    assert "would take long" in found.note


def test_cells_are_every_pair_twice_with_its_value_and_whether_the_plan_merges_it(stats, two_groups):
    found = find_similarities(gather([stats, two_groups]), silent)
    groups = chapter.plan_groups(gather([stats, two_groups]), found.matrices)
    clusterings = {name: cluster(matrix) for name, matrix in found.matrices.items()}
    cells = chapter.cell_frame(found.matrices, clusterings, groups)
    mine = cells[cells.layer == "encoder 3"]
    assert len(mine) == 6 * 5
    for cell in mine.itertuples():
        assert cell.s == found.matrices[LAYERS[1]][cell.a, cell.b]
        assert cell.k == ("yes" if (cell.a < 3) == (cell.b < 3) else "no")
        assert clusterings[LAYERS[1]].order[cell.x] == cell.b
    assert set(cells[cells.layer == "encoder 1"].k) == {"no plan"}


def test_shares_of_pairs_sum_to_one_for_each_kind():
    frame = chapter.pair_frame({"a": MATRIX}, {"a": np.array([0, 0, 2])}, 0.2, 0.9)
    assert frame.groupby("kind").share.sum().to_dict() == pytest.approx({"one group": 1, "other pairs": 1})


def test_images_run_from_the_first_to_the_last_colour_and_average_blocks():
    shades = similarity_images.levels(np.array([[9, 0.0], [0.5, 9]]), 0.0, 1.0, side=2)
    assert shades.tolist() == [[31, 0], [16, 31]]  # round(0.5 * 31) = 16
    blocks_of_two = np.kron(np.array([[1.0, 0.0], [0.0, 1.0]]), np.ones((2, 2)))
    assert similarity_images.levels(blocks_of_two, 0.0, 1.0, side=2).tolist() == [[31, 0], [0, 31]]


def test_figures_draw_with_cells_and_with_images(switch, stats, two_groups, exact, monkeypatch):
    artefacts = gather([switch, stats, two_groups, exact])
    render(chapter.section(artefacts, silent))
    monkeypatch.setattr(chapter, "MAX_CELLS", 0)
    section = chapter.section(artefacts, silent)
    assert "data:image/png;base64," in json.dumps(to_spec(section.blocks[0].chart))
    render(section)


def test_the_chapter_stays_small_for_many_layers_and_experts():
    rng = np.random.default_rng(0)
    matrices = {f"encoder.block.{i}.mlp": rng.random((256, 256)) for i in range(24)}
    images = similarity_images.draw(matrices, 0.0, 1.0)
    assert sum(len(url) for _, url in images) < 300_000


def test_alignment_is_what_the_checkpoint_remembers(exact):
    artefacts = gather([exact])
    entries = [g for g in artefacts.compressed[0].provenance["groups"] if "alignment" in g]
    first = entries[0]["alignment"]
    members = member_frame(artefacts.compressed)
    assert len(members) == sum(len(g["alignment"]) for g in entries)
    row = members.iloc[0]
    assert row.after == first[str(row.expert)]["objective_after"]
    layers = alignment_layers(members).set_index("name")
    name = entries[0]["layer"]
    matches = [m for g in entries if g["layer"] == name for m in g["alignment"].values()]
    assert layers.moved[name] == pytest.approx(np.mean([m["share_moved"] for m in matches]))
    gains = [m["objective_after"] - m["objective_before"] for m in matches]
    assert layers.gain[name] == pytest.approx(np.mean(gains))
    assert layers.least[name] == pytest.approx(min(gains))


def test_without_statistics_alignment_is_shown_with_a_note(exact):
    section = chapter.section(gather([exact]), silent)
    assert "msmoe profile" in blocks(section, Note)[0].text
    assert [figure.name for figure in blocks(section, Figure)] == ["similarity-alignment"]


def test_there_is_no_chapter_without_statistics_or_alignment(switch):
    assert chapter.section(gather([switch]), silent) is None


def test_alignment_of_several_checkpoints_draws(exact, native):
    section = chapter.section(gather([exact, native]), silent)
    frame = next(table.frame for table in blocks(section, Table) if table.name == "similarity-alignment-layers")
    assert frame.checkpoint.nunique() == 2
    render(section)


def test_two_checkpoints_of_one_name_are_told_apart(exact):
    folder = gather([exact]).compressed[0]
    again = CheckpointFolder(folder.label, folder.checkpoint, folder.summary, folder.provenance, folder.plan)
    assert member_frame((folder, again)).checkpoint.nunique() == 2


def test_hostile_names_are_data_only(stats):
    layers = {f"{HOSTILE}{i}": layer for i, layer in enumerate(stats.layers.values())}
    section = chapter.section(gather([replace(stats, layers=layers)]), silent)
    figure = blocks(section, Figure)[0]
    text = json.dumps({key: value for key, value in to_spec(figure.chart).items() if key not in ("datasets", "params")})
    assert "onload" not in text
    render(section)


def test_an_expert_without_tokens_does_not_break_the_matrix(stats):
    layer = stats.layers[LAYERS[0]]
    gram = layer.router_logits_gram.clone()
    gram[0], gram[:, 0] = 0, 0
    changed = {LAYERS[0]: replace(layer, router_logits_gram=gram)}
    found = find_similarities(gather([replace(stats, layers=changed)]), silent)
    assert torch.tensor(found.matrices[LAYERS[0]])[0].tolist() == [1, 0, 0, 0, 0, 0]


def test_the_table_has_every_layer(stats):
    section = chapter.section(gather([stats]), silent)
    assert blocks(section, Table)[0].frame.layer.tolist() == list(LAYERS)
