"""The record as Markdown."""

from typing import Any

HIDDEN = {"kind", "item", "all_sdpa_us", "sizes"}  # in the JSON only


def markdown(data: dict[str, Any]) -> str:
    """All of it, whatever has been found so far."""
    steps = data["steps"]
    parts = [
        "# The CUDA kernels on a card",
        state(data),
        table(
            [
                {
                    "step": step["name"],
                    "how it ended": step["status"],
                    "seconds": step.get("seconds", ""),
                    "of at most": step.get("limit_s", ""),
                    "note": step.get("note", ""),
                }
                for step in steps
            ]
        ),
    ]
    for step in steps:
        shown = section(step)
        if shown:
            parts += [f"## {step['name']}", *shown]
    return "\n\n".join(parts) + "\n"


def state(data: dict[str, Any]) -> str:
    """Whether the run has ended, and whether its times mean anything."""
    text = f"Began {data['began']}, at most {data['limit_s']:.0f} s. "
    if data["finished"]:
        text += f"Finished after {data['seconds']:.0f} s."
    else:
        text += "**Not finished**: the run goes on, or was cut short in the last step below."
    if data["device"] == "emulated":
        text = "**Emulated device: times mean nothing.** " + text
    return text


def section(step: dict[str, Any]) -> list[str]:
    """A step's results by their kind; what it wrote last, where it did not succeed."""
    kinds = dict.fromkeys(result["kind"] for result in step["results"])
    found = [table([r for r in step["results"] if r["kind"] == kind]) for kind in kinds]
    if step["status"] not in ("ok", "running") and step.get("log_end"):
        found += ["The end of its log:", indented(step["log_end"])]
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """A column for every name in the rows."""
    names = [name for name in dict.fromkeys(n for row in rows for n in row) if name not in HIDDEN]
    lines = [names, ["---"] * len(names)]
    lines += [[cell(row.get(name)) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: Any) -> str:
    """Four digits of a number; of a text what a cell can hold."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.4e}"
    return " ".join(str(value).split()).replace("|", "\\|")


def indented(text: str) -> str:
    """As code, which no text can end."""
    printable = "".join(x if x.isprintable() or x == "\n" else "?" for x in text)
    return "\n".join("    " + line for line in printable.splitlines())
