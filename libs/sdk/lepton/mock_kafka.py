"""Runs librdkafka's mock broker on a fixed port: `python -m lepton.mock_kafka PORT`.

The mock always listens on a port of the kernel's choice. To keep its address over a restart it is told to advertise
PORT, and what arrives there is handed on.
"""

import asyncio
import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path

_PRODUCER = 0
_BROKER_ID = 1


def start_mock_broker(port: int) -> str:
    """host:port the mock broker really listens on, until this process ends. It advertises 127.0.0.1:`port`."""
    spec = find_spec("confluent_kafka")
    if spec is None or spec.origin is None:
        raise SystemExit("The mock broker is not installed: pip install 'lepton[local]'")
    package = Path(spec.origin).parent
    library = ctypes.CDLL(str(next(package.with_name("confluent_kafka.libs").glob("librdkafka*"))))
    library.rd_kafka_conf_new.restype = ctypes.c_void_p
    library.rd_kafka_new.restype = ctypes.c_void_p
    library.rd_kafka_new.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
    library.rd_kafka_mock_cluster_new.restype = ctypes.c_void_p
    library.rd_kafka_mock_cluster_new.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
    library.rd_kafka_mock_cluster_bootstraps.argtypes = [ctypes.c_void_p]
    library.rd_kafka_mock_group_initial_rebalance_delay_ms.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    library.rd_kafka_mock_broker_set_host_port.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int32,
        ctypes.c_char_p,
        ctypes.c_int,
    ]

    error = ctypes.create_string_buffer(512)
    client = library.rd_kafka_new(_PRODUCER, library.rd_kafka_conf_new(), error, len(error))
    if not client:
        raise SystemExit(f"librdkafka did not start: {error.value.decode()}")
    cluster = library.rd_kafka_mock_cluster_new(client, 1)
    listens = library.rd_kafka_mock_cluster_bootstraps(cluster).decode()
    library.rd_kafka_mock_group_initial_rebalance_delay_ms(cluster, 0)
    library.rd_kafka_mock_broker_set_host_port(cluster, _BROKER_ID, b"127.0.0.1", port)
    return str(listens)


async def forward(port: int, host: str, mock_port: int) -> None:
    """Hands every connection to 127.0.0.1:`port` on to the mock broker, for ever."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass  # The other direction sees the same end.
        finally:
            writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mock_reader, mock_writer = await asyncio.open_connection(host, mock_port)
        await asyncio.gather(copy(reader, mock_writer), copy(mock_reader, writer))

    server = await asyncio.start_server(connected, "127.0.0.1", port)
    await server.serve_forever()


def main() -> None:
    port = int(sys.argv[1])
    host, _, mock_port = start_mock_broker(port).rpartition(":")
    sys.stdout.write(f"WARNING: mock Kafka broker on 127.0.0.1:{port}: in memory, for trying things out only\n")
    sys.stdout.flush()
    asyncio.run(forward(port, host, int(mock_port)))


if __name__ == "__main__":
    main()
