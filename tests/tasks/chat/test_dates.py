"""Chat templates with the date of the day."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from diffora.tasks.chat.dates import DATE, DIRECTIVES, with_fixed_date


def text(template: str) -> str:
    [found], _ = render_jinja_template([[{"role": "user", "content": "hello"}]], chat_template=template)
    return found


@pytest.mark.parametrize("written", ["%d %b %Y", "%B %d, %Y", "%Y-%m-%d", "%A %H:%M", *(f"%{d}" for d in DIRECTIVES)])
def test_a_date_is_written_in_any_form(written):
    assert text(with_fixed_date(f"{{{{ strftime_now('{written}') }}}}")) == DATE.strftime(written)


def test_numbers_without_zeros():
    assert text(with_fixed_date("{{ strftime_now('%-m/%-d %-H %F') }}")) == "7/26 0 2024-07-26"


@pytest.mark.parametrize(
    "template",
    [
        "{% macro head() %}{{ strftime_now('%Y') }}{% endmacro %}{{ head() }}",  # as gpt-oss
        "{% if not day is defined %}{% if strftime_now is defined %}{% set day = strftime_now('%Y') %}"
        "{% else %}{% set day = 'none' %}{% endif %}{% endif %}{{ day }}",  # as Llama 3.2
        "{% for m in messages %}{% if m.role == 'user' %}{{ strftime_now('%Y') | int }}{% endif %}{% endfor %}",
    ],
)
def test_a_date_is_written_anywhere_in_a_template(template):
    assert text(with_fixed_date(template)) == "2024"


@pytest.mark.parametrize("start", ["", "\n", "\n\n", "  ", "  \n", " x", "{#- c -#}\n"])
@pytest.mark.parametrize("rest", ["{% if true %}\n  a{% endif %}\n", "{{- ' a' }}", "a", "{%- if true %}a{% endif %}"])
def test_the_rest_of_a_template_keeps_its_white_space(start, rest):
    template = f"{start}{rest}{{{{ '' if messages else strftime_now('%d') }}}}"
    assert text(with_fixed_date(template)) == text(template)
    assert with_fixed_date(start + rest) == start + rest
