"""Which units of a layout may sleep while fewer users are there. Pure."""

from brigade.plan.search import Layout, joined


def night_of(layout: Layout, users: float) -> Layout:
    """The cheapest part of a layout, in whole units of each kind, that keeps the promise for so many users."""
    return min((x for x in parts(layout) if x.users >= users * (1 - 1e-9)), key=lambda x: x.hourly)


def parts(layout: Layout) -> list[Layout]:
    """The layout with every smaller number of its units, itself included; one unit of each kind at least."""
    if len(layout.units) == 1:
        ((u, most),) = layout.units
        return [Layout(((u, k),), u.nodes * k, u.users * k, u.rate * k) for k in range(1, most + 1)]
    (p, most_p), (d, most_d) = layout.units
    return [joined(p, i, d, j) for i in range(1, most_p + 1) for j in range(1, most_d + 1)]
