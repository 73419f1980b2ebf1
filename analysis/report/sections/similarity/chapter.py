"""How similar experts are: matrices in the order of a clustering, dendrograms, and the groups of the plan on them."""

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from msmoe.analysis.report.artefacts import Artefacts
from msmoe.analysis.report.charts import short_names
from msmoe.analysis.report.document import Block, Column, Figure, Note, Section, Table
from msmoe.analysis.report.sections.similarity.alignment import alignment_blocks
from msmoe.analysis.report.sections.similarity.charts import Drawing, interactive, small_multiples
from msmoe.analysis.report.sections.similarity.images import draw
from msmoe.analysis.report.sections.similarity.matrices import (
    Clustering,
    Similarities,
    cluster,
    find_similarities,
    group_labels,
    off_diagonal,
    same_group,
)

MAX_CELLS = 12_000  # of all layers together; above, and above 48 experts, a matrix is an image
MAX_CELL_EXPERTS = 48
BINS = 20
REMOVED = "removed"


def section(artefacts: Artefacts, say: Callable[[str], None]) -> Section | None:
    similarities = find_similarities(artefacts, say)
    alignment = alignment_blocks(artefacts)
    if similarities is None and not alignment:
        return None
    if similarities is None:
        missing = Note("No statistics: give the directory that `msmoe profile` wrote to see how similar experts are.")
        return Section("similarity", "Expert similarity", "", (missing, *alignment))
    if not similarities.matrices:
        unseen = Note("No token of the calibration data reached an MoE layer: there are no similarities.")
        return Section("similarity", "Expert similarity", "", (unseen, *alignment))
    groups = plan_groups(artefacts, similarities.matrices)
    frame = layer_frame(similarities.matrices, groups)
    blocks: list[Block] = [Note(similarities.note)] if similarities.note else []
    if any(len(matrix) > 1 for matrix in similarities.matrices.values()):
        blocks.append(matrix_figure(similarities, groups, say))
    blocks.append(layer_table(frame))
    return Section("similarity", "Expert similarity", lead(similarities, frame), (*blocks, *alignment))


