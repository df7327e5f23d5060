"""What a cue such as "no" or "may represent" says of the findings around it.

All places are numbers of words. Source: after NegEx (Chapman et al. 2001) and ConText (Harkema et
al. 2009): cues with a direction, pseudo cues and terminating words; the nearest mark instead of a
fixed window, and the ends of lists, are ours.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

from mmclip.data.sample import EntityStatus
from mmclip.data.words import ListWords

_OR, _AND = frozenset(("or", "nor", "/")), frozenset(("and", "&"))
_CLAUSE_ENDS = frozenset((*_OR, *_AND, ",", ".", ";", ":", "but", "which", "that", "with"))
_SINGULAR, _PLURAL = frozenset(("is", "was", "has")), frozenset(("are", "were", "have", ":"))
_DENIALS = frozenset(("no", "not", "without", "nor"))
_LISTING = frozenset(("differential", "include", "includes", "including", "either"))
_IN = frozenset(("in", "within", "inside", "from"))
_CIRCUMSTANCE = frozenset(("setting", "context"))
_DEFINITE = frozenset(("the", "this", "that", "these", "those", "its"))
_DENIED_SIZE = frozenset(("large", "massive", "huge"))  # "no mass [or] large effusion"
_PLACE_WORDS = 3  # [chosen: "in the known right upper lobe mass" fits; lobes are no words of it]
_CONJUNCTION_WORDS = 8  # [chosen: "and a small left-sided layering ..." fits]
_LIST_WORDS = 60  # [chosen: longer than any list of a report; keeps the time linear]
_ALTERNATIVE_WORDS = 5  # [chosen: "or mild chronic basilar scarring" fits]
_VERB_WORDS = 7  # [chosen: "opacity in the left lower lobe base is ..." fits]


class Span(NamedTuple):
    """A finding, from word `start` up to word `end`, and what it is a mention of."""

    start: int
    end: int
    concept: str


class Mark(NamedTuple):
    """Words that bear on findings: a cue, or the end of a clause.

    Attributes:
        before: What it says of the findings after it in the clause.
        after: What it says of the findings before it, from word `reach` on.
        is_either: `before` holds only where the clause has no finding before the mark, `after`
            only where it has one.
        is_copula: `after` holds only where no finding follows the mark directly, else `before`.
        is_suffix: `after` holds only where a finding ends at the mark ("effusion-free").
        is_between: `after` holds for one finding, and those that "or" joins to it.
        is_purpose: What it joins to a denied finding is denied, too ("no opacity to suggest").
        is_resolution: `before` holds unless what follows its findings takes it back.
        is_outcome: Takes a resolution back ("is incomplete"); says nothing else.
    """

    start: int
    end: int
    before: EntityStatus | None = None
    after: EntityStatus | None = None
    is_either: bool = False
    is_between: bool = False
    is_copula: bool = False
    is_suffix: bool = False
    is_purpose: bool = False
    is_resolution: bool = False
    is_outcome: bool = False
    reach: int = 0


class Heard(NamedTuple):
    """What a report says of a finding, and the mark that says so; None for "present"."""

    status: EntityStatus
    mark: Mark | None


def statuses(
    words: Sequence[str],
    findings: Sequence[Span],
    marks: Sequence[Mark],
    lists: ListWords,
    *,
    is_own_cue_heard: bool = True,
) -> list[Heard]:
    """The status of each finding that the marks around it say.

    A finding heeds the last mark before it and the first mark after it, and of these two the
    nearer, except that a denial outdoes a doubt ("no pneumonia is suspected").
    Every mark ends the reach of the one beyond it.

    Args:
        words: Of the text, in lower case.
        findings: In order and disjoint.
        marks: In order and disjoint.
        is_own_cue_heard: Whether a cue inside a finding ("heart is not enlarged") goes first, or is
            part of its name.
    """
    if not findings:
        return []
    marks = _without_joining_colons(words, marks)
    marks = _without_open_resolutions(words, findings, marks)
    marks = [_directed(mark, i, marks, findings, words) for i, mark in enumerate(marks)]
    marks = _with_ends_of_lists(words, findings, marks, lists)
    marks = _with_denied_purposes(words, findings, marks)
    starts, ends = [m.start for m in marks], [m.end for m in marks]
    said = []
    for finding in findings:
        inner = marks[bisect_left(starts, finding.start) : bisect_right(ends, finding.end)]
        own = [m for m in inner if m.before] if is_own_cue_heard else []
        if own:
            said.append(Heard(min(str(m.before) for m in own), own[0]))  # pyright: ignore
            continue
        said.append(_heard(finding, marks, starts, ends))
    return _with_alternatives(words, findings, said, lists)


def _without_joining_colons(words: Sequence[str], marks: Sequence[Mark]) -> list[Mark]:
    """The marks without the colons over which a cue points ("No: A, B", "A: not excluded")."""
    if ":" not in words:
        return list(marks)
    out: list[Mark] = []
    for i, mark in enumerate(marks):
        is_colon = words[mark.start] == ":" and mark.end == mark.start + 1
        is_led = i > 0 and marks[i - 1].before is not None and marks[i - 1].end == mark.start
        behind = marks[i + 1] if i + 1 < len(marks) else None
        is_followed = behind is not None and behind.after and behind.start == mark.end
        if not (is_colon and (is_led or is_followed)):
            out.append(mark)
    return out


def _without_open_resolutions(
    words: Sequence[str], findings: Sequence[Span], marks: Sequence[Mark]
) -> list[Mark]:
    """The marks without the outcomes, and without the resolutions that these take back.

    "Resolution of edema is incomplete" and "... is not seen" leave the edema there, and a doubt
    behind it ("is likely") leaves it in doubt.
    """
    if not any(mark.is_resolution or mark.is_outcome for mark in marks):
        return list(marks)
    out: list[Mark] = []
    for mark in marks:
        prior = out[-1] if out else None
        is_open = False
        if prior is not None and prior.is_resolution:
            at = bisect_left(findings, prior.end, key=attrgetter("start"))
            has_finding = at < len(findings) and findings[at].end <= mark.start
            is_single = "," not in words[prior.end : mark.start] and not mark.is_between
            is_open = has_finding and (mark.is_outcome or (mark.after is not None and is_single))
        if is_open:
            out.pop()
        if not mark.is_outcome and not (is_open and mark.after == "negated"):
            out.append(mark)
    return out


def _with_denied_purposes(
    words: Sequence[str], findings: Sequence[Span], marks: Sequence[Mark]
) -> list[Mark]:
    """The marks, and those of a purpose as denials where they follow what is denied.

    In "no opacity to suggest pneumonia" the purpose is of one finding, or of a list with "or".
    """
    out: list[Mark] = []
    for mark in marks:
        prior = out[-1] if out else None
        if mark.is_purpose and prior is not None and prior.before == "negated":
            between = words[prior.end : mark.start]
            ends = {",", *_AND} if _OR.isdisjoint(between) else set()
            at = bisect_left(findings, prior.end, key=attrgetter("start"))
            has_finding = at < len(findings) and findings[at].end <= mark.start
            if ends.isdisjoint(between) and (has_finding or len(between) <= _VERB_WORDS):
                mark = mark._replace(before="negated")
        out.append(mark)
    return out


def _with_alternatives(
    words: Sequence[str], findings: Sequence[Span], said: Sequence[Heard], lists: ListWords
) -> list[Heard]:
    """What is said of the findings, with "A or B" in doubt where nothing else is said of them.

    Of "A, B, or C" all three are; of "A, B or C" the last two, as A may be what they explain.
    "Atelectasis or scarring" is a set phrase for one harmless band, and states both.
    """
    out = list(said)
    for i in range(1, len(findings)):
        left, right = findings[i - 1], findings[i]
        joint = words[left.end : right.start]
        at = next((k for k, word in enumerate(joint) if word == "or"), None)
        if at is None or len(joint) - at > _ALTERNATIVE_WORDS:
            continue
        if joint[:at] not in ([], [","], ["and", "/"], ["/"]) or not _CLAUSE_ENDS.isdisjoint(
            joint[at + 1 :]
        ):
            continue
        first = i - 1
        while joint[:at] == [","] and first and words[findings[first - 1].end] == ",":
            first -= 1
            if findings[first + 1].start - findings[first].end > _ALTERNATIVE_WORDS:
                break
        some = range(first, i + 1)
        if any(said[k].status != "present" for k in some):
            continue
        if not lists.residue.isdisjoint(words[left.start : right.end]):
            continue
        lead = list(words[max(0, left.start - _CONJUNCTION_WORDS) : left.start])
        lead = lead[len(lead) - lead[::-1].index(".") :] if "." in lead else lead
        if not _DENIALS.isdisjoint(lead):
            continue  # "no change in effusion or edema" has both
        word = left.end + at
        for k in some:
            out[k] = Heard("uncertain", Mark(word, word + 1, "uncertain", "uncertain"))
    return out


def _heard(
    finding: Span, marks: Sequence[Mark], starts: Sequence[int], ends: Sequence[int]
) -> Heard:
    """What the last mark before a finding and the first one after it say."""
    last = bisect_right(ends, finding.start) - 1
    following = bisect_left(starts, finding.end)
    prior = marks[last] if last >= 0 and marks[last].before else None
    behind = marks[following] if following < len(marks) else None
    if behind is not None and (behind.after is None or finding.start < behind.reach):
        behind = None
    if prior is None or prior.before is None:
        after = None if behind is None else behind.after
        return Heard(after or "present", behind)
    if behind is None or behind.after is None:
        return Heard(prior.before, prior)
    if prior.before == behind.after:
        is_prior = finding.start - prior.end <= behind.start - finding.end
    else:
        is_prior = prior.before == "negated"
    return Heard(prior.before, prior) if is_prior else Heard(behind.after, behind)


def _directed(
    mark: Mark, i: int, marks: Sequence[Mark], findings: Sequence[Span], words: Sequence[str]
) -> Mark:
    """A mark with its direction settled and its reach over a list before it."""
    if mark.after is None:
        return mark
    if mark.is_copula:
        follower = bisect_left(findings, mark.end, key=attrgetter("start"))
        end = findings[follower].start if follower < len(findings) else len(words)
        if end - mark.end <= _CONJUNCTION_WORDS and _CLAUSE_ENDS.isdisjoint(words[mark.end : end]):
            return mark._replace(after=None)
        mark = mark._replace(before=None)
    clause = marks[i - 1].end if i else 0
    at = bisect_right(findings, mark.start, key=attrgetter("end"))  # findings before the mark
    if mark.is_suffix and not (at and findings[at - 1].end == mark.start):
        return mark._replace(after=None)
    if not at or findings[at - 1].start < clause:
        return mark._replace(after=None) if mark.is_either else mark
    verb = words[mark.start]
    reach, is_list = findings[at - 1].start, False
    for k in range(at - 2, -1, -1):
        left, right = findings[k], findings[k + 1]
        joint = words[left.end : right.start]
        if left.start < clause:
            break
        if not _OR.isdisjoint(joint):
            is_list = True
        elif mark.is_between:
            break
        elif not _AND.isdisjoint(joint):
            if verb in _SINGULAR:
                break
            is_list = True
        elif joint and ("," not in joint or not (is_list or verb in _PLURAL)):
            break
        reach = left.start
    before = None if mark.is_either else mark.before
    return mark._replace(reach=reach, before=before)


def _with_ends_of_lists(
    words: Sequence[str], findings: Sequence[Span], marks: Sequence[Mark], lists: ListWords
) -> list[Mark]:
    """The marks, and a bare one wherever a list that is denied or doubted ends.

    It ends at "and a/an"; at a finding with its own verb ("no effusion, the heart is enlarged"); at
    the heart, where no word joins it ("NO EFFUSION HEART ENLARGED"); at a comma or "and" before a
    size, a side or a number ("no effusion, mild cardiomegaly"), or behind items with a "no" each
    ("no edema, no mass, scoliosis"), unless an "or" goes on with the list. What a denied thing
    would be in or of is there ("no cavity in the mass", "no fracture of the lead"). A doubt goes on
    over "and a" without a size: "includes pneumonia and a neoplasm".
    """
    out = list(marks)
    previous = 0
    named: dict[str, int] = {}  # where each concept was named last
    for finding in findings:
        last = bisect_right(out, finding.start, key=attrgetter("end")) - 1
        begin = out[last].end if last >= 0 else 0
        is_second = previous > begin
        begin, previous = max(begin, previous), finding.end
        named_before, named[finding.concept] = named.get(finding.concept, -1), finding.start
        if last < 0 or out[last].before is None:
            continue
        first = max(begin, finding.start - _CONJUNCTION_WORDS)
        is_denied = out[last].before == "negated"
        if is_denied and is_second and _stands_apart(words, finding, begin, lists):
            insort(out, Mark(begin, begin), key=attrgetter("start"))
            continue
        at = _place(words, first, finding.start, is_second) if is_denied else None
        if at is not None and at > out[last].end:
            insort(out, Mark(at, at + 2), key=attrgetter("start"))
            continue
        at = finding.start - 1
        while at >= first and words[at] != "," and words[at] not in _AND and words[at] not in _OR:
            at -= 1
        if at < first or at <= out[last].end or words[at] in _OR:
            continue
        is_differential = any(word in _LISTING for word in words[out[last].start : out[last].end])
        if is_differential and not _has_own_verb(words, finding, words[at], lists):
            continue
        is_restated = is_denied and named_before >= out[last].end
        is_restated |= is_second and words[at] == "," and _is_each_denied(words, out, last)
        if _begins_anew(words, finding, at, out, is_denied, lists, is_restated):
            insort(out, Mark(at, at + 1), key=attrgetter("start"))
    return out


def _stands_apart(words: Sequence[str], finding: Span, begin: int, lists: ListWords) -> bool:
    """Whether a finding begins a statement, with no word that joins it to what ends at `begin`."""
    if finding.start == begin:
        return words[begin] in lists.subject
    following = words[finding.end : finding.end + _CONJUNCTION_WORDS]
    is_joined = not _CLAUSE_ENDS.isdisjoint(words[begin : finding.start])
    return words[begin] in lists.size - _DENIED_SIZE and not is_joined and _OR.isdisjoint(following)


def _is_each_denied(words: Sequence[str], marks: Sequence[Mark], last: int) -> bool:
    """Whether the last "no" follows another one: "no edema, no mass"."""
    start, prior = marks[last].start, marks[last - 1]
    is_near = last > 0 and start - prior.end <= _CONJUNCTION_WORDS
    return is_near and words[start] == words[prior.start] == "no" and words[start - 1] == ","


def _place(words: Sequence[str], first: int, start: int, is_second: bool) -> int | None:
    """The word "in" of "in the known right mass" and "in the setting of", where words from `first`
    on lead to it; behind a finding that is denied the "of" of "fracture of the lead", too."""
    for at in range(start - 2, max(first, start - 2 - _PLACE_WORDS) - 1, -1):
        if words[at] in _IN and (words[at + 1] in _DEFINITE or words[at + 1] in _CIRCUMSTANCE):
            return at
        if is_second and words[at] == "of" and words[at + 1] in _DEFINITE:
            return at
        if words[at] in _CIRCUMSTANCE and words[at + 1] == "of":
            continue
        if words[at + 1] in _CLAUSE_ENDS or words[at + 1] in ("to", "of", "for"):
            return None
    return None


def _begins_anew(
    words: Sequence[str],
    finding: Span,
    at: int,
    marks: Sequence[Mark],
    is_denied: bool,
    lists: ListWords,
    is_restated: bool,
) -> bool:
    """Whether a finding behind the "," or "and" at a word is no longer part of the list."""
    if _has_own_verb(words, finding, words[at], lists):
        return True
    lead = words[at + 1 : max(finding.start, min(at + 5, finding.end))]
    has_article = bool(lead) and lead[0] in ("a", "an")
    rest = words[finding.end : finding.end + 2]  # "effusion small."
    is_sized = (
        is_restated
        or any(word in lists.size or word[0].isdigit() for word in lead)
        or words[at + 1] in lists.subject
        or (len(rest) == 2 and rest[0] in lists.size and rest[1] in _CLAUSE_ENDS)
    )
    if words[at] in _AND and has_article:
        return is_denied or is_sized
    is_sized = is_sized or (words[at] == "," and not lists.side.isdisjoint(lead))
    if not is_sized or (words[at] in _AND and not is_denied):
        return False
    following = bisect_left(marks, finding.end, key=attrgetter("start"))
    clause_end = marks[following].start + 1 if following < len(marks) else len(words)  # or a "nor"
    return _OR.isdisjoint(words[finding.end : min(clause_end, finding.end + _LIST_WORDS)])


def _has_own_verb(words: Sequence[str], finding: Span, joint: str, lists: ListWords) -> bool:
    """Whether a finding has a verb of its own, and not one that it shares with a list before it."""
    if not lists.verb.isdisjoint(words[finding.start : finding.end]):
        return True
    for at in range(finding.end, min(finding.end + _VERB_WORDS, len(words))):
        if words[at] in _CLAUSE_ENDS:
            return False
        if words[at] in lists.verb:
            rest = words[at + 1 : at + 4]
            is_shared = not lists.seen.isdisjoint(rest) and "again" not in rest
            return not is_shared or (joint == "," and words[at] in _SINGULAR)
    return False
