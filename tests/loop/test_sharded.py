"""What `trainer=fsdp` refuses. tests/training/test_finetune.py and tests/e2e/test_fsdp.py run it."""

import pytest
import torch
from torch import nn

from diffora.errors import UserError
from diffora.run.check import check
from diffora.tasks.generation import with_others

BASE = ["task=paraphrase", "model=tiny", "trainer=ddp_cpu", "trainer.strategy=fsdp"]


@pytest.mark.parametrize("method", ["lora", "diffora", "houlsby", "dora"])
def test_methods_that_add_parameters_are_accepted(cfg, method):
    settings, _ = check(cfg(f"method={method}", *BASE))
    assert settings.trainer.strategy == "fsdp"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method=lora", "trainer.devices=1"], "trainer.strategy=fsdp needs several devices"),
        (["method=full_ft"], "method=full_ft trains all of them: use trainer.strategy=ddp"),
        (["method=lora", "trainer.compile=true"], "does not go with trainer.compile=true"),
        (["method=lora", "trainer.precision=16-mixed"], "does not go with trainer.precision=16-mixed"),
        (
            ["method=lora", "task=dialogue", "model=tiny_llama", "task.forgetting.path=t.txt"],
            "task.forgetting.path=t.txt",
        ),
        (["method=diffora", "search.order=2"], "does not go with search.order=2"),
        (["method=diffora", "method.selector=fisher"], "does not go with method.selector=fisher"),
    ],
)
def test_what_does_not_go_with_it_is_refused(cfg, overrides, words):
    with pytest.raises(UserError) as caught:
        check(cfg(*BASE, *overrides))
    assert [words in problem for problem in caught.value.problems] == [True]


def test_all_mistakes_come_at_once(cfg):
    with pytest.raises(UserError) as caught:
        check(cfg(*BASE, "method=full_ft", "trainer.compile=true", "finetune.batch_size=3"))
    assert len(caught.value.problems) == 3


def test_a_selection_from_elsewhere_needs_no_selector(cfg):
    check(cfg(*BASE, "method=random"))


def test_a_process_without_chosen_rows_generates_with_the_others():
    model, chosen, none = nn.Module(), torch.tensor([False, True]), torch.zeros(2, dtype=torch.bool)
    assert with_others(model, none).tolist() == [False, False]
    model._is_fsdp_managed_module = True
    assert with_others(model, none).tolist() == [True, False] and with_others(model, chosen) is chosen
