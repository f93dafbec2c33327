"""What `trainer=fsdp` refuses. tests/training/test_finetune.py and tests/e2e/test_fsdp.py run it."""

import pytest

from diffora.errors import UserError
from diffora.run.check import check

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
            ["method=lora", "task=sums", "model=tiny_sums", "task.generation.rows=5"],
            "does not go with task.generation.rows=5",
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
