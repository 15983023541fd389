"""The kind of an error that the platform reports. Pure, and the only module that knows its error texts.

Two official tables give the same number two meanings (1 is a refused key in one and an internal error in the other),
and either may apply. So the text decides, and the number only if the text is unknown; each generation of the platform
has numbers of its own (``v1``, ``v2``).
Source: https://onenet.hk.chinamobile.com/suben/doc/nb-iot/book/application-develop/Error_codes.html for the NB-IoT
service, and the error codes of the API in front of it.
"""

import re
import unicodedata
from collections.abc import Mapping
from enum import Enum, auto

SUCCESS = 0


class Kind(Enum):
    """What an error means for the request."""

    CREDENTIALS = auto()  # the key or token is refused, for this device or for all; nothing was cached
    THROTTLED = auto()  # too many requests; nothing was cached
    OUTAGE = auto()  # the platform failed; the command may have been cached
    DEVICE_TROUBLE = auto()  # the platform works, but has trouble with the device; the command may have been cached
    LIMIT = auto()  # a limit of the platform is reached; nothing was cached
    DEVICE = auto()  # the device or its product is unknown, or the device is offline; nothing was cached
    PARAMETER = auto()  # the request breaks a rule; nothing was cached
    UNKNOWN = auto()  # neither the text nor the number is in a table


_MAX_TEXT_CHARS = 1_000  # the rest of a longer text is ignored

# The first pattern that matches decides. Kinds that leave the command in doubt come first, because doubt is always
# safe. The other kinds claim that nothing was cached, so their patterns must not match a text with another meaning.
# ASCII: there is a word boundary between a letter and a Chinese character.
_TEXTS = [
    (kind, re.compile(pattern, re.VERBOSE | re.ASCII))
    for kind, pattern in [
        (
            Kind.DEVICE_TROUBLE,
            r"(?<![a-z])rpc[ _]response(?![a-z]) | (?<![a-z])latency(?![a-z]) | rpc响应 | 延迟 | 时延",
        ),
        (
            Kind.OUTAGE,
            r"""(?<![a-z])internal(?![a-z]) | (?<![a-z])rpc(?![a-z])
            | (?<![a-z])(?:server|service|system)[ _](?:error|exception|failure|busy|unavailable|down)(?![a-z])
            | \b(?:server|service|system)\ (?:is\ )?(?:too\ |temporarily\ )?(?:busy|unavailable|down)\b
            | 内部 | (?:服务|服务器|服务端|系统|平台)(?:发生|处理|出现)?(?:错误|异常|故障|繁忙|忙|不可用) | 积压""",
        ),
        # "timeout" is also the name of a parameter.
        (
            Kind.PARAMETER,
            r"""(?:(?:invalid|illegal|missing|wrong|bad|required)\ parameters?
                 |\bparameters?(?:\ (?:is\ )?(?:required|missing|invalid|error))?)[ ,('"`]*timeout\b
            | \b(?:invalid|illegal|missing|wrong|bad)\ (?:value\ (?:of|for)\ )?[('"`]?timeout\b
            | \btimeout[)'"`]?:?\ (?:value\ |parameter\ |is\ )*(?:must|should|cannot|invalid|illegal|missing|required
                 |out[ _]of|not\ in|(?:is\ )?too\ (?:large|small|long|short|big|high|low)|exceeds|parameter)\b
            | (?:无效|非法|错误)的[ ('"]*(?:timeout|超时)
            | 参数(?:错误|无效|非法|缺失|不合法|不正确)?[ ,、('"]*timeout | timeout\ ?参数""",
        ),
        # "valid_time out of limit" and "retry times out of range" are not timeouts.
        (
            Kind.DEVICE_TROUBLE,
            r"""(?<![a-z])(?<!valid[ _-])(?<!expired[ _-])(?<!expire[ _-])time[sd]?[ _-]out
                (?![a-z]|[ _-]of[ _-](?:the[ _-])?(?:\w+[ _-])?(?:limit|range|bound|order|scope))
            | (?<![a-z])time[sd]?out(?![a-z])
            | (?<!valid\ )(?<!expired\ )(?<!expire\ )\btime\ limit\ exceeded\b
            | 超时(?!时间|参数|值|设置|范围)""",
        ),
        (
            Kind.THROTTLED,
            r"""(?<![a-z])freq(?![a-z]) | (?<![a-z])frequen(?:cy|t|tly)\b | \btoo\ fast\b | \bthrottl | \bqps\b
            | (?<![a-z])rate[ _-]?limit | \brate\ exceeded\b | \b(?:api|requests?|calls?)\ (?:call\ )?limit\b
            | \btoken\ bucket\b
            | \btoo\ many\b(?!\ (?:\w+\ )?(?:commands?|cmds?|param\w*|args?|arguments?|devices?|bytes|char\w*
                 |objects?)\b)
            | 频率 | 频次 | 频繁 | [过太]快 | 限流 | 限频 | 限速 | (?:请求|调用|访问)(?:次?数|量)?(?:[过太]多|超)""",
        ),
        (
            Kind.CREDENTIALS,
            r"""(?<![a-z])(?:un|o)?auth(?:(?![a-z])|enticat|ori[sz]|fail|err|info|token)
            | (?<![a-z])(?:api|master|access)[ _-]?key(?![a-z]) | (?<!unexpected\ )(?<![a-z])tokens?(?![a-z])
            | \b(?:permission|access)\ denied\b | \bno\ (?:access|permission)\b
            | 鉴权 | 认证 | 授权 | 密钥 | 秘钥 | 令牌 | 身份 | 无权 | 权限 | 签名""",
        ),
        (
            Kind.LIMIT,
            r"""(?<![a-z])limit(?:s|ed|ation|ations)?(?![a-z]) | \bquota\b | 限制 | 上限 | 超限
            | \btoo\ many\ (?:\w+\ )?(?:commands?|cmds?)\b | \b(?:commands?|cmds?)\ (?:already|are)\ (?:exist|wait)
            | \bqueue\ (?:\w+\ )?full\b | 队列(?:已|过)?满""",
        ),
        (
            Kind.DEVICE,
            r"""\bnot[ _-]?online\b | \boff[ -]?line\b | \bnot\ found\b | (?:\bnot|n't)\ exists?\b
            | \bno\ such\ (?:device|product)\b | \bnot\ registered\b
            | (?<![a-z])device[ _-](?:does[ _])?not[ _-](?:found|exists?|online|registered)
            | 不在线 | 未在线 | 未上线 | 离线 | 不存在 | 未找到 | 找不到 | 没有找到 | 未注册
            | (?:无此|没有该|无该)设备""",
        ),
        (
            Kind.PARAMETER,
            r"""(?<![a-z])param(?:s|eters?)?(?![a-z]) | (?<![a-z])json(?![a-z]) | (?<![a-z])entity(?![a-z])
            | (?<![a-z])sensitive(?![a-z]) | \bexist(?:s|ed|ing)?\b
            | 参数 | 格式 | 敏感 | 已存在 | 已经存在 | 实体""",
        ),
    ]
]


