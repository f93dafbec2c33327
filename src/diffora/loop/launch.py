"""Checks of the environment variables that say which process this is, and how many processes there are."""

from collections.abc import Iterator, Mapping

from diffora.errors import called

COUNTS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "SLURM_NTASKS",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_PROCID",
)


def torchrun() -> str:
    """The start of a command that gives torchrun this program."""
    by = called("train")
    return f"torchrun --nproc-per-node=N {by.removeprefix('python ') if by.startswith('python ') else f'-m {by}'}"


def start() -> str:
    """What to do about wrong variables."""
    return f"start the processes with `{torchrun()} …`"


def launch_problems(environment: Mapping[str, str], devices: object) -> Iterator[str]:
    """One message for each variable of torchrun or SLURM that cannot be right.

    Lightning trusts these variables. If they are wrong, a process may believe that it has rank 1 and write no results,
    or it may wait for other processes that do not exist.

    Args:
        environment: `os.environ`.
        devices: ``trainer.devices``.
    """
    given = {name: environment[name] for name in COUNTS if name in environment}
    wrong = {name: value for name, value in given.items() if not (value.isascii() and value.isdecimal())}
    for name, value in wrong.items():
        yield f"the environment variable {name}={value} must be a whole number; unset it, or {start()}"
    if wrong:
        return
    counts = {name: int(value) for name, value in given.items()}
    if "TORCHELASTIC_RUN_ID" in environment or {"RANK", "LOCAL_RANK"} & counts.keys():
        yield from _torchrun(counts, devices, "TORCHELASTIC_RUN_ID" in environment)
    elif environment.get("SLURM_JOB_NAME") not in (
        "bash",
        "interactive",
    ):  # in these, Lightning starts the processes itself
        yield from _slurm(counts, devices, "SLURM_STEP_NUM_TASKS" in environment)
    elif rank := counts.get("SLURM_PROCID"):
        yield f"SLURM_PROCID={rank} in an interactive job: only its first task may start the program"


def _torchrun(counts: Mapping[str, int], devices: object, by_torchrun: bool) -> Iterator[str]:
    """Check the variables of torchrun."""
    ranks = {name: counts[name] for name in ("RANK", "LOCAL_RANK") if name in counts}
    said = ", ".join(f"{name}={value}" for name, value in ranks.items())
    world, highest = counts.get("WORLD_SIZE"), max(ranks.values(), default=0)
    if by_torchrun and (missing := [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name not in counts]):
        yield f"TORCHELASTIC_RUN_ID is set without {', '.join(missing)}: {start()}, or unset it"
    elif world is None:
        if highest > 0 or devices != 1:  # a single process has rank 0 anyway
            yield f"{said} is set without WORLD_SIZE: {start()}, or unset it"
    elif highest >= world:
        yield f"{said} must be less than WORLD_SIZE={world}: {start()}, or unset them"
    elif world > 1 and "LOCAL_RANK" not in counts:
        yield f"{said} and WORLD_SIZE={world} are set without LOCAL_RANK: {start()}, or unset them"
    else:
        yield from _as_many(world, devices, "WORLD_SIZE")


def _slurm(counts: Mapping[str, int], devices: object, by_srun: bool) -> Iterator[str]:
    """Check the variables of SLURM."""
    tasks, rank = counts.get("SLURM_NTASKS"), counts.get("SLURM_PROCID", 0)
    if tasks is None:
        if rank > 0:
            yield f"SLURM_PROCID={rank} is set without SLURM_NTASKS: start the processes with srun, or unset it"
    elif rank >= max(tasks, 1):
        yield f"SLURM_PROCID={rank} must be less than SLURM_NTASKS={tasks}: start the processes with srun"
    elif tasks > 1 and not by_srun:
        yield (
            f"SLURM_NTASKS={tasks}, but srun did not start this process. For {tasks} processes: `srun "
            f"--ntasks-per-node={tasks} {called('train')} trainer.devices={tasks} …`; for one: `env -u SLURM_NTASKS "
            f"{called('train')} …`"
        )
    elif tasks > 1 and "SLURM_NTASKS_PER_NODE" not in counts:
        yield f"SLURM_NTASKS={tasks} without SLURM_NTASKS_PER_NODE: start with `srun --ntasks-per-node={tasks} …`"
    else:
        yield from _as_many(tasks, devices, "SLURM_NTASKS")


def _as_many(processes: int, devices: object, variable: str) -> Iterator[str]:
    """Check that there is one device for each process; otherwise each process would train alone."""
    if type(devices) is int and processes > 1 and devices != processes:
        yield (
            f"trainer.devices={devices} must be {processes}, the number of processes that were started ({variable}): "
            "each process has one device"
        )
