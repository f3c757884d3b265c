"""Options of a training in a YAML file."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from .task import TrainingError


def read_configuration(path: Path) -> dict[str, Any]:
    """The file's entries: words, lists and mappings of them, and None for what is not given.

    Words stay as they are written: `precision: no` is not False. Only null, ~ and an empty value,
    without quotes, mean that something is not given; such items of lists and mappings are left out.

    Raises:
        TrainingError: for a file that cannot be read or is no mapping.
    """
    import yaml

    class Loader(yaml.BaseLoader):
        """All scalars are strings, except null, ~ and empty values without quotes."""

    null = "tag:yaml.org,2002:null"
    Loader.add_implicit_resolver(null, re.compile("(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
    Loader.add_constructor(null, lambda loader, node: None)
    try:
        content = yaml.load(path.read_bytes(), Loader)
    except OSError as error:
        raise TrainingError(f"--config: cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise TrainingError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise TrainingError(f"{path}: expected lines of `option: value`, got {content!r}")
    return {str(key): _given(value) for key, value in content.items()}


def _given(value: Any) -> Any:
    """Remove None from a value, at any depth; None if nothing is left."""
    left: Any
    if isinstance(value, dict):
        left = {key: kept for key, part in value.items() if (kept := _given(part)) is not None}
    elif isinstance(value, list):
        left = [kept for part in value if (kept := _given(part)) is not None]
    else:
        return value
    return left if left or not value else None


def with_numbers(part: Any) -> Any:
    """A list or mapping with its numbers as numbers; a single word stays as it is written."""

    def literal(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: literal(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [literal(inner) for inner in value]
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value

    return part if isinstance(part, str) else literal(part)
