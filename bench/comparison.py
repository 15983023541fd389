"""The comparison: a worker that a good developer would write by hand with the fastest asyncio libraries.

It validates with the same pydantic model, publishes persistent replies, awaits their confirms and then acknowledges.
It has none of the worker's guarantees: a lost answer is a failed command, a redelivery is a second request, there are
no retries, no order, no records, no metrics and no log.
"""

import asyncio
import json
import os
from datetime import datetime
from zoneinfo import ZoneInfo

import aio_pika
import aiohttp
import uvloop
from pydantic import ValidationError

from schemas.command import COMMAND, Command

_ZONE = ZoneInfo("Asia/Shanghai")
_TRIGGERS = {"REGISTER": 1, "UPDATE": 2, "NOTIFY": 4}


class Comparison:
    """Receives commands, sends them and publishes replies."""

    def __init__(self, http: aiohttp.ClientSession, url: str, key: str, replies: aio_pika.abc.AbstractExchange) -> None:
        self._http = http
        self._url = f"{url}/nbiot/execute/offline"
        self._headers = {"api-key": key}
        self._replies = replies

    async def handle(self, message: aio_pika.abc.AbstractIncomingMessage) -> None:
        """Process one message."""
        reply: dict[str, object]
        try:
            command = COMMAND.validate_json(message.body)
        except ValidationError as exc:
            reply = {"status": "failed", "error": str(exc)}
        else:
            answered = await self._send(command)
            reply = {"command_id": command.get("command_id"), "imei": command["imei"], **answered}
        await self._replies.publish(
            aio_pika.Message(
                json.dumps(reply).encode(),
                content_type="application/json",
                delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
                correlation_id=message.correlation_id or reply.get("command_id"),
            ),
            routing_key=f"execute.{reply['status']}.{message.app_id or 'unknown'}",
        )
        await message.ack()

    async def _send(self, command: Command) -> dict[str, object]:
        body = {"json": {"args": command["args"]}} if "args" in command else {}
        async with self._http.post(self._url, params=_query(command), headers=self._headers, **body) as response:
            answer = await response.json(content_type=None)
        if answer["errno"] == 0:
            return {"status": "accepted", "uuid": answer["data"]["uuid"]}
        return {"status": "rejected", "error": answer["error"]}


def _query(command: Command) -> dict[str, str | int]:
    query: dict[str, str | int] = {
        "imei": command["imei"],
        "obj_id": command["obj_id"],
        "obj_inst_id": command["obj_inst_id"],
        "res_id": command["res_id"],
        "expired_time": _local(command["expired_time"]),
    }
    if "valid_time" in command:
        query["valid_time"] = _local(command["valid_time"])
    if "retry" in command:
        query["retry"] = command["retry"]
    if "timeout" in command:
        query["timeout"] = command["timeout"]
    if "trigger_msg" in command:
        trigger = command["trigger_msg"]
        query["trigger_msg"] = trigger if isinstance(trigger, int) else sum(_TRIGGERS[name] for name in trigger)
    return query


def _local(text: str) -> str:
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo is None else moment.astimezone(_ZONE)).strftime("%Y-%m-%dT%H:%M:%S")


async def main() -> None:
    """Run until killed, with the worker's settings."""
    concurrency = int(os.environ["WORKER_CONCURRENCY"])
    namespace = os.environ["WORKER_NAMESPACE"]
    connection = await aio_pika.connect_robust(os.environ["AMQP_URL"])
    channel = await connection.channel(publisher_confirms=True)
    await channel.set_qos(prefetch_count=int(os.environ["COMPARISON_PREFETCH"]))
    queue = await channel.get_queue(f"{namespace}.execute")
    replies = await channel.get_exchange(f"{namespace}.replies")
    connector = aiohttp.TCPConnector(limit=concurrency)
    async with aiohttp.ClientSession(connector=connector) as http:
        url, key = os.environ["ONENET_URL"], os.environ["ONENET_API_KEY"]
        comparison = Comparison(http, url, key, replies)
        await queue.consume(comparison.handle)
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
