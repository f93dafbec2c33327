"""The bi-level search of a user's own model with the user's own loaders (`diffora.search`)."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from diffora.core.grid import Grid
from diffora.core.picture import start_gate
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.standalone.batches import Loss, divided_loader, loader_problems, loss_problem, model_loss
from diffora.standalone.bilevel import Found, bilevel_search, steps_of_round
from diffora.standalone.choice import (
    choice_problems,
    ensemble_problems,
    member_seeds,
    selection_of,
    selection_of_members,
)
from diffora.standalone.model import grid_of, head_of, left_as_found, unwrapped, warn_of_processes
from diffora.standalone.progress import say
from diffora.standalone.settings import SearchSettings


def search(
    model: nn.Module,
    train_loader: Iterable[Any],
    valid_loader: Iterable[Any] | None = None,
    *,
    loss: Loss | None = None,
    rounds: int = 5,
    k: int | None = None,
    scope: str = "layer",
    layer: str | None = None,
    candidates: Sequence[str] | None = None,
    head: Sequence[str] | None = None,
    rank: int = 4,
    alpha: float = 16.0,
    lr: float = 1e-3,
    gamma_lr: float = 0.01,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    train_steps: int = 1,
    relaxation: str = "softmax",
    head_warmup: float | None = None,
    readout: str = "gamma",
    patience: int | None = None,
    seed: int = 0,
    progress: bool = True,
    ensemble: int = 1,
) -> Selection:
    """Search which modules of a model should get a LoRA of their own ([D] Algorithm 1, lines 1 to 8 and 10).

    Every candidate gets an adapter with a gate. Each step updates Γ on a validation batch, then A, B and the head on
    ``train_steps`` training batches. Afterwards the model is as before: adapters are removed, and the head has its old
    weights.

    Args:
        model: any module with repeated layers, without adapters, in any precision, also quantised. It stays on its
            device or devices. Inside `torch.compile` and `nn.DataParallel`, the module itself is searched.
        train_loader: batches for A, B and the head: a `DataLoader`, a list, or anything else that can be iterated over
            again. A round is one pass over it.
        valid_loader: batches for Γ, of other rows of the *training* data. None: ``train_loader`` is divided into two
            halves at random, and a line says so. Rows are not compared: one that occurs twice may be in both halves.
        loss: ``loss(model, batch)``, a scalar; the batch is on the model's device. None: ``model(**batch).loss``.
        rounds: passes over ``train_loader``.
        k: modules to select in each layer; None for half of them.
        scope: ``layer``: the best k of each layer; ``global``: as many in all, wherever they are.
        layer, candidates: where the candidates are, as in `diffora.core.grid.find_grid`; None: found in the model.
        head: names of modules that are trained together with A and B. None: a transformers model's parts outside the
            pretrained model, and in other models everything outside the layers. If some of the candidates' weights are
            frozen, everything that requires gradients.
        rank, alpha: of the adapters; updates are scaled by alpha / rank.
        lr, weight_decay, clip: of A, B and the head; ``clip`` is the largest norm of their gradient, None for no limit.
        gamma_lr: learning rate of Γ.
        train_steps: T, weight steps per Γ step.
        relaxation: from Γ to gates, a key of `diffora.core.dam.RELAXATIONS`.
        head_warmup: train A, B and the head alone at first, for so many steps (an int) or this share of all steps (a
            float below 1); None: Γ moves from the first step.
        readout: what modules are scored by: ``gamma``, the gates at the end, or ``early_gradient``, minus the sum of
            ∂L_valid/∂γ̄ over the first third of the Γ steps.
        patience: stop once the selection has not changed for this many checks, of which a round has ten; None: never.
        seed: of the adapters' first values, dropout, the order of a shuffled loader and the division of one loader.
            Random numbers of numpy and of Python's ``random``, which a collate function may use, are not seeded.
        progress: show a progress bar, in a terminal or notebook.
        ensemble: search so many times, with other seeds (`diffora.core.ensemble.member_seed`), and select by the mean
            of the standardised gates. The selection then has a ``confidence`` for each module. The head has its present
            weights at the start of each search.

    Returns:
        The selection. ``gamma_bar`` is the relaxed DAM (with ``early_gradient`` there are ``scores`` instead),
        ``rounds`` how long the search took, ``config`` what it was made with. Of an ensemble, ``scores`` are the mean
        scores, ``confidence`` the probability that a repeat would select the module, ``rounds`` the first member's.

    Raises:
        UserError: an argument is impossible, the model has no repeated layers or has adapters, a loader has no batches,
            a loss is not a finite scalar, or it calls a candidate in no batch. The model is then as before, too.
    """
    settings = SearchSettings(
        rounds=rounds,
        rank=rank,
        alpha=alpha,
        lr=lr,
        gamma_lr=gamma_lr,
        weight_decay=weight_decay,
        clip=clip,
        train_steps=train_steps,
        relaxation=relaxation,
        head_warmup=head_warmup,
        readout=readout,
        patience=patience,
    )
    model = unwrapped(model)
    grid = grid_of(model, layer, candidates)
    problems = [
        *choice_problems(k, scope, grid, seed),
        *settings.problems(),
        *loss_problem(loss),
        *ensemble_problems(ensemble, train_loader, valid_loader),
    ]
    if problems := [*problems, *loader_problems(train_loader, valid_loader, rounds)]:
        raise UserError(problems)
    warn_of_processes()
    trained = head_of(model, grid, head)
    names = [name for name, parameter in model.named_parameters() if parameter in set(trained)]
    division: str | None = None
    members: list[Found] = []
    for own in member_seeds(seed, ensemble, progress):
        train, valid = train_loader, valid_loader
        if valid is None:
            train, valid, how = divided_loader(train, own)
            division = division or how
            say(progress, [how])
        if problems := [*settings.step_problems(steps_of_round(train, train_steps))]:
            raise UserError(problems)
        if not members:
            say(progress, [f"trained with the adapters: {', '.join(names) or 'nothing'}"])
        with left_as_found(model, own, trained):
            loaders = train, valid
            found = bilevel_search(
                model, grid, trained, loaders, loss or model_loss, settings, (k, scope), own, progress
            )
        if found.rounds < rounds:
            say(progress, [f"stopped after {found.rounds:.3g} of {rounds} rounds: unchanged for {patience} checks"])
        members.append(found)
    gates = members[0].gates[grid.present]
    starts = dict.fromkeys(f"{start_gate(relaxation, size):.3f}" for size in sorted(set(grid.sizes), reverse=True))
    now = f"between {gates.min():.3f} and {gates.max():.3f}"
    say(progress, [f"gates are {now} now; they started at {' or '.join(starts)}"])
    config = {"search": asdict(settings), "trained": names, "division": division}
    return _selection(grid, members, k, scope, seed, settings, config)


def _selection(
    grid: Grid,
    members: Sequence[Found],
    k: int | None,
    scope: str,
    seed: int,
    settings: SearchSettings,
    config: dict[str, Any],
) -> Selection:
    """The modules with the highest scores of the only member, or with the highest mean score of several members."""
    first = members[0]
    if len(members) > 1:
        scores = [member.scores for member in members]
        relaxation = settings.relaxation if settings.readout == "gamma" else None
        selection = selection_of_members(grid, scores, k, scope, "search", seed, config, relaxation)
        return replace(selection, readout=settings.readout, rounds=first.rounds)
    rest = {"gamma_bar": first.scores.tolist(), "relaxation": settings.relaxation, "rounds": first.rounds}
    selection = selection_of(grid, first.scores, k, scope, "search", seed, config, **rest)
    return selection.read_from(settings.readout)
