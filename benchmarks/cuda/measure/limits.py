"""The least time of a call that the card allows: counted work over the rates that were measured."""

import math

import model
from devices import Device
from layout import MOST_RESIDENT, Problem

from setformer_ext.cli.timing import Shape

from .results import fact, found

# The ceiling that bounds each resource of a Work.
CEILINGS = {
    "memory": "copy",
    "cache": "cache",
    "shared": "shared",
    "tensor": "mma",
    "special": "ex2",
}
ISSUED = 4 * model.WARP  # instructions of one thread, a clock and multiprocessor


def measured_device() -> Device | None:
    """The card by its ceilings; what was not measured never binds. None where nothing is known."""
    multiprocessors = fact("multiprocessors")
    if multiprocessors is None:
        return None
    ceilings = {result["name"]: result for result in found("ceiling")}
    known = {
        resource: ceilings.get(name, {}).get("rate") or math.inf
        for resource, name in CEILINGS.items()
    }
    clock = ceilings.get("fma", {}).get("MHz") or math.inf
    return Device(
        name=str(fact("card")),
        capability=int(str(fact("capability") or "8.0").replace(".", "")),
        multiprocessors=multiprocessors,
        issue=ISSUED * multiprocessors * clock * 1e6,
        full_tensor=math.inf,
        flash_attention=math.inf,
        **known,
    )


def limit(
    shape: Shape, dtype: str, iterations: int, gradient: bool, device: Device | None
) -> tuple[float, str] | None:
    """Microseconds of all launches, each at its slowest resource; the resource of most of them.

    None where no ceiling was measured, and where executed.csv is not of the kernels that run: it
    has some heads of half types, as sm_80 runs them.
    """
    optin = fact("shared memory of a block") or MOST_RESIDENT
    if device is None or dtype not in ("bfloat16", "float16") or optin < MOST_RESIDENT:
        return None
    problem = Problem(
        shape.batch, shape.heads, shape.tokens, shape.depth, shape.references, iterations
    )
    try:
        launches = model.forward(problem, device)
        if gradient:
            launches += model.backward(problem, device)
    except ValueError:
        return None
    seconds = model.seconds_by_resource(launches, device)
    total = sum(seconds.values())
    return (1e6 * total, model.most_of(seconds)) if total else None
