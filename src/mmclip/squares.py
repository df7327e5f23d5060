"""How an image of any shape comes to lie in a square; without torch, which no decoder needs."""

from typing import NamedTuple

from mmclip.config import ResizeMode


class Span(NamedTuple):
    """Which pixels of a side of an image are seen, and where they lie on a side of the square."""

    start: int
    length: int
    first: int  # of the square
    size: int  # on the square, px


def square_spans(
    height: int, width: int, size_px: int, how: ResizeMode = "squash"
) -> tuple[Span, Span]:
    """How the height and the width of an image come to lie in a square of size_px.

    Args:
        height: Of the image, px.
        width: Of the image, px.
        size_px: Side of the square.
        how: "squash" scales both sides on their own; "pad" scales the longer one to size_px and
            centres the image; "crop" takes the middle square.
    """
    if how == "crop":
        side = min(height, width)
        return (
            Span((height - side) // 2, side, 0, size_px),
            Span((width - side) // 2, side, 0, size_px),
        )
    if how == "squash":
        return Span(0, height, 0, size_px), Span(0, width, 0, size_px)
    share = size_px / max(height, width)
    sizes = (max(1, round(height * share)), max(1, round(width * share)))
    rows, columns = (
        Span(0, n_px, (size_px - size) // 2, size)
        for n_px, size in zip((height, width), sizes, strict=True)
    )
    return rows, columns
