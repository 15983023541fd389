"""The command that upstream systems publish: one JSON object in UTF-8, routing key ``execute``."""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, TypeAdapter, with_config
from typing_extensions import TypedDict

COMMAND_ID_PATTERN = r"^[A-Za-z0-9._:-]{1,128}$"
TIME_PATTERN = (
    r"^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]"
    r"(Z|[+-]([01][0-9]|2[0-3])(:?[0-5][0-9])?)?$"
)
MAX_ARGS_BYTES = 2048
MAX_BODY_BYTES = 64 * 1024
# What the worker refuses although a schema of the fields takes it; `tests/cli/test_contracts.py` checks the list.
BEYOND_THE_SCHEMA = (
    "no id in command_id or in the AMQP property message_id, two that differ, or a message_id not of its form",
    "a time that is not in the calendar, such as February 30, or lies within a day of its ends in the years 1 and 9999",
    "an expired_time that is not later than valid_time, both as instants, whatever their offsets",
    f"args of more than {MAX_ARGS_BYTES} bytes in UTF-8, since the schema counts characters",
    "a lone surrogate in a string, since it has no form in UTF-8",
    "an integer that is written with a fraction or an exponent, such as 1.0 or 1e0",
    f"a body of more than {MAX_BODY_BYTES} bytes",
    "a body that is not JSON to the letter: not in UTF-8, with a byte order mark, with a name twice in an object",
)
_SEEN_LATER = "Whether expired_time has passed, and whether product is configured, is seen when the command is sent."


def _is_unicode(text: str) -> str:
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("must be Unicode: a lone surrogate has no UTF-8")
    return text


def _fits_the_platform(args: str) -> str:
    if len(args.encode()) > MAX_ARGS_BYTES:
        raise ValueError(f"must be at most {MAX_ARGS_BYTES} bytes of UTF-8")
    return args


def _trigger_form(value: object) -> str:
    return "list" if isinstance(value, list) else "integer"


def _each_once(messages: list[str]) -> list[str]:
    if len(set(messages)) < len(messages):
        raise ValueError("names a message twice")  # the sum would be another trigger
    return messages


# For validators whose $ is Python's and lets a line break at the end pass; in ECMA-262, and here, it does not.
_ONE_LINE: dict[str, Any] = {"not": {"pattern": "\\n"}}

Text = Annotated[str, AfterValidator(_is_unicode)]
CommandId = Annotated[str, Field(pattern=COMMAND_ID_PATTERN, json_schema_extra=_ONE_LINE)]
Imei = Annotated[str, Field(pattern=r"^[0-9]{15}$", json_schema_extra=_ONE_LINE)]
Identifier = Annotated[int, Field(ge=0, le=65535)]
Time = Annotated[str, Field(pattern=TIME_PATTERN, json_schema_extra=_ONE_LINE)]
TriggerBits = Annotated[int, Field(ge=1, le=7)]
TriggerNames = Annotated[
    list[Literal["REGISTER", "UPDATE", "NOTIFY"]],
    Field(min_length=1, max_length=3, json_schema_extra={"uniqueItems": True}),
    AfterValidator(_each_once),
]
Trigger = Annotated[
    Annotated[TriggerBits, Tag("integer")] | Annotated[TriggerNames, Tag("list")], Discriminator(_trigger_form)
]


EXAMPLE = {
    "command_id": "8f6c0a52-5d1e-4f5e-9a55-0d7c5f8b9f01",
    "imei": "865820030000001",
    "obj_id": 3311,
    "obj_inst_id": 0,
    "res_id": 5850,
    "valid_time": "2026-11-22T08:00:00",
    "expired_time": "2026-11-23T08:00:00+08:00",
    "trigger_msg": ["REGISTER", "UPDATE"],
    "args": "on",
}


def _complete(schema: dict[str, Any]) -> None:
    beyond = "".join(f"\n- {rule}" for rule in BEYOND_THE_SCHEMA)
    schema["description"] += f"\n\nBeyond this schema the worker refuses:\n{beyond}\n\n{_SEEN_LATER}"
    schema["examples"] = [EXAMPLE]


@with_config(
    ConfigDict(
        strict=True, extra="forbid", hide_input_in_errors=True, title="Execute command", json_schema_extra=_complete
    )
)
class Command(TypedDict):
    """One Execute command for one device, cached by OneNET until the device shows up."""

    # A typed dictionary and not a model: an absent field is not a null one, and a model's defaults would mix them up.

    command_id: NotRequired[
        Annotated[
            CommandId,
            Field(
                description="The idempotency key: one id is one command. Required unless the AMQP property message_id "
                "is set; if both are, they must agree.",
            ),
        ]
    ]
    imei: Annotated[Imei, Field(description="The device module's IMEI: 15 digits.")]
    obj_id: Annotated[Identifier, Field(description="LwM2M object id.")]
    obj_inst_id: Annotated[Identifier, Field(description="LwM2M object instance id.")]
    res_id: Annotated[Identifier, Field(description="LwM2M resource id.")]
    expired_time: Annotated[
        Time,
        Field(
            description="When the command expires: ISO 8601 to the second, with an offset or Z that instant, without "
            "one the platform's local time. Later than valid_time, and than now."
        ),
    ]
    valid_time: NotRequired[
        Annotated[
            Time,
            Field(
                description="When the command comes into force. One that has passed when the request is sent is left "
                "out."
            ),
        ]
    ]
    retry: NotRequired[Annotated[int, Field(ge=0, le=10, description="The platform's tries; its default is 3.")]]
    timeout: NotRequired[Annotated[int, Field(ge=5, le=40, description="Seconds; the platform's default is 25.")]]
    trigger_msg: NotRequired[
        Annotated[
            Trigger,
            Field(
                description="Which uplink messages trigger the command: the sum of 1 REGISTER, 2 UPDATE and 4 NOTIFY, "
                "or their names; the platform's default is 7."
            ),
        ]
    ]
    args: NotRequired[
        Annotated[
            str,
            Field(
                max_length=MAX_ARGS_BYTES,
                description="The command's arguments: at most 2048 bytes of UTF-8. Without it the request has no body.",
            ),
            AfterValidator(_is_unicode),
            AfterValidator(_fits_the_platform),
        ]
    ]
    product: NotRequired[
        Annotated[
            Text,
            Field(description="Which configured OneNET product's credentials to use; without it the default ones."),
        ]
    ]


COMMAND = TypeAdapter(Command)
