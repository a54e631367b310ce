"""Drives an update with the client that the QEMU project publishes, on one connection, as a management tool would.

Arguments: the QMP socket, the process id of cpr-vmm, and its machine arguments. Ends with exit code 0 and prints one
line per step; anything unexpected is an exception.
"""

import asyncio
import sys

from qemu.qmp import EventListener, ExecuteError, QMPClient
from qemu.qmp.legacy import QEMUMonitorProtocol

UPDATES = 5


def command_line(pid):
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read().decode().split("\0")[:-1]


def expect(condition, *what):
    if not condition:
        raise AssertionError(what)


async def update(qmp, pid, command, uri):
    """One update; the events of it in short."""
    listener = EventListener()
    with qmp.listen(listener):
        await qmp.execute(
            "migrate-set-parameters",
            {"mode": "cpr-exec", "cpr-exec-command": command + ["-incoming", uri]},
        )
        await qmp.execute("migrate", {"uri": uri})
        seen = []
        async for event in listener:
            seen.append(event["data"]["status"] if event["event"] == "MIGRATION" else event["event"])
            if seen[-1] in ("completed", "failed"):
                break
    expect(command_line(pid) == command + ["-incoming", uri], command_line(pid))
    return seen


async def main(socket, pid, command):
    qmp = QMPClient("stock client")
    # A client that gets what it does not understand ends the connection with an exception of its own.
    await qmp.connect(socket)
    expect(qmp.greeting is not None and qmp.greeting.QMP.version["qemu"]["major"] >= 0, qmp.greeting)
    print("connected:", qmp.greeting.QMP.version["package"])

    commands = {entry["name"] for entry in await qmp.execute("query-commands")}
    expect({"migrate", "query-status", "human-monitor-command"} <= commands, commands)
    await qmp.execute("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})

    for number in range(UPDATES):
        uri = "memfd:" if number % 2 else "file:vm.state"
        seen = await update(qmp, pid, command, uri)
        expect(seen == ["setup", "active", "STOP", "device", "RESUME", "completed"], seen)
        status = await qmp.execute("query-status")
        expect(status == {"status": "running", "running": True}, status)
        info = await qmp.execute("query-migrate")
        expect(info["status"] == "completed" and info["cpr"]["generation"] == number + 1, info)
        print("updated:", ", ".join(seen))

    try:
        await qmp.execute("no-such-command")
        expect(False, "an unknown command succeeded")
    except ExecuteError as error:
        expect(error.error_class == "CommandNotFound", error)

    # Many commands at once while the program is replaced under them: one reply each, to the one who asked.
    await qmp.execute("migrate-set-parameters", {"cpr-exec-command": command + ["-incoming", "memfd:"]})
    replies = await asyncio.gather(
        qmp.execute("migrate", {"uri": "memfd:"}),
        *(qmp.execute("query-name") for _ in range(50)),
    )
    expect(replies == [{}] + [{"name": "stock"}] * 50, replies)
    await qmp.disconnect()
    print("disconnected")


def legacy_interface(socket):
    """The older interface of the same package, on the socket that the first client has left."""
    legacy = QEMUMonitorProtocol(socket)
    greeting = legacy.connect()
    expect("QMP" in greeting, greeting)
    status = legacy.cmd("query-status")
    expect(status["running"], status)
    legacy.cmd("quit")
    event = legacy.pull_event(wait=10.0)
    while event and event["event"] != "SHUTDOWN":
        event = legacy.pull_event(wait=10.0)
    expect(event and event["data"]["reason"] == "host-qmp-quit", event)
    try:
        legacy.close()
    except EOFError:
        pass  # cpr-vmm was the first to close.
    print("ended")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
    legacy_interface(sys.argv[1])
