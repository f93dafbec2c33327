"""Checks, before anything is loaded, that the ``trainer`` section suits this machine and the way it was started."""

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import lightning as L
import torch

from diffora.errors import UserError, first_line
from diffora.loop.launch import launch_problems
from diffora.loop.sharded import FSDP, Sharded
from diffora.settings.sections import Settings


def check_machine(settings: Settings) -> None:
    """Check that the devices exist and the processes were started correctly.

    Do not call it for a dry run, or on a machine that only submits the jobs of a sweep.

    Args:
        settings: settings without mistakes of their own.

    Raises:
        UserError: everything that is wrong.
    """
    t = settings.trainer
    if t.compile and (missing := list(_compile_problems())):
        raise UserError(missing)
    problems = (
        list(launch_problems(os.environ, t.devices, t.num_nodes))
        or list(_device_problems(t.accelerator, t.devices, t.strategy, t.precision))
        or list(_process_problems(os.environ, t.accelerator, t.devices))
    )
    if problems:
        raise UserError(problems)


def found_devices(accelerator: str) -> int:
    """How many devices ``trainer.devices=auto`` means on this machine."""
    gpus = torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 0
    return max(gpus, 1)  # one CPU, or one GPU of Apple


def _process_problems(environment: Mapping[str, str], accelerator: str, devices: object) -> Iterator[str]:
    """A message if this process has no device of its own: the n-th process of a machine gets its n-th device."""
    number = environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID", "0"))
    found = found_devices(accelerator)
    if devices != "auto" or not number.isdecimal() or int(number) < found:
        return
    said = f"trainer.devices=auto finds {found} here, and this is process {int(number) + 1} of this machine"
    if torch.cuda.device_count() and accelerator != "cpu":
        yield (
            f"{said}: start one process for each GPU, and let each of them see all GPUs of its machine (in SLURM "
            "--gpus-per-node, not --gpus-per-task)"
        )
    else:
        yield f"{said}: name the number of processes, trainer.devices=N"


def _compile_problems() -> Iterator[str]:
    """What ``torch.compile`` lacks on this machine. It would say so at the first step, in many lines."""
    compilers = [os.environ.get("CXX"), "g++", "clang++", "c++", "cl"]
    if not any(shutil.which(name) for name in compilers if name):
        yield "trainer.compile=true needs a C++ compiler, and there is none: install g++, or set CXX to its path"
    if sys.platform == "linux" and not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        yield "trainer.compile=true needs Python's header files: install python3-dev (or python3.x-dev)"


@cache
def _device_problems(accelerator: str, devices: int | str, strategy: str, precision: str) -> tuple[str, ...]:
    gpus, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if (accelerator == "gpu" and not (gpus or mps)) or (accelerator == "cuda" and not gpus):
        return (f"trainer.accelerator={accelerator}: torch finds no GPU on this machine; use trainer=cpu",)
    if accelerator == "mps" and not mps:
        return ("trainer.accelerator=mps: torch finds no such device on this machine; use trainer=cpu",)
    on_cpu = accelerator == "cpu" or not (gpus or mps)
    problems = []
    if on_cpu and precision == "16-mixed":
        problems.append("trainer.precision=16-mixed needs a GPU; use bf16-mixed or 32-true on a CPU")
    # Allow two processes even on one core, so that trainer=ddp_cpu can be tried anywhere.
    most = max(os.cpu_count() or 1, 2) if on_cpu else gpus if accelerator != "mps" and gpus else 1
    if isinstance(devices, int) and devices > most:
        has = f"this machine has {os.cpu_count()} CPU cores" if on_cpu else f"this machine has {most} of them"
        problems.append(f"trainer.devices={devices} must be at most {most}: {has}")
    if problems:
        return tuple(problems)
    try:
        L.Trainer(
            accelerator=accelerator,
            devices=devices,
            strategy=Sharded() if strategy == FSDP else strategy,
            precision=precision,  # type: ignore[arg-type]
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except Exception as error:
        chosen = f"trainer.accelerator={accelerator} devices={devices} strategy={strategy} precision={precision}"
        return (f"{chosen} do not work together on this machine: {first_line(error)}",)
    return ()
