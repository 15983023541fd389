"""The command that upstream systems publish: one JSON object in UTF-8, routing key ``execute``."""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, TypeAdapter, with_config
from typing_extensions import TypedDict

COMMAND_ID_PATTERN = r"^[A-Za-z0-9._:-]{1,128}$"
TIME_PATTERN = (
    r"^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]"
    r"([.][0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3])(:?[0-5][0-9])?)?$"
)
MAX_ARGS_BYTES = 2048
MAX_BODY_BYTES = 64 * 1024
# Rules of the worker that JSON Schema cannot express; `tests/cli/test_contracts.py` checks the list.
BEYOND_THE_SCHEMA = (
    "a missing id (command_id or the AMQP property message_id), two ids that differ, or a malformed message_id",
    "a time that does not exist, such as February 30, or within a day of the calendar's limits (years 1 and 9999)",
    "an expired_time that is not later than valid_time, compared as instants",
    f"args of more than {MAX_ARGS_BYTES} bytes in UTF-8 (the schema counts characters)",
    "a string with a lone surrogate, which UTF-8 cannot encode",
    "an integer written with a fraction or an exponent, such as 1.0 or 1e0",
    f"a body of more than {MAX_BODY_BYTES} bytes",
    "a body that is not strict JSON: not in UTF-8, with a byte order mark, or with a duplicate name in an object",
)
_CHECKED_LATER = (
    "Two things are checked only when the command is sent: that expired_time has not passed, and that product is "
    "configured."
)


def _is_unicode(text: str) -> str:
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("must not contain a lone surrogate: UTF-8 cannot encode it")
    return text


def _fits_the_platform(args: str) -> str:
    if len(args.encode()) > MAX_ARGS_BYTES:
        raise ValueError(f"must be at most {MAX_ARGS_BYTES} bytes of UTF-8")
    return args


def _trigger_form(value: object) -> str:
    return "list" if isinstance(value, list) else "integer"


def _each_once(messages: list[str]) -> list[str]:
    if len(set(messages)) < len(messages):
        raise ValueError("must not name a message twice")  # the sum would be another trigger
    return messages


# For validators written in Python, where $ also matches before a final line break; in ECMA-262 it does not.
_ONE_LINE: dict[str, Any] = {"not": {"pattern": "\\n"}}

Text = Annotated[str, AfterValidator(_is_unicode)]
CommandId = Annotated[str, Field(pattern=COMMAND_ID_PATTERN, json_schema_extra=_ONE_LINE)]
Imei = Annotated[str, Field(pattern=r"^([0-9]{15}|[0-9]{4})$", json_schema_extra=_ONE_LINE)]
Identifier = Annotated[int, Field(ge=0, le=65535)]
Time = Annotated[str, Field(pattern=TIME_PATTERN, json_schema_extra=_ONE_LINE)]
TriggerBits = Annotated[int, Field(ge=1, le=7)]
TriggerNames = Annotated[
    list[Annotated[Literal["REGISTER", "UPDATE", "NOTIFY"], Field(title="TriggerMessage")]],
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
    schema["description"] += (
        f"\n\nThe worker also refuses what this schema cannot express:\n{beyond}\n\n{_CHECKED_LATER}"
    )
    schema["examples"] = [EXAMPLE]


@with_config(
    ConfigDict(
        strict=True, extra="forbid", hide_input_in_errors=True, title="Execute command", json_schema_extra=_complete
    )
)
class Command(TypedDict):
    """One Execute command for one device. OneNET caches it until the device is online."""

    # A typed dictionary keeps absent and null apart; the defaults of a model would not.

    command_id: NotRequired[
        Annotated[
            CommandId,
            Field(
                description="The idempotency key: one id is one command. Required unless the AMQP property message_id "
                "is set; if both are, they must agree.",
            ),
        ]
    ]
    imei: Annotated[Imei, Field(description="IMEI of the device: 15 digits, or 4 of a test device.")]
    obj_id: Annotated[Identifier, Field(description="LwM2M object id.")]
    obj_inst_id: Annotated[Identifier, Field(description="LwM2M object instance id.")]
    res_id: Annotated[Identifier, Field(description="LwM2M resource id.")]
    expired_time: Annotated[
        Time,
        Field(
            description="When the command expires: ISO 8601 with seconds; a fraction of a second is cut off. With an "
            "offset or Z it is that instant, without one it is the platform's local time. Must be later than "
            "valid_time and than now."
        ),
    ]
    valid_time: NotRequired[
        Annotated[
            Time,
            Field(
                description="When the command takes effect. It is omitted from the request if it has passed by then."
            ),
        ]
    ]
    retry: NotRequired[
        Annotated[int, Field(ge=0, le=10, description="How often the platform retries; its default is 3.")]
    ]
    timeout: NotRequired[
        Annotated[int, Field(ge=5, le=40, description="Timeout of the platform, in seconds; its default is 25.")]
    ]
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
                description="Arguments of the command: at most 2048 bytes of UTF-8. Without them the body of "
                "the request is {}.",
            ),
            AfterValidator(_is_unicode),
            AfterValidator(_fits_the_platform),
        ]
    ]
    product: NotRequired[
        Annotated[
            Text,
            Field(description="Configured OneNET product whose credentials are used; without it the default ones."),
        ]
    ]


COMMAND = TypeAdapter(Command)
