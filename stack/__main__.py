"""The command: `python -m stack --help`."""

import argparse
import os
import sys

from stack import downloads, java
from stack.cassandra import CONTAINER_YAML, container_yaml
from stack.services import ALIASES, SERVICES, Stack
from stack.settings import REPOSITORY, StackError

_DESCRIPTION = f"""\
The platform the pipelines run on, as plain processes, bound to 127.0.0.1.

services: {", ".join(each.name for each in SERVICES)}; flink is {" and ".join(ALIASES["flink"])}
"""
_EPILOG = """\
environment:
  STACK_HOME         data, logs, process ids (default: .stack in the repository)
  STACK_CACHE        downloads, shared between clones (default: ~/.cache/beam_pipelines)
  STACK_PORT_OFFSET  added to every port (default: 0)
  STACK_SMALL        1 is --small
  POSTGRES_PASSWORD  of the user activity (default: activity)
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = _parser().parse_args(arguments)
    if options.small:
        os.environ["STACK_SMALL"] = "1"
    try:
        stack = Stack(say=lambda line: print(line, flush=True))
        return options.act(stack, options) or 0
    except StackError as error:
        print(f"stack: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _status(stack: Stack, options: argparse.Namespace) -> int:
    all_serve = True
    for service in stack.services(options.names):
        process, healthy = service.process, service.healthy
        all_serve &= healthy
        if process and process.alive:
            state = "serves" if healthy else "does not answer"
            ports = " ".join(f"{name} {port}" for name, port in service.ports.items())
            state += f", pid {process.pid}, {process.resident_bytes >> 20} MiB, "
            state += f"up {process.age_s:.0f} s" + (f", ports: {ports}" if ports else "")
        else:
            state = "died" if process else "stopped"
        print(f"{service.name:<18} {state}")
    return 0 if all_serve else 1


def _logs(stack: Stack, options: argparse.Namespace) -> int:
    logs = [str(each.log) for each in stack.services(options.names) if each.log.exists()]
    if not logs:
        raise StackError(f"there are no logs in {stack.settings.home}; nothing was started")
    follow = ["-F"] if options.follow else []
    os.execvp("tail", ["tail", "-n", str(options.lines), *follow, *logs])


def _build_flink(stack: Stack, options: argparse.Namespace) -> None:
    java.java()
    jar = REPOSITORY / "runners/flink/target/beam-flink-job-server.jar"
    pom = REPOSITORY / "runners/flink/pom.xml"
    sources = [pom, *pom.parent.glob("src/**/*.java")]
    if jar.exists() and jar.stat().st_mtime > max(each.stat().st_mtime for each in sources):
        print(f"{jar} is there already")
        return
    downloads.job_server_parts(stack.settings)
    downloads.run(
        [java.maven(), "-B", "-q", "-f", str(pom), "package"], what="building the job server"
    )
    print(f"built {jar}")


def _lock(stack: Stack) -> None:
    CONTAINER_YAML.write_text(container_yaml())
    downloads.lock(stack.settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m stack",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(small=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, act, help_: str, names: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help_, description=help_)
        command.set_defaults(act=act)
        if names:
            command.add_argument(
                "names", nargs="*", metavar="NAME", help="a service; without names, all"
            )
        return command

    up = add("up", lambda stack, o: stack.up(*o.names), "start services and wait for them")
    up.add_argument(
        "--small", action="store_true", help="memory for a machine of 8 GiB instead of 16"
    )
    add("down", lambda stack, o: stack.down(*o.names), "stop services; data and logs stay")
    add("status", _status, "say how services are; exit status 1 unless all serve")
    logs = add("logs", _logs, "show the end of logs")
    logs.add_argument("-n", "--lines", type=int, default=25, help="of each log; default 25")
    logs.add_argument("-f", "--follow", action="store_true", help="and what comes")
    add("clean", lambda stack, o: stack.clean(*o.names), "stop services and remove their data")
    add(
        "env",
        lambda stack, o: print(stack.settings.exports(), end=""),
        'print where everything is; for a shell: eval "$(python -m stack env)"',
        names=False,
    )
    add("build-flink", _build_flink, "build Beam's job server for Flink", names=False)
    add(
        "lock",
        lambda stack, o: _lock(stack),
        "download everything afresh and write checksums.txt and Cassandra's configuration for "
        "containers, after a change of versions.toml",
        names=False,
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
