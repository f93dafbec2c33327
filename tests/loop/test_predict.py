"""Predictions for a whole split: those of the model in evaluation, in the order of the rows."""

from types import SimpleNamespace

import pytest
import torch
from small import rows_of, small_deberta, small_task

from diffora.loop.predict import predict
from diffora.tasks.base import Split
from diffora.tasks.tokenise import Collator


def predicted(model, precision="32-true", batch_size=5):
    rows, trainer = rows_of(12), SimpleNamespace(accelerator="cpu", precision=precision, num_workers=0)
    return predict(model, small_task(), Split(rows, rows), Collator(0), batch_size, trainer)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_predictions_are_those_of_the_model_without_dropout_in_the_precision_of_the_run(precision):
    model, rows = small_deberta(dropout=0.5), rows_of(12)
    found = predicted(model.train(), precision)
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        alone = [model(input_ids=torch.tensor([ids])).logits.float() for ids in rows["input_ids"]]
    assert found["row"].tolist() == list(range(12)) and found["labels"].tolist() == rows["labels"][:]
    close = {"rtol": 1e-4, "atol": 1e-5} if precision == "32-true" else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(found["logits"], torch.cat(alone), **close)
    exact = predicted(model)["logits"]
    assert torch.equal(found["logits"], exact) == (precision == "32-true")


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_in_its_mode_again(training):
    model = small_deberta().train(training)
    predicted(model)
    assert {module.training for module in model.modules()} == {training}
