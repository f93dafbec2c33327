"""The part of a task from text to text that does not depend on where the pairs come from.

The loss is the mean over the tokens of the targets. In a validation, text is generated too, and compared with the
targets by ROUGE and exact match.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from diffora.backbones.compatibility import longest_input
from diffora.errors import UserError
from diffora.settings.checks import LENGTH, Help, whole
from diffora.settings.sections import TaskSettings
from diffora.tasks.account import Account
from diffora.tasks.base import Batch, Collate, Outputs, Split, Task
from diffora.tasks.causal_lm import exponential
from diffora.tasks.chat.loss import aligned_losses
from diffora.tasks.generation import evenly, generate, with_others
from diffora.tasks.ignored import IGNORED
from diffora.tasks.pairs.batches import PairCollator
from diffora.tasks.pairs.encode import encode
from diffora.tasks.pairs.metrics import ROUGE, generation_scores
from diffora.tasks.pairs.read import ID


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How text is generated in an evaluation. Apart from these settings, generation is plain greedy search."""

    rows: Annotated[
        Annotated[int, whole(0)] | None,
        Help("Generate for this many validation rows after each epoch; 0: only the loss; null: for all.", "rows"),
    ] = 500
    max_new_tokens: Annotated[
        Annotated[int, whole(1, LENGTH)] | None, Help("Longest generated text; null: `max_target_length`.", "tokens")
    ] = None
    num_beams: Annotated[int, whole(1, 100), Help("Beams of a beam search; 1: greedy.", "beams")] = 1


@dataclass(frozen=True, kw_only=True)
class PairSettings(TaskSettings):
    """What every task from text to text has."""

    prefix: Annotated[str | None, Help("Written before every source, such as `summarize: ` for a T5.")] = None
    max_source_length: Annotated[int, whole(2, LENGTH), Help("Length at which sources are cut.", "tokens")]
    max_target_length: Annotated[int, whole(2, LENGTH), Help("Length at which targets are cut.", "tokens")]
    generation: Annotated[Generation, Help("How text is generated in an evaluation.")] = field(
        default_factory=Generation
    )


