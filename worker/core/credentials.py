"""The credentials of a OneNET product, in the platform's two modes."""

import base64
import binascii
import re

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

PRODUCT_ID_PATTERN = r"^[A-Za-z0-9_-]+$"
_HEADER_VALUE = re.compile(r"[\x21-\x7e]+")


class ApiKey(BaseModel):
    """Credentials of mode "common": the product's MasterKey."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    api_key: SecretStr = Field(min_length=1)

    @field_validator("api_key")
    @classmethod
    def _fits_a_header(cls, key: SecretStr) -> SecretStr:
        if not _HEADER_VALUE.fullmatch(key.get_secret_value()):
            raise ValueError("must be printable ASCII without blanks, since it travels in a header")
        return key


class AccessKey(BaseModel):
    """Credentials of mode "safe": tokens are signed with the access key."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    product_id: str = Field(pattern=PRODUCT_ID_PATTERN)
    access_key: SecretStr = Field(min_length=1)

    @field_validator("access_key")
    @classmethod
    def _is_base64(cls, key: SecretStr) -> SecretStr:
        try:
            base64.b64decode(key.get_secret_value(), validate=True)
        except binascii.Error as exc:
            raise ValueError("must be base64, as the platform shows it") from exc
        return key


Credentials = ApiKey | AccessKey
