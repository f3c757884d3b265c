"""Errors of the commands, and what any error says."""

from __future__ import annotations

import re


class UserError(Exception):
    """What the user of a command can put right: the message names the option, file or folder."""


def first_line(error: BaseException) -> str:
    """The first line, for torch and transformers go on for pages; of an empty one, the class.

    A line that ends in a colon goes on with the next.
    """
    text = re.sub(r":\s*\n\s*", ": ", str(error).strip())
    return text.partition("\n")[0].rstrip(": ") or type(error).__name__
