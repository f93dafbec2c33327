"""The settings of the tasks for language models."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from diffora.settings.checks import LENGTH, PATH, ROWS, TEXT, Help, whole
from diffora.settings.sections import TaskSettings
from diffora.tasks.chat.held_out import Forgetting


@dataclass(frozen=True, kw_only=True)
class Answers:
    """How answers are generated and compared with ``task.score=generation``. Generation is greedy."""

    rows: Annotated[
        Annotated[int, whole(1)] | None,
        Help("Generate for this many validation rows in each evaluation; null: for all.", "rows"),
    ] = None
    max_new_tokens: Annotated[int, whole(1, LENGTH), Help("Longest generated text.", "tokens")] = 300
    answer: Annotated[
        Annotated[str, TEXT] | None,
        Help(
            "Regular expression of the answer in a generated text and in a reference: the last match counts, or its "
            "group. null: the whole text."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class LanguageSettings(TaskSettings):
    """What every task for a language model has."""

    max_length: Annotated[int, whole(4, LENGTH), Help("Length at which rows are cut.", "tokens")]
    packing: Annotated[
        bool, Help("Put several conversations into one training row, each with attention to itself only.")
    ]
    train_on: Annotated[
        Literal["completion", "all"], Help("Tokens to learn: the assistant's turns (`completion`), or all.")
    ]
    prompt: Annotated[
        Annotated[str, TEXT] | None,
        Help(
            "Write a row as this text, with the user's text at {prompt}, then the answer and the end token; null: by "
            "the tokenizer's chat template."
        ),
    ] = None
    score: Annotated[
        Literal["loss", "generation"],
        Help("What chooses the best weights: the perplexity (`loss`), or the generated answers (`generation`)."),
    ] = "loss"
    generation: Annotated[Answers, Help("How answers are generated and compared.")] = field(default_factory=Answers)
    forgetting: Annotated[Forgetting, Help("Texts whose loss is measured before and after.")] = field(
        default_factory=Forgetting
    )


@dataclass(frozen=True, kw_only=True)
class CausalLMSettings(LanguageSettings):
    """The settings of `CausalLMTask`."""

    hub: Annotated[str, Help("Data set on the hub.")]
    hub_config: Annotated[str | None, Help("Configuration of that data set, if it has several.")] = None
    train_split: Annotated[str, Help("Name of the training split on the hub.")]
    validation_hub: Annotated[
        str | None, Help("Another data set on the hub for validation and test; null: the same one.")
    ] = None
    validation_hub_config: Annotated[str | None, Help("Configuration of that other data set.")] = None
    validation_split: Annotated[
        str | None, Help("Name of the validation split on the hub; null: `validation_rows` of the training rows.")
    ] = None
    test_split: Annotated[str | None, Help("Name of the test split on the hub, for `predict=true`.")] = None
    path: Annotated[
        Annotated[str, PATH] | None,
        Help("Folder with train and, if there are any, validation and test as .jsonl or .parquet; null: the hub."),
    ] = None
    validation_rows: Annotated[
        int, whole(2, ROWS), Help("Training rows to validate on if there is no validation split.", "rows")
    ]
    max_validation_rows: Annotated[
        Annotated[int, whole(2, ROWS)] | None,
        Help("Use only this many rows of the validation split, the same ones in every run; null: all.", "rows"),
    ] = None
    max_characters: Annotated[
        Annotated[int, whole(1)] | None,
        Help("Leave out training rows with more characters in all turns; null: none.", "characters"),
    ] = None
