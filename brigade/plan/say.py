"""Sentences as data: an English template with its values, which a catalogue can say in another language. Pure."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources

LANGUAGES = ("en", "zh")


@dataclass(frozen=True)
class Say:
    """`template` in the style of str.format; a value may be a Say or a tuple of them, which are joined."""

    template: str
    values: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.to("en")

    def to(self, lang: str) -> str:
        """In a language of LANGUAGES. Raises KeyError for a template that its catalogue lacks."""
        template = self.template if lang == "en" else catalogue(lang)[self.template]
        return template.format(**{k: _value(v, lang) for k, v in self.values.items()})


def say(template: str, **values: object) -> Say:
    return Say(template, values)


def _value(value: object, lang: str) -> object:
    if isinstance(value, Say):
        return value.to(lang)
    if isinstance(value, tuple):
        return ("; " if lang == "en" else "；").join(str(_value(v, lang)) for v in value)
    return value


@lru_cache(maxsize=4)
def catalogue(lang: str) -> Mapping[str, str]:
    """English template -> template."""
    text = (resources.files("brigade.plan") / f"data/{lang}.json").read_text(encoding="utf-8")
    found: dict[str, str] = json.loads(text)
    return found
