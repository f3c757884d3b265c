"""The tasks, by name."""

from .garments import GARMENTS
from .images import PATCHES, POINTS
from .listops import LISTOPS
from .overlap import OVERLAP
from .recall import RECALL
from .senses import SENSES
from .task import Task
from .texts import IMDB_BYTES

ALL = (PATCHES, POINTS, GARMENTS, IMDB_BYTES, OVERLAP, SENSES, LISTOPS, *RECALL)
TASKS: dict[str, Task] = {task.name: task for task in ALL}
