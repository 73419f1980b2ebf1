"""Records of `msmoe evaluate`, checked before chapters read them."""

from msmoe.comparison.fields import Field
from msmoe.errors import UserError


def read_records(content: Field) -> tuple[dict, ...]:
    """Records of `msmoe evaluate`, checked.

    Raises:
        UserError: naming the field that is missing or wrong.
    """
    try:
        elements = content["results"].elements()
        for record in elements:
            check_record(record)
    except UserError as error:
        raise UserError(f"damaged: {error}") from error
    return tuple(record.value for record in elements)


def check_record(record: Field) -> None:
    """Raise `UserError` for a record of results.json that lacks a field, or has a wrong one."""
    for name in ("checkpoint", "task"):
        record[name].text()
    for _, metric in record["metrics"].items():
        metric["value"].number()
        metric["num_examples"].integer()
        interval = metric["ci95"].elements()
        if len(interval) != 2:
            raise metric["ci95"].fail("a list of two numbers")
        for end in interval:
            end.number()
    for name in ("num_parameters", "bytes", "peak_memory_bytes"):
        if record[name].value is not None:
            record[name].integer()
    for name in ("majority_share", "flops_per_token", "seconds"):
        if record[name].value is not None:
            record[name].number(least=0)
    if (source := record.get("source")) is not None:
        source.text()
