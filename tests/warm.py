"""`python FILE ...` without its ten seconds of imports: each process is forked from one that has them already.

    run("stages/sft.py", "--runs", ...)            one process
    launch("zero3", "stages/sft.py", ...)          two, in the environment that `accelerate launch` would give them

`accelerate launch` itself is asked for that environment, with what starts processes replaced. Run as a program this
is the process to fork from: a line of JSON on its standard input is a job, a line on its standard output the result.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200",
    "PYTHONUNBUFFERED": "1",
}  # fmt: skip
GRACE = 5  # seconds that the other processes have when one has failed

Done = subprocess.CompletedProcess[str]


def run(*command: str, timeout: float = 300, **environment: str) -> Done:
    """What a command leaves, run from the project's folder with one thread and nobody at the terminal."""
    return _run([{**os.environ, **ENVIRONMENT, **environment}], command, timeout)


def launch(
    backend: str, *command: str, launch_with: Sequence[str] = (), timeout: float = 300, **environment: str
) -> Done:
    """The command on the two CPU processes of a file of configs/accelerate."""
    return _run(ranks_environment(backend, launch_with, environment), command, timeout)


def ranks_environment(backend: str, options: Sequence[str], environment: Mapping[str, str]) -> list[dict[str, str]]:
    """What `accelerate launch` and torchrun would give each process."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    found: list[dict[str, str]] = []

    def note(args: Any) -> None:
        world = {"WORLD_SIZE": args.nproc_per_node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.master_port)}
        for rank in range(int(args.nproc_per_node)):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": args.nproc_per_node}
            found.append({**os.environ, **world, **place})

    file = str(ROOT / f"configs/accelerate/{backend}.yaml")
    argv = ["--config_file", file, "--main_process_port", "0", *options, "a script"]
    with (
        mock.patch.dict(os.environ, {**ENVIRONMENT, **environment}),
        mock.patch("torch.distributed.run.run", note),
    ):
        launch_command(launch_command_parser().parse_args(argv))
    return found


def _run(environments: Sequence[Mapping[str, str]], command: Sequence[str], timeout: float) -> Done:
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        job = {"environments": environments, "argv": command, "out": str(out), "err": str(err), "timeout": timeout}
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in (out, err)]
    return subprocess.CompletedProcess(command, next((code for code in codes if code), 0), *texts)


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, __file__], cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    atexit.register(server.communicate)  # which closes its input: there are no more jobs
    return server


# the process to fork from


def serve(answers: TextIO) -> dict[str, Any] | None:
    """Runs jobs until there are no more; a forked process comes back from it with its part of one."""
    for line in sys.stdin:
        job = json.loads(line)
        children = []
        for environment in job["environments"]:
            child = os.fork()
            if not child:
                return job | {"environment": environment}
            children.append(child)
        print(json.dumps(ends(children, job["timeout"])), file=answers, flush=True)
    return None


def ends(children: Sequence[int], timeout: float) -> list[int]:
    """Exit status of each; all are killed at the time-out, and the others soon after one of them has failed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while len(codes) < len(children):
        time.sleep(0.02)
        for child in set(children) - set(codes):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child]:
                    deadline = min(deadline, time.monotonic() + GRACE)
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
    return [codes[child] for child in children]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print as they are imported
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import peft  # noqa: F401
    from trl import RewardTrainer, SFTTrainer  # noqa: F401

    from pipeline import chat, evaluate, merge, ppo, pretrain, reward, sft  # noqa: F401

    assert deepspeed
    gc.freeze()
    job = serve(answers)
    if job is None:
        return
    for number, name in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv = list(job["argv"])
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    code: Any = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # what Python takes down after that is five seconds of modules


if __name__ == "__main__":
    main()
