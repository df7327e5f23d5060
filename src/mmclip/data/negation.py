"""What a cue such as "no" or "may represent" says of the findings around it."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from mmclip.data.sample import Entity, EntityStatus


class Mark(NamedTuple):
    """Words that are no entity but bear on one: a cue, or the end of a clause."""

    start: int
    end: int
    before: EntityStatus | None = None  # what it says of the findings after it in the clause
    after: EntityStatus | None = None  # of the findings before it in the clause
    nearest: bool = False  # `after` holds for the last finding before it only


def with_status(entities: Sequence[Entity], marks: Sequence[Mark]) -> list[Entity]:
    """Gives each finding the status that the marks around it say.

    A finding heeds the last mark before it and the first mark after it, and of these two the
    nearer; every mark ends the reach of the one beyond it. A cue inside the finding goes first.

    Args:
        entities: In order and disjoint.
        marks: In order and disjoint.

    Source: after NegEx (Chapman et al. 2001) and ConText (Harkema et al. 2009): cues with a
        direction, pseudo cues and terminating words; nearest mark instead of a fixed window [ours].
    """
    starts, ends = [m.start for m in marks], [m.end for m in marks]
    findings = [e for e in entities if e.kind == "finding"]
    follower = {a.start: b.start for a, b in pairwise(findings)}
    out = []
    for entity in entities:
        if entity.kind != "finding":
            out.append(entity)
            continue
        first, last = bisect_left(starts, entity.start), bisect_right(ends, entity.end)
        heard: list[tuple[int, EntityStatus, Mark]] = [
            (0, m.before, m) for m in marks[first:last] if m.before
        ]
        prior = bisect_right(ends, entity.start) - 1
        if prior >= 0 and (said := marks[prior].before):
            heard.append((entity.start - marks[prior].end, said, marks[prior]))
        nxt = bisect_left(starts, entity.end)
        if nxt < len(marks) and (said := marks[nxt].after):
            between = follower.get(entity.start, marks[nxt].end) < marks[nxt].start
            if not (marks[nxt].nearest and between):
                heard.append((marks[nxt].start - entity.end, said, marks[nxt]))
        if heard:
            _, status, mark = min(heard, key=lambda h: (h[0], h[1]))
            entity = replace(entity, status=status, cue=(mark.start, mark.end))
        out.append(entity)
    return out
