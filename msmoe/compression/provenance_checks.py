"""What `msmoe.json` of a compressed checkpoint says, checked before anything reads it."""

from msmoe.comparison.fields import Field
from msmoe.errors import UserError

PAIR = ("before", "after")


def check_provenance(provenance: dict, name: str) -> None:
    """Check the fields that are read, where they are there.

    Args:
        name: of the file, for the error.

    Raises:
        UserError: naming the field that is wrong.
    """
    about = Field(provenance)
    try:
        if (source := about.get("source")) is not None:
            for field in ("model_type", "fingerprint"):
                source[field].text()
        check_numbers(about.get("bytes"), ("source", "predicted", "written"))
        check_numbers(about.get("num_parameters"), ("source", "predicted", "written"))
        if (export := about.get("export")) is not None:
            export.text()
        for group in elements(about.get("groups")):
            check_group(group)
        for _, rates in items(about.get("drop_rates")):
            check_numbers(rates, PAIR)
        for _, count in items(about.get("dropped")):
            count.integer()
        check_factors(about.get("factors"))
        check_recovery(about.get("recovery"))
        check_statistics(about.get("stats"))
    except UserError as error:
        raise UserError(f"{name} is damaged: {error}") from error


def check_group(group: Field) -> None:
    group["layer"].text()
    for member in group["members"].elements():
        member.integer()
    if (dominant := group.get("dominant")) is not None:
        dominant.integer()
    for member, match in items(group.get("alignment")):
        if not member.isdecimal():
            raise match.fail("named by the index of an expert")
        check_numbers(match, ("share_moved", "objective_before", "objective_after"))
    check_numbers(group.get("refit"), ("error_before", "error_after", "held_out_square"))


def check_factors(factors: Field | None) -> None:
    if factors is None:
        return
    items(factors.get("options"))
    check_statistics(factors.get("stats"))
    for matrix in elements(factors.get("matrices")):
        for name in ("layer", "matrix"):
            if (text := matrix.get(name)) is not None:
                text.text()
        check_numbers(matrix, ("stable_rank", "stable_rank_before"))


def check_recovery(recovery: Field | None) -> None:
    if recovery is None:
        return
    check_numbers(recovery, ("steps", "best_step"))
    check_numbers(recovery.get("num_records"), ("train",))
    check_numbers(recovery.get("validation_loss"), PAIR)


def check_statistics(stats: Field | None) -> None:
    """A reference to statistics: the digest, or those of their parts."""
    if stats is None:
        return
    if (digest := stats.get("sha256")) is not None:
        digest.text()
    for part in elements(stats.get("parts")):
        part.text()


def check_numbers(field: Field | None, names: tuple[str, ...]) -> None:
    """Numbers of an object, where they are there."""
    if field is None:
        return
    for name in names:
        if (value := field.get(name)) is not None:
            value.number()


def elements(field: Field | None) -> list[Field]:
    return field.elements() if field is not None else []


def items(field: Field | None) -> list[tuple[str, Field]]:
    return field.items() if field is not None else []
