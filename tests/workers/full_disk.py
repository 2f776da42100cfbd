"""slow_steps.py RECIPE, where a file finds the disk full: the NUMBERth with NAME in its name.

full_disk.py NAME NUMBER once|on RECIPE OVERRIDES…        once: there is room for all after it
"""

import errno
import os
import runpy
import sys
from pathlib import Path

_, name, number, how, *rest = sys.argv
real, met = os.fsync, []


def fsync(file):  # type: ignore[no-untyped-def]
    path = os.readlink(f"/proc/self/fd/{file}")
    met.extend([path] * (name in path))
    full = len(met) >= int(number) if how == "on" else len(met) == int(number) and name in path
    if full:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real(file)


os.fsync = fsync
sys.argv = ["slow_steps.py", *rest]
runpy.run_path(str(Path(__file__).with_name("slow_steps.py")), run_name="__main__")
