"""`mlpd models keygen` and `sign`: keys are files here, the daemon sees signatures alone."""

from pathlib import Path

import click

from mlpd.cli.lazy import AS_JSON
from mlpd.cli.output import print_json, print_lines, print_pairs
from mlpd.cli.session import Session, connected, examples
from mlpd.cli.versions import version_argument, why_option


@click.command(epilog=examples("mlpd models keygen team.key"))
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def keygen(file: Path, *, as_json: bool) -> None:
    """Make a key to sign versions with.

    FILE gets the private key (mode 0600; keep it where only you can read it).  The public key is
    printed: a daemon trusts it once it is listed under [registry] trusted_keys.
    """
    click.get_current_context().meta[AS_JSON] = as_json
    from mlpd.registry.signing import create_key

    done = {"file": str(file), "key": create_key(file)}
    if as_json:
        print_json(done)
        return
    print_pairs({"private key": done["file"], "public key": done["key"]})
    print_lines("", f'Trust it:  [registry] trusted_keys = ["{done["key"]}"]')


@click.command(epilog=examples("mlpd models sign flight-risk@3 --key team.key"))
@version_argument
@click.option(
    "--key",
    "file",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="The private key, as mlpd models keygen makes it.",
)
@why_option
@connected
def sign(session: Session, version: tuple[str, str], *, file: Path, why: str) -> None:
    """Sign a version's digest, which covers all of its files.

    The private key stays here.
    """
    from mlpd.registry import signing

    found = session.client.models.version(*version)["version"]
    key, signature = signing.sign(file, found["digest"])
    model, number = found["name"], found["number"]
    session.client.models.sign(model, number, key=key, signature=signature, why=why)
    done = {
        "version": f"{model}@{number}",
        "digest": found["digest"],
        "key": key,
        "signature": signature,
    }
    session.show(done, print_pairs)
