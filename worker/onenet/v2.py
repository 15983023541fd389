"""The second generation of the platform: ``https://iot-api.heclouds.com``.

Source: the codes that its clients know, and the platform's page on tokens of version 2022-05-01.
"""

from worker.onenet.dialect import Dialect
from worker.onenet.errno import Kind, by_number

V2 = Dialect(
    generation="v2",
    path_prefix="/nb-iot",
    code_name="code",
    text_name="msg",
    signing_version="2022-05-01",
    mark="request_id",
    own_codes=range(10_000, 11_000),
    kinds=by_number(
        {
            Kind.CREDENTIALS: (10403,),
            Kind.DEVICE: (10408, 10410, 10421),
            # "operation": the number of a full queue is not known, and a look at the device's queue tells.
            Kind.LIMIT: (10407,),
            Kind.PARAMETER: (10001, 10406),
        }
    ),
)
