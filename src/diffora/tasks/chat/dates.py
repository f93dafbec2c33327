"""One fixed date for chat templates that write today's, such as those of Llama 3.2.

With today's date, the same rows would have other tokens every day, and prompts other ones than the training rows.
"""

import json
from datetime import UTC, datetime
from typing import Any

DATE = datetime(2024, 7, 26, tzinfo=UTC)
"""The date that the templates of Llama 3 write where there is no clock."""
CLOCK = "strftime_now"
"""The function of transformers that gives a template the date."""
DIRECTIVES = "aAbBcdfGHIjmMpSuUVwWxXyYzZ"
"""The directives of `datetime.strftime` that Python documents for every system, without %%."""


def has_clock(tokenizer: Any) -> bool:
    """Whether the chat template of a tokenizer asks for the date."""
    return CLOCK in str(tokenizer.chat_template)


def with_fixed_date(template: str) -> str:
    """A chat template in which the date is always `DATE`; the template itself if it does not ask for the date.

    transformers passes no functions on to a template. So a macro takes the place of its function.
    """
    if CLOCK not in template:
        return template
    texts = {f"%{letter}": DATE.strftime(f"%{letter}") for letter in DIRECTIVES}
    # Some systems know more: numbers without zeros in front, the day of two places, the date of ISO 8601.
    texts |= {f"%-{letter}": texts[f"%{letter}"].lstrip("0") or "0" for letter in "dHIjmMSy"}
    texts |= {"%e": f"{DATE.day:2}", "%F": f"{DATE:%Y-%m-%d}"}
    written = "".join(f"|replace({json.dumps(sign)}, {json.dumps(text)})" for sign, text in texts.items())
    # transformers removes a new line after a tag. So the rest is read like a template that begins here.
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{written} }}}}{{% endmacro %}}\n{template}"
