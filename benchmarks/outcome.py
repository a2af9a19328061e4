"""Exit status of a benchmark: 0 its goals hold, 1 they fall short, 2 it could not run."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from qnpu_jax.errors import UserError

COULD_NOT_RUN = 2


def status(measure: Callable[[], int]) -> int:
    """Returns what `measure` does, or COULD_NOT_RUN where it raises, with the reason on stderr."""
    try:
        return measure()
    except UserError as error:
        print(error, file=sys.stderr)
    except Exception:  # an uncaught one would exit with 1, which says that a goal is missed
        traceback.print_exc()
    return COULD_NOT_RUN
