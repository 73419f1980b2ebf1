"""In which export a comparison measures each method: the family's own class where it holds what the method makes."""

from msmoe.errors import UserError, choose
from msmoe.families import Family
from msmoe.planning.methods import METHODS, resolve, variant


def settled_export(asked: str | None, family: Family) -> str | None:
    """The export of a comparison; None of encoder-decoders, which are measured as `exact` alone.

    Raises:
        UserError: for another one.
    """
    if not family.is_causal:
        if asked not in (None, "exact"):
            raise UserError(f"a comparison measures encoder-decoders as exact, got --export {asked}")
        return None
    return choose("export", asked or family.exports[0], family.exports)


def export_of(label: str, export: str | None) -> str:
    """Export of a method: the comparison's, or `exact` where that cannot hold it.

    A family's own class has as many experts in every layer, at least as many as a token goes to, dense ones alone.
    """
    if export != "native":
        return "exact"
    method, choices = variant(label)
    parameters = resolve(method, choices)
    needs_exact = (
        METHODS[method].fixed == "one"
        or parameters.others == "mean-output"
        or parameters.factors is not None
        or choices.get("budget") not in (None, "uniform")
    )
    return "exact" if needs_exact else "native"
