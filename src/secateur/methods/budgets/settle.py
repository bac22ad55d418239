"""From wishes to counts: whole groups, nobody below its minimum or above what it has, the total exact."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.errors import SecateurError
from secateur.methods.base import Amount, SiteInfo


def uniform_count(site: SiteInfo, keep: Amount) -> int:
    """What one site keeps under ``keep``: so much of each of its groups, rounded half up.

    Raises:
        SecateurError: more than there is, or fewer than the site's minimum.
    """
    groups = max(site.groups, 1)
    each = site.units // groups
    kept = keep.of(each)
    if not 0 <= kept <= each:
        raise SecateurError(
            f"{site.name} cannot keep {kept} of {each}",
            received=keep.share if keep.share is not None else keep.count,
            works=f"a share from 0.0 to 1.0, or a count from 0 to {each}",
        )
    if groups * kept < site.minimum:
        raise SecateurError(
            f"{site.name} needs at least {site.minimum} of its {site.units} units",
            received=f"{groups * kept} kept",
            works=f"keep at least {site.minimum}",
        )
    return groups * kept


def total_count(sites: Sequence[SiteInfo], keep: Amount) -> int:
    """What all sites keep together.

    Where units are free to move (no groups), a share is of all of them together: half of 30 x 3 heads is 45,
    not 30 x 2. Where sites are single units (layers), a count is of all sites. Otherwise the total is
    what ``uniform`` would keep.
    """
    free = all(site.groups <= 1 for site in sites)
    units = sum(site.units for site in sites)
    single = all(site.units == 1 for site in sites)
    if free and (keep.count is None or single):
        kept = keep.of(units)
        if not 0 <= kept <= units:
            raise SecateurError(
                f"cannot keep {kept} of {units}",
                received=keep.share if keep.share is not None else keep.count,
                works=f"a share from 0.0 to 1.0, or a count from 0 to {units}",
            )
        return kept
    return sum(uniform_count(site, keep) for site in sites)
