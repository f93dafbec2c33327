"""Running out of memory at any point of a run gives one message that says what to change."""

import errno
import os
import signal

import pytest
import torch
from conftest import batch_of
from failures import NO_MEMORY, SHORT_LORA
from small import rows_of, small_deberta, small_task

from diffora.errors import UserError, explained, out_of_memory
from diffora.loop.predict import predict
from diffora.run.experiment import run
from diffora.tasks.base import Split
from diffora.tasks.glue import GlueTask
from diffora.tasks.tokenise import Collator

SHORTAGES = [
    (RuntimeError(NO_MEMORY), "out of memory, 4 TiB were asked for"),
    (MemoryError(), "out of memory"),
    (MemoryError("Unable to allocate 7.28 TiB for an array"), "out of memory, 7.28 TiB were asked for"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0"), "20.00 MiB were asked for"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "out of memory"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "num_workers"),
    (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "num_workers"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"), "/dev/shm"),
    (RuntimeError("unable to open shared memory object </torch_1> in read-write mode: No space left"), "/dev/shm"),
]


@pytest.mark.parametrize(("error", "words"), SHORTAGES)
def test_lack_of_memory_is_recognised(error, words):
    assert words in out_of_memory(error) and words in str(explained(error))


@pytest.mark.parametrize("error", [RuntimeError("shapes"), ValueError("out of memory"), KeyError("x"), OSError("x")])
def test_other_errors_are_not_called_lack_of_memory(error):
    assert out_of_memory(error) is None and explained(error) is None


def test_the_messages_of_the_installed_torch_are_recognised():
    for shape in [(10**14,), (2**40, 2**30)]:
        with pytest.raises(RuntimeError) as caught:
            torch.empty(*shape)
        assert out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("diffora.run.experiment.Parts.load", "smaller model"),
        ("diffora.methods.lora.LoRA.adapt", "smaller batch_size, rank"),
        ("diffora.tasks.glue.GlueTask.loss", r"finetune.accumulate=2 takes 16 rows at a time"),
        ("diffora.run.experiment.new_record", None),
    ],
)
def test_lack_of_memory_in_any_stage_gives_one_message_with_advice(cfg, tmp_path, monkeypatch, place, words):

    def fails(*_, **__):
        raise RuntimeError(NO_MEMORY)

    monkeypatch.setattr(place, fails)
    if words is None:
        with pytest.raises(RuntimeError) as caught:
            run(cfg(*SHORT_LORA), tmp_path / "run")
        assert explained(caught.value)
        return
    with pytest.raises(UserError, match=f"out of memory, 4 TiB.*{words}"):
        run(cfg(*SHORT_LORA), tmp_path / "run")


def test_a_killed_loader_process_gives_one_message(cfg, tmp_path, monkeypatch):
    def killed(self, rows):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Collator, "__call__", killed)
    with pytest.raises(UserError, match=r"a process that loads batches was killed.*trainer\.num_workers=0"):
        run(cfg(*SHORT_LORA, "trainer.num_workers=1"), tmp_path / "run")


def test_lack_of_memory_in_prediction_advises_a_smaller_batch(cfg, monkeypatch):
    def fails(*_):
        raise RuntimeError(NO_MEMORY)

    task, rows = small_task(), rows_of(8)
    monkeypatch.setattr(GlueTask, "outputs", fails)
    trainer = cfg(*SHORT_LORA).trainer
    with pytest.raises(UserError, match=r"with batches of 8 rows; try batch_size=4"):
        predict(small_deberta(), task, Split(rows, rows), lambda _: batch_of(8), 8, trainer)
