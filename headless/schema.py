"""The base of every configuration: frozen pydantic values whose fields describe themselves.

One description of a field (title, help, unit, tier, bounds, choices) feeds the forms of the window, the checks of
``mosaic-headless check`` and the documentation. No torch here: the window and the queue read configurations too.
"""

from __future__ import annotations

import difflib
from enum import Enum
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic import Field as _PydanticField
from pydantic.fields import FieldInfo

from headless.errors import MosaicError

Tier = Literal["basic", "advanced", "expert"]


class Frozen(BaseModel):
    """An immutable value that refuses unknown fields, so that a misspelt setting is never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


def Field(
    default: Any = ...,
    *,
    title: str,
    help: str,
    unit: str = "",
    tier: Tier = "advanced",
    **constraints: Any,
) -> Any:
    """A configuration field with all that a form, a check and a manual need to know of it.

    ``constraints`` are those of pydantic (``ge``, ``gt``, ``le``, ``lt``, ``min_length``, ``default_factory`` ...).
    """
    return _PydanticField(
        default, title=title, description=help, json_schema_extra={"unit": unit, "tier": tier}, **constraints
    )


class Config(Frozen):
    """Base of every method's configuration. Subclasses add fields with :func:`Field` and name their presets."""

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """Named sets of values that differ from the defaults."""
        return {}

    @classmethod
    def make(cls, preset: str | None = None, **settings: Any) -> Self:
        """A configuration from a preset and changed fields.

        Raises
        ------
        MosaicError
            ``model.unknown_preset``, ``model.unknown_setting`` (with the nearest name) or ``model.bad_setting``.
        """
        values: dict[str, Any] = {}
        if preset is not None:
            presets = cls.presets()
            if preset not in presets:
                raise MosaicError(
                    "model.unknown_preset",
                    f"There is no preset {preset!r}.",
                    f"Choose one of: {', '.join(presets) or 'none'}.",
                    field="preset",
                )
            values.update(presets[preset])
        values.update(settings)
        for name in values:
            if name not in cls.model_fields:
                near = difflib.get_close_matches(name, list(cls.model_fields), n=1)
                hint = f"Did you mean {near[0]!r}?" if near else f"Known settings: {', '.join(cls.model_fields)}."
                raise MosaicError("model.unknown_setting", f"There is no setting {name!r}.", hint, field=name)
            if values[name] is None and "none" in get_args(cls.model_fields[name].annotation):
                values[name] = "none"  # the command line cannot tell the word from the absence of a value
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise from_validation(error, "model.bad_setting") from None


def from_validation(error: ValidationError, code: str, **where: object) -> MosaicError:
    """The first fault of a pydantic error in words, with the number of further ones."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    value = first.get("input")
    shown = f" (given: {value!r})" if isinstance(value, (int, float, str, bool)) else ""
    more = error.error_count() - 1
    hint = f"{more} further field{'s are' if more > 1 else ' is'} wrong too." if more else ""
    return MosaicError(code, f"{field or 'value'}: {first['msg']}{shown}.", hint, field=field, **where)


def describe(config: type[Config]) -> list[dict[str, Any]]:
    """One row a field, JSON-ready: name, title, help, unit, tier, type, default, bounds, choices."""
    schema = config.model_json_schema()
    rows = []
    for name, info in config.model_fields.items():
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        entry = schema["properties"][name]
        rows.append(
            {
                "name": name,
                "title": info.title or name,
                "help": info.description or "",
                "unit": extra.get("unit", ""),
                "tier": extra.get("tier", "advanced"),
                "default": _plain(info.get_default(call_default_factory=True, validated_data={})),
                "schema": {key: value for key, value in entry.items() if key not in ("title", "description")},
                "bounds": _bounds(info),
            }
        )
    return rows


def _bounds(info: FieldInfo) -> dict[str, float]:
    found: dict[str, float] = {}
    for item in info.metadata:
        for key in ("ge", "gt", "le", "lt"):
            value = getattr(item, key, None)
            if value is not None:
                found[key] = value
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return value
