"""Both official error tables row by row, in English and Chinese, and texts seen on the live platform."""

import pytest

from worker.onenet.dialect import Dialect
from worker.onenet.errno import Kind
from worker.onenet.v1 import V1
from worker.onenet.v2 import V2

kind_of = V1.kind_of

NB_IOT_SERVICE = [
    (1, "auth failed", "鉴权失败", Kind.CREDENTIALS),
    (3, "parameter required", "缺少参数", Kind.PARAMETER),
    (7, "service internal error", "服务内部错误", Kind.OUTAGE),
    (2001, "device not online", "设备不在线", Kind.DEVICE),
    (5006, "system logic limit", "系统逻辑限制", Kind.LIMIT),
    (5106, "UNSUCESS", "操作失败", Kind.PARAMETER),
    (5108, "invalid parameter", "无效参数", Kind.PARAMETER),
    (5108, "rpc response error", "RPC响应错误", Kind.DEVICE_TROUBLE),
    (5117, "rpc error", "RPC错误", Kind.OUTAGE),
]
API_LAYER = [
    (1, "internal server error", "服务器内部错误", Kind.OUTAGE),
    (2, "api-key required", "缺少api-key", Kind.CREDENTIALS),
    (3, "auth failed", "鉴权失败", Kind.CREDENTIALS),
    (4, "invalid JSON", "无效的JSON", Kind.PARAMETER),
    (5, "request entity too large", "请求实体过大", Kind.PARAMETER),
    (6, "invalid parameter", "参数错误", Kind.PARAMETER),
    (7, "parameter required", "参数缺失", Kind.PARAMETER),
    (8, "not found", "未找到", Kind.DEVICE),
    (9, "entity data required", "缺少实体数据", Kind.PARAMETER),
    (10, "device not online", "设备离线", Kind.DEVICE),
    (11, "exists already", "已存在", Kind.PARAMETER),
    (12, "already exists", "已经存在", Kind.PARAMETER),
    (13, "system limit", "系统限制", Kind.LIMIT),
    (14, "network latency", "网络延迟", Kind.DEVICE_TROUBLE),
    (15, "api freq out of limit", "API调用频率超出限制", Kind.THROTTLED),
    (16, "unsuccess", "不成功", Kind.DEVICE_TROUBLE),
    (17, "nbiot server error", "NBIOT服务器错误", Kind.OUTAGE),
    (18, "other service", "其他服务", Kind.UNKNOWN),
    (23, "sensitive words", "包含敏感词", Kind.PARAMETER),
]
V2_CODES = [
    (500, "internal error", "内部错误", Kind.OUTAGE),
    (10500, "internal error", "系统内部错误", Kind.OUTAGE),
    (10001, "parameter error", "参数错误", Kind.PARAMETER),
    (10403, "authentication failed", "鉴权失败", Kind.CREDENTIALS),
    (10406, "device exists already", "设备已存在", Kind.PARAMETER),
    (10408, "no such product", "产品不存在", Kind.DEVICE),
    (10410, "device not exist", "设备不存在", Kind.DEVICE),
    (10421, "device not online", "设备不在线", Kind.DEVICE),
]
ROWS = NB_IOT_SERVICE + API_LAYER + V2_CODES
DETAILS = ["", ": ", "\uff1a", ":\u3000", ": imei 865820030000001", "\uff1aimei 865820030000001", ": see the document"]


@pytest.mark.parametrize("detail", DETAILS)
@pytest.mark.parametrize(("errno", "english", "chinese", "kind"), ROWS)
def test_every_row_of_the_error_tables_has_its_kind(
    errno: int, english: str, chinese: str, kind: Kind, detail: str
) -> None:
    for text in (english, chinese, english.upper(), f" {english} "):
        assert kind_of(errno, text + detail) is kind


@pytest.mark.parametrize(("errno", "english", "chinese", "kind"), ROWS)
def test_a_known_text_decides_the_kind_under_every_errno(errno: int, english: str, chinese: str, kind: Kind) -> None:
    """An error may come from either table, or from a future one."""
    if english not in {"UNSUCESS", "unsuccess", "other service"}:  # of these rows only the number is known
        assert {kind_of(number, text) for number in (errno, 1, 7, 4242) for text in (english, chinese)} == {kind}


@pytest.mark.parametrize("detail", ["internal error", "timeout", "auth failed", "api freq out of limit", "超时"])
@pytest.mark.parametrize(
    ("head", "kind"),
    [("invalid parameter", Kind.PARAMETER), ("auth failed", Kind.CREDENTIALS), ("内部错误", Kind.OUTAGE),
     ("system logic limit", Kind.LIMIT), ("api freq out of limit", Kind.THROTTLED), ("设备不在线", Kind.DEVICE)],
)  # fmt: skip
def test_the_text_before_the_colon_decides_first(head: str, kind: Kind, detail: str) -> None:
    assert kind_of(4242, f"{head}: {detail}") is kind_of(4242, f"{head}\uff1a{detail}") is kind


