"""What a running stage trains of a model, as `row_oracle.RowOracle` takes it."""

from helpers import factors_now


def rows_now(expander, prefix: str = "") -> dict:
    """The trained indices along an axis of every weight, and of the bias that goes with it."""
    trained = {}
    for own in expander.training.rows.values():
        name = own.site.name.split("[")[0].removeprefix(prefix)
        indices, key = own.site.indices(own.units).tolist(), (name, own.site.axis)
        trained[key] = [*trained.get(key, []), *indices]
        if len(own.parts) == 2:
            bias = name.removesuffix("weight") + "bias", 0
            trained[bias] = [*trained.get(bias, []), *indices]
    return trained


def operators_now(expander, prefix: str = "") -> list[dict]:
    """The operators with indices of the whole weights."""
    found = factors_now(expander, prefix)
    for operator, site in zip(found, expander.sites, strict=False):
        chosen = expander.selections[site.group.name]
        operator["positive"], operator["negative"] = (site.indices(units) for units in chosen)
    return found
