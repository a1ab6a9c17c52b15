"""For the programs beside it: write something down when train.py ends this process."""

import os
from pathlib import Path


def note_on_leaving(name, note):
    """Write str(note(exit status)) to the file <name>-<rank> before the process ends."""
    leave = os._exit

    def note_and_leave(status):
        Path(f"{name}-{os.environ['RANK']}").write_text(str(note(status)))
        leave(status)

    os._exit = note_and_leave
