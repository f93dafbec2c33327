"""Whether this machine, and how the process was started, suit the ``trainer`` section; before anything is loaded."""

import os
from collections.abc import Iterator
from functools import cache

import lightning as L
import torch
from omegaconf import DictConfig

from diffora.errors import UserError


def check_machine(cfg: DictConfig) -> None:
    """Refuse devices that are not there. Not for a dry run, nor where a sweep is only submitted from.

    Args:
        cfg: a configuration without mistakes of its own.

    Raises:
        UserError: everything that is wrong.
    """
    t = cfg.trainer
    if problems := list(_launch_problems()) or _device_problems(t.accelerator, t.devices, t.strategy, t.precision):
        raise UserError(list(problems))


def _launch_problems() -> Iterator[str]:
    """SLURM's variables tell Lightning that other processes take part; it then waits for them."""
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if not tasks.isdecimal():
        yield f"the environment has SLURM_NTASKS={tasks}, which must be a number: unset it, or start with srun"
        return
    by_hand = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")  # as Lightning sees it
    if int(tasks) < 2 or by_hand or "LOCAL_RANK" in os.environ:
        return
    if "SLURM_STEP_ID" not in os.environ:
        yield (
            f"the environment has SLURM_NTASKS={tasks}, but srun did not start this process, so the others would be "
            "waited for in vain: start with srun, or for one process unset SLURM_NTASKS"
        )
    elif "SLURM_NTASKS_PER_NODE" not in os.environ:
        yield f"SLURM_NTASKS={tasks} without --ntasks-per-node: give srun (or sbatch) --ntasks-per-node"


@cache
def _device_problems(accelerator: str, devices: int | str, strategy: str, precision: str) -> tuple[str, ...]:
    gpus, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if (accelerator == "gpu" and not (gpus or mps)) or (accelerator == "cuda" and not gpus):
        return (f"trainer.accelerator={accelerator}: torch finds no GPU here; use trainer=cpu",)
    if accelerator == "mps" and not mps:
        return ("trainer.accelerator=mps: torch finds none here; use trainer=cpu",)
    on_cpu = accelerator == "cpu" or not (gpus or mps)
    problems = []
    if on_cpu and precision == "16-mixed":
        problems.append("trainer.precision=16-mixed needs a GPU; use bf16-mixed or 32-true on a CPU")
    # Two processes are allowed on one core too, to try things out: trainer=ddp_cpu.
    most = max(os.cpu_count() or 1, 2) if on_cpu else gpus if accelerator != "mps" and gpus else 1
    if isinstance(devices, int) and devices > most:
        there = f"this machine has {os.cpu_count()} CPU cores" if on_cpu else f"this machine has {most} of them"
        problems.append(f"trainer.devices={devices} must be at most {most}: {there}")
    if problems:
        return tuple(problems)
    try:
        L.Trainer(
            accelerator=accelerator,
            devices=devices,
            strategy=strategy,
            precision=precision,  # type: ignore[arg-type]
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except Exception as error:
        settings = f"trainer.accelerator={accelerator} devices={devices} strategy={strategy} precision={precision}"
        return (f"{settings} do not go together here: {(str(error) or type(error).__name__).splitlines()[0]}",)
    return ()