def by_number(numbers: Mapping[Kind, tuple[int, ...]]) -> dict[int, Kind]:
    """Return the kind of each number."""
    return {number: kind for kind, group in numbers.items() for number in group}


# The same in every generation of the platform: no number has two meanings in two of them.
_NUMBERS = by_number(
    {
        Kind.OUTAGE: (7, 17, 500, 5117, 10500),
        Kind.DEVICE_TROUBLE: (14, 16),
        Kind.THROTTLED: (15,),
        Kind.LIMIT: (13, 5006),
    }
)
_PARAMETER_OR_RPC = 5108  # "invalid parameter/rpc response error": without a text it may be either

# The device's own answer follows this word (UNAUTHORIZED, NOT_FOUND, …): it is not about our credentials.
_UNSUCCESS = re.compile(r"unsuc+es+(?:ful)?\b")
_IN_DOUBT = frozenset({Kind.OUTAGE, Kind.DEVICE_TROUBLE})


def kind_of(errno: int, text: str, numbers: Mapping[int, Kind]) -> Kind:
    """Return the kind of an error.

    A text is ``<text of a table>`` or ``<text of a table>: <detail>``, in English or Chinese. The part before the colon
    decides; if it is unknown, the whole text; if that is unknown too, the number.

    Args:
        errno: the error number, not 0.
        text: the platform's error text.
        numbers: the kinds of the numbers that only one generation of the platform has.
    """
    plain = " ".join(unicodedata.normalize("NFKC", text[:_MAX_TEXT_CHARS]).lower().split())
    head = plain.partition(":")[0]
    kind = None if head == "timeout" else _kind_of_text(head)  # "timeout: must be …" is about the parameter
    kind = kind or _kind_of_text(plain)
    if kind is None and errno == _PARAMETER_OR_RPC and not plain:
        return Kind.DEVICE_TROUBLE
    numbered = _NUMBERS.get(errno) or numbers.get(errno, Kind.UNKNOWN)
    if kind is None or (_UNSUCCESS.match(plain) and kind not in _IN_DOUBT):
        return numbered
    # A limit is told from a broken rule by a look at the device's history, and without one it is a refusal too.
    return numbered if kind is Kind.PARAMETER and numbered is Kind.LIMIT else kind


def _kind_of_text(text: str) -> Kind | None:
    return next((kind for kind, pattern in _TEXTS if pattern.search(text)), None)
