"""`serve.py PORT...`: listen on TCP, both families, and greet each caller with the address that was seen."""

import asyncio
import sys


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    del reader
    seen = writer.get_extra_info("peername")[0].removeprefix("::ffff:")
    writer.write(f"hello {seen}\n".encode())
    writer.close()


async def serve(ports: list[int]) -> None:
    for port in ports:
        for address in ("0.0.0.0", "::"):  # noqa: S104 - in a namespace of its own
            await asyncio.start_server(greet, address, port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve([int(one) for one in sys.argv[1:]]))
