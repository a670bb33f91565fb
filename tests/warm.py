"""Python programs in processes of their own that have done the imports: forked from a server that did them once.

For what needs a separate process but not a fresh import. What is to read its environment as it is imported, as
`huggingface_hub` does, needs a fresh one.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from .ports import free_port


ROOT = Path(__file__).parents[1]
SECONDS = 600


def context() -> ForkServerContext:
    """What makes processes that are forked from the server; it only imports, so that it has one thread."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.preloaded"])
    return found


def run(
    *arguments: object, processes: int = 1, cwd: str | Path = ROOT, timeout: float = SECONDS, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Do what `python <arguments>` does, or torchrun with two processes and more.

    Args:
        *arguments: `-m` and a module, `-c` and code, or a file; and what the program is given.
        processes: how many run it; more than one find each other as a group.
        cwd: where it runs.
        timeout: seconds after which it is killed.
        **environment: variables beside those of this process.

    Returns:
        How it ended. Of a group, what it printed one after the other; the first failure is the end of all.
    """
    shared: dict[str, str] = {}
    if processes > 1:
        world = str(processes)
        shared |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as name:
        members = []
        for rank in range(processes):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            variables = {**shared, **place, **environment}
            members.append(start(*arguments, printed=Path(name, f"{rank}"), cwd=cwd, **variables))
        code = _ended(members, timeout)
        out, err = (
            "".join(Path(name, f"{rank}.{stream}").read_text(errors="replace") for rank in range(processes))
            for stream in ("out", "err")
        )
    return subprocess.CompletedProcess(arguments, code, out, err)


def start(*arguments: object, printed: Path, cwd: str | Path = ROOT, **environment: str) -> ForkServerProcess:
    """Begin what `run` does in one process; it prints into the files `<printed>.out` and `<printed>.err`."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = context().Process(target=_program, args=(list(map(str, arguments)), str(cwd), variables, str(printed)))
    process.start()
    return process


def without(*packages: str) -> str:
    """A line of code that makes these packages seem not installed to what is imported behind it."""
    return f"from tests.warm import forget; forget{packages!r}"


def forget(*packages: str) -> None:
    """Let packages seem not installed; ours must not hold anything of them since it was imported itself."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "peft_composition":
            for value in vars(module).values():
                origin = getattr(value, "__module__", None) or getattr(value, "__name__", None)
                assert str(origin).partition(".")[0] not in packages, f"{name} imports {origin} when it is imported"
    gone = [name for name in (*packages, *sys.modules) if name.partition(".")[0] in packages]
    sys.modules.update(dict.fromkeys(gone))


def _ended(members: list[ForkServerProcess], timeout: float) -> int:
    """The exit status of the first that failed, or 0; none is left behind."""
    end, code = time.monotonic() + timeout, 0
    running = {member.sentinel: member for member in members}
    try:
        while running and not code:
            ready = wait(list(running), max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"still running after {timeout:.0f} s")
            for sentinel in ready:
                member = running.pop(sentinel)  # type: ignore[call-overload]
                member.join()
                code = code or member.exitcode or 0
    finally:
        for member in running.values():
            member.kill()
            member.join()
    return code


def _program(words: list[str], cwd: str, environment: dict[str, str], printed: str) -> None:
    """Become the program."""
    for number, stream in ((1, "out"), (2, "err")):
        with open(f"{printed}.{stream}", "ab") as file:
            os.dup2(file.fileno(), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    kind, rest = (words[0], words[1:]) if words[0] in ("-m", "-c") else ("", words)
    sys.argv = rest
    if kind == "-m":
        sys.path.insert(0, cwd)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(rest[0]).parent))
        runpy.run_path(rest[0], run_name="__main__")
