"""`cenote check-config`: whether a configuration file can be used, told before a daemon is started with it.

It reads files, certificates included, and connects nowhere. With --sample it prints a file to begin with, with
--markdown the reference of all options; both are generated.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cenote.cli.banner import bound
from cenote.cli.endings import need_proxy, plain_endings
from cenote.errors import ConfigError

if TYPE_CHECKING:
    from cenote.proxy.config import Config


def check_config(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="The configuration file (TOML).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the answer as JSON.")] = False,
    sample: Annotated[bool, typer.Option("--sample", help="Write a commented file to begin with.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Write the page docs/configuration.md.")] = False,
) -> None:
    """Check a configuration file: every problem at once, and exit status 1; or a summary, and 0.

    \b
    Examples:
      cenote check-config --sample > cenote.toml
      cenote check-config cenote.toml
      cenote check-config cenote.toml --json
    """
    with plain_endings():
        need_proxy()
        if sample or markdown:
            from cenote.proxy.sample import reference, sample_file

            typer.echo(reference() if markdown else sample_file(), nl=False)
            return
        if file is None:
            raise ConfigError(["check-config needs a file, or --sample"])
        _check(file, as_json)


def _check(file: Path, as_json: bool) -> None:
    from cenote.proxy.config import load_config
    from cenote.proxy.problems import warnings_of

    try:
        config = load_config(file)
    except ConfigError as error:
        if as_json:
            typer.echo(json.dumps({"valid": False, "problems": error.problems}, indent=2))
        else:
            for problem in error.problems:
                typer.echo(problem, err=True)
            count = len(error.problems)
            typer.echo(f"{count} problem{'' if count == 1 else 's'}", err=True)
        raise typer.Exit(1) from None
    summary = _summary(config)
    warnings = warnings_of(config)
    if as_json:
        typer.echo(json.dumps({"valid": True, "problems": [], "warnings": warnings, **summary}, indent=2))
        return
    for warning in warnings:
        typer.echo(f"{file}: warning: {warning}", err=True)
    typer.echo(f"{file}: good")
    typer.echo(f"databases: {', '.join(summary['databases'])}")
    typer.echo(f"users: {', '.join(summary['users'])}")
    for pool in summary["pools"]:
        typer.echo(f'pool "{pool["name"]}": {pool["mode"]}, {pool["min_size"]} to {pool["max_size"]} connections')
    typer.echo(f"server connections: at most {summary['max_server_connections']:,}")
    typer.echo(f"clients: at most {summary['max_clients']:,}")


def _summary(config: "Config") -> dict[str, Any]:
    from cenote.proxy.config import pool_names, pool_options

    pools = []
    for database, user in pool_names(config):
        options = pool_options(config, database, user)
        pools.append(
            {
                "name": f"{database}/{user}",
                "mode": options.mode,
                "min_size": options.min_size,
                "max_size": options.max_size,
            }
        )
    return {
        "databases": list(config.databases),
        "users": list(config.users),
        "pools": pools,
        "max_server_connections": bound(config),
        "max_clients": config.listen.max_clients,
    }
