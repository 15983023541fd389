"""The command that upstream systems publish: one JSON object in UTF-8, routing key ``execute``."""

from typing import Annotated, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, TypeAdapter, with_config
from typing_extensions import TypedDict

COMMAND_ID_PATTERN = r"^[A-Za-z0-9._:-]{1,128}$"
TIME_PATTERN = (
    r"^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]"
    r"(Z|[+-]([01][0-9]|2[0-3])(:?[0-5][0-9])?)?$"
)
MAX_ARGS_BYTES = 2048
MAX_BODY_BYTES = 64 * 1024


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


Text = Annotated[str, AfterValidator(_is_unicode)]
Identifier = Annotated[int, Field(ge=0, le=65535)]
Time = Annotated[str, Field(pattern=TIME_PATTERN)]
TriggerBits = Annotated[int, Field(ge=1, le=7)]
TriggerNames = Annotated[
    list[Literal["REGISTER", "UPDATE", "NOTIFY"]],
    Field(min_length=1, max_length=3, json_schema_extra={"uniqueItems": True}),
    AfterValidator(_each_once),
]
Trigger = Annotated[
    Annotated[TriggerBits, Tag("integer")] | Annotated[TriggerNames, Tag("list")], Discriminator(_trigger_form)
]


@with_config(ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True, title="Execute command"))
class Command(TypedDict):
    """One Execute command for one device, cached by OneNET until the device shows up."""

    # A typed dictionary and not a model: an absent field is not a null one, and a model's defaults would mix them up.

    command_id: NotRequired[
        Annotated[
            str,
            Field(
                pattern=COMMAND_ID_PATTERN,
                description="The idempotency key: one id is one command. Required unless the AMQP property message_id "
                "is set; if both are, they must agree.",
            ),
        ]
    ]
    imei: Annotated[str, Field(pattern=r"^[0-9]{15}$", description="The device module's IMEI: 15 digits.")]
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
