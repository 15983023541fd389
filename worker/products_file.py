"""The products file: a JSON object, product name → credentials and, where they differ, the platform's place."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from worker.core.command import MAX_PRODUCT_CHARS
from worker.core.credentials import AccessKey, Api, ApiKey, Credentials, Product, UserKey, generation, platform_url
from worker.core.json_faults import json_fault
from worker.core.validation import messages
from worker.settings_files import UnusableFile, read_text

_MAX_LINES = 20
_MARK = re.compile(r'["{}]')  # where a string, or an object, begins or ends
_COLON = re.compile(r"\s*:")
_DECODER = json.JSONDecoder()
_KINDS: dict[str, type[Credentials]] = {"api_key": ApiKey, "product_id": AccessKey, "user_id": UserKey}


class _Place(BaseModel):
    """Where a product is; by default where ``ONENET_URL`` and ``ONENET_API`` say."""

    model_config = ConfigDict(hide_input_in_errors=True)

    url: Annotated[str, AfterValidator(platform_url)]
    api: Annotated[Api, BeforeValidator(lambda api: api.lower() if isinstance(api, str) else api)]


def read_products(path: Path, default_url: str, default_api: Api) -> tuple[dict[str, Product], list[str]]:
    """Return the products of a file by name, and a line for everything in it that cannot be used.

    Args:
        path: of the file.
        default_url: of the platform, for products without one.
        default_api: of the platform, for products without one.
    """
    try:
        text = read_text(path)
        entries = _parse(text, path)
    except UnusableFile as exc:
        return {}, [str(exc)]
    places: dict[tuple[str, ...], int] = {}
    lines: list[str] = []
    repeated: set[tuple[str, ...]] = set()
    for names, number in _names(text):
        if names in places and repeated.isdisjoint((names, names[:1])):
            repeated.add(names)
            lines.append(f"line {number}: {_described(*names)} is there twice, first in line {places[names]}")
        places.setdefault(names, number)
    products: dict[str, Product] = {}
    for name, entry in entries.items():
        try:
            products[name] = _product(name, entry, default_url, default_api)
        except ValidationError as exc:
            for field, message in messages(exc).items():
                number = places.get((name, field), places[name,])
                lines.append(f"line {number}: {_described(name, field)}: {message}")
        except ValueError as exc:
            lines.append(f"line {places[name,]}: product {name!r}: {exc}")
    if len(lines) > _MAX_LINES:
        lines[_MAX_LINES:] = [f"and {len(lines) - _MAX_LINES:,} more"]
    return products, [str(UnusableFile(line, path)) for line in lines]


def _parse(text: str, path: Path) -> dict[str, Any]:
    """Return the object that a JSON text contains.

    Raises:
        UnusableFile: it contains none.
    """
    if not text.strip():
        raise UnusableFile("is empty", path)
    try:
        found = json.loads(text)
    except json.JSONDecodeError as exc:
        raise UnusableFile(json_fault(exc), path) from None
    except RecursionError:
        raise UnusableFile("is nested too deeply", path) from None
    except ValueError:
        raise UnusableFile("is not JSON: a number has too many digits", path) from None
    if not isinstance(found, dict):
        raise UnusableFile("must be a JSON object: product name → credentials", path)
    return found


def _names(text: str) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield each product of a valid JSON text, and each field after the name of its product, with its line.

    What is nested more deeply has no name here: a path for each would take memory by the square of the depth.
    """
    around = ["", ""]
    depth = 0
    line, counted, position = 1, 0, 0
    while (mark := _MARK.search(text, position)) is not None:
        position = mark.end()
        if mark[0] == "{":
            depth += 1
        elif mark[0] == "}":
            depth -= 1
        else:
            string, position = _DECODER.raw_decode(text, mark.start())
            if depth <= len(around) and _COLON.match(text, position):
                around[depth - 1] = string
                line += text.count("\n", counted, mark.start())
                counted = mark.start()
                yield tuple(around[:depth]), line


def _described(product: str, *fields: str) -> str:
    return f"product {product!r}: {'.'.join(fields)}".removesuffix(": ")


def _product(name: str, entry: object, default_url: str, default_api: Api) -> Product:
    """Return a product of the products file.

    Raises:
        ValueError: the entry is unusable; pydantic's ValidationError is one.
    """
    if not (name.isprintable() and name == name.strip() and 0 < len(name) <= MAX_PRODUCT_CHARS):
        raise ValueError(f"its name must be 1 to {MAX_PRODUCT_CHARS} printable characters, without blanks around them")
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    place = _Place.model_validate({"url": default_url, "api": default_api} | fields)
    named = [field for field in _KINDS if field in fields]
    if len(named) != 1:
        raise ValueError("must be an object with one of api_key, product_id and user_id")
    [kind] = named
    credentials = _KINDS[kind].model_validate({key: fields[key] for key in fields.keys() - _Place.model_fields.keys()})
    api = generation(place.api, place.url)
    if kind == "api_key" and api == "v2":
        raise ValueError("api_key: is for v1 of the platform; v2 needs product_id or user_id, and access_key")
    if kind == "user_id" and api == "v1":
        raise ValueError('user_id: is for v2 of the platform; use product_id, or set "api": "v2"')
    return Product(place.url, api, credentials)
