"""One product at its platform: what every request of it needs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, TypeVar

from worker.core.credentials import Product
from worker.onenet.answers import DIALECTS
from worker.onenet.authentication import Authentication, authentication
from worker.onenet.clock import PlatformClock
from worker.onenet.dialect import Dialect
from worker.onenet.history_reader import HistoryReader
from worker.onenet.response import Response
from worker.onenet.search_time import SearchTime
from worker.onenet.transport import HTTPTransport

Model = TypeVar("Model")


@dataclass(frozen=True, slots=True)
class Site:
    """The platform at one URL.

    Attributes:
        new_transport: makes the transport of one product.
        reader: reads histories.
        clock: the platform's clock.
    """

    new_transport: Callable[[], HTTPTransport]
    reader: HistoryReader
    clock: PlatformClock


@dataclass(frozen=True, slots=True)
class Account:
    """One product at the platform, with its own connections, so that no product can use up those of another."""

    product: Product
    dialect: Dialect
    authentication: Authentication
    transport: HTTPTransport
    reader: HistoryReader
    clock: PlatformClock

    @classmethod
    def of(cls, product: Product, site: Site) -> Self:
        """Return the account of a product at the platform that its URL names."""
        dialect = DIALECTS[product.api]
        clock = site.clock  # the platform judges by it whether a token has expired
        signing = authentication(product.credentials, dialect.signing_version, lambda: clock.now().timestamp())
        return cls(product, dialect, signing, site.new_transport(), site.reader, site.clock)

    def headers(self) -> dict[str, str]:
        """Return the headers with the credentials."""
        return dict([self.authentication.header()])

    async def read(
        self, path: str, search: SearchTime, parse: Callable[[Response, Dialect], Model]
    ) -> tuple[Model, float | None]:
        """Read one page; see ``HistoryReader.read_page``."""
        path = self.dialect.path_prefix + path
        return await self.reader.read_page(path, self.headers(), search, self.dialect, parse, self.clock)

    async def put(self, path: str, search: SearchTime, parse: Callable[[Response, Dialect], Model]) -> Model:
        """Make a request that changes something, however often it is made; see ``HistoryReader.read_page``."""
        path = self.dialect.path_prefix + path
        headers, clock = self.headers(), self.clock
        found, _ = await self.reader.read_page(path, headers, search, self.dialect, parse, clock, method="PUT")
        return found