NUMBERS = [
    (V1, Kind.CREDENTIALS, [1, 2]),
    (V1, Kind.THROTTLED, [15]),
    (V1, Kind.OUTAGE, [7, 17, 500, 5117, 10500]),
    (V1, Kind.DEVICE_TROUBLE, [14, 16]),
    (V1, Kind.LIMIT, [13, 5006]),
    (V1, Kind.DEVICE, [8, 10, 2001]),
    (V1, Kind.PARAMETER, [3, 4, 5, 6, 9, 11, 12, 23, 5106]),
    (V1, Kind.UNKNOWN, [-1, 18, 22, 4242, 10001, 10403, 10410, 2**70]),
    (V2, Kind.CREDENTIALS, [10403]),
    (V2, Kind.OUTAGE, [7, 17, 500, 5117, 10500]),
    (V2, Kind.DEVICE_TROUBLE, [14, 16]),
    (V2, Kind.THROTTLED, [15]),
    (V2, Kind.LIMIT, [13, 5006, 10407]),
    (V2, Kind.DEVICE, [10408, 10410, 10421]),
    (V2, Kind.PARAMETER, [10001, 10406]),
    (V2, Kind.UNKNOWN, [-1, 1, 2, 3, 4242, 2**70]),
]


@pytest.mark.parametrize(
    ("dialect", "kind", "code"), [(dialect, kind, code) for dialect, kind, codes in NUMBERS for code in codes]
)
@pytest.mark.parametrize("text", ["", "whatever", "一二三", "\ufffd\ufffd", ":"])
def test_the_number_decides_the_kind_of_an_unknown_text(dialect: Dialect, kind: Kind, code: int, text: str) -> None:
    """Each generation of the platform has its own numbers; those that leave a command in doubt hold in both."""
    assert dialect.kind_of(code, text) is kind


def test_errno_5108_without_a_text_is_device_trouble() -> None:
    assert kind_of(5108, "whatever") is Kind.PARAMETER
    assert kind_of(5108, "") is Kind.DEVICE_TROUBLE


