"""The first generation of the platform: ``https://api.heclouds.com``, and its hosts in provinces and in Hong Kong.

Source: the platform's page of ``POST /nbiot/execute/offline``, and its two tables of error numbers.
"""

from worker.onenet.dialect import Dialect
from worker.onenet.errno import Kind, by_number

V1 = Dialect(
    generation="v1",
    path_prefix="/nbiot",
    code_name="errno",
    text_name="error",
    signing_version="2018-10-31",
    mark="errno",
    own_codes=range(0),
    kinds=by_number(
        {
            Kind.CREDENTIALS: (1, 2),
            Kind.DEVICE: (8, 10, 2001),
            Kind.PARAMETER: (3, 4, 5, 6, 9, 11, 12, 23, 5106, 5108),
        }
    ),
)