class PairTask(Task):
    """Train an encoder-decoder with its pretrained head on pairs of texts. Subclasses say where the pairs come from."""

    settings: ClassVar[type[TaskSettings]] = PairSettings
    model_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    peft_type: ClassVar[str | None] = "SEQ_2_SEQ_LM"
    trains_head: bool = False
    pretrained_head: ClassVar[bool] = True
    scores_training: ClassVar[bool] = False  # the training loss is logged anyway; nothing is generated while training
    padding: ClassVar = {**Task.padding, "labels": IGNORED}
    test_splits: tuple[str, ...] = ()
    usage = """
To generate: `model.generate(**tokenizer(source, return_tensors="pt"), max_new_tokens=64)`. Write the same prefix before
the source as in training. To continue training, load with `is_trainable=True`.
"""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        generates = cfg.generation.rows != 0
        self.metrics = (*ROUGE, "exact_match") if generates else ("perplexity",)
        self.main_metric = "rougeL" if generates else "perplexity"
        self.maximise = generates  # type: ignore[misc]
        self._tokenizer: Any = None
        self._shifted: Callable[[Tensor], Tensor] | None = None

    def unit_of(self, metric: str) -> str:
        return "perplexity" if metric == "perplexity" else "fraction"

    def higher_is_better(self, metric: str) -> bool:
        return metric != "perplexity"

    # --- before training ---

    def encode(self, rows: datasets.Dataset, processor: Any, training: bool) -> datasets.Dataset:
        """Columns of `diffora.tasks.pairs.encode.encode`, and ``generated``: whether to generate in a validation."""
        c = self.cfg
        room = 1 + processor.num_special_tokens_to_add()
        lengths = {"max_source_length": c.max_source_length, "max_target_length": c.max_target_length}
        if small := [
            f"task.{name}={n} leaves no room for text: at least {room}" for name, n in lengths.items() if n < room
        ]:
            raise UserError(small)
        encoded = encode(rows, processor, c.prefix or "", c.max_source_length, c.max_target_length, self.num_proc)
        chosen = np.zeros(len(encoded), dtype=bool)
        if not training:
            chosen[evenly(len(encoded), c.generation.rows)] = True
        table = encoded.data.table.append_column("generated", pa.array(chosen))
        return datasets.Dataset(table)

    def count_encoded(self, account: Account, split: Split) -> None:
        c, table = self.cfg, split.encoded.data
        for name, most in (("source", c.max_source_length), ("target", c.max_target_length)):
            if f"{name}_cut" in table.column_names:
                cut = pc.sum(table.column(f"{name}_cut")).as_py() or 0
                account.change(f"{name} cut at task.max_{name}_length={most}", cut)

    def collate(self, processor: Any, training: bool) -> Collate:
        self._tokenizer = processor  # decodes what was generated
        return PairCollator(processor.pad_token_id, pad_to_multiple_of=self.width_multiple)

    def check(self, model: Any) -> None:
        """Raise a UserError if sources, targets or generated texts can be longer than the model's positions."""
        self._learn(model)
        most = longest_input(model)
        lengths = {
            "task.max_source_length": self.cfg.max_source_length,
            "task.max_target_length": self.cfg.max_target_length,
            "task.generation.max_new_tokens": self.cfg.generation.max_new_tokens or 0,
        }
        if most is not None and (long := {name: n for name, n in lengths.items() if n > most}):
            raise UserError(
                [f"{name}={n} is more than the {most} tokens that this backbone reads" for name, n in long.items()]
            )

    def dummy(self, rows: int, model: Any) -> Batch:
        ids = torch.ones(rows, self.cfg.max_source_length, dtype=torch.long)
        labels = torch.ones(rows, self.cfg.max_target_length, dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": ids, "decoder_input_ids": labels}
        return inputs | {"labels": labels, "row": torch.arange(rows)}

    def _learn(self, model: Any) -> None:
        """Learn from the model how it makes the decoder's inputs of the targets; model families differ in this."""
        self._shifted = model.prepare_decoder_input_ids_from_labels

    # --- in a step ---

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = "input_ids", "attention_mask", "decoder_input_ids"  # the last one only in a `dummy`
        found = {name: batch[name] for name in names if name in batch}
        if "labels" in batch and "decoder_input_ids" not in batch:
            assert self._shifted is not None
            found["decoder_input_ids"] = self._shifted(batch["labels"])
        return found

    def loss(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean over the tokens of the targets."""
        losses, counted = aligned_losses(output.logits, batch["labels"])
        return losses.sum() / counted.sum().clamp(min=1)

    def weight(self, batch: Mapping[str, Tensor]) -> float:
        return float((batch["labels"] != IGNORED).sum())

    # --- after a step ---

    def outputs(self, output: Any, batch: Mapping[str, Tensor]) -> Outputs:
        """Sum of losses and number of target tokens, [n] each."""
        with torch.no_grad():
            losses, counted = aligned_losses(output.logits.detach(), batch["labels"])
        return {"row": batch["row"], "loss": losses.sum(1), "tokens": counted.sum(1)}

    def evaluate(self, model: nn.Module, batch: Batch, final: bool) -> Outputs:
        """`outputs` if there are targets; ``generated`` [n], and ``text`` [n, max_new_tokens], padded token ids.

        A final evaluation generates for all rows, a validation while training for those that `encode` chose.
        """
        self._learn(model)
        found = self.outputs(model(**self.inputs(batch)), batch) if "labels" in batch else {"row": batch["row"]}
        chosen = torch.ones_like(batch["generated"]) if final else batch["generated"]
        text = self._generate(model, batch, chosen)
        return found | {"generated": chosen, "text": text}

    def _generate(self, model: Any, batch: Batch, chosen: Tensor) -> Tensor:
        """Generated token ids of the chosen rows, without the start token; only padding for the other rows."""
        g, pad = self.cfg.generation, self._tokenizer.pad_token_id
        longest = g.max_new_tokens or self.cfg.max_target_length
        text = torch.full((len(chosen), longest), pad, dtype=torch.long, device=chosen.device)
        wanted = chosen if g.rows == 0 else with_others(model, chosen)
        if wanted.any():
            inputs = {name: batch[name][wanted] for name in ("input_ids", "attention_mask")}
            text[wanted] = generate(model, inputs, longest, pad, num_beams=g.num_beams)
        return text

    def score(self, outputs: Outputs, split: Split) -> dict[str, float]:
        """Mean loss over all target tokens; over the rows with generated text, ROUGE and exact match."""
        loss = float(outputs["loss"].double().sum() / outputs["tokens"].sum().clamp(min=1))
        if self.cfg.generation.rows == 0:
            return {"loss": loss, "perplexity": exponential(loss)}
        chosen = outputs["generated"]
        rows = outputs["row"][chosen].tolist()
        targets = split.rows.data.column("target")
        return {"loss": loss} | generation_scores(
            self._texts(outputs["text"][chosen]), [targets[row].as_py() for row in rows]
        )

    def _texts(self, ids: Tensor) -> list[str]:
        if not len(ids):
            return []  # batch_decode would take this as one empty text
        found: list[str] = self._tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True)
        return [text.strip() for text in found]

    def predictions(self, outputs: Outputs, split: Split) -> list[dict[str, Any]]:
        """For each row ``id`` if it has one, the generated text and the target."""
        texts = self._texts(outputs["text"])
        columns = split.rows.data
        kept = [name for name in (ID, "target") if name in columns.column_names]
        found = []
        for row, text in zip(outputs["row"].tolist(), texts, strict=True):
            facts = {name: columns.column(name)[row].as_py() for name in kept}
            target = {"target": facts.pop("target")} if "target" in facts else {}
            found.append({"row": row, **facts, "prediction": text, **target})
        return found

    def note_generated(self, validation: pa.Table) -> None:
        """Note for how many validation rows text is generated after each epoch."""
        n, chosen = validation.num_rows, self.cfg.generation.rows
        if chosen is not None and 0 < chosen < n:
            self.accounts["validation"].notes.append(
                f"after each epoch, text is generated for {chosen:,} of {n:,} rows: task.generation.rows={chosen}"
            )