@pytest.mark.parametrize(
    ("errno", "text", "kind"),
    [
        (3, "token鉴权失败", Kind.CREDENTIALS),
        (3, "token鉴权失败: token expired", Kind.CREDENTIALS),
        (4242, "Unauthorized", Kind.CREDENTIALS),
        (4242, "authentication failed", Kind.CREDENTIALS),
        (4242, "authorization error", Kind.CREDENTIALS),
        (4242, "AUTH_FAILED", Kind.CREDENTIALS),
        (4242, "\uff21\uff35\uff34\uff28\u3000\uff46\uff41\uff49\uff4c\uff45\uff44", Kind.CREDENTIALS),
        (4242, "无效的令牌", Kind.CREDENTIALS),
        (4242, "密钥错误", Kind.CREDENTIALS),
        (4242, "身份认证失败", Kind.CREDENTIALS),
        (3, "鉴权参数错误", Kind.CREDENTIALS),
        (4242, "too many requests", Kind.THROTTLED),
        (4242, "Too Many Requests for this device", Kind.THROTTLED),
        (4242, "calling too fast", Kind.THROTTLED),
        (4242, "requests are too frequent", Kind.THROTTLED),
        (4242, "rate limit exceeded", Kind.THROTTLED),
        (4242, "请求过于频繁\uff0c请稍后再试", Kind.THROTTLED),
        (4242, "访问频率过高", Kind.THROTTLED),
        (4242, "请求过快", Kind.THROTTLED),
        (4242, "请求次数超限", Kind.THROTTLED),
        (1, "command token bucket is full", Kind.THROTTLED),
        (13, "api freq out of limit", Kind.THROTTLED),
        (7, "service internal error: too many requests", Kind.OUTAGE),
        (15, "internal server error: calling too fast", Kind.OUTAGE),
        (4242, "system is busy", Kind.OUTAGE),
        (4242, "service unavailable", Kind.OUTAGE),
        (4242, "系统繁忙\uff0c请稍后重试", Kind.OUTAGE),
        (4242, "服务异常", Kind.OUTAGE),
        (5106, "UNSUCESS: INTERNAL_SERVER_ERROR", Kind.OUTAGE),
        (16, "unsuccess: TIME_OUT null", Kind.DEVICE_TROUBLE),
        (5106, "UNSUCESS: TIME_OUT", Kind.DEVICE_TROUBLE),
        (4242, "the device timed out", Kind.DEVICE_TROUBLE),
        (4242, "设备响应超时", Kind.DEVICE_TROUBLE),
        (5108, "invalid parameter/rpc response error", Kind.DEVICE_TROUBLE),
        (5108, "rpc response error: invalid parameter", Kind.DEVICE_TROUBLE),
        (5006, "system logic limit: see the parameters' restrictions", Kind.LIMIT),
        (4242, "args is limited to 2k", Kind.LIMIT),
        (4242, "too many commands for this device", Kind.LIMIT),
        (4242, "too many cmds are waiting", Kind.LIMIT),
        (13, "10 commands already exist", Kind.LIMIT),
        (5006, "invalid parameter: too many", Kind.LIMIT),
        (4242, "the queue is full", Kind.LIMIT),
        (4242, "队列已满", Kind.LIMIT),
        (4242, "命令数达到上限", Kind.LIMIT),
        (4242, "no such device", Kind.DEVICE),
        (4242, "the device does not exist", Kind.DEVICE),
        (5108, "invalid parameter: timeout must be in [5,40]", Kind.PARAMETER),
        (5108, "invalid parameter timeout", Kind.PARAMETER),
        (5108, "Invalid Parameter (timeout)", Kind.PARAMETER),
        (5108, "参数timeout错误", Kind.PARAMETER),
        (6, "invalid parameter: limit", Kind.PARAMETER),
        (6, "invalid parameter: auth_token", Kind.PARAMETER),
        (4, "invalid JSON: unexpected token", Kind.PARAMETER),
        (4, "Unexpected token in JSON at position 3", Kind.PARAMETER),
        (5106, "UNSUCESS: METHOD_NOT_ALLOWED", Kind.PARAMETER),
        (4242, "格式不正确", Kind.PARAMETER),
    ],
)
def test_other_wordings_and_details_have_their_kind(errno: int, text: str, kind: Kind) -> None:
    assert kind_of(errno, text) is kind


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("valid_time out of limit", Kind.LIMIT), ("expired_time out of limit", Kind.LIMIT),
        ("Valid Time out of the limit", Kind.LIMIT), ("retry times out of limit", Kind.LIMIT),
        ("valid_time limit exceeded", Kind.LIMIT), ("valid time limit exceeded", Kind.LIMIT),
        ("valid_time out of range", Kind.PARAMETER), ("expired_time out of the allowed range", Kind.PARAMETER),
        ("valid_time out", Kind.PARAMETER), ("trigger times out of range", Kind.PARAMETER),
        ("invalid parameter: timeout", Kind.PARAMETER), ("invalid timeout", Kind.PARAMETER),
        ("timeout is invalid", Kind.PARAMETER), ("timeout is too large", Kind.PARAMETER),
        ("timeout out of range", Kind.PARAMETER), ("timeout out of limit", Kind.PARAMETER),
        ("timeout: must be in [5,40]", Kind.PARAMETER), ("超时参数错误", Kind.PARAMETER),
        ("无效的超时", Kind.PARAMETER), ("超时值超出范围", Kind.PARAMETER),
    ],
)  # fmt: skip
def test_a_parameter_named_time_or_timeout_is_not_a_timeout(text: str, kind: Kind) -> None:
    """The request was refused. If it were in doubt instead, its reply would not name the refusal."""
    assert kind_of(5106, text) is kind


@pytest.mark.parametrize(
    "text",
    ["time_out", "RESP_TIME_OUT", "timeout", "read_timeout", "timeout exceeded", "timeout of 25 s exceeded",
     "timeout: 25 s", "request timed out of 25 s", "the time out of the device", "device response timeout",
     "time limit exceeded", "响应超时", "设备超时"],
)  # fmt: skip
def test_a_timeout_is_device_trouble(text: str) -> None:
    assert kind_of(5106, text) is Kind.DEVICE_TROUBLE


@pytest.mark.parametrize(
    "text",
    ["the author", "authority", "identity", "jsonp", "internationalization", "frequencies", "unlimited", "parametric"],
)
def test_a_keyword_within_a_longer_word_does_not_match(text: str) -> None:
    assert kind_of(4242, text) is Kind.UNKNOWN


@pytest.mark.parametrize(
    "word", ["UNAUTHORIZED", "FORBIDDEN", "NOT_FOUND", "BAD_REQUEST", "OFFLINE", "REQ_PARAM_ERROR"]
)
def test_an_error_of_the_device_itself_is_not_a_refusal_of_credentials(word: str) -> None:
    assert kind_of(5106, f"UNSUCESS: {word}") is Kind.PARAMETER
    assert kind_of(16, f"unsuccess: {word} null") is Kind.DEVICE_TROUBLE


def test_only_the_beginning_of_a_very_long_text_is_matched() -> None:
    assert kind_of(4242, "x" * 5_000_000 + "auth failed") is Kind.UNKNOWN
