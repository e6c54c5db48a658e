"""One process at a time writes a stage's folder; the kernel lets the lock go when the process ends, however it does."""

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from pipeline.runtime.console import print_main
from pipeline.runtime.finished import StageError

LOCK = ".lock"
"""Stays when it is let go: were it deleted, two processes could hold two files of that name."""


def lock_folder(folder: Path) -> TextIO | None:
    """The open file that holds the folder until it is closed; StageError names the process that has it already.

    None, with a printed line, on a file system without locks.
    """
    file = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise StageError(
            f"{folder}: {holder} is running in it: wait until it has ended, or end it, or give --runs another folder"
        ) from None
    except OSError as error:
        file.close()
        print_main(f"{folder}: warning: not locked ({error.strerror}): see to it that nothing else runs in it")
        return None
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since},")
    file.flush()
    return file


def unlock(file: TextIO) -> None:
    file.truncate(0)
    file.close()
