"""The tasks, by name."""

from .images import PATCHES, POINTS
from .listops import LISTOPS
from .overlap import OVERLAP
from .recall import RECALL
from .senses import SENSES
from .task import Task
from .texts import IMDB_BYTES

TASKS: dict[str, Task] = {
    task.name: task for task in (PATCHES, POINTS, IMDB_BYTES, OVERLAP, SENSES, LISTOPS, *RECALL)
}
