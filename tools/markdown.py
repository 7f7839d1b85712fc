"""Markdown tables and lists, and what rewrites the part of a README between two markers."""
import os
import textwrap

from data.files import UserError, atomic_write_text


def table(head, lines):
    """A Markdown table that reads well in a terminal: the first column is left-aligned.

    head is a list of titles and each line a list of as many cells, all of them strings.
    """
    rows = [head, *lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    rule = ["-" * widths[0]]
    for width in widths[1:]:
        rule.append("-" * (width - 1) + ":")
    text = [format_row(row, widths) for row in [head, rule, *lines]]
    return "\n".join(text)


def format_row(row, widths):
    first = row[0].ljust(widths[0])
    others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
    return "| " + " | ".join([first, *others]) + " |"


def bullets(paragraphs):
    """A list with these paragraphs, in lines of 100 columns."""
    items = []
    for paragraph in paragraphs:
        items.append(textwrap.fill(paragraph, 100, initial_indent="- ", subsequent_indent="  ",
                                   break_long_words=False, break_on_hyphens=False))
    return "\n".join(items)


def replaced(text, body, name):
    """The text with body between its markers <!-- name --> and <!-- /name -->.

    Raises ValueError, with a sentence, unless both markers are there once and in this order.
    """
    start = f"<!-- {name} -->"
    stop = f"<!-- /{name} -->"
    is_marked = text.count(start) == text.count(stop) == 1 and text.index(start) < text.index(stop)
    if not is_marked:
        raise ValueError(f"it needs one {start} and, below it, one {stop}")
    before = text[:text.index(start) + len(start)]
    return f"{before}\n{body}\n{text[text.index(stop):]}"


def rewrite(path, body, name):
    """Puts body between the markers of a file, as replaced() does. Raises UserError, with a
    sentence, if they are not there; then the file is as it was."""
    with open(path) as file:
        text = file.read()
    try:
        text = replaced(text, body, name)
    except ValueError as error:
        raise UserError(f"{os.path.basename(path)} is as it was, because {error}")
    atomic_write_text(path, text)
