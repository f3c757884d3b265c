"""Errors of the commands, and what any error says."""

from __future__ import annotations

import re


class UserError(Exception):
    """An error that a command's user can correct; the message names the option, file or folder."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message (those of torch and transformers have pages), or, if the
    message is empty, the name of its class.

    A line that ends in a colon goes on with the next.
    """
    text = re.sub(r":\s*\n\s*", ": ", str(error).strip())
    return text.partition("\n")[0].rstrip(": ") or type(error).__name__