def plan_groups(artefacts: Artefacts, matrices: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Group of each expert (E,), by layer, of the layers that the plan changes."""
    planned = artefacts.plan.plan.layers if artefacts.plan else {}
    return {
        name: group_labels(planned[name])
        for name, matrix in matrices.items()
        if name in planned and planned[name].num_experts == len(matrix)
    }


def layer_frame(matrices: Mapping[str, np.ndarray], groups: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """One row per layer: similarities (0 to 1) over its pairs of experts; a and b are the most similar pair."""
    rows = []
    for name, matrix in matrices.items():
        pairs = off_diagonal(matrix)
        row = {"layer": name, "experts": len(matrix), "a": None, "b": None, "pair": None}
        row |= dict.fromkeys(("mean", "highest", "lowest", "inside", "between", "difference"), float("nan"))
        if len(pairs):
            upper = np.triu_indices(len(matrix), 1)
            a, b = int(upper[0][pairs.argmax()]), int(upper[1][pairs.argmax()])
            row |= {"mean": pairs.mean(), "highest": pairs.max(), "lowest": pairs.min()}
            row |= {"a": a, "b": b, "pair": f"{a} and {b}"}
        if name in groups:
            row |= inside_and_between(matrix, groups[name])
        rows.append(row)
    return pd.DataFrame(rows)


def inside_and_between(matrix: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean similarity of pairs of one group, and of pairs of two; pairs with a removed expert are neither."""
    upper = np.triu_indices(len(matrix), 1)
    same, values = same_group(labels)[upper], matrix[upper]
    grouped = (labels[upper[0]] >= 0) & (labels[upper[1]] >= 0)
    inside, between = values[same], values[grouped & ~same]
    means = {"inside": inside.mean() if len(inside) else np.nan, "between": between.mean() if len(between) else np.nan}
    return {name: float(value) for name, value in means.items()} | {
        "difference": float(means["inside"] - means["between"])
    }


def lead(similarities: Similarities, frame: pd.DataFrame) -> str:
    known = frame.dropna(subset=["mean"])
    if known.empty:
        return "Every layer has one expert: there is nothing to compare."
    most = known.loc[known.highest.idxmax()]
    text = (
        f"By {similarities.base} ({similarities.metric}), pairs of experts have a mean similarity of "
        f"{known['mean'].min():.3f} to {known['mean'].max():.3f} by layer; the most similar pair is experts "
        f"{most.pair} of {short_names(list(frame.layer))[most.layer]} with {most.highest:.3f}."
    )
    compared = frame.dropna(subset=["difference"])
    if compared.empty:
        return text
    better = int((compared.difference > 0).sum())
    return (
        f"{text} Pairs within a group of the plan are more similar than pairs of different groups in {better} of "
        f"{len(compared)} layers (on average {compared.inside.mean():.3f} against {compared.between.mean():.3f})."
    )


def matrix_figure(similarities: Similarities, groups: Mapping[str, np.ndarray], say: Callable[[str], None]) -> Figure:
    say("clustering")
    matrices = similarities.matrices
    clusterings = {name: cluster(matrix) for name, matrix in matrices.items()}
    short = short_names(list(matrices))
    low, high = value_range(matrices)
    ordered = {short[name]: matrix[np.ix_(order, order)] for name, matrix in matrices.items()
               if (order := clusterings[name].order) is not None}  # fmt: skip
    largest = max(map(len, matrices.values()))
    as_cells = largest <= MAX_CELL_EXPERTS and sum(len(m) ** 2 for m in matrices.values()) <= MAX_CELLS
    drawing = Drawing(
        title=f"{similarities.base}, {similarities.metric}",
        low=low,
        high=high,
        num_experts=largest,
        cells=cell_frame(matrices, clusterings, groups) if as_cells else None,
        images=None if as_cells else pd.DataFrame(draw(ordered, low, high), columns=["layer", "url"]),
        experts=expert_frame(clusterings, groups),
        joins=join_frame(clusterings),
        pairs=pair_frame(matrices, groups, low, high),
    )
    return Figure(
        "similarity-matrices",
        "Similarity of experts",
        reading(as_cells=as_cells, has_groups=bool(groups)),
        interactive(drawing),
        small_multiples(drawing),
    )


def reading(*, as_cells: bool, has_groups: bool) -> str:
    shown = "Each cell is the similarity of two experts" if as_cells else (
        "Each image is the matrix of a layer, averaged over blocks where it is large: the similarity of two experts"
    )  # fmt: skip
    marks = "full cells are pairs that the plan puts into one group, " if as_cells else ""
    marks = f"; {marks}orange marks dominant experts" if has_groups else ""
    follow = ", and whether groups follow them" if has_groups else ""
    return (
        f"{shown} (0 to 1, bright is similar), in the order of an average-linkage clustering of 1 - similarity{marks}. "
        f"Look for bright blocks along the diagonal{follow}."
    )


def value_range(matrices: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """Lowest and highest similarity of a pair, apart from one another."""
    values = np.concatenate([off_diagonal(matrix) for matrix in matrices.values()])
    low, high = float(values.min()), float(values.max())
    return (low, high) if high - low > 1e-6 else (max(low - 0.01, 0.0), max(low - 0.01, 0.0) + 0.02)


def cell_frame(
    matrices: Mapping[str, np.ndarray], clusterings: Mapping[str, Clustering], groups: Mapping[str, np.ndarray]
) -> pd.DataFrame:
    """Cells off the diagonal: column x and row y as places in the clustering, experts a and b, similarity s, kind k."""
    short, frames = short_names(list(matrices)), []
    for name, matrix in matrices.items():
        order, count = clusterings[name].order, len(matrix)
        y, x = np.nonzero(~np.eye(count, dtype=bool))
        frame = {
            "layer": short[name],
            "n": count,
            "x": x,
            "y": y,
            "a": order[y],
            "b": order[x],
            "s": matrix[order[y], order[x]],
        }
        kind = np.where(same_group(groups[name])[order[y], order[x]], "yes", "no") if name in groups else "no plan"
        frames.append(pd.DataFrame(frame | {"k": kind}))
    return pd.concat(frames, ignore_index=True)


def expert_frame(clusterings: Mapping[str, Clustering], groups: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Experts at their places (0 to 1) with the dominant expert g of their group, groups from left to right as r."""
    short, frames = short_names(list(clusterings)), []
    for name, clustering in clusterings.items():
        order, count = clustering.order, len(clustering.order)
        frame = pd.DataFrame({"layer": short[name], "at": ((np.arange(count) + 0.5) / count).round(4), "expert": order})
        labels = groups[name][order] if name in groups else None
        frame["g"] = "" if labels is None else [str(g) if g >= 0 else REMOVED for g in labels]
        frame["d"] = 0 if labels is None else (labels == order).astype(int)
        place = frame.assign(last=frame.g == REMOVED).groupby("g").agg(last=("last", "max"), at=("at", "mean"))
        ranked = place.sort_values(["last", "at"]).index
        frame["r"] = frame.g.map({g: rank for rank, g in enumerate(ranked)})
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def join_frame(clusterings: Mapping[str, Clustering]) -> pd.DataFrame:
    """Joins of the dendrograms: branches at x1 and x2 (0 to 1) from heights h1 and h2 up to h."""
    short, frames = short_names(list(clusterings)), []
    for name, clustering in clusterings.items():
        joins = pd.DataFrame(clustering.joins, columns=["x1", "h1", "x2", "h2", "h"])
        joins[["x1", "x2"]] /= max(len(clustering.order), 1)
        frames.append(joins.round(4).assign(layer=short[name]))
    return pd.concat(frames, ignore_index=True)


def pair_frame(
    matrices: Mapping[str, np.ndarray], groups: Mapping[str, np.ndarray], low: float, high: float
) -> pd.DataFrame:
    """Shares of pairs by similarity, from y to y2: those of one group and the others, or all where there is no plan."""
    short, rows = short_names(list(matrices)), []
    edges = np.linspace(low, high, BINS + 1)
    for name, matrix in matrices.items():
        values = off_diagonal(matrix)
        same = same_group(groups[name])[np.triu_indices(len(matrix), 1)] if name in groups else None
        kinds = {"all pairs": values} if same is None else {"one group": values[same], "other pairs": values[~same]}
        for place, (kind, chosen) in enumerate(kinds.items()):
            shares = np.histogram(chosen, edges)[0] / max(len(chosen), 1)
            thick = (edges[1] - edges[0]) / len(kinds)
            for start, share in zip(edges, shares, strict=False):
                y = start + place * thick
                rows.append((short[name], kind, y, y + thick, share, start, start + edges[1] - edges[0]))
    return pd.DataFrame(rows, columns=["layer", "kind", "y", "y2", "share", "from", "to"])


def layer_table(frame: pd.DataFrame) -> Table:
    return Table(
        "similarity-layers",
        "Similarity by layer",
        "Over all pairs of different experts of a layer, 0 to 1; inside and between are of the plan's groups, and a "
        "dash says that there are no such pairs.",
        frame,
        (
            Column("layer", "layer"),
            Column("experts", "experts", "integer"),
            Column("mean", "mean", "number"),
            Column("lowest", "lowest", "number"),
            Column("highest", "highest", "number"),
            Column("pair", "most similar pair", "text", "indices of the two experts"),
            Column("inside", "inside", "number", "mean over pairs of one group"),
            Column("between", "between", "number", "mean over pairs of different groups, removed experts left out"),
            Column("difference", "difference", "number", "inside minus between"),
        ),
    )
