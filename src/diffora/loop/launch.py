"""Checks of the environment variables that say which process this is, and how many processes there are."""

from collections.abc import Iterator, Mapping

from diffora.errors import called

COUNTS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "SLURM_NTASKS",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_PROCID",
)


def torchrun(nodes: int = 1) -> str:
    """The start of a command that gives torchrun this program; with several nodes, the command for each of them."""
    by = called("train")
    program = by.removeprefix("python ") if by.startswith("python ") else f"-m {by}"
    meeting = f"--nnodes={nodes} --rdzv-backend=c10d --rdzv-endpoint=FIRST_MACHINE:29500 " if nodes > 1 else ""
    return f"torchrun {meeting}--nproc-per-node=N {program}"


def start() -> str:
    """What to do about wrong variables."""
    return f"start the processes with `{torchrun()} …`"


def launch_problems(environment: Mapping[str, str], devices: object, nodes: int = 1) -> Iterator[str]:
    """One message for each variable of torchrun or SLURM that cannot be right.

    Lightning trusts these variables. If they are wrong, a process may believe that it has rank 1 and write no results,
    or it may wait for other processes that do not exist.

    Args:
        environment: `os.environ`.
        devices: ``trainer.devices``, on each machine.
        nodes: ``trainer.num_nodes``.
    """
    given = {name: environment[name] for name in COUNTS if name in environment}
    wrong = {name: value for name, value in given.items() if not (value.isascii() and value.isdecimal())}
    for name, value in wrong.items():
        yield f"the environment variable {name}={value} must be a whole number; unset it, or {start()}"
    if wrong:
        return
    counts = {name: int(value) for name, value in given.items()}
    if "TORCHELASTIC_RUN_ID" in environment or {"RANK", "LOCAL_RANK"} & counts.keys():
        yield from _torchrun(counts, devices, nodes, "TORCHELASTIC_RUN_ID" in environment)
    elif environment.get("SLURM_JOB_NAME") not in (
        "bash",
        "interactive",
    ):  # in these, Lightning starts the processes itself
        yield from _slurm(counts, devices, nodes, "SLURM_STEP_NUM_TASKS" in environment)
    elif rank := counts.get("SLURM_PROCID"):
        yield f"SLURM_PROCID={rank} in an interactive job: only its first task may start the program"
    elif nodes > 1:
        yield _alone(nodes)


def _alone(nodes: int) -> str:
    return (
        f"trainer.num_nodes={nodes}, but this process was started alone: start the processes on each machine with "
        f"`{torchrun(nodes)} …`, or all of them with srun"
    )


def _torchrun(counts: Mapping[str, int], devices: object, nodes: int, by_torchrun: bool) -> Iterator[str]:
    """Check the variables of torchrun."""
    ranks = {name: counts[name] for name in ("RANK", "LOCAL_RANK") if name in counts}
    said = ", ".join(f"{name}={value}" for name, value in ranks.items())
    world, highest = counts.get("WORLD_SIZE"), max(ranks.values(), default=0)
    if by_torchrun and (missing := [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name not in counts]):
        yield f"TORCHELASTIC_RUN_ID is set without {', '.join(missing)}: {start()}, or unset it"
    elif world is None:
        if highest > 0 or devices != 1 or nodes > 1:  # a single process has rank 0 anyway
            yield f"{said} is set without WORLD_SIZE: {start()}, or unset it"
    elif highest >= world:
        yield f"{said} must be less than WORLD_SIZE={world}: {start()}, or unset them"
    elif world > 1 and "LOCAL_RANK" not in counts:
        yield f"{said} and WORLD_SIZE={world} are set without LOCAL_RANK: {start()}, or unset them"
    else:
        yield from _as_many(world, counts.get("LOCAL_WORLD_SIZE", world // nodes), devices, nodes, "WORLD_SIZE")


def _slurm(counts: Mapping[str, int], devices: object, nodes: int, by_srun: bool) -> Iterator[str]:
    """Check the variables of SLURM."""
    tasks, rank = counts.get("SLURM_NTASKS"), counts.get("SLURM_PROCID", 0)
    if tasks is None:
        if rank > 0:
            yield f"SLURM_PROCID={rank} is set without SLURM_NTASKS: start the processes with srun, or unset it"
        elif nodes > 1:
            yield _alone(nodes)
    elif rank >= max(tasks, 1):
        yield f"SLURM_PROCID={rank} must be less than SLURM_NTASKS={tasks}: start the processes with srun"
    elif tasks > 1 and not by_srun:
        each = -(-tasks // nodes)
        yield (
            f"SLURM_NTASKS={tasks}, but srun did not start this process. For {tasks} processes: `srun "
            f"--ntasks-per-node={each} {called('train')} trainer.devices={each} …`; for one: `env -u SLURM_NTASKS "
            f"{called('train')} …`"
        )
    elif tasks > 1 and "SLURM_NTASKS_PER_NODE" not in counts:
        each = -(-tasks // nodes)
        yield f"SLURM_NTASKS={tasks} without SLURM_NTASKS_PER_NODE: start with `srun --ntasks-per-node={each} …`"
    else:
        yield from _as_many(tasks, counts.get("SLURM_NTASKS_PER_NODE", tasks), devices, nodes, "SLURM_NTASKS")


def _as_many(processes: int, each: int, devices: object, nodes: int, variable: str) -> Iterator[str]:
    """Check that there is one device for each process; otherwise each process would train alone.

    Args:
        processes: on all machines.
        each: on each machine.
    """
    if each < 1 or processes % each:
        yield f"{variable}={processes} must be a multiple of the {each} processes of each machine"
    elif processes != each * nodes:
        yield (
            f"trainer.num_nodes={nodes} must be {processes // each}: {processes} processes were started ({variable}), "
            f"{each} on each machine"
        )
    elif type(devices) is int and processes > 1 and devices != each:
        yield (
            f"trainer.devices={devices} must be {each}, the number of processes that were started on each machine "
            f"({variable}={processes}): each process has one device"
        )
